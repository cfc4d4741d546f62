"""`-n N`: the same command again in N processes of this machine, by torch's elastic launcher."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from dinov2cli.distributed import launched
from dinov2cli.errors import Preempted, UserError

_FLAGS = ("-n", "--processes")


class Ended(Exception):
    """The processes that were started have ended and said what there was to say: leave the program with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def relaunch(processes: int | None) -> None:
    """Run this command line in `processes` processes and raise Ended with their exit code.

    Returns where there is nothing to start: one process, or this is one of several already.
    """
    if launched() and processes is not None and processes != (found := int(os.environ["WORLD_SIZE"])):
        raise UserError(f"-n {processes} inside a launch of {found} processes; expected one of the two: leave out -n")
    if processes is None or processes == 1 or launched():
        return
    raise Ended(start(without_processes(sys.argv[1:]), processes))


def without_processes(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments less `-n N`, in any of its spellings."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in _FLAGS:
            skip = True
        elif not (argument.startswith("--processes=") or (argument.startswith("-n") and argument[2:].isdigit())):
            kept.append(argument)
    return kept


def start(arguments: Sequence[str], processes: int) -> int:
    """Run `dinov2 ARGUMENTS` in `processes` processes until all end; the exit code of the first that failed, or 0.

    A signal to this process goes to all of them: they save, and the code says what stopped them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet()
    # torchrun would give each process one thread; where there is no GPU they are what computes.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # How long ranks have to save after a signal; also how long those that hang after another died stay.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "45")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"dinov2-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # the machine's own name may not be one that can be looked up
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dinov2cli", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # The launcher ends the others by SIGTERM; any other signal came from outside, and came first.
        killed = [f for f in error.failures.values() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
        return _killed(killed[0]) if killed else max(first.exitcode, 1)
    except SignalException as stopped:
        return 130 if stopped.sigval == signal.SIGINT else Preempted.exit_code
    return 0


def _killed(failure: Any) -> int:
    name = signal.Signals(-failure.exitcode).name
    print(  # noqa: T201
        f"error: rank {failure.local_rank} was ended by {name}, and then all; the same command continues",
        file=sys.stderr,
    )
    return 1


def _quiet() -> None:
    """Silence the launcher's own reports: the process that failed has said why, in one line."""
    import logging

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
