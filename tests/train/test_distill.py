"""The loss of distillation against a reference one image at a time in float64, and what its terms need."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinov2cli.data.masks import masked_tokens
from dinov2cli.train.distill import DistillObjective, build_distill_model
from dinov2cli.train.distillation import Distillation
from dinov2cli.train.method import Company, Crops
from dinov2cli.train.parallel import setup
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import Spread
from tests.train.distill_run import HEADS, WIDTH, backbone, student, teacher

BATCH, STUDENT_T, TEACHER_T = 5, 0.1, 0.05
VALUES = StepValues(1e-3, 1e-3, weight_decay=0.04, momentum=0.9, teacher_temperature=TEACHER_T)


def sinkhorn(logits, iterations=3):
    q = torch.exp(logits / TEACHER_T).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def crops(locals_: int = 3) -> Crops:
    generator = torch.Generator().manual_seed(3)
    return Crops(
        torch.randn(2, BATCH, 3, 32, 32, generator=generator),
        torch.randn(locals_, BATCH, 3, 16, 16, generator=generator),
        torch.arange(BATCH),
        torch.zeros(BATCH, dtype=torch.int64),
    )


def step(model, looked_at, objective, batch, *, share=1.0):
    """One student's loss by the product's own method; `share` of the patches counts in iBOT."""
    method = Distillation(looked_at, objective)
    parallel = setup("cpu", "fp32")
    method.place(parallel)
    side = 32 // model.student.backbone.patch_size
    chosen = method.choose(2 * BATCH, (side, side), rng=np.random.default_rng(0), wanted=range(2 * BATCH))
    assert chosen.float().mean() == pytest.approx(share, abs=0.04)
    seen = method.look(batch, parallel)
    company = Company(torch.Generator().manual_seed(0))
    spread = Spread(model, model.student, torch.device("cpu"))
    return chosen, method.losses(spread, seen, batch, chosen, VALUES, company)


def reference(model, looked_at, objective, batch, chosen):
    """Every term one image and one crop at a time, in float64; both models must be float64 already."""
    s, t, o = model.student, looked_at, objective
    views, small = batch.global_crops.double(), batch.local_crops.double()
    pairs = [(g, b) for g in range(2) for b in range(BATCH)]
    side = 32 // s.backbone.patch_size

    def regrid(patches):
        n = int(patches.shape[0] ** 0.5)
        maps = patches.T.reshape(1, -1, n, n)
        return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)[0].flatten(1).T

    with torch.no_grad():
        seen = {(g, b): t.network(views[g, b][None]) for g, b in pairs}
        cls = {key: value.cls[0] for key, value in seen.items()}
        patches = {key: regrid(value.patches[0]) for key, value in seen.items()}
        # Whose heads make the teacher's logits: its own, or the moving average of the student's.
        heads = t if t.dino_head is not None else model.teacher
        dino_q = sinkhorn(torch.stack([heads.dino_head(cls[key]) for key in pairs]))
        counted = {key: chosen[i] for i, key in enumerate(pairs)}
        rows = [heads.patch_head(patches[key][counted[key]]) for key in pairs]
        ibot_q = dict(zip(pairs, sinkhorn(torch.cat(rows)).split([len(r) for r in rows]), strict=True))
        dino_q = dict(zip(pairs, dino_q, strict=True))
    own = {key: s.backbone(views[key][None]) for key in pairs}
    learned = t.dino_head is None

    def space(tokens, patches=False):
        if not learned:
            return tokens
        return s.adapter.patches(tokens) if patches else s.adapter.cls(tokens)

    def cross_entropy(logits, q):
        return -(q * F.log_softmax(logits / STUDENT_T, dim=-1)).sum(-1)

    terms = {}
    count = 2 + max(2 * len(small), 1)
    terms["dino_global"] = sum(
        cross_entropy(s.dino_head(space(own[g, b].cls)), dino_q[1 - g, b]).sum() for g, b in pairs
    ) / (BATCH * count)
    terms["dino_local"] = sum(
        cross_entropy(s.dino_head(space(s.backbone(crop[b][None]).cls)), dino_q[g, b]).sum()
        for crop in small
        for g, b in pairs
    ) / (BATCH * count)
    terms["ibot"] = sum(
        cross_entropy(s.patch_head(space(own[key].patches[0][counted[key]], True)), ibot_q[key]).mean() for key in pairs
    ) / len(pairs)
    koleo = torch.zeros((), dtype=torch.float64)
    for g in range(2):
        x = F.normalize(torch.stack([own[g, b].cls[0] for b in range(BATCH)]), dim=-1)
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") + 10 * torch.eye(BATCH)
        koleo = koleo - torch.log(distance.min(dim=1).values + 1e-8).mean()
    terms["koleo"] = o.koleo_weight * koleo
    if o.feature_weight:
        distances = [1 - F.cosine_similarity(s.adapter.cls(own[k].cls[0]), cls[k], dim=-1) for k in pairs]
        inner = [
            1 - F.cosine_similarity(s.adapter.patches(own[k].patches[0]), patches[k], dim=-1).mean() for k in pairs
        ]
        terms["feature"] = o.feature_weight * (sum(distances) + sum(inner)) / len(pairs)
    if o.gram_weight:

        def gram(x):
            x = F.normalize(x, dim=-1)
            return x @ x.T

        differences = [(gram(own[k].patches[0]) - gram(patches[k])).square().mean() for k in pairs]
        terms["gram"] = o.gram_weight * sum(differences) / len(pairs)
    return terms


FORMS = {
    "paper": ({}, True, {}),
    "tied": ({}, True, {"untied": False}),
    "some patches": ({"ibot_share": 0.5}, True, {}),
    "learned heads": ({}, False, {}),
    "all terms": ({"feature_weight": 0.7, "gram_weight": 2.0}, False, {}),
    "another grid": ({"feature_weight": 0.7, "gram_weight": 2.0}, True, {"patch_size": 16}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_step_equals_the_reference(form):
    settings, heads, sizes = FORMS[form]
    objective, batch = DistillObjective(koleo_weight=0.3, **settings), crops()
    tied = {"untied": False} if sizes.get("untied") is False else {}
    looked_at, model = teacher(heads=heads, **tied), student(objective, heads=heads, **sizes)
    for parameter in model.teacher.parameters():  # else average and student are the same
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    exact, exact_teacher = copy.deepcopy(model).double(), copy.deepcopy(looked_at).double()
    chosen, found = step(model, looked_at, objective, batch, share=settings.get("ibot_share", 1.0))
    expected = reference(exact, exact_teacher, objective, batch, chosen)
    assert found.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert found.terms[name].item() == pytest.approx(value.item(), rel=2e-5, abs=1e-7), name
    found.total.backward()
    sum(expected.values()).backward()
    for (name, ours), theirs in zip(model.student.named_parameters(), exact.student.parameters(), strict=True):
        if not ours.requires_grad:
            continue
        scale = theirs.grad.norm().item()
        assert scale > 0, name  # every parameter that trains is reached: DDP would wait for it
        assert (ours.grad - theirs.grad).norm().item() <= 2e-4 * scale, name
    assert all(p.grad is None for p in [*model.teacher.parameters(), *looked_at.parameters()])


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({"dino_weight": 0, "ibot_weight": 0, "koleo_weight": 0, "feature_weight": 1}, {"backbone", "adapter"}),
        ({"dino_weight": 0, "ibot_weight": 0, "koleo_weight": 0, "gram_weight": 1}, {"backbone"}),
        ({"dino_weight": 0, "feature_weight": 1}, {"backbone", "dino_head", "ibot_head", "adapter"}),
        ({"ibot_weight": 0}, {"backbone", "dino_head", "ibot_head"}),
    ],
)
def test_only_what_a_term_needs_is_there_and_is_trained(weights, parts):
    objective = DistillObjective(**weights)
    model, looked_at = student(objective), teacher()
    assert {name for name, _ in model.student.named_children()} == parts
    _, found = step(model, looked_at, objective, crops())
    assert (found.targets is None) == (objective.dino_weight == 0)
    found.total.backward()
    for name, parameter in model.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, name


def test_an_adapter_trains_where_a_term_reaches_it_alone():
    learned = student(DistillObjective(ibot_weight=0), heads=False).student
    assert {name for name, p in learned.adapter.named_parameters() if p.requires_grad} == {"cls.weight", "cls.bias"}
    learned = student(DistillObjective(dino_weight=0), heads=False).student
    trained = {name for name, p in learned.adapter.named_parameters() if p.requires_grad}
    assert trained == {"patches.weight", "patches.bias"}


def test_local_crops_are_looked_at_only_for_the_term_on_class_tokens(monkeypatch):
    for weight, views in ((1.0, 2), (0.0, 1)):
        objective = DistillObjective(dino_weight=weight)
        model, seen = student(objective), []
        forward = model.student.backbone.forward_crops
        monkeypatch.setattr(
            model.student.backbone,
            "forward_crops",
            lambda v, *a, f=forward, s=seen, **k: s.append(len(v)) or f(v, *a, **k),
        )
        step(model, teacher(), objective, crops())
        assert seen == [views]


def test_a_term_of_weight_0_costs_no_logits(monkeypatch):
    looked_at, rows = teacher(), []
    head = looked_at.ibot_head
    monkeypatch.setattr(looked_at.ibot_head, "forward", lambda x, f=head.forward: rows.append(len(x)) or f(x))
    objective = DistillObjective(ibot_weight=0)
    step(student(objective), looked_at, objective, crops())
    assert sum(rows) == 0


def test_targets_of_all_patches_are_let_go_of_once_they_were_used():
    """The largest tensor of a step must not live through the student's backward pass."""
    objective, looked_at = DistillObjective(), teacher()
    method = Distillation(looked_at, objective)
    made = []
    original = method._targets
    method._targets = lambda *a: made.append(original(*a)) or made[-1]
    parallel = setup("cpu", "fp32")
    method.place(parallel)
    model, batch = student(objective), crops()
    seen = method.look(batch, parallel)
    spread = Spread(model, model.student, torch.device("cpu"))
    chosen = torch.ones(2 * BATCH, 16, dtype=torch.bool)
    method.losses(spread, seen, batch, chosen, VALUES, Company(torch.Generator()))
    assert made[0].ibot is None and made[0].dino is not None
    assert not seen.targets  # kept for further students alone


