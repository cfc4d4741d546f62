import itertools

import pytest
import torch
from torch import nn

from dinov2cli.models.heads import ProjectionHead, normalize


def make(**overrides):
    numbers = {"hidden": 48, "bottleneck": 16} | overrides
    return ProjectionHead(24, 40, **numbers, generator=torch.Generator().manual_seed(0))


def official(layers=3):
    """The same head out of torch's own parts, with the parameter names of the official checkpoints."""
    widths = [24] + [48] * (layers - 1) + [16]
    parts = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        parts += [nn.GELU()] if i else []
        parts.append(nn.Linear(a, b))
    head = nn.Module()
    head.mlp = nn.Sequential(*parts)
    head.last_layer = nn.utils.weight_norm(nn.Linear(16, 40, bias=False))
    return head


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("layers", [2, 3, 4])
def test_logits_equal_torch_weight_norm_under_the_same_names(layers):
    ours, theirs = make(layers=layers).double(), official(layers).double()
    with torch.no_grad():
        ours.last_layer.weight_g.uniform_(0.5, 2)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(7, 24, dtype=torch.float64)
    expected = theirs.last_layer(nn.functional.normalize(theirs.mlp(x), dim=-1))
    torch.testing.assert_close(ours(x), expected)
    ours(x).logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for (name, mine), (_, other) in zip(
        sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_frozen_gain_bounds_the_logits():
    head = make(freeze_gain=True)
    x = torch.randn(64, 24) * 1e4
    assert head(x).abs().max() <= 1 + 1e-6
    head(x).sum().backward()
    assert head.last_layer.weight_g.grad is None
    assert head.last_layer.weight_v.grad is not None
    assert make().last_layer.weight_g.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalize_is_safe_at_both_ends(dtype):
    x = torch.tensor([[3e4, 4e4], [0.0, 0.0], [3e-4, 4e-4]]).to(dtype).requires_grad_()
    y = normalize(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y[0].float(), torch.tensor([0.6, 0.8]), atol=4e-3, rtol=0)
    torch.testing.assert_close(y[2].float(), torch.tensor([0.6, 0.8]), atol=2e-2, rtol=0)
    assert torch.equal(y[1], torch.zeros(2, dtype=dtype))
    y.float().sum().backward()
    assert x.grad.isfinite().all()


def test_half_precision_head_gives_finite_logits_for_extreme_tokens():
    head = make().half()
    tokens = torch.stack([torch.full((24,), 1000.0), torch.zeros(24), torch.full((24,), 1e-7)]).half()
    assert head(tokens).isfinite().all()


def test_under_autocast_the_logits_stay_close():
    head, x = make(), torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(x)
    torch.testing.assert_close(found.float(), head(x), atol=0.03, rtol=0)


def test_project_gives_unit_vectors_and_weights_depend_on_the_generator():
    head = make()
    torch.testing.assert_close(head.project(torch.randn(6, 24)).norm(dim=-1), torch.ones(6))
    assert torch.equal(head.last_layer.weight_g, torch.ones(40, 1))
    again = make()
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))
