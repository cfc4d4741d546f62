"""Small sets with masks for the tests of dense tasks: every class has its colour."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40]], np.uint8)


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def labels_of(seed: int, size: tuple[int, int], classes: int = 3, cell: int = 8) -> np.ndarray:
    """Squares of `cell` pixels of random classes, uint8 [H, W]."""
    cells = np.random.default_rng(seed).integers(0, classes, (-(-size[0] // cell), -(-size[1] // cell)))
    return np.kron(cells, np.ones((cell, cell), int))[: size[0], : size[1]].astype(np.uint8)


def image_of(labels: np.ndarray, seed: int = 0, noise: int = 25) -> np.ndarray:
    """The colours of classes (modulo 4) with noise, uint8 [H, W, 3]."""
    random = np.random.default_rng(1000 + seed).integers(-noise, noise + 1, (*labels.shape, 3))
    return np.clip(COLOURS[labels % 4].astype(int) + random, 0, 255).astype(np.uint8)


def write_set(path: Path, images: list[np.ndarray], masks: list[np.ndarray], column: str = "mask") -> str:
    """A Parquet file with both; its DATA string."""
    cells = [{"bytes": png(image), "path": None} for image in images]
    targets = [{"bytes": png(mask), "path": None} for mask in masks]
    pq.write_table(pa.table({"image": cells, column: targets}), path)
    return f"{path}?mask={column}"


def colour_set(path: Path, count: int, *, seed: int = 0, sizes=((24, 32),), classes: int = 3, changed=None) -> str:
    """`count` images of coloured squares; `changed(mask, number)` gives the mask that is stored."""
    images, masks = [], []
    for number in range(count):
        labels = labels_of(seed + number, sizes[number % len(sizes)], classes)
        images.append(image_of(labels, seed + number))
        masks.append(labels if changed is None else changed(labels.copy(), number))
    return write_set(path, images, masks)
