"""Attention of packs: who serves what, that all agree, and the operator dinov2::short_attention as torch sees it."""

import re
import sys
import types

import pytest
import torch
from packs import PACK, both, make, textbook
from torch.nn import functional as F

from dinov2cli.errors import UserError
from dinov2cli.kernels import attention as room
from dinov2cli.kernels import attention_baselines, attention_op, build
from dinov2cli.kernels.attention import attention, equal_runs
from dinov2cli.kernels.attention_op import short_attention
from dinov2cli.kernels.attention_reference import reference_backward, reference_forward

MIXED = [(2, 50), (1, 300), (2, 17), (1, 64)]
CPU = torch.device("cpu")


def served_by(monkeypatch, *order):
    """Give `order` to all devices, and return the list of who was called with which groups."""
    calls = []
    monkeypatch.setattr(room, "_order", lambda *_: order)
    for name, function in list(room._SERVE.items()):

        def call(qkv, groups, name=name, function=function):
            calls.append((name, list(groups)))
            return function(qkv, groups)

        monkeypatch.setitem(room._SERVE, name, call)
    return calls


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in for xFormers: its two functions that we call, by plain products. Returns how many masks were made."""
    made = []

    class BlockDiagonalMask:
        def __init__(self, lengths):
            self.lengths = lengths

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert device is not None
            made.append(list(q_seqlen))
            return cls(list(q_seqlen))

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.dim() == 4 and query.shape[0] == 1 and query.stride(-1) == 1
        qkv = torch.stack([query, key, value], 2)[0]
        return textbook(qkv, [(1, n) for n in attn_bias.lengths]).view(query.shape)

    modules = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")}
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    modules["xformers.ops.fmha"].BlockDiagonalMask = BlockDiagonalMask
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    room._block_diagonal.cache_clear()
    yield made
    room._block_diagonal.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [PACK, MIXED, [(2, 301)], [(0, 7), (2, 5)], [(0, 7), (0, 5)]])
def test_on_a_cpu_it_is_bitwise_what_training_was_measured_with(groups, dtype):
    """A split per length, the fused kernel (plain products for short bf16), one concatenation."""

    def before(qkv):
        outputs = []
        runs = equal_runs(groups)
        for chunk, (b, n) in zip(qkv.flatten(1).split([b * n for b, n in runs]), runs, strict=True):
            q, k, v = chunk.view(b, n, 3, 2, 64).permute(2, 0, 3, 1, 4).unbind(0)
            if dtype == torch.bfloat16 and n <= 300:
                out = ((q * 64**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
            else:
                out = F.scaled_dot_product_attention(q, k, v)
            outputs.append(out.transpose(1, 2).reshape(b * n, 128))
        return torch.cat(outputs)

    qkv, grad = make(groups, dtype=dtype)
    for ours, theirs in zip(both(lambda x: attention(x, groups), qkv, grad), both(before, qkv, grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("setting", ["sdpa", "torch"])
def test_a_forced_back_end_serves_all_and_agrees(setting, monkeypatch):
    calls = []
    for name in ("fused", "products"):
        function = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *a, name=name, function=function: calls.append(name) or function(*a))
    monkeypatch.setenv("DINOV2_KERNELS", setting)
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        qkv, grad = make(MIXED, dtype=dtype)
        found = both(lambda x: attention(x, MIXED), qkv, grad)
        exact = both(lambda x: textbook(x, MIXED), qkv.detach().double().requires_grad_(), grad.double())
        for ours, theirs in zip(found, exact, strict=True):
            assert (ours - theirs).norm() <= bound * theirs.norm()
    assert set(calls) == {"fused" if setting == "sdpa" else "products"}


def test_our_kernels_take_a_whole_pack_in_one_call(monkeypatch):
    calls = served_by(monkeypatch, "cuda", "auto")
    groups = [(2, 50), (1, 272), (2, 17)]
    qkv, grad = make(groups, dtype=torch.bfloat16)
    found = both(lambda x: attention(x, groups), qkv, grad)
    assert calls == [("cuda", groups)]
    exact = both(lambda x: textbook(x, groups), qkv.detach().double().requires_grad_(), grad.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()


def test_longer_samples_other_widths_and_types_fall_back(monkeypatch):
    calls = served_by(monkeypatch, "cuda", "auto")
    qkv, grad = make(MIXED, dtype=torch.float16)
    found = both(lambda x: attention(x, MIXED), qkv, grad)
    assert calls == [("cuda", [(2, 50)]), ("auto", [(1, 300)]), ("cuda", [(2, 17), (1, 64)])]
    exact = both(lambda x: textbook(x, MIXED), qkv.detach().double().requires_grad_(), grad.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm()
    for other in (make(PACK, width=32, dtype=torch.bfloat16), make(PACK, dtype=torch.float32)):
        calls.clear()
        attention(other[0], PACK)
        assert calls == [("auto", [(3, 17), (3, 5)])]


@pytest.mark.parametrize("groups", [[(0, 50), (0, 257)], [(0, 50), (3, 17)], [(2, 17), (0, 50)]])
def test_groups_without_samples(groups, monkeypatch):
    served_by(monkeypatch, "cuda", "auto")
    qkv, grad = make(groups, dtype=torch.bfloat16)
    out, grad_qkv = both(lambda x: attention(x, groups), qkv, grad)
    assert out.shape == (qkv.shape[0], 128) and grad_qkv.shape == qkv.shape
    if len(qkv):
        assert torch.equal(out, attention(qkv, [group for group in groups if group[0]]))


def test_xformers_gets_the_whole_pack_and_one_mask_for_all_layers(monkeypatch, xformers):
    calls = served_by(monkeypatch, "xformers", "auto")
    qkv, grad = make(MIXED)
    for _layer in range(2):
        found = both(lambda x: attention(x, MIXED), qkv, grad)
    assert calls == [("xformers", MIXED)] * 2
    assert xformers == [[50, 50, 300, 17, 17, 64]]
    for ours, theirs in zip(found, both(lambda x: textbook(x, MIXED), qkv, grad), strict=True):
        torch.testing.assert_close(ours, theirs)
    calls.clear()
    attention(make(PACK, dtype=torch.float64)[0], PACK)
    attention(make([(0, 17)])[0], [(0, 17)])
    attention(make(PACK, width=20)[0], PACK)
    assert {name for name, _ in calls} == {"auto"}


def test_behind_our_kernels_comes_xformers_if_it_is_there(monkeypatch):
    gpu = torch.device("cuda", 0)
    for lack, order in ((None, ("cuda", "xformers", "auto")), ("not installed", ("cuda", "auto"))):
        monkeypatch.setattr(room, "missing", lambda *_, lack=lack: lack)
        room._order_of.cache_clear()
        assert room._order_of("cuda", "auto", gpu) == order
    assert room._order_of("xformers", "auto", gpu) == ("xformers", "auto")
    assert room._order_of("sdpa", "auto", gpu) == room._order_of("sdpa", "triton", gpu) == ("auto",)
    assert room._order_of("sdpa", "sdpa", gpu) == ("sdpa",) and room._order_of("torch", "torch", gpu) == ("torch",)
    room._order_of.cache_clear()


def test_what_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("DINOV2_KERNELS", "cuda")
    with pytest.raises(UserError, match="DINOV2_KERNELS=cuda"):
        attention(make(PACK)[0], PACK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_operators(dtype):
    groups = [2, 17, 0, 9, 3, 5]
    qkv, _ = make([(2, 17), (3, 5)], dtype=dtype)
    torch.library.opcheck(torch.ops.dinov2.short_attention.default, (qkv, groups, 0.125, 0))
    out, lse = (x.detach() for x in torch.ops.dinov2.short_attention(qkv, groups, 0.125))
    arguments = (out, qkv.detach(), out, lse, groups, 0.125, 0)
    torch.library.opcheck(torch.ops.dinov2.short_attention_backward.default, arguments)


def test_the_operator_equals_float64():
    qkv, grad = make(MIXED)
    groups = [size for run in MIXED for size in run]
    exact = qkv.detach().double().requires_grad_()
    for ours, theirs in zip(
        both(lambda x: short_attention(x, groups), qkv, grad),
        both(lambda x: textbook(x, MIXED), exact, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    _, lse = torch.ops.dinov2.short_attention(qkv, groups, 0.125)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    last = exact[-64:].detach()
    sums = torch.einsum("nhc,mhc->nhm", last[:, 0], last[:, 1]).mul(0.125).exp().sum(-1).log2()
    torch.testing.assert_close(lse[-64:].double(), sums, rtol=1e-6, atol=1e-5)


def test_finite_differences_agree():
    qkv = make([(1, 3), (2, 2)], heads=1, width=4, dtype=torch.float64)[0]
    assert torch.autograd.gradcheck(lambda x: short_attention(x, [1, 3, 2, 2]), qkv, rtol=1e-3)


def test_a_gradient_that_is_not_contiguous_and_rows_apart():
    qkv, grad = make(PACK)
    groups = [3, 17, 3, 5]
    wide = torch.cat([qkv.detach().flatten(1), torch.zeros(len(qkv), 64)], 1).requires_grad_()

    def strided(x):
        return short_attention(x[:, :384].unflatten(1, (3, 2, 64)), groups)

    across = grad.t().contiguous().t()
    (ours,) = torch.autograd.grad(strided(wide), wide, across)
    expected = both(lambda x: short_attention(x, groups), qkv, grad)[1]
    torch.testing.assert_close(ours[:, :384].view_as(qkv), expected)


def test_it_differentiates_once_and_says_so():
    qkv, grad = make(PACK)
    (first,) = torch.autograd.grad(short_attention(qkv, [3, 17, 3, 5]), qkv, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        first.sum().backward()


def test_groups_that_do_not_add_up():
    with pytest.raises(RuntimeError, match="found groups"):
        short_attention(make(PACK)[0], [3, 17, 3, 6])


def test_the_library_is_called_with_what_its_operators_take(monkeypatch):
    """The CUDA side of the operator on a CPU: the library's operators, by the schemas in ops.cpp, as the reference."""
    text = (build.SOURCES / "ops.cpp").read_text().replace('"\n      "', "")
    schemas = dict(re.findall(r'"(attention_\w+)\((.*?)\) -> \(\)"', text))
    launched = []

    def operator(name):
        names = [part.split()[-1] for part in schemas[name].split(", ")]

        def call(*values):
            given = dict(zip(names, values, strict=True))
            launched.append((name, given["groups"]))
            runs = list(zip(given["groups"][::3], given["groups"][1::3], strict=True))
            if name == "attention_forward":
                out, lse = reference_forward(given["qkv"], runs, given["scale"])
                given["out"].copy_(out)
                given["lse"].copy_(lse)
            else:
                parts = (given[key] for key in ("grad_out", "qkv", "out", "lse"))
                given["grad_qkv"].copy_(reference_backward(*parts, runs, given["scale"]))

        return call

    operators = types.SimpleNamespace(**{name: operator(name) for name in schemas})
    monkeypatch.setattr(torch.ops, "dinov2_kernels", operators, raising=False)
    monkeypatch.setattr(attention_op, "_load", lambda _: None)
    qkv, grad = make([(2, 17), (3, 70)], dtype=torch.bfloat16)
    arguments = ([2, 17, 0, 5, 3, 70], 0.125, 2)
    out, lse = attention_op._forward_cuda(qkv.detach(), *arguments)
    gradient = attention_op._backward_cuda(grad, qkv.detach(), out, lse, *arguments)
    expected_out, expected_lse = torch.ops.dinov2.short_attention(qkv, *arguments)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    assert torch.equal(gradient, torch.autograd.grad(expected_out, qkv, grad)[0])
    assert launched == [("attention_forward", [2, 17, 0, 3, 70, 2]), ("attention_backward", [2, 17, 0, 3, 70, 2])]


