"""Masks: exact counts, the ladder of ratios, blocks, shuffling, determinism."""

import numpy as np
import pytest
import torch

from dinov2cli.data.masks import make_masks, mask_blocks, masked_tokens
from dinov2cli.errors import UserError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("crops", [1, 2, 7, 64, 128])
@pytest.mark.parametrize("probability", [0.0, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("grid", [(2, 2), (1, 5), (4, 4), (7, 7), (16, 16), (3, 20)])
def test_exactly_the_asked_crops_and_tokens_are_masked(crops, probability, grid):
    n = grid[0] * grid[1]
    masks = make_masks(crops, grid, rng=rng(), probability=probability)
    assert masks.shape == (crops, n)
    assert masks.dtype == torch.bool
    counts = sorted(masks.sum(1).tolist())
    masked = int(crops * probability + 1e-9)
    assert counts[: crops - masked] == [0] * (crops - masked)
    edges = np.linspace(0.1, 0.5, masked + 1)
    for count, low, high in zip(counts[crops - masked :], edges[:-1], edges[1:], strict=True):
        assert max(1, np.floor(low * n + 1e-9)) <= count <= max(1, np.floor(high * n + 1e-9))


def test_hundredths_do_not_lose_a_crop_to_rounding():
    assert (make_masks(100, (4, 4), rng=rng(), probability=0.29).sum(1) > 0).sum() == 29


def test_ratio_is_uniform_inside_the_bin():
    """One masked crop of 2500 patches, bin 0.1-0.5: mean 0.3 and spread 0.4 / sqrt(12)."""
    generator = rng()
    ratios = [make_masks(1, (50, 50), rng=generator, probability=1.0).float().mean().item() for _ in range(400)]
    assert np.mean(ratios) == pytest.approx(0.3, abs=4 * 0.1155 / 20)
    assert np.std(ratios) == pytest.approx(0.4 / np.sqrt(12), rel=0.1)
    assert min(ratios) < 0.11
    assert max(ratios) > 0.49


def test_masked_crops_and_bins_are_shuffled():
    generator = rng()
    counts = np.stack([make_masks(16, (14, 14), rng=generator).sum(1).numpy() for _ in range(400)])
    share = (counts > 0).mean(0)
    assert share == pytest.approx(0.5, abs=4 * 0.5 / 20)
    mean_ratio = counts.sum(0) / (counts > 0).sum(0) / 196
    assert mean_ratio == pytest.approx(0.3, abs=4 * 0.1155 / np.sqrt(200) + 0.01)


def test_blocks_are_rectangles_not_dust():
    """Masked patches touch masked patches: at ratio 0.3, chance alone gives a neighbour to the right with 30 %."""
    masks = make_masks(600, (16, 16), rng=rng(), probability=1.0, ratio_min=0.3, ratio_max=0.3).view(600, 16, 16)
    inner = masks[:, :, :-1]
    followed = (inner & masks[:, :, 1:]).sum() / inner.sum()
    assert followed > 0.7
    everywhere = masks.float().mean(0)
    assert everywhere.min() > 0  # every patch gets its turn, corners too
    # no side is preferred; the centre is, since more blocks fit around it
    torch.testing.assert_close(everywhere.sum(0), everywhere.sum(0).flip(0), rtol=0.25, atol=0.2)
    torch.testing.assert_close(everywhere.sum(1), everywhere.sum(1).flip(0), rtol=0.25, atol=0.2)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 10, 24, 25])
def test_mask_blocks_is_exact_up_to_the_whole_grid(count):
    for seed in range(20):
        mask = np.zeros((5, 5), dtype=bool)
        mask_blocks(mask, count, rng(seed))
        assert mask.sum() == count


def test_depends_on_the_generator_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    first = make_masks(32, (7, 7), rng=rng(3))
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(make_masks(32, (7, 7), rng=rng(3)), first)
    assert not torch.equal(make_masks(32, (7, 7), rng=rng(4)), first)


def test_masked_tokens_weigh_one_per_masked_crop():
    masks = make_masks(20, (7, 7), rng=rng())
    indices, weights = masked_tokens(masks)
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert masks.flatten()[indices].all()
    assert len(indices) == masks.sum()
    for crop in range(20):
        here = weights[indices // 49 == crop]
        assert torch.equal(here, torch.full_like(here, 1 / max(len(here), 1)))
    assert weights.sum().item() == pytest.approx(10, rel=1e-5)


def test_no_masked_token():
    indices, weights = masked_tokens(make_masks(4, (3, 3), rng=rng(), probability=0.0))
    assert len(indices) == len(weights) == 0


@pytest.mark.parametrize(
    "bad", [{"probability": 1.5}, {"ratio_min": 0.6}, {"ratio_max": 1.2}, {"ratio_min": -0.1}, {"probability": -1}]
)
def test_senseless_numbers_are_refused(bad):
    with pytest.raises(UserError, match=r"masks: probability .* found, expected .* correct these keys"):
        make_masks(4, (4, 4), rng=rng(), **bad)
