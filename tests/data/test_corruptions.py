"""The 15 corruptions: each against its definition computed another way, and what all of them share."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedView, corrupt
from dinov2cli.data.corruptions_levels import NOISES, parameters, published_side
from dinov2cli.data.loader import CentreView, read_ranges
from dinov2cli.data.source import open_source
from tests.data.corrupted_photos import photos

DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
# Their published parameters go up and down: less blur with more passes of glass, less cover by ice with a darker image,
# a smaller affine part with a rougher field. These only need to do something at every severity.
UNEVEN = {
    *((side, kind) for side in (24, 32, 48, 64, 126, 224) for kind in ("glass_blur", "frost", "elastic_transform")),
    *((side, "fog") for side in (126, 224)),
}


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(np.float64) - second) ** 2)))


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("side", [24, 32, 48, 64, 126, 224])
def test_distortion_grows_with_severity(kind, side):
    seen = photos(side)
    found = [
        np.mean([psnr(image, corrupt(image, kind, level, seed=3, row=row)) for row, image in enumerate(seen)])
        for level in SEVERITIES
    ]
    assert max(found) < 45
    if (side, kind) not in UNEVEN:
        assert (np.diff(found) < 0.1).all()  # decibels: snow of severity 2 and 3 differs in kind, not in size
        assert found[4] < found[0] - 1


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("side", [16, 24, 45, 98, 133])
def test_every_size_and_picture_comes_back_as_it_was_but_corrupted(kind, side):
    random = np.random.default_rng(side)
    grey = np.repeat(random.integers(0, 256, (side, side, 1), dtype=np.uint8), 3, axis=2)
    flat = np.full((side, side, 3), 77, np.uint8)
    for image in (photos(side)[0], grey, flat, np.zeros_like(flat), np.full_like(flat, 255)):
        before = image.copy()
        for level in (1, 5):
            found = corrupt(image, kind, level, seed=0, row=1)
            assert found.shape == image.shape and found.dtype == np.uint8
            assert (image == before).all()
            assert (found == corrupt(image, kind, level, seed=0, row=1)).all()


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_moving_light_leaves_a_flat_image_alone(kind, value):
    flat = np.full((50, 50, 3), value, np.uint8)
    for level in SEVERITIES:
        assert (corrupt(flat, kind, level, seed=5, row=2) == value).all()


@pytest.mark.parametrize("kind", [kind for kind in CORRUPTIONS if kind not in DETERMINISTIC])
def test_seed_row_and_severity_draw_other_numbers(kind):
    image = photos(64)[0]
    found = [corrupt(image, kind, 2, seed=seed, row=row).tobytes() for seed, row in ((0, 0), (0, 1), (1, 0))]
    assert len(set(found)) == 3


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_what_draws_nothing_is_the_same_for_every_row(kind):
    image = photos(64)[0]
    assert (corrupt(image, kind, 2, seed=0, row=0) == corrupt(image, kind, 2, seed=9, row=8)).all()


def test_noises_of_the_three_kinds_are_independent():
    grey = np.full((64, 64, 3), 128, np.uint8)
    drawn = [corrupt(grey, kind, 3, seed=0, row=0).astype(float).ravel() - 128 for kind in NOISES]
    assert abs(np.corrcoef(drawn)[np.triu_indices(3, 1)]).max() < 0.05


@pytest.mark.parametrize("level, deviation", [(1, 0.08), (3, 0.18)])
def test_gaussian_noise_has_its_deviation(level, deviation):
    grey = np.full((224, 224, 3), 128, np.uint8)
    noise = corrupt(grey, "gaussian_noise", level, seed=1, row=0).astype(float) - 128
    assert noise.std() == pytest.approx(deviation * 255, rel=0.02)
    assert noise.mean() == pytest.approx(-0.5, abs=0.5)  # cut off, not rounded
    channels = noise.reshape(-1, 3)
    assert abs(np.corrcoef(channels.T)[np.triu_indices(3, 1)]).max() < 0.02


@pytest.mark.parametrize("level, photons", [(1, 60), (4, 5)])
def test_shot_noise_counts_photons(level, photons):
    grey = np.full((224, 224, 3), 51, np.uint8)  # a fifth of full brightness
    found = corrupt(grey, "shot_noise", level, seed=1, row=0)
    counts = np.round(found / 255 * photons)
    assert np.abs(np.floor(counts * 255 / photons + 1e-3) - found).max() <= 1
    assert counts.mean() == pytest.approx(photons / 5, rel=0.01)
    assert counts.var() == pytest.approx(photons / 5, rel=0.03)
    assert (corrupt(grey * 0, "shot_noise", level, seed=1, row=0) == 0).all()


@pytest.mark.parametrize("level, share", [(1, 0.03), (5, 0.27)])
def test_impulse_noise_turns_values_black_or_white(level, share):
    grey = np.full((224, 224, 3), 100, np.uint8)
    found = corrupt(grey, "impulse_noise", level, seed=1, row=0)
    assert set(np.unique(found)) == {0, 100, 255}
    assert (found != 100).mean() == pytest.approx(share, rel=0.03)
    assert (found == 255).mean() == pytest.approx(share / 2, rel=0.05)


@pytest.mark.parametrize("level, kept", list(zip(SEVERITIES, (0.6, 0.5, 0.4, 0.3, 0.25), strict=True)))
def test_pixelate_is_two_resizes_of_pillow(level, kept):
    image = photos(224)[1]
    small = Image.fromarray(image).resize((int(224 * kept),) * 2, Image.Resampling.BOX)
    assert (corrupt(image, "pixelate", level, seed=0, row=0) == np.asarray(small.resize((224, 224), 4))).all()


@pytest.mark.parametrize("level, quality", list(zip(SEVERITIES, (25, 18, 15, 10, 7), strict=True)))
def test_jpeg_is_that_of_pillow(level, quality):
    image, file = photos(224)[1], io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    assert (corrupt(image, "jpeg_compression", level, seed=0, row=0) == np.asarray(Image.open(file))).all()


def test_contrast_shrinks_distances_from_the_mean():
    image = photos(98)[0].astype(np.float64) / 255
    means = image.mean(axis=(0, 1), keepdims=True)
    for level, kept in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        expected = ((image - means) * kept + means) * 255
        found = corrupt(photos(98)[0], "contrast", level, seed=0, row=0)
        assert np.abs(found - np.floor(expected + 1e-3)).max() <= 1
        assert (found == np.floor(expected + 1e-3)).mean() > 0.999


def test_published_parameters_go_to_the_nearest_size():
    assert [published_side(side) for side in (16, 48, 63, 64, 98, 119, 120, 224, 518)] == [
        *(32, 32, 32, 64, 64, 64, 224, 224, 224)
    ]
    assert parameters("gaussian_noise", 5, 32) == {"deviation": 0.10}
    assert parameters("motion_blur", 2, 64) == {"radius": 10, "sigma": 1.5}
    assert parameters("defocus_blur", 5, 224) == {"radius": 10, "softness": 0.5}


def test_lengths_grow_with_the_image_and_nothing_else():
    assert parameters("defocus_blur", 5, 448) == {"radius": 20, "softness": 0.5}
    assert parameters("elastic_transform", 2, 448) == pytest.approx({"strength": 1952, "sigma": 39.04, "shift": 97.6})
    assert parameters("motion_blur", 5, 24) == parameters("motion_blur", 5, 32)  # no blur of less than a pixel
    assert parameters("motion_blur", 1, 96) == {"radius": 15, "sigma": 1.5}
    for kind in ("shot_noise", "fog", "brightness", "contrast", "pixelate", "jpeg_compression", "zoom_blur"):
        assert parameters(kind, 3, 448) == parameters(kind, 3, 224)


@pytest.mark.parametrize(
    "shape, kind, severity",
    [
        ((15, 15, 3), "snow", 1),
        ((64, 65, 3), "snow", 1),
        ((64, 64), "snow", 1),
        ((64, 64, 3), "rain", 1),
        ((64, 64, 3), "snow", 0),
        ((64, 64, 3), "snow", 6),
    ],
)
def test_impossible_arguments_are_refused(shape, kind, severity):
    with pytest.raises(ValueError, match="corruption"):
        corrupt(np.zeros(shape, np.uint8), kind, severity, seed=0, row=0)


def test_a_view_corrupts_what_the_model_sees():
    view = CorruptedView(CentreView(80, 64), "glass_blur", 4, seed=2)
    pixels = np.ascontiguousarray(photos(133)[0][:100])
    seen = CentreView(80, 64)(pixels, 7).numpy().transpose(1, 2, 0)
    found = view(pixels, 7)
    assert found.dtype == torch.uint8 and found.shape == (3, 64, 64) and view.size == 64
    assert (
        found.numpy().transpose(1, 2, 0) == corrupt(np.ascontiguousarray(seen), "glass_blur", 4, seed=2, row=7)
    ).all()
    assert torch.equal(pickle.loads(pickle.dumps(view))(pixels, 7), found)


def test_views_of_other_pixels_have_other_names():
    base = CentreView(80, 64)
    views = [
        CorruptedView(base, "snow", 1),
        CorruptedView(base, "snow", 2),
        CorruptedView(base, "fog", 1),
        CorruptedView(base, "snow", 1, seed=1),
        CorruptedView(CentreView(64, 64), "snow", 1),
        CorruptedView(CentreView(80, 64, square=True), "snow", 1),
    ]
    assert len({view.name for view in views}) == len(views)


@pytest.mark.parametrize("kind", ["gaussian_noise", "frost", "elastic_transform"])
def test_workers_and_batches_do_not_change_a_pixel(kind):
    source, view = open_source("demo:digits"), CorruptedView(CentreView(48, 40), kind, 3)

    def read(ranges, workers):
        return torch.cat([part.batch.images for part in read_ranges(source, ranges, view=view, workers=workers)])

    alone = read([(0, 6)], 0)
    assert torch.equal(read([(0, 2), (2, 3), (3, 6)], 2), alone)
    assert not torch.equal(alone[0], alone[1])
