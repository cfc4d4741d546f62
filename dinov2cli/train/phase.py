"""A stretch of a training run, and what it takes its batches from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dinov2cli.train.schedules import RunLength, Schedules


class BatchSource(Protocol):
    """Endless batches {"global_crops": uint8 [2, B, 3, S, S], "local_crops": uint8 [L, B, 3, s, s], "index": int64 [B],
    "epoch": int64 [B]} that can go on from a position counted in batches handed out.

    A batch holds until the next one is asked for: the source may write that over it.
    """

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with its own crops, batch (images per rank) and schedules, laid out over its own length.

    `seed` is what `loader` was built with: it drives crops and colours.
    """

    schedules: Schedules
    length: RunLength
    loader: BatchSource
    batch_size: int
    global_size: int
    seed: int = 0
