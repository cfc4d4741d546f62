"""PCA maps during training: fixed images of any size, a map fine enough to see, and a backbone left as it was."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.data.source import open_source
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.report.feature_maps import FeatureMaps
from dinov2cli.report.pca import pca_colours

SMALL = Preprocess(resize=32, crop=32)


def backbone(size=32, patch=8) -> VisionTransformer:
    rng = torch.Generator().manual_seed(0)
    return VisionTransformer(img_size=size, patch_size=patch, embed_dim=16, depth=1, num_heads=2, generator=rng)


def save(folder, sizes):
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_sheet_holds_images_above_the_colours_of_their_patches():
    maps = FeatureMaps(open_source("demo:digits?count=40"), preprocess=SMALL, patch_size=8, seed=1, count=4)
    assert maps.found == 4
    model = backbone()
    tokens = maps.tokens(model)
    assert tokens.shape == (4, 16, 16, 16)  # 4 x 4 patches at 32 pixels: four times the size is shown
    sheet = opened(maps(model))
    assert sheet.shape[:2] == (6 + 2 * (128 + 6), 6 + 4 * (128 + 6))
    colours = pca_colours(tokens)  # one basis over all images
    for column in range(4):
        left = 6 + column * 134
        shown = sheet[140 : 140 + 128, left : left + 128]
        np.testing.assert_array_equal(shown[4::8, 4::8], colours[column])


def test_the_same_seed_draws_the_same_images_and_the_mode_is_kept():
    source = open_source("demo:digits?count=60")
    model = backbone().train()
    first, again, other = (FeatureMaps(source, preprocess=SMALL, patch_size=8, seed=s)(model) for s in (3, 3, 4))
    assert first == again != other
    assert model.training


def test_images_of_very_different_sizes_and_broken_ones(tmp_path):
    folder = save(tmp_path, [(1, 700), (300, 2), (5, 5), (400, 300)])
    (folder / "broken.jpg").write_bytes(b"no image")
    maps = FeatureMaps(open_source(str(folder)), preprocess=SMALL, patch_size=8, seed=0)
    assert maps.found == 4
    assert maps(backbone()) is not None


def test_one_image_of_one_patch_is_a_plain_map(tmp_path):
    folder = save(tmp_path, [(8, 8)])
    large = Preprocess(resize=256, crop=224)
    maps = FeatureMaps(open_source(str(folder)), preprocess=large, patch_size=224, seed=0)
    assert maps.tokens(backbone(224, 224)).shape == (1, 4, 4, 16)
    assert maps(backbone(224, 224)) is not None
    few = FeatureMaps(open_source(str(folder)), preprocess=large, patch_size=14, seed=0)
    assert few.tokens(backbone(224, 14)).shape == (1, 16, 16, 16)  # fine enough as it is


def test_nothing_to_show_gives_none(tmp_path):
    source = open_source("demo:digits?count=10")
    broken = backbone()
    with torch.no_grad():
        broken.pos_embed.fill_(float("nan"))
    assert FeatureMaps(source, preprocess=SMALL, patch_size=8, seed=0)(broken) is None
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert FeatureMaps(open_source(str(tmp_path)), preprocess=SMALL, patch_size=8, seed=0)(backbone()) is None


@pytest.mark.parametrize("side", [1, 2])
def test_colours_of_a_handful_of_tokens_are_finite(side):
    tokens = np.random.default_rng(0).normal(size=(1, side, side, 8)).astype(np.float32)
    assert pca_colours(tokens).shape == (1, side, side, 3)
