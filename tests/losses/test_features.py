"""Feature regression against its definition in float64 numpy."""

import numpy as np
import pytest
import torch

from dinov2cli.losses.features import FEATURE_KINDS, feature_loss


def draw(rows=7, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, width, dtype=torch.float64, generator=generator) * 2
    return student, torch.randn(rows, width, dtype=torch.float64, generator=generator) * 5 + 1


def defined(student, teacher, kind):
    """The loss row by row, in numpy."""
    rows = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        if kind == "cosine":
            rows.append(1 - (s @ t) / np.sqrt((s @ s) * (t @ t)))
            continue
        distance = np.abs(s - (t - t.mean()) / np.sqrt(((t - t.mean()) ** 2).mean() + 1e-6))
        rows.append(np.where(distance < 1, distance**2 / 2, distance - 0.5).mean())
    return np.mean(rows)


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_value_is_the_definitions(kind):
    student, teacher = draw()
    assert feature_loss(student, teacher, kind).item() == pytest.approx(defined(student, teacher, kind), rel=1e-12)
    single = feature_loss(student.float(), teacher.float(), kind)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(defined(student, teacher, kind), rel=1e-5)


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_gradient_goes_to_the_student_alone(kind):
    student, teacher = draw(rows=4, width=5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: feature_loss(s, teacher, kind), (student,))
    teacher.requires_grad_()
    feature_loss(student, teacher, kind).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_autocast_computes_in_float32(kind):
    student, teacher = (x.bfloat16() for x in draw(rows=64, width=32))
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_loss(student.requires_grad_(), teacher, kind)
    assert found.dtype == torch.float32
    # Of the tokens as they were rounded: nothing is rounded on the way.
    assert found.item() == pytest.approx(defined(student.detach().double(), teacher.double(), kind), rel=1e-6)
    found.backward()
    assert student.grad.dtype == torch.bfloat16


def test_cosine_knows_no_length_and_smooth_l1_no_scale_of_the_teacher():
    student, teacher = draw()
    lengths = torch.rand(7, 1, dtype=torch.float64) + 0.5
    expected = feature_loss(student, teacher, "cosine")
    torch.testing.assert_close(feature_loss(student * lengths, teacher / lengths, "cosine"), expected)
    expected = feature_loss(student, teacher, "smooth_l1")
    torch.testing.assert_close(
        feature_loss(student, teacher * 50 * lengths + 3, "smooth_l1"), expected, rtol=1e-6, atol=0
    )
    assert feature_loss(student * 2, teacher, "smooth_l1") > expected * 1.5


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_the_minimum_is_zero(kind):
    _, teacher = draw(width=400)
    aim = teacher if kind == "cosine" else torch.nn.functional.layer_norm(teacher, (400,), eps=1e-6)
    assert feature_loss(aim, teacher, kind).item() == pytest.approx(0, abs=1e-12)


def test_tokens_that_are_empty_or_zero_stay_finite():
    none = torch.zeros(0, 8, requires_grad=True)
    loss = feature_loss(none, torch.zeros(0, 8))
    loss.backward()
    assert loss.item() == 0
    for kind in FEATURE_KINDS:
        zero = torch.zeros(2, 8, requires_grad=True)
        feature_loss(zero, torch.zeros(2, 8), kind).backward()
        assert torch.isfinite(zero.grad).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"student \[3, 4\] and teacher \[3, 5\]"):
        feature_loss(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="kind 'mse', expected one of cosine, smooth_l1"):
        feature_loss(torch.zeros(3, 4), torch.zeros(3, 4), "mse")
