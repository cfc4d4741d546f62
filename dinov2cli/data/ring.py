"""Memory for batches that loader workers write and the main process reads: allocated once, never copied on the way.

Without it every batch would be pickled or sent as fresh shared memory, with a page fault for each of its 4 KiB on both
sides. A slot is written again as soon as the next batch is asked for.
"""

import math
import mmap
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGN = 4096


class Ring:
    """`slots` sets of tensors, each of the shapes and types given, in one piece of memory that processes share.

    Forked processes inherit an anonymous mapping, which no limit of /dev/shm concerns; spawned ones get it as a shared
    tensor when the ring is pickled.
    """

    def __init__(self, slots: int, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, forked: bool) -> None:
        self._layout = dict(layout)
        self._offsets, end = {}, 0
        for name, (shape, kind) in self._layout.items():
            self._offsets[name] = end
            size = math.prod(shape) * kind.itemsize
            end += -(-size // _ALIGN) * _ALIGN
        self._stride = end
        self.slots = slots
        self.bytes = slots * end
        length = max(self.bytes, 1)
        self._memory = (
            torch.frombuffer(mmap.mmap(-1, length), dtype=torch.uint8)
            if forked
            else torch.zeros(length, dtype=torch.uint8).share_memory_()
        )
        self._pinned = False

    def slot(self, number: int) -> dict[str, Tensor]:
        """Views of one slot's tensors by name."""
        views: dict[str, Tensor] = {}
        for name, (shape, kind) in self._layout.items():
            start = number * self._stride + self._offsets[name]
            flat = self._memory[start : start + math.prod(shape) * kind.itemsize]
            views[name] = flat.view(kind).view(shape)
        return views

    def pin(self) -> bool:
        """Lock the memory's pages, so that a GPU fetches batches from it by itself; False where that is refused."""
        if not self._pinned:
            result = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0)
            self._pinned = int(result) == 0
        return self._pinned

    def unpin(self) -> None:
        """Undo `pin`, before the memory goes."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._pinned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pinned": False}


def forks() -> bool:
    """Whether workers are forked, sharing all that is in memory; elsewhere that is unsafe, and they are spawned."""
    return sys.platform.startswith("linux")
