"""Attention under torch.compile: no break, the choice outside the graph, and no compilation for every pack."""

import subprocess

import pytest
import torch
from packs import PACK, both, make

from dinov2cli.kernels import attention as room
from dinov2cli.kernels.attention import attention
from dinov2cli.kernels.dispatch import Choice


@pytest.mark.parametrize("order", [("cuda", "auto"), None])
def test_it_compiles_without_a_break(order, monkeypatch):
    if order:
        monkeypatch.setattr(room, "_order", torch.compiler.assume_constant_result(lambda *_: order))
    dtype = torch.bfloat16 if order else torch.float32
    qkv, grad = make(PACK, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention(x * 1.0, PACK) + 0.0, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(both(compiled, qkv, grad), both(lambda x: attention(x, PACK), qkv, grad), strict=True):
        assert torch.equal(ours, theirs)
    torch._dynamo.reset()


def test_the_choice_is_made_outside_the_compiled_graph(monkeypatch):
    """The first choice may run nvcc, which no tracer can follow."""
    asked = []

    def choose(operator, device):
        asked.append(subprocess.run(["true"]).returncode)
        return Choice(operator, "torch", "after a build")

    monkeypatch.setattr(room, "choose", choose)
    qkv, _ = make(PACK)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention(x, PACK), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv), attention(qkv, PACK)) and asked == [0, 0]
    torch._dynamo.reset()


def test_numbers_of_samples_that_change_do_not_compile_again_and_again(monkeypatch):
    """As under several processes, where each keeps another number of samples in every block and step."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(room, "_order", torch.compiler.assume_constant_result(lambda *_: ("cuda", "auto")))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda x, groups: attention(x * 1.0, groups), backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        big, small = torch.randint(2, 30, (2,), generator=generator).tolist()
        groups = [(big, 5), (small, 3)]
        qkv = torch.randn(5 * big + 3 * small, 3, 2, 64, generator=generator).bfloat16().requires_grad_()
        compiled(qkv, groups).float().sum().backward()
    assert counters["stats"]["unique_graphs"] <= 4
