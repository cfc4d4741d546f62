"""The processes of one launch (`accelerate launch`, `torchrun`, `-n`): who this one is, and how they share work.

A command under a launch runs the same code in every process. Heavy maps are dealt out (`Ranks.merge`, `Ranks.map`), the
rest is computed by all alike, and only the main process writes. Without a launch there is one rank and nothing is sent.
torch and accelerate are imported only where a launch is found.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from dinov2cli.errors import DinoError, UserError, WorkError

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = timedelta(days=1)
"""How long the ranks of a command wait for the main process, which may train a probe for hours. A rank that dies closes
its connections and is noticed at once."""

_GPU_PATIENCE = timedelta(minutes=5)


class LostRank(WorkError):
    """Another rank of the launch has gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a launch. `host` is their gloo group, for what lives in the host's memory."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are this rank's: every `world_size`-th one."""
        return items[self.rank :: self.world_size]

    def merge(self, own: Iterable[R], total: int, *, main_only: bool = False) -> Iterator[R]:
        """Results of all `total` items in order, `own` being those of `share`; each rank must exhaust the iterator.

        Every rank gets all of them, or with `main_only` the main process alone (the others iterate over nothing, but
        must iterate). One result of each rank is held at a time. What a rank raises is raised by all.
        """
        iterator = iter(own)
        for first in range(0, total, self.world_size):
            due = first + self.rank < total
            results = self._exchange(lambda: next(iterator), main_only) if due else self._exchange(None, main_only)
            yield from results[: total - first]

    @contextlib.contextmanager
    def gather(self, own: Iterable[R], total: int) -> Iterator[Iterator[R]]:
        """For a `with` block: `merge` for the main process only, which may write what comes; the others wait for it at
        their next result.

        Every rank must exhaust the iterator and leave the block. What the block raises, on any rank, is raised by all.
        """
        failed: list[DinoError] = []

        def verdict() -> None:
            if failed:
                raise failed[0]

        def mine() -> Iterator[R]:
            for result in own:
                yield result
                verdict()

        stream = self.merge(mine(), total, main_only=True)
        try:
            yield stream
        except DinoError as error:
            if self.world_size == 1 or error.rank is not None:
                raise
            failed.append(error)
            for _ in stream:  # the next exchange tells the others
                pass
        self.together(verdict)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of every item, in order, on every rank; each computes its share."""
        return list(self.merge(map(function, self.share(items)), len(items)))

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main process, given to all; what it raises is raised by all."""
        if self.world_size == 1:
            return make()
        # Broadcast, not gathered: an index of gigabytes must arrive once, not once from every rank.
        value, error = self._reached(make if self.main else None, lambda *outcome: self._broadcast(outcome))
        _raise([error])
        return cast(T, value)

    def together(self, work: Callable[[], T]) -> T:
        """`work()` of this rank; where one rank raises, all raise the same. For what may fail on some ranks only."""
        return self._exchange(work, main_only=False, keep=True)[0] if self.world_size > 1 else work()

    def same(self, value: Any, what: str) -> None:
        """Raise UserError, by all, unless every rank brings an equal JSON-able `value`; `what` names it."""
        digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        found = self._exchange(lambda: digest, main_only=False)
        odd = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if odd:
            error = UserError(
                f"ranks {', '.join(map(str, odd))} of {self.world_size} found other {what} than rank 0; "
                "all machines must see the same files and be given the same command"
            )
            error.rank = 0
            raise error

    def wait(self) -> None:
        """Return when every rank has come here."""
        self._exchange(None, main_only=False)

    def _exchange(self, work: Callable[[], Any] | None, main_only: bool, keep: bool = False) -> list[Any]:
        """Results of `work` of all ranks (only this one's with `keep`); the first DinoError of any is raised by all."""
        if self.world_size == 1:
            return [] if work is None else [work()]
        return self._reached(
            work, lambda value, error: self._send((None if keep else value, error), value, main_only, keep)
        )

    def _reached(self, work: Callable[[], Any] | None, talk: Callable[[Any, DinoError | None], R]) -> R:
        """What `talk`, with the other ranks about the result or the error of `work`, comes to."""
        error: DinoError | None = None
        try:
            value, error = _attempt(work)
            with noticing_lost_ranks(self):
                return talk(value, error)
        except DinoError as broken:
            if broken.rank is not None:
                raise
            # A rank is gone, or a signal came amid the exchange: nobody can be told any more, so this rank leaves.
            error = error or broken
            error.rank = self.rank
            raise error from broken.__cause__

    def _broadcast(self, value: Any) -> Any:
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host)
        return values[0]

    def _send(self, outcome: tuple[Any, Any], value: Any, main_only: bool, keep: bool) -> list[Any]:
        import torch.distributed as dist

        outcomes: list[Any] = [None] * self.world_size
        if main_only:
            dist.gather_object(outcome, outcomes if self.main else None, dst=0, group=self.host)
            errors = self._broadcast([error for _, error in outcomes] if self.main else None)
            _raise(errors)
            return [result for result, _ in outcomes] if self.main else []
        dist.all_gather_object(outcomes, outcome, group=self.host)
        _raise([error for _, error in outcomes])
        return [value] if keep else [result for result, _ in outcomes]


