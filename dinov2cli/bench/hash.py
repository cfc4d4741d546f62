"""`dinov2 bench hash [DATA]`: images per second from files to fingerprints, beside a textbook pHash, by turns."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2cli.bench.hash_reference import FolderFiles, memory, pool, textbook_hash
from dinov2cli.curation.fingerprints import fingerprint_images
from dinov2cli.data.demo_photos import photo_files
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError

_WIDTH, _HEIGHT, _QUALITY = 500, 375, 92
"""Size of ImageNet's median photograph."""


def run(
    *,
    data: str | None = None,
    device: str = "auto",
    seed: int = 0,
    images: int = 600,
    workers: int | None = None,
    rounds: int = 5,
) -> dict[str, Any]:
    """Both sides on the same files, read from disk, `rounds` times by turns; medians count.

    data: the images to take a sample of, as they are; None cuts JPEGs of 500 x 375 from the photographs of
    `demo:photos`. Ours does more
    than the reference: sha256, a 256-bit hash of up to four views, thumbnails, sharpness, pixel digests of candidates.
    Ours runs in threads of this process and the reference in as many processes. `speedup` = images per second of ours
    over the reference's; `memory_mb` is the peak of a fresh process for each, with its workers, libraries included.
    Raises InputError for a set without images.
    """
    del device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or cores
    with tempfile.TemporaryDirectory(prefix="dinov2-bench-") as name:
        folder = Path(name)
        _photographs(folder, images, seed) if data is None else _sample(data, folder, images, seed)
        files = FolderFiles(folder)
        seconds: dict[str, list[float]] = {"ours": [], "reference": []}
        with pool(workers) as processes:
            for round_ in range(rounds + 1):
                started = time.perf_counter()
                prints = fingerprint_images(files, workers=workers)
                between = time.perf_counter()
                processes.map(textbook_hash, files.paths, chunksize=16)
                if round_:  # the first warms both up: libraries loaded, files in the system's memory
                    seconds["ours"].append(between - started)
                    seconds["reference"].append(time.perf_counter() - between)
        own, other = (float(np.median(seconds[side])) for side in ("ours", "reference"))
        peaks = {side: memory(side, folder, workers) / 2**20 or None for side in ("ours", "reference")}
        return {
            "images": len(files),
            "mean_file_kb": float(np.mean([os.path.getsize(path) for path in files.paths])) / 1024,
            "workers": workers,
            "seconds": own,
            "reference_seconds": other,
            "images_per_s": len(files) / own,
            "reference_images_per_s": len(files) / other,
            "speedup": other / own,
            "views_per_image": len(prints.hashes.owner) / len(files),
            "memory_mb": peaks["ours"],
            "reference_memory_mb": peaks["reference"],
        }


def _photographs(folder: Path, images: int, seed: int) -> None:
    """Parts of the photographs behind `demo:photos`, at about their own resolution, as JPEG files."""
    photos = [Image.open(path).convert("RGB") for path in photo_files().values()]
    rng = np.random.Generator(np.random.Philox(key=seed))
    for row in range(images):
        photo = photos[row % len(photos)]
        most = min(photo.width, photo.height * _WIDTH / _HEIGHT)
        width = rng.uniform(min(0.6 * _WIDTH, most), most)
        height = width * _HEIGHT / _WIDTH
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        part = photo.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        part.save(folder / f"{row:06d}.jpg", quality=_QUALITY)


def _sample(data: str, folder: Path, images: int, seed: int) -> None:
    source = open_source(data)
    if not len(source):
        raise InputError(f"bench hash: found no images in {data}; expected at least one")
    rng = np.random.Generator(np.random.Philox(key=seed))
    for row in np.sort(rng.permutation(len(source))[:images]).tolist():
        (folder / f"{row:09d}.img").write_bytes(source.read(row))
