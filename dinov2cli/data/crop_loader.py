"""Endless shuffled crops for training, resumable at any image.

The order is a function of (seed, epoch), the pixels of a crop are one of (seed, epoch, sample): neither depends on the
number of workers, ranks, or on where a run was stopped. Positions count images over all ranks. With a number of `views`
an image is shown in that many ways, over and over.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.decode import MAX_PIXELS, Decoder, open_image
from dinov2cli.data.ring import Ring, forks
from dinov2cli.data.scratch import Scratch
from dinov2cli.data.source import ImageSource
from dinov2cli.data.visits import Shuffle, Visits
from dinov2cli.data.workers import DEADLY, MAX_DEATHS, Hand, Pool
from dinov2cli.errors import InputError

_REPLACEMENT_TRIES = 100
_LARGEST_PART = 64


class CropLoader:
    """Batches of crops without end; every image once per epoch, an epoch's remainder flows into the next batch.

    An unreadable image is replaced by another one, chosen by (seed, epoch, sample), counted and named in `bad`. All
    workers make parts of the same batch, in memory that is used again: it holds `prefetch` batches and one more,
    whatever the number of workers (somewhat more only where they are about as many as the images of a batch, or more).

    Args:
        source: the images; there may be fewer than one batch.
        crop: settings of the crops.
        batch_size: images per rank and batch.
        seed: of order and crops.
        workers: processes that decode and crop; 0 does it in this one.
        start_step: batches already consumed by a run of the same batch size; `load_state_dict` is the exact way.
        rank, world_size: this process' share of each global batch of batch_size x world_size images.
        bad: counter and policy for unreadable images.
        max_pixels: larger images count as unreadable.
        prefetch: batches made ahead.
        scaled_decode: decode JPEG files at 1/2, 1/4 or 1/8 where every crop is still made smaller (`MultiCrop.shrink`).
        shuffle, window: how an epoch is mixed, see `Visits`.
        max_deaths: workers that may die (and be replaced) before the run stops.
        pin: lock the batches' memory for a GPU to read.
        views: crops of an image repeat after so many epochs, pixel for pixel; None: they are new in every epoch.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        crop: MultiCrop,
        batch_size: int,
        seed: int,
        workers: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bad: BadImages | None = None,
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
        scaled_decode: bool = False,
        shuffle: Shuffle = "auto",
        window: int = 16,
        max_deaths: int = MAX_DEATHS,
        pin: bool = False,
        views: int | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or (views is not None and views < 1):
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}, {views} views")
        self.bad = BadImages() if bad is None else bad
        self.position = start_step * batch_size * world_size
        self._source, self._crop = source, crop
        self._settings: dict[str, Any] = {
            "seed": seed,
            "max_pixels": max_pixels,
            "scaled": scaled_decode,
            "views": views,
        }
        self._batch_size = batch_size
        self._visits = Visits(source, seed, shuffle=shuffle, window=window)
        self._workers = workers
        self._rank = rank
        self._world_size = world_size
        self._max_deaths, self._pin = max_deaths, pin
        # Parts small enough that all workers share a batch, and large enough that handing them out costs nothing.
        self._part = min(math.ceil(batch_size / max(workers, 1)), _LARGEST_PART)
        self._parts = math.ceil(batch_size / self._part)
        self._ahead = max(prefetch * self._parts, 2 * workers)

    def state_dict(self) -> dict[str, int]:
        """Images consumed so far, over all ranks; batches made ahead by workers do not count."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind `state['position']`; holds for iterators made from now on."""
        self.position = int(state["position"])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches from the current position on, without end:

        global_crops uint8 [2, B, 3, S, S], local_crops uint8 [L, B, 3, s, s], index int64 [B] (row of the image used),
        epoch int64 [B] (with `views` the number of the view: what keys the colours too). The crops lie in memory as
        [.., S, S, 3] and hold until the next batch is asked for.

        Raises:
            InputError: too many unreadable images.
            WorkError: workers keep dying.
        """
        ring = self._ring()
        pinned = self._pin and ring.pin()
        reader = _CropReader(self._source, self._crop, ring, **self._settings)
        slots = [ring.slot(number) for number in range(ring.slots)]
        pool = Pool(reader, self._workers, ahead=self._ahead, max_deaths=self._max_deaths)
        results = pool.run(self._tasks(self.position))
        try:
            for number in iter(range(1 << 62)):
                used = [row for rows in islice(results, self._parts) for row in self._checked(rows)]
                self.position += self._batch_size * self._world_size
                crops = {name: crop.permute(0, 1, 4, 2, 3) for name, crop in slots[number % ring.slots].items()}
                index = torch.tensor([row for row, _ in used], dtype=torch.int64)
                yield {**crops, "index": index, "epoch": torch.tensor([epoch for _, epoch in used], dtype=torch.int64)}
        finally:
            results.close()  # type: ignore[attr-defined]
            self._visits.close()
            if pinned:
                ring.unpin()

    def memory_bytes(self) -> int:
        """Memory that batches take while they are made."""
        return self._ring_slots() * sum(math.prod(shape) for shape, _ in self._layout().values())

    def _ring_slots(self) -> int:
        """Batches that parts given out ahead can belong to, the oldest of them being put together."""
        return 1 if self._workers == 0 else 1 + (self._parts - 1 + self._ahead) // self._parts

    def _ring(self) -> Ring:
        return Ring(self._ring_slots(), self._layout(), forked=forks())

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        crop, batch = self._crop, self._batch_size
        return {
            "global_crops": ((2, batch, crop.global_size, crop.global_size, 3), torch.uint8),
            "local_crops": ((crop.local_number, batch, crop.local_size, crop.local_size, 3), torch.uint8),
        }

    def _checked(self, result: "_Part") -> list[tuple[int, int]]:
        used, failures = result
        for name, reason in failures:
            self.bad.add(name, reason)
        self.bad.check(self._met_by_now())
        if used is None:
            raise InputError(
                f"{self._source.spec}: {_REPLACEMENT_TRIES} images in a row cannot be read "
                f"(first: {self.bad.names[0]}); repair the set"
            )
        return used

    def _met_by_now(self) -> int:
        """Images of the set, less those that so far were only other ranks': what the share of bad ones is taken of."""
        epochs = self.position // len(self._source) + 1
        return math.ceil(len(self._source) * (1 - (1 - 1 / self._world_size) ** epochs))

    def _tasks(self, position: int) -> Iterator["_Task"]:
        """The parts of this rank's share of every batch."""
        slots, batch = self._ring_slots(), 0
        while True:
            first = position + self._rank * self._batch_size
            rows, epochs = self._visits.at(np.arange(first, first + self._batch_size, dtype=np.int64))
            for place in range(0, self._batch_size, self._part):
                part = slice(place, place + self._part)
                yield batch % slots, place, rows[part], epochs[part]
            position += self._batch_size * self._world_size
            batch += 1