ALONE = Ranks()
"""The one process of a command that no launcher started."""


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def met() -> bool:
    """Whether the processes of the launch have met, so that what one of them meets is its own affair."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def join(device: str = "auto", patience: timedelta = _PATIENCE) -> Ranks:
    """Meet the other processes of the launch, if there are any. `device` 'cpu' keeps a machine's GPUs out of it.

    `patience` is how long a rank waits for the others. Raises WorkError where they cannot be
    reached, UserError for more processes than GPUs.
    """
    if not launched():
        return ALONE
    import torch

    cpu = device == "cpu" or not torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and here > torch.cuda.device_count():
        raise UserError(
            f"the launch has {here} processes on this machine, torch sees {torch.cuda.device_count()} GPUs; "
            "expected at most as many processes, or --device cpu"
        )
    state = process_group(cpu=cpu, patience=patience)
    host = torch.distributed.group.WORLD
    if state.device.type != "cpu":
        host = torch.distributed.new_group(backend="gloo", timeout=patience)
    return Ranks(state.process_index, state.num_processes, state.local_process_index, host)


def process_group(*, cpu: bool, patience: timedelta) -> Any:
    """Accelerate's PartialState: process group and device from the environment that the launcher set.

    On a GPU the group also carries host tensors, by gloo. Raises WorkError where the other processes do not answer.
    """
    from accelerate import PartialState

    try:
        # Without cpu=True every process of a machine without GPUs would think that it is alone.
        if cpu:
            return PartialState(cpu=True, backend="gloo", timeout=patience)
        # Host groups have patience of their own; a GPU that waits longer than this waits for a rank that is gone.
        return PartialState(backend="cuda:nccl,cpu:gloo", timeout=min(patience, _GPU_PATIENCE))
    except NotImplementedError:  # accelerate's, of a driver; a RuntimeError too
        raise
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR', 'no MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'no MASTER_PORT')}"
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WorkError(
            f"rank {os.environ.get('RANK', '?')} cannot reach the other processes of the launch at {place} ({cause}); "
            "check the address, the port and the number of processes given to the launcher"
        ) from error


_LOST = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|timed? ?out|socket|remote (error|process|rank|worker)|aborted",
    re.IGNORECASE,
)


@contextlib.contextmanager
def noticing_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Raise LostRank, which says so, for an exchange inside that failed because another rank has gone."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no class of their own that both use
        if ranks.world_size == 1 or not _LOST.search(str(error)):
            raise
        lines = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).splitlines()
        told = next((line for line in lines if line.startswith("Last error")), None)  # NCCL's own words come last
        cause = f"{told} {lines[-1]}" if told else lines[0].split(". ")[0]
        raise LostRank(
            f"rank {ranks.rank} of {ranks.world_size} has lost another rank ({cause}), so all stop; the rank that "
            "failed first says why; the same command continues from what is saved"
        ) from error


def leave() -> None:
    """Leave the launch, at the end of a command that succeeded."""
    import torch.distributed as dist

    if met():
        dist.destroy_process_group()


def report_failure(text: str) -> None:
    """Leave a line for the launcher, which shows it in its summary of what failed (torchelastic's error file)."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as handle:
            # The launcher takes the earliest failure for the cause of all.
            json.dump({"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}, handle)


def _attempt(work: Callable[[], Any] | None) -> tuple[Any, DinoError | None]:
    """The result of `work` and the error it raised; one that all ranks raise already goes its way."""
    try:
        return (None if work is None else work()), None
    except DinoError as error:
        if error.rank is not None:
            raise
        return None, error


def _raise(errors: Sequence[DinoError | None]) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            error.rank = rank  # whoever it is prints it; the others know that it has been said
            raise error
