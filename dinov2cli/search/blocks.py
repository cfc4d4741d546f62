"""Work over the rows of a set, block by block: shared among the ranks, and kept on disk so that it can be stopped."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all) after every block."""

Arrays = Mapping[str, npt.NDArray[np.generic]]
"""What a block of work comes to, where it is to be kept: named arrays of numbers, bools or fixed-length strings."""

R = TypeVar("R")


class Stage(Protocol):
    """Finished blocks of one stage of a run, on disk; see `Parts` in artifacts."""

    def load(self, start: int) -> Arrays | None:
        """The result of the block that begins at row `start`; None where it was never finished."""

    def save(self, start: int, arrays: Arrays) -> None:
        """Keep the result of the block that begins at row `start`: whole, or not at all."""


class Store(Protocol):
    """Where the stages of a run keep what they have finished."""

    def stage(self, name: str, key: Mapping[str, object]) -> Stage:
        """The stage `name`, with all in `key` that its results depend on: other keys find nothing of these."""


def over_blocks(
    work: Callable[[int], R], rows: int, block: int, *, progress: Progress | None = None, ranks: Ranks = ALONE
) -> Iterator[R]:
    """`work(start)` of every block of `rows` rows, in order, on every rank; the ranks share the blocks.

    Where a block begins does not depend on the number of ranks, so neither does what is found.
    """
    starts = range(0, rows, block)
    results = ranks.merge(map(work, ranks.share(starts)), len(starts))
    for start, result in zip(starts, results, strict=True):
        yield result
        if progress is not None:
            progress(min(start + block, rows), rows)


def kept(work: Callable[[int], Arrays], stage: Stage | None) -> Callable[[int], Arrays]:
    """`work`, except for blocks that `stage` holds already; what it computes is kept there. For `over_blocks`."""
    if stage is None:
        return work

    def once(start: int) -> Arrays:
        found = stage.load(start)
        if found is None:
            found = work(start)
            stage.save(start, found)
        return found

    return once
