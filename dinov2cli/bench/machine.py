"""What `dinov2 doctor` looks at: the software, the machine, and whether images come as fast as a model takes them."""

import importlib.metadata
import math
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from dinov2cli.bench.input_path import BATCH, crops_of, loader_rate, one_thread, sample_of, stage_times
from dinov2cli.bench.train import training_rate
from dinov2cli.data.bad import BadImages
from dinov2cli.data.cores import default_workers
from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.jpeg import turbo
from dinov2cli.data.source import open_source
from dinov2cli.device import choose_device, choose_precision
from dinov2cli.errors import UserError
from dinov2cli.kernels.dispatch import choices, summary

State = Literal["ok", "advice", "problem"]
_FEW_FILES = 4096
_LITTLE_DISK = 5 << 30
_DATA = "demo:photos?count=400"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and what to do where that is not `ok`."""

    name: str
    found: str
    state: State = "ok"
    advice: str = ""


def examine(device: str = "auto", data: str | None = None, arch: str | None = None) -> Iterator[Finding]:
    """Look at one thing after the other; the last one measures the input path on `data` beside a step of `arch`."""
    where = choose_device(device)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _torch(where)
    kernels = _kernels(where)
    yield kernels
    yield _decoder()
    yield _faiss()
    yield from _optional()
    yield from _resources()
    if kernels.state != "problem":  # without them no step can be timed
        yield _feeding(where, data or _DATA, arch)


def verdict(findings: list[Finding]) -> tuple[str, bool]:
    """The whole in a sentence, and whether training can be expected to work here."""
    problems = [finding.name for finding in findings if finding.state == "problem"]
    if problems:
        return f"not ready: see {', '.join(problems)} above", False
    advised = [finding.name for finding in findings if finding.state == "advice"]
    return ("ready" if not advised else f"ready; more can be had from {', '.join(advised)}"), True


def _torch(device: torch.device) -> Finding:
    precision, reason = choose_precision("auto", device, training=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    found = f"{torch.__version__}, {device} ({name}), trains in {precision} ({reason})"
    try:
        value = float(
            torch.ones(64, 64, device=device).to(torch.float32).matmul(torch.ones(64, 64, device=device))[0, 0]
        )
    except RuntimeError as error:
        return Finding("torch", f"{found}: {str(error).splitlines()[0]}", "problem", "install torch for this machine")
    if value != 64:
        return Finding("torch", f"{found}: 64 x 1 x 1 came out as {value}", "problem", "install torch again")
    if device.type == "cpu" and torch.version.cuda:
        return Finding(
            "torch", found, "advice", "a CUDA build without a usable GPU: check the driver, or install the CPU build"
        )
    return Finding("torch", found)


def _kernels(device: torch.device) -> Finding:
    """What the operators of a training step run on."""
    try:
        found = summary(device)
    except UserError as error:
        return Finding("kernels", str(error), "problem")
    lacking = {choice.backend for choice in choices(device) if not choice.forced} & {"xformers", "sdpa", "torch"}
    if device.type == "cuda" and lacking:
        return Finding("kernels", found, "advice", "`dinov2 kernels info` says what each one lacks")
    return Finding("kernels", found)


def _decoder() -> Finding:
    from PIL import Image, features

    kinds = [name for name in ("webp", "avif") if features.check(name)]
    if ".heic" in Image.registered_extensions():
        kinds.append("heic")
    found = f"Pillow {importlib.metadata.version('pillow')} with {', '.join(kinds) or 'JPEG and PNG only'}"
    if turbo() is None:
        return Finding("decoder", found, "advice", "JPEG decodes sooner with pip install 'dinov2cli[fast]'")
    return Finding("decoder", f"{found}; JPEG by simplejpeg {importlib.metadata.version('simplejpeg')}")


def _faiss() -> Finding:
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return Finding("faiss", f"{faiss.__version__}, {f'{gpus} GPUs' if gpus else 'on the CPU'}")


def _optional() -> Iterator[Finding]:
    extras = {"xformers": "gpu", "triton": "gpu", "transformers": "compare", "tensorboard": "tensorboard"}
    have, lack = [], []
    for package, extra in extras.items():
        try:
            have.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lack.append(f"{package} [{extra}]")
    yield Finding("extras", f"{', '.join(have) or 'none'}{'; not installed: ' + ', '.join(lack) if lack else ''}")


def _resources() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("machine", f"{os.cpu_count()} cores, {memory:.0f} GiB of memory; {default_workers()} loader workers")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _FEW_FILES:
        yield Finding("open files", f"{files} allowed", "advice", f"many shards want more: ulimit -n {_FEW_FILES}")
    else:
        yield Finding("open files", f"{files} allowed")
    here = shutil.disk_usage(".")
    found = f"{here.free / 2**30:.0f} of {here.total / 2**30:.0f} GiB free here"
    if here.free < _LITTLE_DISK:
        yield Finding("disk", found, "advice", "runs and caches may fill it: give -o and HF_HOME on a larger one")
    else:
        yield Finding("disk", found)


def _feeding(device: torch.device, data: str, arch: str | None) -> Finding:
    """Whether the workers of this machine keep up with a model."""
    arch = arch or ("vits14" if device.type == "cuda" else "tiny")
    crop = crops_of(arch)
    source = open_source(data)
    sample = sample_of(source, 64, None)
    with one_thread():
        decode, cut = min((stage_times(sample.files, crop, 0) for _ in range(2)), key=sum)
    one = 1e3 / (sample.read_seconds * 1e3 + decode + cut)
    workers = default_workers()
    loader = CropLoader(source, crop=crop, batch_size=BATCH, seed=0, workers=workers, bad=BadImages(1.0))
    supply, _ = loader_rate(loader, device, seconds=1.0)
    demand, _ = training_rate(arch, device, crop)
    found = (
        f"{workers} worker{'s give' if workers > 1 else ' gives'} {supply:.0f} images/s "
        f"({sample.pixels / 1e6:.2g} megapixels each), {arch} takes {demand:.0f}"
    )
    if supply >= demand:
        return Finding("input", found)
    needed = math.ceil(demand / one)
    return Finding(
        "input",
        found,
        "advice",
        f"the model waits for images: {needed} workers would keep up; fewer do where large images are packed small "
        "(`dinov2 pack`) or decoded in part (data.scaled_decode=true)",
    )
