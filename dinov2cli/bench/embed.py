"""`dinov2 bench embed`: images per second from files to features, beside a plain loop over the same images.

Plain means one image at a time: Pillow decode, Pillow resize and crop, float, one forward pass.
"""

import io
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov2cli.data.bad import BadImages
from dinov2cli.data.cores import default_workers
from dinov2cli.data.loader import iterate_images
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.device import choose_device
from dinov2cli.evaluation.features import extract
from dinov2cli.models.load import LoadedModel, load_model


def run(
    device: str = "auto", seed: int = 0, data: str = "demo:photos?count=400", model: str = "tiny", rounds: int = 2
) -> dict[str, Any]:
    """Time both alternately over the same images.

    Returns `images_per_s`, `seconds`, `reference_seconds`, `speedup` (best of the rounds), `workers`, and
    `largest_difference` of the unit-length features, which the different resize filters cause.
    """
    where = choose_device(device)
    source = open_source(data)
    loaded = load_model(model, device=where, seed=seed)
    workers = default_workers()
    timed: dict[str, list[float]] = {"ours": [], "plain": []}
    features: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name, work in (("ours", lambda: _ours(source, loaded, workers)), ("plain", lambda: _plain(source, loaded))):
            started = time.perf_counter()
            features[name] = work()
            timed[name].append(time.perf_counter() - started)
    seconds, reference = min(timed["ours"]), min(timed["plain"])
    return {
        "images": len(source),
        "images_per_s": len(source) / seconds,
        "seconds": seconds,
        "reference_seconds": reference,
        "speedup": reference / seconds,
        "workers": workers,
        "device": str(where),
        "largest_difference": float((features["ours"] - features["plain"]).abs().max()),
    }


def _ours(source: ImageSource, loaded: LoadedModel, workers: int) -> torch.Tensor:
    size = loaded.preprocess
    batches = iterate_images(
        source, resize=size.resize, crop=size.crop, batch_size=64, workers=workers, bad=BadImages()
    )
    parts = [part.pooled for part in extract(loaded.backbone, batches, preprocess=size)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def _plain(source: ImageSource, loaded: LoadedModel) -> torch.Tensor:
    size, parts = loaded.preprocess, []
    for row in range(len(source)):
        image = Image.open(io.BytesIO(source.read(row))).convert("RGB")
        scale = size.resize / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size.crop) // 2, (image.height - size.crop) // 2
        pixels = np.asarray(image.crop((left, top, left + size.crop, top + size.crop)))
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(loaded.backbone.cls_token.device)
        with torch.inference_mode():
            parts.append(loaded.backbone(size.normalize(batch)).cls.cpu())
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)
