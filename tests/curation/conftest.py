"""Pools and vectors for the policies."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def make_pool() -> Callable[..., pa.Table]:
    def make(rows: int, **columns: object) -> pa.Table:
        pool = {
            "id": pa.array([f"img-{i:05d}" for i in range(rows)]),
            "image_path": pa.array([f"a/img-{i:05d}.jpg" for i in range(rows)]),
            "source": pa.array(["/photos"] * rows, pa.string()),
            "row": pa.array(np.arange(rows) + 7, pa.int64()),
        }
        return pa.table(pool | {name: pa.array(value) for name, value in columns.items()})

    return make


@pytest.fixture
def random_vectors() -> Callable[..., np.ndarray]:
    """Directions so many dimensions apart that no two resemble each other by chance."""

    def make(rows: int, seed: int = 0, dim: int = 64) -> np.ndarray:
        return unit(np.random.default_rng(seed).normal(size=(rows, dim)))

    return make
