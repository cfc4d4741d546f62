"""Reading images in row order for `embed` and `eval`, in worker processes; `CropLoader` for training lies beside it.

Whatever the number of workers, the same batches come out in the same order. Workers return what went wrong as data:
the main process counts it, and alone decides and reports.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.decode import MAX_PIXELS, decode_image, resize_center_crop
from dinov2cli.data.source import ImageSource
from dinov2cli.data.workers import worker_loader

__all__ = ["Batch", "CropLoader", "Reading", "iterate_images", "read_ranges", "row_ranges"]


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
    resize: int,
    crop: int,
    workers: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Reading]:
    """One Reading per range, in order; the arguments are those of `iterate_images`. Counts and reports nothing."""
    return worker_loader(_RangeReader(source, resize, crop, max_pixels), ranges, min(workers, len(ranges)))


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
    for found in read_ranges(source, ranges, resize=resize, crop=crop, workers=workers, max_pixels=max_pixels):
        for name, reason in found.failures:
            bad.add(name, reason)
        bad.check(len(source))
        if len(found.batch):
            yield found.batch


class _RangeReader:
    """Turns (first, stop) into a Reading; runs in a worker."""

    def __init__(self, source: ImageSource, resize: int, crop: int, max_pixels: int) -> None:
        self._source = source
        self._resize = resize
        self._crop = crop
        self._max_pixels = max_pixels

    def __getitem__(self, rows: tuple[int, int]) -> Reading:
        images: list[torch.Tensor] = []
        sizes: list[tuple[int, int, int]] = []
        digests: list[str] = []
        failures: list[tuple[str, str]] = []
        for row in range(*rows):
            try:
                data = self._source.read(row)
                pixels = decode_image(data, name=self._source.name(row), max_pixels=self._max_pixels)
            except BadImage as error:
                failures.append((error.name, error.reason))
                continue
            images.append(resize_center_crop(pixels, self._resize, self._crop))
            sizes.append((row, pixels.shape[1], pixels.shape[0]))
            digests.append(hashlib.sha256(data).hexdigest())
        table = np.array(sizes, dtype=np.int64).reshape(-1, 3)
        stacked = torch.stack(images) if images else torch.empty(0, 3, self._crop, self._crop, dtype=torch.uint8)
        return Reading(Batch(table[:, 0], stacked, table[:, 1], table[:, 2], digests), failures)
