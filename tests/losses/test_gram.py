"""Gram-matrix matching against its definition in float64 numpy."""

import numpy as np
import pytest
import torch

from dinov2cli.losses import cross_entropy
from dinov2cli.losses.gram import gram_loss


def draw(batch=3, patches=6, width=5, teacher_width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, patches, width, dtype=torch.float64, generator=generator)
    return student, torch.randn(batch, patches, teacher_width, dtype=torch.float64, generator=generator) + 0.3


def cosines(patches):
    unit = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
    return unit @ unit.T


def defined(student, teacher):
    """The loss image by image, in numpy."""
    pairs = zip(student.numpy(), teacher.numpy(), strict=True)
    return np.mean([((cosines(s) - cosines(t)) ** 2).mean() for s, t in pairs])


@pytest.mark.parametrize("elements", [1, 80, 1 << 18])  # images one by one, two at a time, all at once
def test_value_and_gradient_are_the_definitions(monkeypatch, elements):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    student, teacher = draw()
    assert gram_loss(student, teacher).item() == pytest.approx(defined(student, teacher), rel=1e-12)
    assert gram_loss(student.float(), teacher.float()).item() == pytest.approx(defined(student, teacher), rel=1e-5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: 3 * gram_loss(s, teacher), (student,))


def test_the_teacher_receives_no_gradient():
    student, teacher = draw()
    student.requires_grad_()
    teacher.requires_grad_()
    gram_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0
    with torch.no_grad():
        assert not gram_loss(student, teacher).requires_grad


def test_autocast_computes_in_float32():
    student, teacher = (x.bfloat16() for x in draw(patches=16, width=32, teacher_width=48))
    with torch.autocast("cpu", torch.bfloat16):
        found = gram_loss(student.requires_grad_(), teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(defined(student.detach().double(), teacher.double()), rel=1e-5)
    found.backward()
    assert student.grad.dtype == torch.bfloat16


def test_only_the_similarities_within_an_image_count():
    student, teacher = draw(teacher_width=5)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    expected = gram_loss(student, teacher)
    torch.testing.assert_close(gram_loss(student, teacher @ turn), expected)
    torch.testing.assert_close(gram_loss(student @ turn, teacher), expected)
    lengths = torch.rand(3, 6, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(gram_loss(student * lengths, teacher / lengths), expected)
    other = torch.arange(6).flip(0)
    torch.testing.assert_close(gram_loss(student[:, other], teacher[:, other]), expected)
    assert (gram_loss(student[:, other], teacher) - expected).abs() > 1e-3  # which patch is which does count
    assert gram_loss(teacher @ turn, teacher).item() == pytest.approx(0, abs=1e-15)


def test_empty_and_zero_patches_stay_finite():
    none = torch.zeros(0, 4, 8, requires_grad=True)
    loss = gram_loss(none, torch.zeros(0, 4, 3))
    loss.backward()
    assert loss.item() == 0
    zero = torch.zeros(2, 4, 8, requires_grad=True)
    gram_loss(zero, torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))).backward()
    assert torch.isfinite(zero.grad).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"student \[2, 4, 8\] and teacher \[2, 9, 8\]"):
        gram_loss(torch.zeros(2, 4, 8), torch.zeros(2, 9, 8))
