"""Fixtures of the data room: image files in memory, and a cache of `datasets` that the test throws away."""

import io
from collections.abc import Callable

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("hf-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """encode(seed, size=(w, h), format='PNG'): a smooth random colour image as file bytes."""

    def make(seed: int = 0, size: tuple[int, int] = (24, 16), format: str = "PNG", **options) -> bytes:
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, format, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def picture_folder(tmp_path, encode):
    """Folder 'photos' with cat/0.png, cat/1.jpg, dog/2.png and a text file."""
    root = tmp_path / "photos"
    for seed, name in enumerate(["cat/0.png", "cat/1.jpg", "dog/2.png"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(seed, format="JPEG" if name.endswith("jpg") else "PNG"))
    (root / "readme.txt").write_text("not an image")
    return root
