import pickle

import numpy as np
import torch
from PIL import Image

from dinov2cli.data.crops import random_box, sample_rng
from dinov2cli.data.views import RandomCrop


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def test_a_crop_is_the_box_resized_and_perhaps_mirrored():
    pixels, mirrored = picture(), 0
    for row in range(12):
        view = RandomCrop(28, seed=3, epoch=2)
        found = view(pixels, row)
        assert found.shape == (3, 28, 28) and found.dtype == torch.uint8
        rng = sample_rng(3, 2, row)
        box = random_box(60, 90, (0.08, 1.0), rng)
        flip = rng.random() < 0.5
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        oracle = Image.fromarray(pixels).resize((28, 28), Image.Resampling.BICUBIC, box=corners)
        expected = np.asarray(oracle).astype(int)[:, ::-1] if flip else np.asarray(oracle).astype(int)
        # Pillow reads beyond the box of `resize`, torch does not: only the border may differ by more than rounding.
        difference = np.abs(found.permute(1, 2, 0).numpy() - expected)
        assert difference[4:-4, 4:-4].max() <= 3
        mirrored += flip
    assert 0 < mirrored < 12


def test_seed_epoch_and_row_decide_and_the_name_tells():
    pixels, view = picture(), RandomCrop(28, seed=1, epoch=0)
    assert torch.equal(view(pixels, 5), pickle.loads(pickle.dumps(view))(pixels.copy(), 5))
    others = [
        RandomCrop(28, 2, 0),
        RandomCrop(28, 1, 1),
        RandomCrop(28, 1, 0, scale=(0.5, 1)),
        RandomCrop(28, 1, 0, flip=0),
    ]
    assert len({view.name, *(other.name for other in others)}) == 5
    assert not any(torch.equal(view(pixels, 5), other(pixels, 5)) for other in others[:3])
    assert not torch.equal(view(pixels, 5), view(pixels, 6))


def test_tiny_and_narrow_images_have_crops():
    for shape in ((1, 1), (2, 300), (300, 2)):
        assert RandomCrop(14, 0, 0)(np.full((*shape, 3), 7, np.uint8), 0).eq(7).all()