def test_the_teacher_sees_the_size_and_computes_in_the_precision_it_is_given():
    batch, parallel = crops(), setup("cpu", "bf16")
    looked_at = teacher()
    looked_at.image_size = 64
    plain = copy.deepcopy(looked_at)
    method = Distillation(looked_at, DistillObjective(), precision="fp32")
    method.place(parallel)
    with parallel.autocast():  # as it may be called
        seen = method.look(batch, parallel)
    assert seen.tokens.patches.shape == (2 * BATCH, 64, WIDTH)  # 8 x 8 places, resampled for each student
    exact = plain.tokens(batch.global_crops.flatten(0, 1), 8)
    torch.testing.assert_close(seen.tokens.patches, exact.patches, rtol=1e-5, atol=1e-5)
    half = Distillation(plain, DistillObjective())
    half.place(parallel)
    assert {p.dtype for p in plain.network.parameters()} == {torch.float32, torch.bfloat16}
    rounded = half.look(batch, parallel).tokens.patches
    assert 1e-4 < (rounded.float() - exact.patches).abs().max() < 0.2


def test_widths_that_differ_need_an_adapter():
    features = DistillObjective(dino_weight=0, ibot_weight=0, feature_weight=1.0)
    arguments = {"teacher_has_heads": True, "adapter": False, "heads": HEADS}
    with pytest.raises(ValueError, match="width 32 and 48 need an adapter"):
        build_distill_model(backbone(), WIDTH, features, **arguments)
    with pytest.raises(ValueError, match="need an adapter"):
        build_distill_model(backbone(), WIDTH, DistillObjective(), **(arguments | {"teacher_has_heads": False}))
    assert build_distill_model(backbone(), WIDTH, DistillObjective(), **arguments).student.adapter is None
    same = build_distill_model(backbone(embed_dim=WIDTH), WIDTH, features, **arguments)
    assert same.student.adapter is None


def test_a_share_of_the_patches_is_exact_random_and_the_same_over_ranks():
    method = Distillation(teacher(), DistillObjective(ibot_share=0.3))

    def choose(wanted, seed=0):
        return method.choose(12, (4, 4), rng=np.random.default_rng(seed), wanted=wanted)

    whole = choose(range(12))
    assert (whole.sum(1) == 5).all()  # 0.3 of 16
    assert len({tuple(row.tolist()) for row in whole}) == 12
    assert torch.equal(choose([7, 2]), whole[[7, 2]])
    assert not torch.equal(choose(range(12), seed=1), whole)
    indices, weights = masked_tokens(whole)
    assert len(indices) == 60
    assert weights.unique().tolist() == pytest.approx([0.2])
