"""The masks of a training set: read once, checked, counted, and kept in memory beside stored token maps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.dense import in_order, read_pair, read_target, resize_nearest
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import Ranks
from dinov2cli.errors import InputError
from dinov2cli.evaluation.dense.maps import MapSet
from dinov2cli.evaluation.dense.tokens import Sight
from dinov2cli.evaluation.segmentation.labels import Classes, Labelling

Rows = npt.NDArray[np.int64]


@dataclass
class Masks:
    """Of all ranks: rows int64 [n] with a readable mask, sorted; pixels int64 [C] of each class, C = highest + 1;
    digests uint8 [n, 32] of the images. Of this rank: targets int16 [H, W] by row, as the model sees the image."""

    rows: Rows
    pixels: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    targets: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Own:
    """What one rank found, as it is told to the others."""

    rows: list[int] = field(default_factory=list)
    digests: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    pixels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def masks_of_maps(
    source: ImageSource,
    found: MapSet,
    sight: Sight,
    labelling: Labelling,
    *,
    bad: BadImages,
    workers: int,
    resize_target: bool,
    ranks: Ranks,
) -> Masks:
    """Masks of the rows of stored maps; each rank reads those whose maps it holds. Raises InputError for wrong ones."""
    digests = dict(zip(found.rows.tolist(), found.digests, strict=True))
    sizes = dict(zip(found.rows.tolist(), found.sizes.tolist(), strict=True))
    targets: dict[int, Tensor] = {}

    def one(row: int) -> Classes:
        target = read_target(source, row, "mask", tuple(sizes[row]), resize_target=resize_target)
        return labelling.read(target, source.name(row))

    def kept(row: int, classes: Classes) -> npt.NDArray[np.uint8]:
        seen = cast(Classes, resize_nearest(classes, *sight.size(*classes.shape)))
        targets[row] = torch.from_numpy(np.ascontiguousarray(seen))
        return cast(npt.NDArray[np.uint8], digests[row])

    own = _surveyed(one, kept, sorted(found.maps), workers)
    return _together(own, source, bad, ranks, targets)


def masks_of_source(
    source: ImageSource,
    labelling: Labelling,
    *,
    bad: BadImages,
    workers: int,
    resize_target: bool,
    ranks: Ranks,
) -> Masks:
    """Masks of all rows whose image and mask can be read; none is kept."""
    digests: dict[int, npt.NDArray[np.uint8]] = {}

    def one(row: int) -> Classes:
        pair = read_pair(source, row, "mask", resize_target=resize_target)
        digests[row] = pair.digest
        return labelling.read(pair.target, pair.name)

    own = _surveyed(one, lambda row, _: digests.pop(row), list(ranks.share(range(len(source)))), workers)
    return _together(own, source, bad, ranks, {})


def _surveyed(
    one: Callable[[int], Classes],
    kept: Callable[[int, Classes], npt.NDArray[np.uint8]],
    rows: Sequence[int],
    workers: int,
) -> Iterator[_Own]:

    def read(row: int) -> tuple[int, Classes | BadImage]:
        try:
            return row, one(row)
        except BadImage as error:
            return row, error

    own = _Own()
    for row, classes in in_order(read, rows, workers):
        if isinstance(classes, BadImage):
            own.failures.append((classes.name, classes.reason))
            continue
        own.rows.append(row)
        own.digests.append(kept(row, classes))
        own.pixels = added(own.pixels, np.bincount(classes[classes >= 0].ravel()))
    yield own


def added(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The sum of two counts by class, of which one may know fewer classes."""
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total


def _together(
    own: Iterator[_Own], source: ImageSource, bad: BadImages, ranks: Ranks, targets: dict[int, Tensor]
) -> Masks:
    rows: list[int] = []
    digests: list[npt.NDArray[np.uint8]] = []
    pixels: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    for part in ranks.merge(own, ranks.world_size):
        rows += part.rows
        digests += part.digests
        pixels = added(pixels, part.pixels)
        for name, reason in part.failures:
            bad.add(name, reason)
    bad.check(len(source))
    if np.count_nonzero(pixels) < 2:
        found = f"only class {int(pixels.argmax())}" if pixels.any() else "no class: every pixel is ignored"
        raise InputError(
            f"{source.spec}: its masks hold {found}; expected two classes or more. See --set ignore and "
            "reduce_zero_label"
        )
    order = np.argsort(rows)
    return Masks(np.array(rows, dtype=np.int64)[order], pixels, np.array(digests, dtype=np.uint8)[order], targets)
