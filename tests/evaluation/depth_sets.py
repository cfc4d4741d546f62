"""Small sets of images with depth, made so that depth can be read off the colours."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

HEIGHT, WIDTH, PATCH = 42, 56, 14
MILLIMETRES = 1000.0


def scene(rng: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [H, W, 3], of flat patches, and its depth in metres: 1 where black, 4 where white."""
    grey = rng.integers(0, 256, (-(-height // PATCH), -(-width // PATCH)))
    grey = np.kron(grey, np.ones((PATCH, PATCH), dtype=int))[:height, :width]
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8), 1 + 3 * grey / 255


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


def millimetres(depth: np.ndarray) -> bytes:
    """A 16-bit PNG."""
    return encoded(np.round(depth * MILLIMETRES).astype(np.uint16))


def write_set(path: Path, pairs: list[tuple[bytes, bytes]]) -> str:
    """A parquet file of (image file, depth file); returns its DATA string."""
    table = {
        "image": [{"bytes": image, "path": None} for image, _ in pairs],
        "depth": [{"bytes": depth, "path": None} for _, depth in pairs],
    }
    pq.write_table(pa.table(table), path)
    return f"{path}?depth=depth"


def scenes(path: Path, count: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    found = [scene(rng) for _ in range(count)]
    return write_set(path, [(encoded(image), millimetres(depth)) for image, depth in found])


def tiny_model() -> LoadedModel:
    """A random backbone whose tokens tell the brightness of their patch."""
    network = VisionTransformer(
        img_size=28, patch_size=PATCH, embed_dim=32, depth=4, num_heads=2, generator=torch.Generator().manual_seed(0)
    ).eval()
    return LoadedModel(network, "tiny", Preprocess(resize=28, crop=28), True, {"arch": "tiny", "seed": 0})
