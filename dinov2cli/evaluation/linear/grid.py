"""What the linear probe tries, on what it is chosen, and for how long it learns (DINOv2, arXiv 2304.07193, B.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import InputError, UserError

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""The grid of the paper, for 256 images per step."""

LAST_BLOCKS = (1, 4)
EPOCHS = 10
MIN_STEPS = 1_000
"""A small set has too few batches in ten passes for the low rates of the grid to get anywhere."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Head:
    """One head of the grid. `id` is unique: it counts the rates, for rates rounded into a name would collide.

    learning_rate: for 256 images per step. blocks: the head reads the class tokens of that many last blocks, and with
    averaged_patches also the mean of the last block's patch tokens.
    """

    id: str
    learning_rate: float
    blocks: int
    averaged_patches: bool

    @property
    def reads(self) -> tuple[int, bool]:
        """What tells its input from that of other heads."""
        return self.blocks, self.averaged_patches


def head_grid(
    available_blocks: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    blocks: Sequence[int] = LAST_BLOCKS,
    averaged_patches: Sequence[bool] = (False, True),
    has_patches: bool = True,
) -> tuple[list[Head], list[str]]:
    """The grid of rates x last blocks x with or without averaged patches, and notes on what was clipped.

    available_blocks, has_patches: what the features hold (descriptors: one vector, no patches).
    Raises UserError for rates that are not positive numbers, and for an empty grid.
    """
    if not learning_rates or not all(0 < rate < math.inf for rate in learning_rates):
        raise UserError(f"linear learning rates are {list(learning_rates)}, expected one or more positive numbers")
    if not blocks or min(blocks) < 1 or not averaged_patches:
        raise UserError(f"linear blocks are {list(blocks)}, expected one or more whole numbers from 1: use [1, 4]")
    used = sorted({min(count, available_blocks) for count in blocks})
    too_many = sorted({count for count in blocks if count > available_blocks})
    notes = [f"last {count} blocks clipped to the {available_blocks} there are" for count in too_many]
    if not has_patches:
        notes = ["this model gives one vector per image: the grid has learning rates only"]
        averaged_patches = (False,)
    heads = [
        Head(f"blocks{count}-{'patches' if patches else 'class'}-rate{index:02d}", rate, count, patches)
        for count in used
        for patches in sorted(set(averaged_patches))
        for index, rate in enumerate(learning_rates)
    ]
    return heads, notes


def split_validation(labels: Rows, fraction: float, *, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, int64, sorted: a fraction of each class, at least one if it has two.

    Raises UserError for a fraction that is none, InputError when nothing can be held out (every class has one image).
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction is {fraction}, expected a number between 0 and 1: use 0.1")
    rng = np.random.Generator(np.random.Philox(key=seed))
    held: list[Rows] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held.append(rows[:count])
    validation = np.sort(np.concatenate(held)) if held else np.zeros(0, np.int64)
    if not len(validation):
        raise InputError(
            "no training class has two images, so none can be held out to choose the linear head: "
            "give more images per class, or use `dinov2 eval knn`"
        )
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def default_steps(n_train: int, batch_size: int, epochs: int = EPOCHS) -> int:
    """That many passes over the training images, but no fewer than 1,000 steps."""
    return max(math.ceil(epochs * n_train / batch_size), MIN_STEPS)


class Batches:
    """Rows of every step: batches walk through shuffled passes over `rows` rows, one pass after the other.

    What a step reads follows from (seed, step) alone, so training can begin anywhere.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._rows, self._batch, self._seed = rows, batch_size, seed
        self._pass: tuple[int, Rows] | None = None

    def at(self, step: int) -> Rows:
        """The rows of this step, int64 [batch_size]."""
        parts: list[Rows] = []
        first, stop = step * self._batch, (step + 1) * self._batch
        while first < stop:
            number, offset = divmod(first, self._rows)
            part = self._order(number)[offset : offset + stop - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def _order(self, number: int) -> Rows:
        if self._pass is None or self._pass[0] != number:
            rng = np.random.Generator(np.random.Philox(key=[self._seed, number]))
            self._pass = number, rng.permutation(self._rows)
        return self._pass[1]
