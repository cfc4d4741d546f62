"""The state of fine-tuning on disk, and what passes between the processes of a launch: gradients and that state."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2cli.distributed import Ranks, noticing_lost_ranks
from dinov2cli.search.blocks import Stage

_BUCKET = 1 << 23
"""Numbers that are sent at once: 32 MB."""
_PLACE, _TENSOR = 0, "tensor."


@dataclass
class Course:
    """How far fine-tuning came, and how: mean loss of every step, held-out accuracy of every epoch, the epoch (from 1;
    0: none) whose weights were best there."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: int = 0


def save(stage: Stage | None, ranks: Ranks, course: Course, tensors: dict[str, Tensor]) -> None:
    """Replace what `stage` holds by this state, whole or not at all; all ranks must call. WorkError on a full disk."""

    def write() -> None:
        if stage is None or not ranks.main:
            return
        arrays = {_TENSOR + name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        arrays["place"] = np.array([course.step, course.best])
        arrays["losses"], arrays["held_out"] = np.array(course.losses), np.array(course.held_out)
        stage.save(_PLACE, arrays)

    ranks.together(write)


class Saved:
    """A state found on disk: `course`, and `names` of its tensors; `fill` copies those into place."""

    def __init__(self, course: Course, names: list[str], arrays: dict[str, np.ndarray], ranks: Ranks) -> None:
        self.course, self.names = course, names
        self._arrays, self._ranks = arrays, ranks

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Write the saved values into `tensors`, which are those of `names`; all ranks must call."""
        for name in self.names:
            target = tensors[name].detach()
            if self._ranks.main:
                target.copy_(torch.from_numpy(self._arrays.pop(name)))
            if self._ranks.world_size > 1:
                with noticing_lost_ranks(self._ranks):
                    dist.broadcast(target, src=0, group=_group(self._ranks, target))


def load(stage: Stage | None, ranks: Ranks) -> Saved | None:
    """The state in `stage`, of which only the main process needs to have one; None where there is none."""
    found = stage.load(_PLACE) if stage is not None and ranks.main else None
    arrays = (
        {name.removeprefix("tensor."): found[name] for name in found if name.startswith("tensor.")} if found else {}
    )

    def told() -> tuple[Course, list[str]] | None:
        if found is None:
            return None
        step, best = (int(number) for number in found["place"])
        return Course(step, found["losses"].tolist(), found["held_out"].tolist(), best), sorted(arrays)

    state = ranks.first(told)
    return None if state is None else Saved(*state, arrays, ranks)


def sum_over_ranks(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Add up float32 `tensors` over all ranks, in place, some megabytes at a time. Raises LostRank."""
    if ranks.world_size == 1:
        return
    with noticing_lost_ranks(ranks):
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat, group=_group(ranks, flat))
            for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _group(ranks: Ranks, tensor: Tensor) -> dist.ProcessGroup | None:
    """gloo's group for what lies in the host's memory, the default one (NCCL) for a GPU's."""
    return None if tensor.is_cuda else ranks.host
