"""Which patches of which global crops the student does not see: block masking along a ladder of ratios."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2cli.errors import UserError

MIN_BLOCK = 4
"""Smallest block area in patches (iBOT, arXiv 2111.07832, after BEiT)."""
MIN_ASPECT = 0.3
"""Blocks have height / width between this and its inverse, log-uniform."""
TRIES_PER_BLOCK = 10


class MaskedTokens(NamedTuple):
    """Where a batch's masked tokens are and what each weighs in the iBOT loss."""

    indices: Tensor  # int64 [M], into the tokens of all crops laid out as [crops * N]
    weights: Tensor  # float32 [M], 1 / (masked tokens of that token's crop)


def make_masks(
    crops: int,
    grid: tuple[int, int],
    *,
    rng: np.random.Generator,
    probability: float = 0.5,
    ratio_min: float = 0.1,
    ratio_max: float = 0.5,
    wanted: Sequence[int] | None = None,
) -> Tensor:
    """Masks of a batch of `crops` global crops of `grid` = (rows, columns) patches: bool [crops, rows * columns].

    Exactly floor(crops * probability) crops are masked. The range of ratios is cut into as many equal bins; each masked
    crop draws its ratio uniformly in its own bin, so that every batch covers the range evenly, and masks
    exactly max(1, floor(ratio * N)) patches. Crops and bins are shuffled over the batch. Depends on `rng` alone.

    `wanted` names the crops whose masks are made, in that order (all by default): each has a stream of its own, so a
    process makes those of its part of a batch and they are what they would be in the whole.
    Raises UserError for numbers that make no sense.
    """
    if not (0 <= probability <= 1 and 0 <= ratio_min <= ratio_max <= 1):
        raise UserError(
            f"masks: probability {probability}, ratio_min {ratio_min}, ratio_max {ratio_max} found, expected "
            "0 <= probability <= 1 and 0 <= ratio_min <= ratio_max <= 1; correct these keys"
        )
    height, width = grid
    masked = math.floor(crops * probability + 1e-9)  # 1e-9: 0.29 * 100 is 28.999...
    edges = np.linspace(ratio_min, ratio_max, masked + 1)
    ratios = np.full(crops, -1.0)  # of those that stay whole
    ratios[rng.permutation(crops)[:masked]] = edges[:-1] + (edges[1:] - edges[:-1]) * rng.random(masked)
    streams = rng.integers(1 << 64, size=crops, dtype=np.uint64)
    rows = np.arange(crops) if wanted is None else np.asarray(wanted, dtype=np.int64)
    masks = np.zeros((len(rows), height, width), dtype=bool)
    for mask, ratio, stream in zip(masks, ratios[rows].tolist(), streams[rows], strict=True):
        if ratio >= 0:
            count = max(1, math.floor(height * width * ratio + 1e-9))
            mask_blocks(mask, count, np.random.Generator(np.random.Philox(key=np.array([stream, 0], dtype=np.uint64))))
    return torch.from_numpy(masks.reshape(len(rows), height * width))


def mask_blocks(mask: np.ndarray, count: int, rng: np.random.Generator) -> None:
    """Set exactly `count` more cells of `mask` (bool [rows, columns], in place) in random rectangles.

    Rectangles of log-uniform aspect are placed until the count is reached or none fits in ten tries; on small grids
    they then often fall short, so what is missing is taken from the free cells at random.
    """
    height, width = mask.shape
    missing = count
    log_aspect = math.log(1 / MIN_ASPECT)
    while missing >= MIN_BLOCK:
        added = 0
        for area_draw, aspect_draw, top_draw, left_draw in rng.random((TRIES_PER_BLOCK, 4)).tolist():
            area = MIN_BLOCK + area_draw * (missing - MIN_BLOCK)
            aspect = math.exp((2 * aspect_draw - 1) * log_aspect)
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows > height or columns > width or rows * columns == 0:
                continue
            top, left = int(top_draw * (height - rows + 1)), int(left_draw * (width - columns + 1))
            block = mask[top : top + rows, left : left + columns]
            free = rows * columns - int(np.count_nonzero(block))
            if 0 < free <= missing:
                block[...] = True
                added = free
                break
        if added == 0:
            break
        missing -= added
    if missing > 0:
        free_cells = np.flatnonzero(~mask)
        mask.reshape(-1)[rng.choice(free_cells, size=min(missing, len(free_cells)), replace=False)] = True


def masked_tokens(masks: Tensor) -> MaskedTokens:
    """Flat positions and iBOT weights of the masked tokens of `masks` (bool [crops, N])."""
    indices = masks.flatten().nonzero().flatten()
    counts = masks.sum(1).clamp(min=1)
    weights = (1.0 / counts.to(torch.float32))[indices // masks.shape[1]]
    return MaskedTokens(indices, weights)
