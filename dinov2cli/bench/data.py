"""`dinov2 bench data DATA`: how fast images become crops, where the time goes, and how many workers a model needs.

One core, beside the all-Pillow pipeline on the same images with the same boxes and colours, by turns in one process.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dinov2cli.bench.input_path import (
    BATCH,
    InMemory,
    colour_time,
    crop_bytes,
    crops_of,
    loader_rate,
    one_thread,
    sample_of,
    stage_times,
)
from dinov2cli.bench.pillow_pipeline import pillow_crops, pillow_sample
from dinov2cli.bench.train import training_rate
from dinov2cli.data.augment import Augment
from dinov2cli.data.bad import BadImages
from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.jpeg import turbo
from dinov2cli.data.order import mixing
from dinov2cli.data.pack import pack_image
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.data.visits import Visits
from dinov2cli.device import choose_device

DEFAULT_DATA, DEFAULT_MEGAPIXELS = "demo:photos?count=400", 0.19
"""Photographs that need no download, at the size of ImageNet's."""
_PACK_SIZE = 512
_PIXELS = 75e6
"""Pixels looked at where images are made large: Pillow takes a tenth of a second for each few million."""
_AHEAD_BATCH = 64


def run(
    device: str = "auto",
    seed: int = 0,
    data: str | None = None,
    *,
    images: int = 256,
    megapixels: float | None = None,
    arch: str | None = "vits14",
    crop: MultiCrop | None = None,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure the input path on up to `images` images of `data`; with `megapixels` on a few of them, made that large.

    Returns, times in milliseconds per image on one core unless said otherwise: `parts` (read, decode, crop, colour on
    `device`, transfer: the main process' own work per image), `images_per_s` (of one core: read, decode, crop),
    `pillow_ms` and `pillow_crops_ms` (the reference with and without colours), `speedup` (reference with colours over
    decode and crop, for colours are the device's), `speedup_crops` (both without colours), `speedup_on_cpu` (both with,
    on a CPU), `memory_ratio` (bytes handed on per image), `scaled` and `packed` (decode and crop of JPEGs decoded at a
    part of their size, or packed at 512 pixels before), `loader` (images/s by workers) with `loader_gain` (2 over 1),
    `batches_mib` (memory of batches made ahead), `model` (rate of a training step of `arch` on `device`, None leaves it
    out, and the workers it needs).
    """
    where, crop = choose_device(device), crop or (MultiCrop() if arch is None else crops_of(arch))
    if data is None:
        data, megapixels = DEFAULT_DATA, megapixels or DEFAULT_MEGAPIXELS
    source = open_source(data)
    if megapixels is not None:
        images = min(images, max(8, int(_PIXELS / (megapixels * 1e6))))
    sample = sample_of(source, images, megapixels)
    with one_thread():
        ours, plain = _by_turns(sample.files, crop, seed, rounds)
        scaled = _best(lambda: stage_times(sample.files, crop, seed, scaled=True), rounds)
        packed = _packed(sample.files, crop, seed, rounds)
        colour_cpu = colour_time(crop, torch.device("cpu"), seed, rounds)
    colour = colour_cpu if where.type == "cpu" else colour_time(crop, where, seed, rounds)
    decode, cut = ours
    fed = source if megapixels is None else InMemory(sample.files)
    loader, hand_over = _loaders(fed, crop, seed, where, rounds)
    figures: dict[str, Any] = {
        "data": source.spec,
        "images": len(sample.files),
        "megapixels": sample.pixels / 1e6,
        "decoder": "Pillow" if turbo() is None else "Pillow, JPEG by simplejpeg",
        "file_bytes": float(np.mean([len(file) for file in sample.files])),
        "crop_bytes": crop_bytes(crop),
        "parts": {
            "read": sample.read_seconds * 1e3,
            "decode": decode,
            "crop": cut,
            "colour": colour,
            "transfer": hand_over,
        },
        "images_per_s": 1e3 / (sample.read_seconds * 1e3 + decode + cut),
        "pillow_ms": plain[1],
        "pillow_crops_ms": plain[0],
        "speedup": plain[1] / (decode + cut),
        "speedup_crops": plain[0] / (decode + cut),
        "speedup_on_cpu": plain[1] / (decode + cut + colour_cpu),
        "memory_ratio": crop_bytes(crop) / _pillow_bytes(sample.files[0], crop, seed),
        "scaled": {"decode": scaled[0], "crop": scaled[1], "gain": (decode + cut) / sum(scaled)},
        "packed": packed | {"gain": (decode + cut) / (packed["decode"] + packed["crop"])},
        "loader": loader,
        "loader_gain": loader["2"] / loader["1"],
        "batches_mib": _ahead_mib(fed, crop),
        "device": str(where),
    }
    if arch is not None:
        figures["model"] = _needs(arch, where, crop, figures)
    if source.blocks is not None and len(source) > 1:
        figures["mixing"] = _mixing(source, seed)
    return figures


def _by_turns(
    files: list[bytes], crop: MultiCrop, seed: int, rounds: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Best (decode, crop) of ours, and best (without, with colours) of Pillow's, alternating."""
    augment = Augment()
    ours: list[tuple[float, float]] = []
    plain: list[tuple[float, float]] = []
    for _ in range(rounds):
        ours.append(stage_times(files, crop, seed))
        started = time.perf_counter()
        for number, data in enumerate(files):
            pillow_crops(data, crop, seed=seed, epoch=0, sample=number)
        between = time.perf_counter()
        for number, data in enumerate(files):
            pillow_sample(data, crop, augment, seed=seed, epoch=0, sample=number)
        each = 1e3 / len(files)
        plain.append(((between - started) * each, (time.perf_counter() - between) * each))
    first, second = (min(times) for times in zip(*plain, strict=True))
    return min(ours, key=sum), (first, second)


def _pillow_bytes(data: bytes, crop: MultiCrop, seed: int) -> int:
    """What the reference hands on for one image."""
    return sum(image.nbytes for image in pillow_sample(data, crop, Augment(), seed=seed, epoch=0, sample=0))


def _best(measure: Callable[[], tuple[float, float]], rounds: int) -> tuple[float, float]:
    return min((measure() for _ in range(rounds)), key=sum)


def _packed(files: list[bytes], crop: MultiCrop, seed: int, rounds: int) -> dict[str, float]:
    """Decode and crop of the same images packed at 512 pixels, and their bytes."""
    small = [pack_image(data, name="image", size=_PACK_SIZE).data for data in files]
    decode, cut = _best(lambda: stage_times(small, crop, seed), rounds)
    return {"decode": decode, "crop": cut, "file_bytes": float(np.mean([len(data) for data in small]))}


def _loaders(
    source: ImageSource, crop: MultiCrop, seed: int, device: torch.device, turns: int
) -> tuple[dict[str, float], float]:
    """Images/s of the loader with one and two workers, best of `turns`, and milliseconds of the main process each."""
    rates: dict[str, list[float]] = {"1": [], "2": []}
    own, bad = math.inf, BadImages(1.0)
    for _ in range(turns):
        for workers in rates:
            loader = CropLoader(source, crop=crop, batch_size=BATCH, seed=seed, workers=int(workers), bad=bad)
            rate, busy = loader_rate(loader, device, seconds=1.2)
            rates[workers].append(rate)
            own = min(own, busy)
    return {workers: max(values) for workers, values in rates.items()}, own


def _ahead_mib(source: ImageSource, crop: MultiCrop) -> float:
    """MiB that the batches made ahead take, at a batch of 64 and for up to as many workers."""
    loader = CropLoader(source, crop=crop, batch_size=_AHEAD_BATCH, seed=0, workers=16)
    return loader.memory_bytes() / 2**20


def _needs(arch: str, device: torch.device, crop: MultiCrop, figures: dict[str, Any]) -> dict[str, Any]:
    """The rate of a training step of `arch` here, the workers that keep up with it, and colour's share of a step."""
    rate, flops = training_rate(arch, device, crop)
    return {
        "arch": arch,
        "images_per_s": rate,
        "gflop": flops / 1e9,
        "workers_per_100_tflops": 1e14 / flops / figures["images_per_s"],
        "workers": math.ceil(rate / figures["images_per_s"]),
        "colour_share": figures["parts"]["colour"] * rate / 1e3,
    }


def _mixing(source: ImageSource, seed: int) -> dict[str, float]:
    """How a batch of 64 is mixed when blocks are shuffled, beside an exact shuffle."""
    assert source.blocks is not None
    visits = Visits(source, seed, shuffle="blocks")
    order = np.array(visits.at(np.arange(len(source), dtype=np.int64))[0])
    found = mixing(order, source.blocks, min(64, len(source)))
    return {"window": float(visits.window), "batch": float(min(64, len(source))), **found._asdict()}


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for people."""
    f, parts = figures, figures["parts"]
    total = sum(parts.values())
    text = [
        f"{f['images']} images of {f['data']}: {f['megapixels']:.2f} megapixels, {f['file_bytes'] / 1e3:.1f} kB a file "
        f"(median, mean); decoded by {f['decoder']}",
        f"per image, one core{'' if f['device'] == 'cpu' else ', colour on ' + f['device']}:",
        *(f"  {name:<9} {ms:8.3f} ms  {ms / total:6.1%}" for name, ms in parts.items()),
        f"a worker makes {f['images_per_s']:.0f} images/s and hands on {f['crop_bytes'] / 1e3:.0f} kB each",
        f"all in Pillow: {f['pillow_ms']:.2f} ms, without colours {f['pillow_crops_ms']:.2f} ms",
        f"  decode and crop (colours go to the device)  {f['speedup']:5.1f}x as fast",
        f"  decode and crop, neither with colours       {f['speedup_crops']:5.1f}x",
        f"  all of it on the CPU                        {f['speedup_on_cpu']:5.1f}x",
        f"beyond decoding: {parts['crop']:.2f} ms; with data.scaled_decode {f['scaled']['crop']:.2f} ms "
        f"(decoding {f['scaled']['decode']:.2f} ms, together {f['scaled']['gain']:.1f}x)",
        f"packed at {_PACK_SIZE} pixels: decode {f['packed']['decode']:.2f} ms, crop {f['packed']['crop']:.2f} ms, "
        f"{f['packed']['file_bytes'] / 1e3:.1f} kB a file, together {f['packed']['gain']:.1f}x",
        f"loader: {f['loader']['1']:.0f} images/s with 1 worker, {f['loader']['2']:.0f} with 2 "
        f"({f['loader_gain']:.2f}x); {f['batches_mib']:.0f} MiB for batches of {_AHEAD_BATCH} made ahead",
    ]
    if "model" in f:
        m = f["model"]
        text += [
            f"{m['arch']} trains {m['images_per_s']:.1f} images/s on {f['device']}: {m['workers']} worker"
            f"{'s keep' if m['workers'] != 1 else ' keeps'} up; colour takes {m['colour_share']:.1%} of its step",
            f"  at {m['gflop']:.0f} GFLOP an image, a device that sustains 100 TFLOP/s needs "
            f"{m['workers_per_100_tflops']:.1f} workers",
        ]
    if "mixing" in f:
        x = f["mixing"]
        text.append(
            f"shuffled by {x['window']:.0f} blocks at a time: {x['blocks']:.1f} blocks in a batch of {x['batch']:.0f} "
            f"(exactly: {x['exact_blocks']:.1f}), {x['same_block']:.1%} of its pairs from one block "
            f"({x['exact_same_block']:.1%})"
        )
    return text


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Figures of several runs side by side, as Markdown; `runs` by the title of their column."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "decode": lambda f: f"{f['parts']['decode']:.2f} ms",
        "crop": lambda f: f"{f['parts']['crop']:.2f} ms",
        "colour, blur, solarise, normalise, here on the CPU": lambda f: f"{f['parts']['colour']:.2f} ms",
        "handing over, in the main process": lambda f: f"{f['parts']['transfer']:.2f} ms",
        "images/s of a worker (decode and crop)": lambda f: f"{f['images_per_s']:.0f}",
        "the same in Pillow alone": lambda f: f"{f['pillow_ms']:.1f} ms",
        "- without its colours": lambda f: f"{f['pillow_crops_ms']:.1f} ms",
        "speed-up of decode and crop over all of Pillow's": lambda f: f"{f['speedup']:.1f}×",
        "- over Pillow without colours": lambda f: f"{f['speedup_crops']:.1f}×",
        "- of all of it on the CPU": lambda f: f"{f['speedup_on_cpu']:.1f}×",
        "decode + crop with `data.scaled_decode`": lambda f: _pair(f["scaled"]),
        "decode + crop of images packed at 512 pixels": lambda f: _pair(f["packed"]),
        "2 workers over 1": lambda f: f"{f['loader_gain']:.2f}×",
    }
    lines = [["per image, one core", *runs], ["---"] * (1 + len(runs))]
    lines += [[name, *(show(figures) for figures in runs.values())] for name, show in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _pair(times: dict[str, float]) -> str:
    return f"{times['decode']:.2f} + {times['crop']:.2f} ms"
