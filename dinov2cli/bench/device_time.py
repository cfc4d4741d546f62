"""Times of work on a device: medians by the device's own clock, the memory rate they are compared with, and what is
too wrong to be timed at all."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

FORWARD_BOUND, GRADIENT_BOUND, OVER_TORCH = 5e-3, 6e-3, 1.2
"""Largest relative errors of our kernels in bf16, and how many times plain torch's own error they may have."""
_COPY_MIB = {"cuda": 2048, "cpu": 256}


def median_seconds(
    runs: Sequence[Callable[[], object]], device: torch.device, *, rounds: int = 30, warmup: int = 5
) -> float:
    """Median seconds of one call. `runs` do the same work on different inputs and are called by turns, so that no
    input is still in a cache when its turn comes again. On a GPU CUDA events measure, one pair per call."""
    calls = [runs[i % len(runs)] for i in range(warmup + rounds)]
    for call in calls[:warmup]:
        call()
    if device.type != "cuda":
        return statistics.median(_wall(call) for call in calls[warmup:])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]
    for number, call in enumerate(calls[warmup:]):
        marks[2 * number].record()
        call()
        marks[2 * number + 1].record()
    torch.cuda.synchronize(device)
    return statistics.median(marks[2 * i].elapsed_time(marks[2 * i + 1]) for i in range(rounds)) / 1e3


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, bytes read plus bytes written: the rate no kernel can beat."""
    source = torch.randint(0, 127, (_COPY_MIB[device.type] << 20,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds([lambda: target.copy_(source)], device, rounds=10, warmup=2)


def first_wrong(errors: Mapping[str, float], plain: Mapping[str, float]) -> str | None:
    """The first of a kernel's errors ('forward', and one per gradient) beyond its bounds, in words; None if all hold.

    `plain`: the errors of plain torch in the same type.
    """
    for part, error in errors.items():
        allowed = min(FORWARD_BOUND if part == "forward" else GRADIENT_BOUND, OVER_TORCH * plain[part])
        if not error <= allowed:  # so that NaN is refused
            return f"{part} is off by {error:.2e}, allowed {allowed:.2e}"
    return None


def named(device: torch.device) -> str:
    """The device in words: 'NVIDIA H100 80GB HBM3', or 'cpu (2 threads)'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.get_num_threads()} threads)"


def _wall(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