def test_launches_have_the_variant_asked_for_or_the_default():
    groups = [4, 50, 0, 99, 2, 257]
    assert attention_op._launches(groups, 0, "forward") == [4, 50, 0, 2, 257, 0]
    assert attention_op._launches(groups, 5, "forward") == [4, 50, 0, 2, 257, 5]
    assert attention_op._launches(groups, 1, "backward") == [4, 50, 1, 2, 257, 1]
    assert attention_op._launches(groups, 9, "backward") == [4, 50, 0, 2, 257, 0]


def test_rows_are_copied_only_where_the_kernels_could_not_read_them():
    qkv = make(PACK, dtype=torch.bfloat16)[0].detach()
    apart = torch.zeros(len(qkv), 400, dtype=torch.bfloat16)[:, :384].unflatten(1, (3, 2, 64))
    crooked = torch.zeros(qkv.numel() + 1, dtype=torch.bfloat16)[1:].view_as(qkv)
    turned = qkv.transpose(0, 2).contiguous().transpose(0, 2)
    odd = torch.zeros(len(qkv), 387, dtype=torch.bfloat16)[:, :384].unflatten(1, (3, 2, 64))
    for fits in (qkv, apart, qkv[3:], qkv[:0]):
        assert attention_op._rows_contiguous(fits) is fits
    for other in (crooked, turned, odd, qkv[:1].expand_as(qkv)):
        copy = attention_op._rows_contiguous(other)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, other)


