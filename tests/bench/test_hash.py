"""`bench hash`: both sides see the same files, and the reference is the pHash it says it is."""

import numpy as np
import pytest
from PIL import Image

from dinov2cli.bench.hash import run
from dinov2cli.bench.hash_reference import textbook_hash
from dinov2cli.errors import InputError


def test_it_counts_both_sides_on_the_same_files(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((20, 20, 1), np.uint8))
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    found = run(data=str(tmp_path), images=4, workers=1, rounds=1)
    assert found["images"] == 4 and found["workers"] == 1 and found["views_per_image"] >= 1
    assert found["speedup"] == pytest.approx(found["reference_seconds"] / found["seconds"])
    assert found["images_per_s"] == pytest.approx(4 / found["seconds"])
    assert found["memory_mb"] is None or 20 < found["memory_mb"] < 2000
    with pytest.raises(InputError):
        run(data=str(tmp_path / "none"), images=4)


def test_the_reference_hash_sees_through_saving_again(tmp_path):
    from skimage import data

    pixels = data.chelsea()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.jpg", quality=60)
    Image.fromarray(data.coffee()).save(tmp_path / "c.png")
    first, again, other = (
        np.unpackbits(np.frombuffer(textbook_hash(str(tmp_path / name)), np.uint8))
        for name in ("a.png", "b.jpg", "c.png")
    )
    assert first.size == 64 and (first != again).sum() <= 4 < 16 < (first != other).sum()
