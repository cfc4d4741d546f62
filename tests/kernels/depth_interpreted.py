"""Run by test_depth_triton.py in a process whose Triton kernels are interpreted: the kernels themselves."""

import depth_cases as cases
import pytest
import torch

from dinov2cli.kernels import depth_triton, dispatch
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
