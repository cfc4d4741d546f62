"""How many processes or threads decode images, unless told."""

import os


def default_workers(limit: int = 16) -> int:
    """Processor cores this process may use, less one for the main process, from 1 to `limit`.

    The processes that a launcher started on this machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    cores //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(cores - 1, limit))
