"""Compiled blocks: one graph without breaks, the same results, and no compilation in every step."""

import pytest
import torch
from torch._dynamo.utils import counters

from dinov2cli.models.blocks import Block
from dinov2cli.models.depth import Share, add_fused, draw_kept

GROUPS = [(8, 17), (16, 5)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def blocks(ffn="mlp", count=2):
    torch.manual_seed(0)
    return [Block(32, 2, ffn=ffn, layerscale=0.3) for _ in range(count)]


def step(stack, seed, rates, *, share=None, fused=False, autocast=False):
    """Output, gradient of the input and of the first block's weights."""
    drawn = draw_kept(GROUPS, rates, torch.Generator().manual_seed(seed), CPU, share)
    kept = [one and one._replace(fused=fused) for one in drawn]
    x = torch.randn(8 * 17 + 16 * 5, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y = x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for block, one in zip(stack, kept, strict=True):
            y = block(y, GROUPS, one)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *stack[0].parameters()])


def compare(plain, compiled, tolerance=1e-5):
    for found, expected in zip(compiled, plain, strict=True):
        assert float((found - expected).norm() / expected.norm().clamp_min(1e-12)) < tolerance


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_block_is_one_graph_for_all_steps(ffn, fused):
    """Also with its kept samples drawn afresh, and for all blocks alike."""
    plain, compiled = blocks(ffn), blocks(ffn)
    for block in compiled:
        block.compile(backend="aot_eager", fullgraph=True)
    for rates, expected in (([0.0, 0.0], 1), ([0.4, 0.4], 2)):
        for seed in range(3):
            compare(step(plain, seed, rates, fused=fused), step(compiled, seed, rates, fused=fused))
            assert graphs() == expected


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "kernels"])
def test_varying_numbers_of_kept_samples_end_in_one_graph(fused):
    """Over several processes the number kept here varies by step, with rising rates also what they are scaled by."""
    plain, compiled = blocks(), blocks()
    for block in compiled:
        block.compile(backend="aot_eager", fullgraph=True)
    share = Share(0, 2, 8)
    seen = []
    for seed in range(6):
        rates = [0.3, 0.5]
        found = step(compiled, seed, rates, share=share, fused=fused)
        compare(step(plain, seed, rates, share=share, fused=fused), found)
        seen.append(graphs())
    assert seen[-1] == seen[1] <= 4


@pytest.mark.slow
def test_inductor_compiles_a_block_with_kept_samples():
    plain, compiled = blocks(count=1), blocks(count=1)
    compiled[0].compile(fullgraph=True)
    compare(step(plain, 0, [0.4]), step(compiled, 0, [0.4]))


def test_the_gelu_layer_is_open_to_the_compiler():
    """Its activation is an operation in the graph, which the compiler can fuse, not a closed function."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def look(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    mlp = blocks(count=1)[0].mlp
    compiled = torch.compile(mlp.forward, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    compiled(torch.randn(4, 32, requires_grad=True)).sum().backward()
    assert "aten.gelu.default" in seen[0] and "aten.gelu_backward.default" in seen[1]


@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_branch_gets_the_type_it_computes_in(enabled, dtype):
    """Written in 16 bit by the norm under autocast: one pass less, and half of what is kept."""
    (kept,) = draw_kept(GROUPS, [0.4], torch.Generator().manual_seed(0), CPU)
    block, seen = blocks(count=1)[0], []

    def branch(y, _groups):
        seen.append(y.dtype)
        return y

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        x = torch.randn(8 * 17 + 16 * 5, 32)
        out = add_fused(branch, x, GROUPS, kept.attention, kept.scale, norm=block.norm1, gamma=block.ls1.gamma)
    assert seen == [dtype] and out.dtype == torch.float32
