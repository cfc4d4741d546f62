"""Worker processes for the loaders: how they start, what they ignore, how many there should be."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader


class TaskReader(Protocol):
    """Something that turns one task into one result, in any process, the same each time."""

    def __getitem__(self, task: Any) -> Any: ...


def worker_loader(reader: TaskReader, tasks: Iterable[Any], workers: int, *, prefetch: int = 2) -> Iterator[Any]:
    """Results of `reader[task]` in the order of `tasks` (which may be endless), computed by `workers` processes.

    workers: 0 computes in this process. prefetch: results kept ready per worker, which bounds memory.
    """
    options: dict[str, Any] = {}
    if workers > 0:
        # fork shares the source's tables; elsewhere it is unsafe, and everything given to a loader pickles.
        method = "fork" if sys.platform.startswith("linux") else "spawn"
        options = {"prefetch_factor": prefetch, "multiprocessing_context": method, "worker_init_fn": _start_worker}
    return iter(
        DataLoader(
            reader,  # type: ignore[arg-type]  # torch asks for Dataset, uses __getitem__
            sampler=tasks,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            # Its own generator: a DataLoader draws a seed, which must not move the training's random state.
            generator=torch.Generator(),
            **options,
        )
    )


def default_workers(limit: int = 16) -> int:
    """Processor cores this process may use, less one for the main process, from 1 to `limit`.

    The processes that a launcher started on this machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    cores //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(cores - 1, limit))


def _as_is(result: Any) -> Any:
    return result


def _start_worker(worker: int) -> None:
    del worker
    # A terminal sends Ctrl-C, and a scheduler SIGTERM or SIGUSR1, to every process of the job. The main process alone
    # acts on them (it saves first, and then ends its workers); a worker that dies before would turn that into an error.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # One thread each: more would fight over cores, and OpenMP pools do not survive a fork.
    torch.set_num_threads(1)
