"""The prototype layer's way of computing on a GPU, on a CPU: its arithmetic, and what it asks of the products."""

import pytest
import torch

from dinov2cli.models import heads
from dinov2cli.models.heads import Prototypes


def gradients(scale_weights: bool | None, dtype: torch.dtype, monkeypatch) -> list[torch.Tensor]:
    """Logits [40, 30] and gradients of x, v and g, from 40 rows of width 8; None: by matrix products in full."""
    monkeypatch.setattr(heads, "_ROWS", 16)  # two blocks of prototypes
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(rows, 8, generator=generator) for rows in (40, 30))
    leaves = [t.to(dtype).requires_grad_() for t in (x, v, torch.rand(30, 1, generator=generator) + 0.5)]
    x, v, g = leaves
    if scale_weights is None:
        logits = x @ (g * v / v.norm(dim=1, keepdim=True)).t()
    else:
        logits = heads._WeightNormLinear.apply(x, v, g, False, scale_weights)
    logits.logsumexp(-1).sum().backward()
    return [logits.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("scale_weights", [False, True])
def test_factors_on_the_weights_or_on_the_logits(scale_weights, monkeypatch):
    exact = gradients(None, torch.float64, monkeypatch)
    for found, expected in zip(gradients(scale_weights, torch.float32, monkeypatch), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_two_round_differently(monkeypatch):
    """Else the test above would have run one of them twice."""
    first, second = (gradients(flag, torch.float32, monkeypatch)[0] for flag in (False, True))
    assert not torch.equal(first, second)


def test_on_a_cpu_factors_are_on_the_logits():
    layer, x = Prototypes(8, 30), torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(layer.weight_v, generator=torch.Generator().manual_seed(2))
    expected = torch.nn.functional.linear(x, layer.weight_v) * (layer.weight_g[:, 0] / layer.weight_v.norm(dim=-1))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("fast", [True, False])
def test_products_round_their_inputs_and_the_setting_comes_back(fast):
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with heads._input_rounding(fast):
        assert setting.fp32_precision == ("bf16" if fast else before)
    assert setting.fp32_precision == before


@pytest.mark.parametrize("fast", [True, False])
def test_the_switch_of_a_gpu_is_left_alone(fast):
    """torch raises at the next product on a GPU where it was set by the newer switch and not by the older one."""
    before = torch.backends.cuda.matmul.fp32_precision
    with heads._input_rounding(fast):
        assert torch.backends.cuda.matmul.fp32_precision == before