def test_sdpa_tries_kernels_in_the_order_that_was_measured(monkeypatch):
    asked = []

    class Order:
        def __init__(self, kernels, set_priority):
            asked.append((kernels, set_priority))

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(room, "sdpa_kernel", Order)
    monkeypatch.setattr(room, "SDPA_ORDER", {(9, 0): ["cudnn", "flash"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    q = torch.ones(1, 1, 2, 8)
    assert torch.equal(room.fused(q, q, q), q)
    assert asked == [(["cudnn", "flash"], True)]


def test_every_baseline_that_runs_here_agrees_with_float64():
    found = attention_baselines.implementations(CPU)
    assert {"sdpa", "sdpa flash", "sdpa math", "torch"} <= set(found)
    assert not {"cuda", "xformers", "varlen", "sdpa cudnn"} & set(found)
    qkv, grad = make(MIXED, dtype=torch.bfloat16)
    exact = both(lambda x: textbook(x, MIXED), qkv.detach().double().requires_grad_(), grad.double())
    for name, attend in found.items():
        for ours, theirs in zip(both(lambda x, attend=attend: attend(x, MIXED), qkv, grad), exact, strict=True):
            assert (ours - theirs).norm() <= 2e-2 * theirs.norm(), name


@pytest.mark.parametrize("groups", [((2, 257), (5, 50)), ((1, 128), (1, 128)), ((1, 400), (2, 1), (1, 384))])
def test_the_mask_of_flex_attention_is_the_one_torch_would_compute(groups):
    from torch.nn.attention.flex_attention import create_block_mask

    ours = attention_baselines.document_mask(groups, CPU)
    total = sum(b * n for b, n in groups)
    lengths = torch.tensor([n for b, n in groups for _ in range(b)])
    sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    theirs = create_block_mask(lambda b, h, q, k: sample[q] == sample[k], None, None, total, total, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    places = torch.arange(total)
    inside = ours.mask_mod(0, 0, places[:, None], places[None])
    assert torch.equal(inside, sample[:, None] == sample[None])