_Task = tuple[int, int, list[int], list[int]]
"""Slot of the ring, place in its batch, rows and their epochs."""
_Part = tuple[list[tuple[int, int]] | None, list[tuple[str, str]]]
"""(row, epoch or view) of the images used, None where there was none, and (name, reason) of those unreadable."""


class _CropReader:
    """Fills a part of a batch in the ring; runs in a worker."""

    def __init__(
        self,
        source: ImageSource,
        crop: MultiCrop,
        ring: Ring,
        *,
        seed: int,
        max_pixels: int,
        scaled: bool,
        views: int | None = None,
    ) -> None:
        self._source, self._crop, self._ring = source, crop, ring
        self._seed, self._max_pixels, self._scaled, self._views = seed, max_pixels, scaled, views
        self._decoder, self._scratch = Decoder(), Scratch()

    def name(self, item: int) -> str:
        return self._source.name(item)

    def __call__(self, task: _Task, hand: Hand) -> _Part:
        slot, place, rows, epochs = task
        failures: list[tuple[str, str]] = []
        used: list[tuple[int, int]] = []
        whole = self._ring.slot(slot).values()
        for offset, (row, epoch) in enumerate(zip(rows, epochs, strict=True)):
            into = [crops[:, place + offset] for crops in whole]
            found = self._fill(into, row, epoch, failures, hand)
            if found is None:
                return None, failures
            used.append((found, self._view(epoch)))
        return used, failures

    def _view(self, epoch: int) -> int:
        return epoch if self._views is None else epoch % self._views

    def _fill(
        self, into: Sequence[Tensor], due: int, epoch: int, failures: list[tuple[str, str]], hand: Hand
    ) -> int | None:
        """Crops of row `due`, or of one that stands in for it; the row used."""
        row, draw = due, None
        for _ in range(_REPLACEMENT_TRIES):
            hand.hold(row)
            try:
                self._crops(into, row, due, epoch, hand)
                return row
            except BadImage as error:
                failures.append((error.name, error.reason))
            if draw is None:
                draw = np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=[0, 0, 1, due]))
            row = int(draw.integers(len(self._source)))
        return None

    def _crops(self, into: Sequence[Tensor], row: int, due: int, epoch: int, hand: Hand) -> None:
        """Crops of one row, keyed by the one that was due: a stand-in differs from its own turn in the epoch.

        Of a row with a number of views by itself: what is kept of its views holds for a stand-in too.
        """
        name = self._source.name(row)
        if hand.deadly(row):
            raise BadImage(name, DEADLY)
        opened = open_image(self._source.read(row), name=name, max_pixels=self._max_pixels)
        displayed = opened.height, opened.width
        cuts = self._crop.draw(*displayed, self._seed, self._view(epoch), due if self._views is None else row)
        shrink = self._crop.shrink(cuts) if self._scaled else 1
        pixels = self._decoder.stored(opened, shrink)
        self._crop.cut(pixels, cuts, displayed, into, self._scratch, opened.orientation, shrink)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": Decoder(), "_scratch": Scratch()}
