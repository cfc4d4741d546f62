"""Endless shuffled crops for training, resumable at any image.

The order is a function of (seed, epoch), the pixels of a crop are one of (seed, epoch, sample): neither depends on the
number of workers, ranks, or on where a run was stopped. Positions count images over all ranks.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.decode import MAX_PIXELS, decode_image
from dinov2cli.data.source import ImageSource
from dinov2cli.data.workers import worker_loader
from dinov2cli.errors import InputError

_REPLACEMENT_TRIES = 100


class CropFunction(Protocol):
    """Crops of one image: uint8 [H, W, 3] → global uint8 [2, 3, S, S], local uint8 [L, 3, s, s] (L may be 0)."""

    def __call__(
        self, image: np.ndarray, *, seed: int, epoch: int, sample: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class CropLoader:
    """Batches of crops without end; every image once per epoch, an epoch's remainder flows into the next batch.

    An unreadable image is replaced by another one, chosen by (seed, epoch, sample), counted and named in `bad`.

    Args:
        source: the images; there may be fewer than one batch.
        crop: makes the crops of one image, see `CropFunction`; must pickle where workers are spawned.
        batch_size: images per rank and batch.
        seed: of order and crops.
        workers: processes that decode and crop; 0 does it in this one.
        start_step: batches already consumed by a run of the same batch size; `load_state_dict` is the exact way.
        rank, world_size: this process' share of each global batch of batch_size x world_size images.
        bad: counter and policy for unreadable images.
        max_pixels: larger images count as unreadable.
        prefetch: batches kept ready per worker.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        crop: CropFunction,
        batch_size: int,
        seed: int,
        workers: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bad: BadImages | None = None,
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}")
        self.bad = BadImages() if bad is None else bad
        self.position = start_step * batch_size * world_size
        self._source = source
        self._reader = _CropReader(source, crop, seed, max_pixels)
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._rank = rank
        self._world_size = world_size
        self._prefetch = prefetch

    def state_dict(self) -> dict[str, int]:
        """Images consumed so far, over all ranks; batches made ahead by workers do not count."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind `state['position']`; holds for iterators made from now on."""
        self.position = int(state["position"])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from the current position on, without end:

        global_crops uint8 [2, B, 3, S, S], local_crops uint8 [L, B, 3, s, s], index int64 [B] (row of the image used),
        epoch int64 [B].

        Raises:
            InputError: too many unreadable images.
        """
        tasks = self._tasks(self.position)
        for batch, failures in worker_loader(self._reader, _Endless(tasks), self._workers, prefetch=self._prefetch):
            for name, reason in failures:
                self.bad.add(name, reason)
            self.bad.check(self._met_by_now())
            if batch is None:
                raise InputError(
                    f"{self._source.spec}: {_REPLACEMENT_TRIES} images in a row cannot be read "
                    f"(first: {self.bad.names[0]}); repair the set"
                )
            self.position += self._batch_size * self._world_size
            yield batch

    def _met_by_now(self) -> int:
        """Images of the set, less those that so far were only other ranks': what the share of bad ones is taken of."""
        epochs = self.position // len(self._source) + 1
        return math.ceil(len(self._source) * (1 - (1 - 1 / self._world_size) ** epochs))

    def _tasks(self, position: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, epochs) of this rank's share of every batch."""
        n = len(self._source)
        known: dict[int, np.ndarray] = {}
        while True:
            first = position + self._rank * self._batch_size
            positions = np.arange(first, first + self._batch_size, dtype=np.int64)
            epochs = positions // n
            wanted = np.unique(epochs).tolist()
            known = {epoch: known[epoch] if epoch in known else epoch_order(self._seed, epoch, n) for epoch in wanted}
            rows = np.array([known[e][p] for e, p in zip(epochs.tolist(), (positions % n).tolist(), strict=True)])
            yield rows, epochs
            position += self._batch_size * self._world_size


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of n rows in which one epoch visits them; int64 [n]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 2, 0])).permutation(n)


class _Endless:
    """An iterator in the shape that DataLoader asks of a sampler."""

    def __init__(self, tasks: Iterator[Any]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Any]:
        return self._tasks


class _CropReader:
    """Turns (rows, epochs) into a batch and a list of failures; runs in a worker."""

    def __init__(self, source: ImageSource, crop: CropFunction, seed: int, max_pixels: int) -> None:
        self._source = source
        self._crop = crop
        self._seed = seed
        self._max_pixels = max_pixels

    def __getitem__(
        self, task: tuple[np.ndarray, np.ndarray]
    ) -> tuple[dict[str, torch.Tensor] | None, list[tuple[str, str]]]:
        rows, epochs = task
        failures: list[tuple[str, str]] = []
        crops: dict[str, torch.Tensor] = {}
        used: list[int] = []
        for place, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
            found = self._read(row, epoch, failures)
            if found is None:
                return None, failures
            # The crops are keyed by the sample that was due: a stand-in differs from its own turn in the epoch.
            parts = self._crop(found[1], seed=self._seed, epoch=epoch, sample=row)
            for name, part in zip(("global_crops", "local_crops"), parts, strict=True):
                if place == 0:
                    crops[name] = torch.empty((part.shape[0], len(rows), *part.shape[1:]), dtype=part.dtype)
                crops[name][:, place] = part
            used.append(found[0])
        index = torch.tensor(used, dtype=torch.int64)
        return {**crops, "index": index, "epoch": torch.from_numpy(epochs.astype(np.int64))}, failures

    def _read(self, row: int, epoch: int, failures: list[tuple[str, str]]) -> tuple[int, np.ndarray] | None:
        draw = None
        due = row
        for _ in range(_REPLACEMENT_TRIES):
            try:
                pixels = decode_image(self._source.read(row), name=self._source.name(row), max_pixels=self._max_pixels)
                return row, pixels
            except BadImage as error:
                failures.append((error.name, error.reason))
            if draw is None:
                draw = np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=[0, 0, 1, due]))
            row = int(draw.integers(len(self._source)))
        return None
