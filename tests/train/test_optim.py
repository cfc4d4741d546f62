"""Grouping of parameters, clipping per sub-module and the EMA equation."""

import pytest
import torch
from torch import nn

from dinov2cli.train.ema import ema_update, pair_parameters
from dinov2cli.train.optim import (
    apply_schedule,
    build_optimizer,
    clip_gradients,
    has_weight_decay,
    layer_id,
    lr_scale,
    parameter_groups,
)
from dinov2cli.train.schedules import Schedules

DEPTH = 12


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cls_token", 0),
        ("pos_embed", 0),
        ("mask_token", 0),
        ("register_tokens", 0),
        ("patch_embed.proj.weight", 0),
        ("blocks.0.norm1.weight", 1),
        ("blocks.11.mlp.fc1.bias", 12),
        ("norm.weight", 13),
    ],
)
def test_layer_ids(name, layer):
    assert layer_id(name, DEPTH) == layer


def test_lr_scales():
    def scale(name):
        return lr_scale(name, DEPTH, layerwise_decay=0.9, patch_embed_lr=0.2)

    assert scale("backbone.cls_token") == pytest.approx(0.9**13)
    assert scale("backbone.patch_embed.proj.bias") == pytest.approx(0.9**13 * 0.2)
    assert scale("backbone.blocks.3.attn.qkv.weight") == pytest.approx(0.9**9)
    assert scale("backbone.norm.weight") == 1.0
    assert scale("dino_head.mlp.0.weight") == 1.0


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("backbone.cls_token", True),
        ("backbone.pos_embed", True),
        ("backbone.mask_token", True),
        ("backbone.register_tokens", True),
        ("backbone.patch_embed.proj.weight", True),
        ("backbone.patch_embed.proj.bias", False),
        ("backbone.blocks.0.norm1.weight", False),
        ("backbone.blocks.0.ls1.gamma", False),
        ("backbone.blocks.0.attn.qkv.weight", True),
        ("backbone.norm.weight", False),
        ("dino_head.last_layer.weight_v", True),
    ],
)
def test_weight_decay_rule(name, decays):
    assert has_weight_decay(name) is decays


class _Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.dino_head = nn.ModuleDict({"mlp": nn.Linear(4, 4), "last_layer": nn.Linear(4, 5, bias=False)})


def test_every_trainable_parameter_is_in_exactly_one_group():
    student = _Student()
    student.backbone[0].bias.requires_grad_(False)
    groups = parameter_groups(student, depth=1)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(n for n, p in student.named_parameters() if p.requires_grad)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_schedule_reaches_the_groups():
    student = _Student()
    optimizer = build_optimizer(student, depth=1, layerwise_decay=0.5)
    apply_schedule(optimizer, Schedules(lr=1e-2, warmup=0.0, freeze_last_layer=0.5).at(0, 10))
    by_name = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert by_name["dino_head.last_layer.weight"]["lr"] == 0.0
    assert by_name["dino_head.mlp.weight"]["lr"] == 1e-2
    assert by_name["dino_head.mlp.weight"]["weight_decay"] == pytest.approx(0.04)
    assert by_name["dino_head.mlp.bias"]["weight_decay"] == 0.0


def test_clipping_is_separate_for_each_module():
    small, large = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    small.grad, large.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    norms = clip_gradients({"small": [small], "large": [large]}, 3.0)
    assert norms["small"].item() == pytest.approx(0.5)
    assert norms["large"].item() == pytest.approx(50.0)
    assert norms["all"].item() == pytest.approx((0.25 + 2500) ** 0.5)
    assert small.grad.tolist() == pytest.approx([0.3, 0.4])
    assert large.grad.norm().item() == pytest.approx(3.0, rel=1e-5)


def test_ema_equation():
    torch.manual_seed(0)
    teacher, student = nn.Linear(5, 4), nn.Linear(5, 4)
    expected = {
        n: 0.9 * t.detach().double() + 0.1 * s.detach().double()
        for (n, t), s in zip(teacher.named_parameters(), student.parameters(), strict=True)
    }
    ema_update(*pair_parameters(teacher, student), 0.9)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-7)
    before = teacher.weight.detach().clone()
    ema_update(*pair_parameters(teacher, student), 1.0)
    assert torch.equal(teacher.weight, before)


def test_ema_refuses_different_modules():
    with pytest.raises(ValueError, match="do not hold the same parameters"):
        pair_parameters(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
