import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2cli.models.flops import backbone_flops, head_flops
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.registry import build

CASES = [
    ("vits14", {}),
    ("vitb16_reg4", {}),
    ("vitg14", {"img_size": 518}),
    ("tiny_reg4", {"mlp_ratio": 2.0, "qkv_bias": False}),
    ("vitl14", {"ffn": "swiglu", "layerscale": None, "in_chans": 4}),
]


@pytest.mark.parametrize(("arch", "overrides"), CASES)
def test_closed_form_equals_what_torch_counts(arch, overrides):
    model = build(arch, device="meta", **overrides).eval()
    for size in (model.img_size, 4 * model.patch_size):
        images = torch.zeros(1, model.in_chans, size, size, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(images)
        assert backbone_flops(arch, size, **overrides) == counter.get_total_flops()
    assert backbone_flops(arch, **overrides) == backbone_flops(arch, model.img_size, **overrides)


def test_head_counts():
    numbers = {"in_dim": 48, "prototypes": 100, "hidden": 32, "bottleneck": 16, "layers": 3}
    head = ProjectionHead(**numbers)
    with FlopCounterMode(display=False) as counter:
        head(torch.zeros(5, 48))
    assert 5 * head_flops(**numbers) == counter.get_total_flops()
