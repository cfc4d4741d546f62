"""The packed step against a float64 reference that runs every crop on its own, straight from the equations."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinov2cli.data.masks import make_masks
from dinov2cli.errors import UserError
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.network import SSLModel, build_ssl_model
from dinov2cli.train.ssl import Objective, ssl_losses

BATCH, LOCALS, STUDENT_T, TEACHER_T = 6, 3, 0.1, 0.05


def make_model(*, untied: bool = True, centering: str = "sinkhorn", registers: int = 2) -> SSLModel:
    backbone = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        layerscale=0.5,
        num_register_tokens=registers,
        generator=torch.Generator().manual_seed(1),
    )
    model = build_ssl_model(
        backbone, prototypes=40, hidden=48, bottleneck=16, untied=untied, ibot_prototypes=24, centering=centering
    )
    # A teacher equal to its student would hide a mix-up of the two.
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
        for parameter in model.student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return model


def make_batch(locals_: int = LOCALS) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "global_crops": torch.randn(2, BATCH, 3, 32, 32, generator=generator),
        "local_crops": torch.randn(locals_, BATCH, 3, 16, 16, generator=generator) if locals_ else None,
        "masks": make_masks(2 * BATCH, (4, 4), rng=np.random.default_rng(0)),
    }


def reference_sinkhorn(logits, temperature, iterations=3):
    q = torch.exp(logits / temperature).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def reference(model: SSLModel, batch: dict) -> dict[str, torch.Tensor]:
    """DINO + iBOT + KoLeo, one image and one crop at a time, in float64; `model` must be float64 already."""
    student, teacher = model.student, model.teacher
    crops = batch["global_crops"].double()
    masks = batch["masks"].view(2, BATCH, -1)
    with torch.no_grad():
        seen = [[teacher.backbone(crops[g, b][None]) for b in range(BATCH)] for g in range(2)]
        t_class = torch.cat([teacher.dino_head(seen[g][b].cls) for g in range(2) for b in range(BATCH)])
        dino_q = reference_sinkhorn(t_class, TEACHER_T).view(2, BATCH, -1)
        t_patch = [teacher.patch_head(seen[g][b].patches[0][masks[g, b]]) for g in range(2) for b in range(BATCH)]
        ibot_q = reference_sinkhorn(torch.cat(t_patch), TEACHER_T).split([len(p) for p in t_patch])
    views = [[student.backbone(crops[g, b][None], masks[g, b][None]) for b in range(BATCH)] for g in range(2)]

    def cross_entropy(tokens, q):
        return -(q * F.log_softmax(student.dino_head(tokens) / STUDENT_T, dim=-1)).sum()

    local_crops = [] if batch["local_crops"] is None else list(batch["local_crops"].double())
    pairs = 2 + max(2 * len(local_crops), 1)
    # Crosswise: the first global crop's target teaches the second and the other way round.
    global_ = [cross_entropy(views[g][b].cls, dino_q[1 - g, b]) for g in range(2) for b in range(BATCH)]
    local = [
        cross_entropy(student.backbone(crop[b][None]).cls, dino_q[g, b])
        for crop in local_crops
        for g in range(2)
        for b in range(BATCH)
    ]
    ibot = torch.zeros((), dtype=torch.float64)
    for g in range(2):
        for b in range(BATCH):
            hidden = masks[g, b]
            if hidden.any():
                logits = student.patch_head(views[g][b].patches[0][hidden]) / STUDENT_T
                rows = -(ibot_q[g * BATCH + b] * F.log_softmax(logits, dim=-1)).sum(-1)
                ibot = ibot + rows.sum() / hidden.sum()
    koleo = torch.zeros((), dtype=torch.float64)
    for g in range(2):
        x = F.normalize(torch.cat([view.cls for view in views[g]]), dim=-1)
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") + 10 * torch.eye(BATCH)
        koleo = koleo - torch.log(distance.min(dim=1).values + 1e-8).mean()
    return {
        "dino_local": torch.stack(local).sum() / BATCH / pairs if local else torch.zeros((), dtype=torch.float64),
        "dino_global": torch.stack(global_).sum() / BATCH / pairs,
        "ibot": ibot / (2 * BATCH),
        "koleo": 0.1 * koleo,
    }


@pytest.mark.parametrize(("untied", "locals_"), [(True, LOCALS), (False, LOCALS), (True, 0)])
def test_packed_step_equals_the_per_crop_reference(untied, locals_):
    model, batch = make_model(untied=untied), make_batch(locals_)
    double = copy.deepcopy(model).double()
    step = ssl_losses(model, Objective(), teacher_temperature=TEACHER_T, **batch)
    expected = reference(double, batch)
    for name, value in expected.items():
        assert step.terms[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert step.total.item() == pytest.approx(sum(v.item() for v in expected.values()), rel=1e-5)
    step.total.backward()
    sum(expected.values()).backward()
    for (name, ours), theirs in zip(model.student.named_parameters(), double.student.parameters(), strict=True):
        scale = theirs.grad.norm().item()
        assert scale > 0, name
        assert (ours.grad - theirs.grad).norm().item() <= 1e-4 * scale, name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_weights_of_the_terms_reach_the_total():
    model, batch = make_model(), make_batch()
    plain = ssl_losses(model, Objective(), teacher_temperature=TEACHER_T, **batch)
    other = Objective(dino_weight=2.0, ibot_weight=3.0, koleo_weight=0.4)
    weighted = ssl_losses(model, other, teacher_temperature=TEACHER_T, **batch)
    factors = {"dino_local": 2.0, "dino_global": 2.0, "ibot": 3.0, "koleo": 4.0}
    for name, factor in factors.items():
        assert weighted.terms[name].item() == pytest.approx(factor * plain.terms[name].item(), rel=1e-6)


def test_no_masked_patch_leaves_the_patch_loss_at_zero():
    model, batch = make_model(), make_batch()
    batch["masks"] = torch.zeros_like(batch["masks"])
    step = ssl_losses(model, Objective(), teacher_temperature=TEACHER_T, **batch)
    step.total.backward()
    assert step.terms["ibot"].item() == 0.0
    assert torch.isfinite(step.total)


def test_softmax_centre_is_learned_and_belongs_to_the_teacher_side():
    model, batch = make_model(centering="softmax"), make_batch()
    ssl_losses(model, Objective(), teacher_temperature=TEACHER_T, **batch)
    state = model.teacher_side().state_dict()
    assert state["dino_center.center"].abs().sum() > 0
    assert state["ibot_center.center"].shape == (24,)


def test_teacher_never_drops_branches_and_student_does():
    model = make_model()
    model.train()
    assert model.student.backbone.training
    assert not model.teacher.backbone.training


def test_bf16_step_is_near_the_float32_one():
    model, batch = make_model(), make_batch()
    exact = ssl_losses(model, Objective(), teacher_temperature=TEACHER_T, **batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ssl_losses(model, Objective(), teacher_temperature=TEACHER_T, **batch)
    assert half.total.dtype == torch.float32
    assert half.total.item() == pytest.approx(exact.total.item(), rel=0.02)


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match=r"loss\.centering: found 'mean'; expected one of sinkhorn, softmax"):
        make_model(centering="mean")
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    with pytest.raises(UserError, match=r"heads\.prototypes: found 0; expected at least 1"):
        build_ssl_model(backbone, prototypes=0)
