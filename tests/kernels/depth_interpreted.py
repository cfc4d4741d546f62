"""Run by test_depth_triton.py in a process whose Triton kernels are interpreted: the kernels themselves."""

import depth_cases as cases
import pytest
import torch

from dinov2cli.kernels import depth, depth_triton, dispatch
from dinov2cli.models.registry import build


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel leaves out shows as NaN."""
    assert dispatch.interpreted()
    new = torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new(*a, **k)))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "no gain"])
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_float32_equals_float64_autograd(shape, gain):
    out, grad = cases.worst(cases.make(*cases.SHAPES[shape], gain=gain))
    assert out < 5e-7 and grad < 2e-6


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_float16_equals_float64_autograd(x_dtype):
    """Also with the residual in float32 and only the branch in 16 bit, as under autocast."""
    out, grad = cases.worst(cases.make(*cases.SHAPES["width 384"], dtype=torch.float16, x_dtype=x_dtype))
    assert out < 1e-3 and grad < 1e-3


def test_more_rows_than_programs_hold():
    """Programs go round the rows more than once, and the last round is not full."""
    case = cases.make([(7, 31), (5, 13)], [5, 3], 256)
    shape = depth_triton.shape_of(256)
    assert 3 * shape.rows < 7 * 31 and 2 * 3 * shape.rows < 5 * 31
    out, grad = cases.worst(case)
    assert out < 5e-7 and grad < 2e-6


def test_backward_repeats_bitwise():
    case = cases.make(*cases.SHAPES["two groups"])
    first, again = cases.found(case)[1], cases.found(case)[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_and_updates_that_do_not_lie_row_after_row():
    """An expanded gradient, as of a sum, and a transposed update."""
    case = cases.make(*cases.SHAPES["two groups"])
    plain = cases.found(case)
    y, link, slots = depth.gather_norm(case.x, case.kept, case.groups, case.weight, case.bias, cases.EPS, case.dtype)
    update = torch.tanh(y @ case.inner).t().contiguous().t()
    out = depth.scatter_add(case.x, link, slots, update, case.kept, case.groups, case.gamma, case.scale)
    assert torch.equal(out.detach(), plain[0])
    ones = torch.ones((), dtype=out.dtype).expand(out.shape)
    crooked = torch.autograd.grad(out, case.inputs, ones, retain_graph=True)
    straight = torch.autograd.grad(out, case.inputs, ones.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(crooked, straight, strict=True))


def test_only_what_was_normalised_is_used():
    case = cases.make(*cases.SHAPES["two groups"])
    y, _, _ = depth.gather_norm(case.x, case.kept, case.groups, case.weight, case.bias, cases.EPS, case.dtype)
    alone = torch.autograd.grad(y.sin().sum(), case.inputs[:3])
    rows = [
        first + sample * n + token
        for first, n, index in zip((0, case.groups[0] * case.groups[1]), case.groups[1::2], case.kept, strict=True)
        for sample in index.tolist()
        for token in range(n)
    ]
    normed = torch.nn.functional.layer_norm(case.x[rows], case.x.shape[1:], case.weight, case.bias, cases.EPS)
    for ours, torchs in zip(alone, torch.autograd.grad(normed.sin().sum(), case.inputs[:3]), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_backbone_trains_as_with_torch(monkeypatch, recompute):
    ran = []
    kernel = depth_triton.gather_norm_grad
    monkeypatch.setattr(depth_triton, "gather_norm_grad", lambda *args: ran.append(1) or kernel(*args))

    def gradients(backend):
        monkeypatch.setenv(dispatch.SETTING, backend)
        model = build("vits14", embed_dim=64, depth=3, num_heads=2, img_size=28, drop_path=0.4, layerscale=0.5).train()
        model.activation_checkpointing = recompute
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
        crops = [torch.randn(6, 3, 28, 28, generator=random), torch.randn(8, 3, 14, 14, generator=random)]
        outputs = model.forward_crops(crops, generator=torch.Generator().manual_seed(7))
        sum(out.cls.square().sum() + out.patches.sin().sum() for out in outputs).backward()
        return {"cls": outputs[1].cls.detach()} | {name: p.grad for name, p in model.named_parameters()}

    plain = gradients("torch")
    assert not ran
    fused = gradients("triton")
    assert len(ran) == 6
    for name, value in plain.items():
        if value is not None:
            torch.testing.assert_close(fused[name], value, atol=2e-5, rtol=1e-4, msg=name)
