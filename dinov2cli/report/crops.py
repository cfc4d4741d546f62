"""What a model is trained on, as a picture: the augmented crops of a few images, and which patches are hidden."""

import numpy as np
import torch
from torch import Tensor

from dinov2cli.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from dinov2cli.report.sheet import Column, scaled, sheet_png

_SHOWN = 160  # pixels of a global crop on the sheet; local crops are drawn at the same scale
_HIDDEN = 128  # grey level of a masked patch


def crops_sheet(
    global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, patch_size: int, *, images: int = 6
) -> bytes:
    """One row per image as the bytes of a PNG: both global crops, each with its masked copy if it has one, local crops.

    global_crops: normalised floats [2, B, 3, S, S]. local_crops: [L, B, 3, s, s], L may be 0; or None. masks: bool
    [2 * B, N], crop after crop, true where a patch is hidden, N = (S / patch_size)². At most `images` of the B images
    are shown. Inputs may lie on any device. Raises ValueError for masks that do not fit the crops.
    """
    batch, side = global_crops.shape[1], global_crops.shape[-1]
    grid = side // patch_size
    if masks.shape != (2 * batch, grid * grid):
        raise ValueError(f"masks {tuple(masks.shape)} do not fit 2 x {batch} crops of {grid} x {grid} patches")
    shown = min(images, batch)
    globals_ = _pixels(global_crops[:, :shown])
    hidden = masks.view(2, batch, grid, grid)[:, :shown].cpu().numpy()
    columns = []
    for view in range(2):
        plain = globals_[view]
        masked = [_masked(p, m, patch_size) if m.any() else None for p, m in zip(plain, hidden[view], strict=True)]
        columns.append(Column(f"global {view + 1}", [scaled(picture, _SHOWN, side) for picture in plain]))
        if any(picture is not None for picture in masked):
            columns.append(Column("masked", [None if p is None else scaled(p, _SHOWN, side) for p in masked]))
    if local_crops is not None:
        columns += _local_columns(_pixels(local_crops[:, :shown]), side)
    return sheet_png(columns)


def _pixels(crops: Tensor) -> np.ndarray:
    """Normalised floats [..., 3, S, S] back to uint8 [..., S, S, 3]."""
    values = crops.detach().float().cpu()
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    levels = ((values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().numpy()


def _masked(picture: np.ndarray, mask: np.ndarray, patch_size: int) -> np.ndarray:
    """A crop [S, S, 3] with the hidden patches (bool [h, w]) grey."""
    covered = mask.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    return np.where(covered[..., None], np.uint8(_HIDDEN), picture)


def _local_columns(crops: np.ndarray, side: int) -> list[Column]:
    """Local crops [L, n, s, s, 3], two above one another where a global crop of `side` pixels leaves the room."""
    stacked = 2 if 2 * crops.shape[2] <= side else 1
    columns = []
    for first in range(0, len(crops), stacked):
        views = [[scaled(picture, _SHOWN, side) for picture in view] for view in crops[first : first + stacked]]
        pictures = [_stack(list(of_one_image)) for of_one_image in zip(*views, strict=True)]
        columns.append(Column("local" if first == 0 else "", pictures))
    return columns


def _stack(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures above one another, with a light line between."""
    parts = [pictures[0]]
    for picture in pictures[1:]:
        parts += [np.full((2, picture.shape[1], 3), 255, np.uint8), picture]
    return np.concatenate(parts)
