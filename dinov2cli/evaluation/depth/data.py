"""Stored depths as metres, and what a set of them holds: looked through once, before anything is computed for long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.dense import Pair, read_pairs, resize_nearest
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.depth.measures import check_range
from dinov2cli.search.blocks import Stage, kept, over_blocks

CELLS = (24, 32)
"""Rows and columns of the map of mean depths."""
_BLOCK = 64
_NAMED = 3
_MOSTLY = 0.5  # of the measured pixels beyond max_depth: the scale is wrong
_SMALL = 0.05  # of max_depth that the largest depth of a set should reach
_KNOWN = "1 for metres, 1000 for millimetres, 256 for KITTI"

Depth = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DepthScale:
    """How stored numbers become metres (number / units_per_metre), and which of them count: strictly between min_depth
    and max_depth. resize_target: depth maps of another size are brought to the image's by their nearest pixels.

    Raises UserError for impossible numbers.
    """

    units_per_metre: float = 1.0
    min_depth: float = 1e-3
    max_depth: float = 10.0
    resize_target: bool = False

    def __post_init__(self) -> None:
        check_range(self.min_depth, self.max_depth)
        if not 0 < self.units_per_metre < float("inf"):
            raise UserError(f"units_per_metre is {self.units_per_metre:g}, expected a number above 0: {_KNOWN}")

    def metres(self, stored: npt.NDArray[np.generic]) -> Depth:
        """float32 of the same shape; NaN and negative numbers stay what they are, and are not valid."""
        return np.asarray(stored, dtype=np.float32) / np.float32(self.units_per_metre)

    def valid(self, metres: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        """Which depths count, bool of the same shape."""
        return (metres > self.min_depth) & (metres < self.max_depth)  # type: ignore[operator]


@dataclass(frozen=True)
class Survey:
    """What a set holds. rows: int64 [n], images with at least one valid depth; empty: names of those without any.

    digests: uint8 [m, 32] of all readable images. mean: mean valid depth in metres, cells: the mean at every place,
    float32 CELLS. valid: share of all pixels. beyond: share of the measured ones (above 0) at or beyond max_depth.
    """

    rows: npt.NDArray[np.int64]
    empty: list[str]
    digests: npt.NDArray[np.uint8]
    mean: float
    cells: Depth
    valid: float
    beyond: float
    largest: float


def survey(
    source: ImageSource,
    scale: DepthScale,
    *,
    bad: BadImages,
    workers: int = 0,
    stage: Stage | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Look through all images and depths of a source; on every rank of a launch, each reads its share.

    Raises InputError for a depth map of another size than its image, for too many unreadable images, for a set
    without any valid depth and for one whose depths lie mostly beyond max_depth.
    """

    def work(start: int) -> dict[str, npt.NDArray[Any]]:
        rows = range(start, min(start + _BLOCK, len(source)))
        return _block(
            list(
                read_pairs(
                    source,
                    rows,
                    "depth",
                    workers=workers,
                    resize_target=scale.resize_target,
                    make=lambda pair: _measured(pair, scale),
                )
            )
        )

    parts = list(over_blocks(kept(work, stage), len(source), _BLOCK, progress=progress, ranks=ranks))
    for part in parts:
        for name, reason in part["failures"]:
            bad.add(str(name), str(reason))
    bad.check(len(source))
    found = _joined(parts, source)
    _check(found, scale, source.spec)
    return found


@dataclass(frozen=True)
class _Measured:
    """Of one image: pixels that are valid, measured (finite and above 0), beyond, in all; sum and largest of depths."""

    row: int
    digest: npt.NDArray[np.uint8]
    numbers: npt.NDArray[np.float64]
    cells: npt.NDArray[np.float64]  # [2, *CELLS]: sums of valid depths, and their number


def _measured(pair: Pair, scale: DepthScale) -> _Measured:
    metres = scale.metres(pair.target)
    valid, known = scale.valid(metres), np.isfinite(metres) & (metres > 0)
    small = resize_nearest(metres, *CELLS)
    small_valid = scale.valid(small)
    numbers = [
        valid.sum(),
        known.sum(),
        (metres[known] >= scale.max_depth).sum(),
        metres.size,
        metres[valid].sum(dtype=np.float64),
        metres[known].max(initial=0),
    ]
    cells = np.stack([np.where(small_valid, small, 0), small_valid]).astype(np.float64)
    return _Measured(pair.row, pair.digest, np.array(numbers, dtype=np.float64), cells)


def _block(found: Sequence[_Measured | BadImage]) -> dict[str, npt.NDArray[Any]]:
    good = [one for one in found if isinstance(one, _Measured)]
    failures = [(one.name, one.reason) for one in found if isinstance(one, BadImage)]
    return {
        "rows": np.array([one.row for one in good], dtype=np.int64),
        "digests": np.array([one.digest for one in good], dtype=np.uint8).reshape(-1, 32),
        "numbers": np.array([one.numbers for one in good], dtype=np.float64).reshape(-1, 6),
        "cells": np.sum([one.cells for one in good], axis=0) if good else np.zeros((2, *CELLS)),
        "failures": np.array(failures, dtype=np.str_).reshape(-1, 2),
    }


def _joined(parts: Sequence[Any], source: ImageSource) -> Survey:
    rows, digests, numbers = (np.concatenate([part[name] for part in parts]) for name in ("rows", "digests", "numbers"))
    valid, known, beyond, pixels, total, largest = numbers.T
    usable = valid > 0
    mean = float(total.sum() / max(valid.sum(), 1))
    sums, counts = np.sum([part["cells"] for part in parts], axis=0)
    return Survey(
        rows=rows[usable],
        empty=[source.name(int(row)) for row in rows[~usable]],
        digests=digests,
        mean=mean,
        cells=np.where(counts > 0, sums / np.maximum(counts, 1), mean).astype(np.float32),
        valid=float(valid.sum() / max(pixels.sum(), 1)),
        beyond=float(beyond.sum() / max(known.sum(), 1)),
        largest=float(largest.max(initial=0)),
    )


def _check(found: Survey, scale: DepthScale, spec: str) -> None:
    if found.beyond > _MOSTLY:
        raise InputError(
            f"{spec}: {found.beyond:.0%} of its depths lie beyond max_depth={scale.max_depth:g} metres (the largest is "
            f"{found.largest:g}); is units_per_metre={scale.units_per_metre:g} right? ({_KNOWN})"
        )
    if not len(found.rows):
        raise InputError(
            f"{spec}: none of its {len(found.empty)} depth maps has a pixel between {scale.min_depth:g} and "
            f"{scale.max_depth:g} metres (the largest is {found.largest:g}); expected depths above 0: "
            f"check ?depth=COLUMN and units_per_metre ({_KNOWN})"
        )


def doubts(found: Survey, scale: DepthScale, spec: str) -> list[str]:
    """What the user should be told of a set: images left out, and depths that look too small for the scale."""
    notes = []
    if found.empty:
        names = ", ".join(found.empty[:_NAMED]) + (", ..." if len(found.empty) > _NAMED else "")
        notes.append(
            f"{spec}: {len(found.empty)} of {len(found.empty) + len(found.rows)} images have no valid depth and are "
            f"left out: {names}"
        )
    if found.largest < _SMALL * scale.max_depth:
        notes.append(
            f"{spec}: the largest depth is {found.largest:g} metres, max_depth is {scale.max_depth:g}: is "
            f"units_per_metre={scale.units_per_metre:g} right? ({_KNOWN})"
        )
    return notes
