"""The distillation benchmark makes the training loop's own steps and counts their operations. No timing is asserted."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2cli.bench import distill
from dinov2cli.bench.distill import SEVERAL, Case, default_case, distill_flops, run
from dinov2cli.errors import UserError

CASE = Case("tiny", "vitt8", 4, 64, 32, 16, 2, "fp32", "cpu", 0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_figure_is_there(monkeypatch):
    monkeypatch.setattr(distill, "run_in_child", lambda function, *arguments: function(*arguments) + 1)
    figures = run(rounds=1, case=CASE)
    for name in ("images_per_s", "seconds", "speedup", "memory_ratio", "pretrain_images_per_s", "several_speedup"):
        assert figures[name] > 0, name
    assert figures["speedup"] == pytest.approx(figures["images_per_s"] / figures["pretrain_images_per_s"])
    assert figures["several_speedup"] == pytest.approx(SEVERAL * figures["seconds"] / figures["several_seconds"])
    assert 0 < figures["teacher_share"] < 1 and 0 < figures["teacher_flop_share"] < 1
    # All patches meet the prototypes and the teacher is another model: no form of this step computes less.
    assert figures["floor_speedup"] < 1 < figures["several_floor_speedup"] < SEVERAL


def test_memory_is_that_of_a_process_of_its_own():
    grown = distill.peak_memory(CASE, distill.distillation) / 2**20
    step = distill.distillation(CASE)
    model = step.stepper.learners["0"].model
    numbers = 4 * sum(p.numel() for p in model.student.parameters()) + sum(
        p.numel() for p in model.teacher.parameters()
    )
    numbers += sum(p.numel() for p in step.method.teacher.parameters())
    assert 4 * numbers / 2**20 < grown < 4 * numbers / 2**20 + 1000


def test_the_step_is_distillation_s_and_its_students_share_the_teacher(monkeypatch):
    step = distill.distillation(CASE, SEVERAL)
    looks, teacher = [], step.method.teacher
    seen = teacher.tokens
    monkeypatch.setattr(teacher, "tokens", lambda *a: (looks.append(a[0].shape), seen(*a))[1])
    before = [p.clone() for p in teacher.parameters()]
    results = step()
    assert looks == [(2 * CASE.batch_size, 3, CASE.global_size, CASE.global_size)]
    assert len(results) == SEVERAL
    for result in results.values():
        assert {"ibot", "dino_local", "dino_global", "koleo", "total"} == set(result.losses)
        assert torch.isfinite(result.losses["total"]) and not result.skipped
    assert all(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))
    moved = [learner.model.student.backbone.cls_token for learner in step.stepper.learners.values()]
    assert not torch.equal(*moved)  # students of their own


def test_counted_operations_are_those_that_torch_sees():
    """But for attention, whose fused kernel torch does not count: 4 t^2 d in every block."""
    case = Case("vitt8_reg4", "vitt8", 3, 96, 32, 16, 3, "fp32", "cpu", 0)
    step = distill.distillation(case)
    with FlopCounterMode(display=False) as counter:
        step.method.look(_crops(step), step.parallel)
    ours, teacher_attention = distill_flops(case), 2 * 4 * 21**2 * 128 * 4
    assert counter.get_total_flops() / case.batch_size == ours["teacher"] - teacher_attention
    with FlopCounterMode(display=False) as counter:
        step()
    attention = teacher_attention + 3 * (2 * 17**2 + 3 * 5**2) * 4 * 128 * 4
    images = 2 * (2 * 16 + 3 * 4) * 3 * 8 * 8 * 128  # of which nobody needs a gradient
    assert counter.get_total_flops() / case.batch_size == pytest.approx(
        sum(ours.values()) - attention - images, rel=1e-4
    )


def _crops(step):
    from dinov2cli.train.method import Crops

    return Crops(*(step.batch[name] for name in ("global_crops", "local_crops", "index", "epoch")))


def test_share_of_the_teacher_counts_its_pass_and_its_heads(monkeypatch):
    """With a clock that moves only inside the teacher's calls and by one tick a step, shares are exact."""
    step = distill.distillation(CASE)
    now = [0.0]

    def spend(call, ticks):
        return lambda *arguments: (now.__setitem__(0, now[0] + ticks), call(*arguments))[1]

    teacher = step.method.teacher
    teacher.tokens, teacher.logits = spend(teacher.tokens, 2), spend(teacher.logits, 1)
    monkeypatch.setattr(step.stepper, "augment", lambda g, s, **_: (now.__setitem__(0, now[0] + 5), (g, s))[1])
    monkeypatch.setattr(distill.time, "perf_counter", lambda: now[0])
    assert distill.teacher_share(step, 3) == pytest.approx(3 / 8)


def test_default_case_needs_patches_that_meet():
    assert default_case("cpu", 0).student == "vitti14"
    assert default_case("cpu", 0, "vitb16", "vits16").global_size == 112
    with pytest.raises(UserError, match="patches of 16 \\(vits16\\) do not divide"):
        default_case("cpu", 0, "vits16", "vitti14")


def test_bench_distill_is_a_command(capsys, monkeypatch):
    from dinov2cli.cli.main import run as program

    asked = []
    monkeypatch.setattr(distill, "run", lambda **given: asked.append(given) or {"images_per_s": 1.0, "seconds": 2.0})
    words = ["bench", "distill", "--teacher", "vitb14", "--arch", "vits14", "--json", "--device", "cpu"]
    assert program(words) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "distill", "images_per_s": 1.0, "seconds": 2.0}
    assert asked == [{"device": "cpu", "seed": 0, "teacher": "vitb14", "arch": "vits14"}]
