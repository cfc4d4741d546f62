"""Blocks of work on all cores of this process, one thread a block.

Libraries that share out every small operation wait for the slowest core each time; on a machine that does anything
else besides, that costs several times what it gains. Whole blocks are shared out here instead.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """As many threads as torch would use (OMP_NUM_THREADS, or the cores), each of which computes alone.

    On a GPU one thread feeds it.
    """

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self.count = torch.get_num_threads() if device == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`work` of every item, in order; what it raises is raised here, when no thread is at work any more."""
        futures = [self._pool.submit(work, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
