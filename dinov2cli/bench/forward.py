"""Speed and memory of forward passes of several models, as they are used after training: no gradients."""

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dinov2cli.bench.peak import resident_peak
from dinov2cli.device import autocast
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.load import load_model
from dinov2cli.models.vit import VisionTransformer

Network = VisionTransformer | Encoder

ROUNDS = 7
_MOST = {"cpu": 64, "cuda": 256}
# Operations that a pass of the slowest model may take: a few tenths of a second on an ordinary processor or GPU.
_WORK = {"cpu": 3e10, "cuda": 2e13}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def parameters_of(network: Network) -> int:
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())


def batch_for(sizes: Sequence[tuple[Network, int]], device: torch.device) -> int:
    """Images of a batch, a power of two, that suits the heaviest of the models at its image size in pixels; it follows
    from the models and the kind of device alone."""
    kind = device.type if device.type in _WORK else "cpu"
    heaviest = max(2 * parameters_of(net) * (size // net.patch_size) ** 2 for net, size in sizes)
    images = max(1, min(_MOST[kind], int(_WORK[kind] / max(heaviest, 1))))
    return int(2 ** (images.bit_length() - 1))


def forward_seconds(
    networks: Mapping[str, tuple[Network, int]], batch: int, *, precision: str, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of a forward pass of `batch` images for every round, of each (network, size in pixels) by turns, so that
    what disturbs the machine hits all alike; one round before is not counted."""
    images = {name: _images(network, batch, size) for name, (network, size) in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(rounds + 1):
        for name, (network, _) in networks.items():
            _wait(network.device)
            started = time.perf_counter()
            _forward(network, images[name], precision)
            _wait(network.device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def device_memory(network: Network, batch: int, size: int, *, precision: str) -> int:
    """Bytes on a CUDA device that a forward pass needs: the weights, and the most that it allocates beyond what is
    there."""
    images = _images(network, batch, size)
    _forward(network, images[:1], precision)
    torch.cuda.reset_peak_memory_stats(network.device)
    before = torch.cuda.memory_allocated(network.device)
    _forward(network, images, precision)
    _wait(network.device)
    return weight_bytes(network) + torch.cuda.max_memory_allocated(network.device) - before


def host_memory(models: Sequence[tuple[str, int]], batch: int, precision: str) -> list[int] | None:
    """As `device_memory` on the CPU, of every (MODEL, size in pixels) one after the other, out of the resident memory
    of this process: call it in one of its own (`peak.run_in_child`). None where the system does not tell the peak of a
    part of a process's life. Raises what `load_model` raises."""
    found = []
    for spec, size in models:
        network = load_model(spec, img_size=size).encoder
        images = _images(network, batch, size)
        _forward(network, images[:1], precision)
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what the pass asks for
        try:
            _RESET.write_text("5")
            before = int(re.search(r"VmRSS:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024  # type: ignore[index]
        except OSError:
            return None
        _forward(network, images, precision)
        found.append(weight_bytes(network) + max(0, resident_peak() - before))
    return found


def weight_bytes(network: Network) -> int:
    """Bytes of the weights as they are held."""
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _images(network: Network, batch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, size, size, generator=generator).to(network.device)


def _forward(network: Network, images: Tensor, precision: str) -> None:
    with torch.inference_mode(), autocast(images.device, precision):
        network(images)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
