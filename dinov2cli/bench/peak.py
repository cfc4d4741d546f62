"""What this machine can do at most, and what a process needed at most."""

import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dinov2cli.train.parallel import Parallel

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def matmul_peak(parallel: Parallel, rounds: int = 5) -> float:
    """Operations per second of a large square matrix product in the run's precision, best of `rounds`."""
    size = 8192 if parallel.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=parallel.device).to(_TYPES[parallel.precision])
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def run_in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Result of `function(*arguments)` in a fresh process with as many threads: its memory is its own.

    Raises RuntimeError when the process fails.
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=_report, args=(function, arguments, torch.get_num_threads(), results))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"the process that measures memory ended with {child.exitcode}")
    return results.get()


def _report(function: Callable[..., Any], arguments: tuple, threads: int, results: Any) -> None:
    torch.set_num_threads(threads)
    results.put(function(*arguments))


def resident_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss would still hold the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
