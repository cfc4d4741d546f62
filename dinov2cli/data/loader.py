"""Reading images in row order for `embed` and `eval`, in worker processes; `CropLoader` for training lies beside it.

Whatever the number of workers, the same batches come out in the same order. Workers return what went wrong as data:
the main process counts it, and alone decides and reports.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.decode import MAX_PIXELS, decode_image, resize_center_crop
from dinov2cli.data.ring import Ring, forks
from dinov2cli.data.source import ImageSource
from dinov2cli.data.workers import DEADLY, Hand, Pool

__all__ = ["Batch", "CentreView", "CropLoader", "Reading", "View", "iterate_images", "read_ranges", "row_ranges"]

_AHEAD = 2  # ranges per worker


class View(Protocol):
    """How the decoded pixels of an image become what the model sees. Runs in workers, so it must pickle.

    name: tells it from all other views, with its numbers and seeds; size: the side S of its squares in pixels.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def __call__(self, pixels: np.ndarray, row: int) -> torch.Tensor:
        """uint8 [H, W, 3] of row `row` -> uint8 [3, S, S]; what is random in it depends on row and seed alone."""


@dataclass(frozen=True)
class CentreView:
    """The usual view: shorter side to `resize` pixels, then the central square of `crop`.

    With `square` both sides are brought to `resize` without keeping the aspect. interpolation: see `resize_uint8`.
    """

    resize: int
    crop: int
    square: bool = False
    interpolation: str = "bicubic"

    @property
    def name(self) -> str:
        return f"{'square' if self.square else 'centre'} {self.resize} {self.crop} {self.interpolation}"

    @property
    def size(self) -> int:
        return self.crop

    def __call__(self, pixels: np.ndarray, row: int) -> torch.Tensor:
        del row
        return resize_center_crop(pixels, self.resize, self.crop, square=self.square, interpolation=self.interpolation)


@dataclass
class Batch:
    """Images of consecutive rows, less those that could not be read.

    index: int64 [n] rows. images: uint8 [n, 3, S, S]. width, height: int64 [n] of the decoded image (upright).
    sha256: hex digest of each file's bytes.
    """

    index: np.ndarray
    images: torch.Tensor
    width: np.ndarray
    height: np.ndarray
    sha256: list[str]

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Reading:
    """What came of one range of rows: the images that could be read (none, perhaps), and (name, reason) of the rest."""

    batch: Batch
    failures: list[tuple[str, str]]


def row_ranges(start: int, stop: int, batch_size: int, *, within: int | None = None) -> list[tuple[int, int]]:
    """Half-open ranges of at most `batch_size` rows that cover start .. stop; none crosses a multiple of `within`.

    So with `within` the batches of a shard are the same ones wherever a run starts.
    """
    size = within or max(stop, 1)
    return [
        (first, min(first + batch_size, low + size, stop))
        for low in range(start - start % size, stop, size)
        for first in range(max(low, start), min(low + size, stop), batch_size)
    ]


def read_ranges(
    source: ImageSource,
    ranges: Sequence[tuple[int, int]],
    *,
    view: View,
    workers: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Reading]:
    """One Reading per range, in order, of the images as `view` shows them. Counts and reports nothing."""
    workers = min(workers, len(ranges))
    ahead = _AHEAD * workers
    longest = max((stop - first for first, stop in ranges), default=0)
    ring = Ring(ahead + 1, {"images": ((longest, 3, view.size, view.size), torch.uint8)}, forked=forks())
    tasks = [(number % ring.slots, *rows) for number, rows in enumerate(ranges)]
    reader = _RangeReader(source, view, max_pixels, ring)
    found = Pool(reader, workers, ahead=ahead).run(tasks)
    for (slot, _, _), (table, digests, failures) in zip(tasks, found, strict=True):
        # A copy: whoever asked for it may keep it, and the slot is soon written again.
        images = ring.slot(slot)["images"][: len(table)].clone()
        yield Reading(Batch(table[:, 0], images, table[:, 1], table[:, 2], digests), failures)


def iterate_images(
    source: ImageSource,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    workers: int,
    bad: BadImages,
    start: int = 0,
    stop: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Batch]:
    """Decoded, resized and centre-cropped images in row order.

    Args:
        source: the images.
        resize, crop: shorter side and square crop in pixels, see `resize_center_crop`.
        batch_size: rows per batch; a batch is smaller at the end, and by the unreadable images in it (never empty).
        workers: processes that decode; 0 decodes in this one.
        bad: counts and names unreadable images; it stops the run when there are too many.
        start, stop: half-open range of rows, for shards that are written one by one.
        max_pixels: larger images count as unreadable.

    Raises:
        InputError: too many unreadable images.
    """
    stop = len(source) if stop is None else min(stop, len(source))
    ranges = row_ranges(start, stop, batch_size)
    view = CentreView(resize, crop)
    for found in read_ranges(source, ranges, view=view, workers=workers, max_pixels=max_pixels):
        for name, reason in found.failures:
            bad.add(name, reason)
        bad.check(len(source))
        if len(found.batch):
            yield found.batch


class _RangeReader:
    """Turns (slot, first, stop) into images in the ring, a table of (row, width, height), digests and failures; runs in
    a worker."""

    def __init__(self, source: ImageSource, view: View, max_pixels: int, ring: Ring) -> None:
        self._source = source
        self._view = view
        self._max_pixels = max_pixels
        self._ring = ring

    def name(self, item: int) -> str:
        return self._source.name(item)

    def __call__(self, task: tuple[int, int, int], hand: Hand) -> tuple[np.ndarray, list[str], list[tuple[str, str]]]:
        slot, first, stop = task
        images = self._ring.slot(slot)["images"]
        sizes: list[tuple[int, int, int]] = []
        digests: list[str] = []
        failures: list[tuple[str, str]] = []
        for row in range(first, stop):
            hand.hold(row)
            try:
                if hand.deadly(row):
                    raise BadImage(self._source.name(row), DEADLY)
                data = self._source.read(row)
                pixels = decode_image(data, name=self._source.name(row), max_pixels=self._max_pixels)
            except BadImage as error:
                failures.append((error.name, error.reason))
                continue
            images[len(sizes)] = self._view(pixels, row)
            sizes.append((row, pixels.shape[1], pixels.shape[0]))
            digests.append(hashlib.sha256(data).hexdigest())
        return np.array(sizes, dtype=np.int64).reshape(-1, 3), digests, failures
