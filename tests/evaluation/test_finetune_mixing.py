"""Mixup and CutMix against their definitions."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from dinov2cli.evaluation.finetuning.mixing import Mix, Mixing, mixed_images, partners, soft_cross_entropy

SWAPPED = [1, 0, 3, 2, 5, 4]


def images(seed: int = 0, size: tuple[int, int] = (8, 10)) -> torch.Tensor:
    return torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_mixup_blends_each_image_with_its_neighbour():
    own = images()
    found = mixed_images(own.clone(), Mix(0.3))
    expected = 0.3 * own.double() + 0.7 * own[SWAPPED].double()
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_cutmix_pastes_the_neighbours_box_and_nothing_else():
    own = images()
    mix = Mix(1 - 3 * 4 / 80, (2, 5, 1, 5))
    found = mixed_images(own.clone(), mix)
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[2:5, 1:5] = True
    assert torch.equal(found, torch.where(inside, own[SWAPPED], own))
    # The share that the targets go by is that of the pixels.
    assert (found[0, 0] == own[0, 0]).float().mean().item() == pytest.approx(mix.share)


def test_no_mix_leaves_images_alone():
    own = images()
    mixing = Mixing(mixup=0, cutmix=0)
    mix = mixing.draw(8, 8, np.random.default_rng(0))
    assert mix == Mix(1.0, None)
    assert torch.equal(mixed_images(own.clone(), mix), own)


def test_mixup_shares_are_beta_distributed():
    rng = np.random.default_rng(0)
    shares = [Mixing(mixup=0.8, cutmix=0).draw(8, 8, rng).share for _ in range(3000)]
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue < 1e-6


def test_cutmix_boxes_follow_the_papers_rule():
    """Area (1 - lambda) before clipping at the border, centre uniform; the share is corrected to what was pasted."""
    height, width = 60, 90
    rng = np.random.default_rng(0)
    mixes = [Mixing(mixup=0, cutmix=1.0).draw(height, width, rng) for _ in range(2000)]
    boxes = np.array([mix.box for mix in mixes])
    top, bottom, left, right = boxes.T
    assert (boxes >= 0).all() and (bottom <= height).all() and (right <= width).all()
    shares = np.array([mix.share for mix in mixes])
    assert np.allclose(shares, 1 - (bottom - top) * (right - left) / (height * width))
    whole = (top > 0) & (left > 0) & (bottom < height) & (right < width) & (bottom - top > 8)
    aspect = (right - left)[whole] / (bottom - top)[whole]
    assert whole.sum() > 200 and np.allclose(aspect, width / height, rtol=0.25)
    # By the same draws: lambda, then the middle's row and column.
    again = np.random.default_rng(0)
    for mix in mixes[:50]:
        ratio = np.sqrt(1 - again.beta(1.0, 1.0))
        y, x = again.integers(height), again.integers(width)
        rows, columns = int(ratio * height) // 2, int(ratio * width) // 2
        y0, y1, x0, x1 = *np.clip([y - rows, y + rows], 0, height), *np.clip([x - columns, x + columns], 0, width)
        assert mix.box == (y0, y1, x0, x1)


def test_both_are_switched_between_as_often_as_said():
    rng = np.random.default_rng(0)
    cut = [Mixing(switch=0.3).draw(8, 8, rng).box is not None for _ in range(2000)]
    assert np.mean(cut) == pytest.approx(0.3, abs=0.04)


def test_targets_are_shares_of_smoothed_labels():
    labels = torch.tensor([0, 2, 1, 1])
    found = Mixing(smoothing=0.2).targets(labels, 4, Mix(0.75))
    on, off = 1 - 0.2 + 0.2 / 4, 0.2 / 4  # the definition: each label smoothed, then mixed
    smooth = torch.full((4, 4), off)
    smooth[torch.arange(4), labels] = on
    expected = 0.75 * smooth + 0.25 * smooth[[1, 0, 3, 2]]
    assert torch.allclose(found, expected, atol=1e-7)
    assert torch.allclose(found.sum(1), torch.ones(4))


def test_loss_is_cross_entropy():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    targets = Mixing(smoothing=0.1).targets(labels, 5, Mix())
    expected = F.cross_entropy(logits.double(), labels, label_smoothing=0.1, reduction="none")
    assert torch.allclose(soft_cross_entropy(logits, targets).double(), expected, atol=1e-6)
    mixed = Mixing(smoothing=0.1).targets(labels, 5, Mix(0.4))
    expected = F.cross_entropy(logits.double(), mixed.double(), reduction="none")
    assert torch.allclose(soft_cross_entropy(logits, mixed).double(), expected, atol=1e-6)


def test_pairs_stay_together_in_every_pass():
    whole = partners(12)
    assert torch.equal(whole, torch.cat([partners(4) + start for start in (0, 4, 8)]))
    with pytest.raises(ValueError, match="pairs"):
        partners(3)
