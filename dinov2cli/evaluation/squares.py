"""Reading images as squares whose aspect is not kept, for descriptors: the counterpart of `data.loader.read_ranges`."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import MAX_PIXELS, decode_image
from dinov2cli.data.loader import Batch, Reading
from dinov2cli.data.ring import Ring, forks
from dinov2cli.data.source import ImageSource
from dinov2cli.data.workers import DEADLY, Hand, Pool

_AHEAD = 2  # ranges per worker


def resize_square(image_HWC: np.ndarray, side: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [3, side, side], bilinear and antialiased: within 1 grey level of Pillow's resize."""
    # The leading axis first: torch knows channels-last memory, its fast path, by all four strides.
    pixels_1CHW = torch.from_numpy(image_HWC)[None].permute(0, 3, 1, 2)
    return F.interpolate(pixels_1CHW, (side, side), mode="bilinear", antialias=True)[0]


def read_squares(
    source: ImageSource,
    ranges: Sequence[tuple[int, int]],
    *,
    side: int,
    workers: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Reading]:
    """One Reading per half-open range of rows, in order; its images are uint8 [n, 3, side, side].

    `workers` processes decode; 0 decodes in this one. Larger images than `max_pixels` count as unreadable.
    """
    workers = min(workers, len(ranges))
    ahead = _AHEAD * workers
    longest = max((stop - first for first, stop in ranges), default=0)
    ring = Ring(ahead + 1, {"images": ((longest, 3, side, side), torch.uint8)}, forked=forks())
    tasks = [(number % ring.slots, *rows) for number, rows in enumerate(ranges)]
    found = Pool(_SquareReader(source, side, max_pixels, ring), workers, ahead=ahead).run(tasks)
    for (slot, _, _), (table, digests, failures) in zip(tasks, found, strict=True):
        # A copy: whoever asked for it may keep it, and the slot is soon written again.
        images = ring.slot(slot)["images"][: len(table)].clone()
        yield Reading(Batch(table[:, 0], images, table[:, 1], table[:, 2], digests), failures)


class _SquareReader:
    """Turns (slot, first, stop) into images in the ring, a table of (row, width, height), digests and failures; runs in
    a worker."""

    def __init__(self, source: ImageSource, side: int, max_pixels: int, ring: Ring) -> None:
        self._source, self._side, self._max_pixels, self._ring = source, side, max_pixels, ring

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
            images[len(sizes)] = resize_square(pixels, self._side)
            sizes.append((row, pixels.shape[1], pixels.shape[0]))
            digests.append(hashlib.sha256(data).hexdigest())
        return np.array(sizes, dtype=np.int64).reshape(-1, 3), digests, failures
