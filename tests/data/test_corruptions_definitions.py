"""Blurs and weather against their definitions, written down slowly or taken from other libraries."""

import math

import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import torch

from dinov2cli.data import corruptions_blur as blur
from dinov2cli.data import corruptions_weather as weather
from dinov2cli.data.corruptions import corrupt
from dinov2cli.data.corruptions_levels import parameters
from tests.data.corrupted_photos import photos

SIDES = (32, 64, 224)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("level", [1, 3, 5])
def test_defocus_disk_is_the_published_one(side, level):
    cv2 = pytest.importorskip("cv2")
    given = parameters("defocus_blur", level, side)
    kernel = blur.disk(**given)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    half = len(kernel) // 2
    steps = np.arange(-half, half + 1)
    inside = (steps[:, None] ** 2 + steps**2 <= given["radius"] ** 2).astype(np.float64)
    size = (3, 3) if given["radius"] <= 8 else (5, 5)
    expected = cv2.GaussianBlur(inside / inside.sum(), ksize=size, sigmaX=given["softness"])
    assert np.abs(kernel - expected).max() < 1e-6


def test_defocus_is_a_correlation_with_mirrored_borders():
    image = photos(64)[0].astype(np.float32)
    kernel = blur.disk(2.5, 0.5)
    expected = np.stack([scipy.ndimage.correlate(image[..., c], kernel, mode="mirror") for c in range(3)], axis=-1)
    assert np.abs(blur.correlate(image, kernel, "reflect") - expected).max() < 1e-3


def test_defocus_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    image, given = photos(126)[0], parameters("defocus_blur", 4, 126)
    expected = cv2.filter2D(image.astype(np.float32), -1, blur.disk(**given))  # mirrors at the borders
    assert np.abs(blur.defocus_blur(image, np.random.default_rng(0), **given) - expected).max() < 1e-2


def test_correlation_does_not_turn_the_kernel():
    kernel = np.random.default_rng(0).random((5, 5)).astype(np.float32)
    image = photos(64)[0].astype(np.float32)
    expected = np.stack([scipy.ndimage.correlate(image[..., c], kernel, mode="nearest") for c in range(3)], axis=-1)
    assert np.abs(blur.correlate(image, kernel, "edge") - expected).max() < 1e-2


@pytest.mark.parametrize("delta, passes", [(1, 2), (3, 1)])
def test_glass_moves_pixels_one_after_another(delta, passes):
    image = photos(32)[0]
    found = blur.glass_blur(image, np.random.default_rng(4), sigma=0.7, reach=delta, passes=passes)

    random, side = np.random.default_rng(4), 32
    slow = np.floor(scipy.ndimage.gaussian_filter(image.astype(np.float64), (0.7, 0.7, 0), mode="nearest") + 1e-4)
    for _ in range(passes):
        inner = range(delta + 1, side - delta + 1)
        moves = random.integers(-delta, delta, (2, len(inner) ** 2)).reshape(2, len(inner), len(inner))
        for y in reversed(inner):
            for x in reversed(inner):
                down, right = moves[:, y - delta - 1, x - delta - 1]
                slow[y, x] = slow[y + down, x + right]
    expected = scipy.ndimage.gaussian_filter(slow, (0.7, 0.7, 0), mode="nearest")
    assert np.abs(found - expected).max() < 1.01  # a value that float32 rounds to the other side of a whole number
    assert (np.abs(found - expected) < 1e-2).mean() > 0.99


@pytest.mark.parametrize("degrees", [-37.0, 0.0, 20.5, 45.0, -100.0])
def test_motion_takes_taps_along_a_line(degrees):
    image = photos(32)[1].astype(np.float32)
    radius, sigma = 6, 2.5
    turn, weights = math.radians(degrees), [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    expected = np.zeros(image.shape)
    for i, weight in enumerate(weights):
        right, down = math.ceil(i * math.cos(turn) - 0.5), math.ceil(i * math.sin(turn) - 0.5)
        rows = np.clip(np.arange(32) + down, 0, 31)
        columns = np.clip(np.arange(32) + right, 0, 31)
        expected += weight / sum(weights) * image[rows[:, None], columns]
    assert np.abs(blur.dragged(image, radius, sigma, degrees) - expected).max() < 1e-2


@pytest.mark.parametrize("side", [64, 133])
@pytest.mark.parametrize("factor", [1.0, 1.06, 1.31, 2.5])
def test_zoom_is_that_of_scipy(side, factor):
    image = photos(side)[0].astype(np.float32)
    part = math.ceil(side / factor)
    start = (side - part) // 2
    large = scipy.ndimage.zoom(image[start : start + part, start : start + part], (factor, factor, 1), order=1)
    cut = (len(large) - side) // 2
    expected = large[cut : cut + side, cut : cut + side]
    assert np.abs(blur.array_of(blur.zoomed(blur.planes_of(image), factor)) - expected).max() < 0.02


def test_zoom_blur_is_the_mean_of_zooms_and_of_the_image():
    image = photos(64)[0]
    planes = blur.planes_of(image.astype(np.float32))
    factors = np.arange(1, 1.06, 0.01)
    total = planes + sum(blur.zoomed(planes, float(factor)) for factor in factors)
    expected = np.floor(blur.array_of(total / (len(factors) + 1)) + 1e-3)
    assert (corrupt(image, "zoom_blur", 1, seed=0, row=0) == expected).all()


@pytest.mark.parametrize("sigma", [0.96, 5.0, 40.0])
def test_smoothing_by_cosines_is_a_reflected_gaussian(sigma):
    field = np.random.default_rng(0).uniform(-1, 1, (48, 48))
    expected = scipy.ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)
    assert np.abs(blur.smoothed(field, sigma) - expected).max() < 1e-12
    assert blur.smoothed(field, 0) is field


def test_elastic_is_an_affine_map_and_then_a_field():
    side, (strength, sigma, shift) = 64, (6.4, 5.12, 3.84)
    image = photos(side)[0]
    found = blur.elastic_transform(image, np.random.default_rng(8), strength=strength, sigma=sigma, shift=shift)

    random = np.random.default_rng(8)
    middle, arm = side // 2, side // 3
    before = np.array([[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]])
    after = before + random.uniform(-shift, shift, (3, 2))
    y, x = np.mgrid[:side, :side].astype(np.float64)

    def taken(picture, rows, columns, mode):
        planes = [scipy.ndimage.map_coordinates(picture[..., c], [rows, columns], order=1, mode=mode) for c in range(3)]
        return np.stack(planes, axis=-1)

    # Of the result's (x, y) back to the image's, from the three points.
    back = np.linalg.lstsq(np.column_stack([after, np.ones(3)]), before, rcond=None)[0]
    places = np.stack([x, y, np.ones_like(x)], axis=-1) @ back
    moved = taken(image.astype(np.float64), places[..., 1], places[..., 0], "mirror")
    fields = [
        scipy.ndimage.gaussian_filter(random.uniform(-1, 1, (side, side)), sigma, mode="reflect", truncate=3) * strength
        for _ in range(2)
    ]
    expected = taken(moved, y + fields[1], x + fields[0], "reflect")
    assert np.abs(found - expected).max() < 0.05


def test_elastic_moves_the_corners_of_the_triangle_where_opencv_does():
    cv2 = pytest.importorskip("cv2")
    side, shift = 96, 5.0
    image = photos(side)[0]
    found = blur.elastic_transform(image, np.random.default_rng(1), strength=0, sigma=0, shift=shift)
    middle, arm = side // 2, side // 3
    before = np.float32([[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]])
    after = before + np.random.default_rng(1).uniform(-shift, shift, (3, 2)).astype(np.float32)
    matrix = cv2.getAffineTransform(before, after)
    expected = cv2.warpAffine(image.astype(np.float32), matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    # OpenCV interpolates in 32nds of a pixel.
    assert np.abs(found - expected).mean() < 0.5


@pytest.mark.parametrize("added", [0.1, 0.5])
def test_brightness_raises_the_value_of_hsv(added):
    image = np.concatenate([photos(64)[0], np.zeros((64, 64, 3), np.uint8)])[:, :64]
    hsv = skimage.color.rgb2hsv(image)
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    expected = skimage.color.hsv2rgb(hsv) * 255
    assert np.abs(weather.brightness(image, np.random.default_rng(0), added=added) - expected).max() < 1e-3


def test_plasma_halves_the_grid_with_less_and_less_noise():
    side, decay = 8, 1.7
    found = weather.plasma(side, decay, np.random.default_rng(2))
    random, heights, scale = np.random.default_rng(2), np.zeros((1, 1)), 100.0
    while (n := len(heights)) < side:
        noise = (random.random((3, n, n), dtype=np.float32).astype(np.float64) * 2 - 1) * scale**2
        fine = np.full((2 * n, 2 * n), np.nan)
        fine[::2, ::2] = heights
        for y in range(n):
            for x in range(n):
                four = [heights[(y + i) % n, (x + j) % n] for i in (0, 1) for j in (0, 1)]
                fine[2 * y + 1, 2 * x + 1] = np.mean(four) + noise[0, y, x]
        for number, (down, right) in ((1, (0, 1)), (2, (1, 0))):
            for y in range(n):
                for x in range(n):
                    row, column = 2 * y + down, 2 * x + right
                    around = [
                        fine[(row + i) % (2 * n), (column + j) % (2 * n)] for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))
                    ]
                    fine[row, column] = np.mean(around) + noise[number, y, x]
        heights, scale = fine, scale / decay
    heights -= heights.min()
    assert np.abs(found - heights / heights.max()).max() < 1e-5


def test_fog_adds_a_cloud_and_keeps_the_highest_value():
    image = photos(64)[0]
    cloud = weather.plasma(64, 2.5, np.random.default_rng(3))[..., None]
    highest = image.max() / 255
    expected = (image / 255 + 1.0 * cloud) * highest / (highest + 1.0) * 255
    found = weather.fog(image, np.random.default_rng(3), thickness=1.0, decay=2.5)
    assert np.abs(found - expected).max() < 1e-3


def test_snow_without_flakes_only_bleaches():
    image = photos(64)[0]
    given = {"mean": 0.1, "deviation": 0.2, "zoom": 1, "radius": 8, "sigma": 3, "kept": 0.7}
    found = weather.snow(image, np.random.default_rng(0), least=9.0, **given)
    grey = image @ np.array([0.299, 0.587, 0.114])
    expected = 0.7 * image + 0.3 * np.maximum(image, (grey * 1.5 + 127.5)[..., None])
    assert np.abs(found - expected).max() < 1e-3


def test_snow_lays_its_flakes_on_twice_turned_around():
    black = np.zeros((64, 64, 3), np.uint8)
    given = {"mean": 0.1, "deviation": 0.3, "zoom": 2, "radius": 8, "sigma": 3}
    found = weather.snow(black, np.random.default_rng(0), least=0.5, kept=1.0, **given)
    assert np.abs(found - np.rot90(found, 2)).max() < 1e-3
    assert (found[..., 0] == found[..., 1]).all()
    assert 0.05 < (found > 8).mean() < 0.95


def test_snow_falls_downwards():
    """The flakes are longer from top to bottom than across."""
    black, along, across = np.zeros((128, 128, 3), np.uint8), 0.0, 0.0
    for row in range(8):
        layer = corrupt(black, "snow", 2, seed=0, row=row)[..., 0].astype(np.float64)
        along += np.abs(np.diff(layer, axis=0)).mean()
        across += np.abs(np.diff(layer, axis=1)).mean()
    assert along < across


def test_frost_is_part_of_a_texture_on_a_dimmed_image():
    image, random = photos(64)[0], np.random.default_rng(6)
    number, (top, left) = int(random.integers(5)), random.integers(0, 64, 2)
    expected = 0.8 * image + 0.6 * weather.ice(128, number)[top : top + 64, left : left + 64]
    found = weather.frost(image, np.random.default_rng(6), kept=0.8, added=0.6)
    assert np.abs(found - expected).max() < 1e-3


def test_ice_has_dark_and_bright_places_everywhere_the_same_on_every_call():
    weather.ice.cache_clear()
    made = [weather.ice(128, number).copy() for number in range(5)]
    weather.ice.cache_clear()
    for number, texture in enumerate(made):
        assert (texture == weather.ice(128, number)).all()
        assert texture.min() >= 0 and texture.max() <= 255
        assert 60 < texture.mean() < 150 and texture.std() > 30
        assert (texture[..., 2] >= texture[..., 0]).all()  # bluish
    assert np.abs(made[0] - made[1]).mean() > 10


def test_sampling_mirrors_beyond_the_border():
    row = torch.arange(5.0).expand(1, 1, 5, 5)
    places = np.stack(np.meshgrid([-1.0, 0.0, 4.0, 5.0, 2.5], np.arange(5.0)), axis=-1)
    once = blur._sampled(row, places, border_between_pixels=False)[0, 0, 0]
    assert once.tolist() == pytest.approx([1, 0, 4, 3, 2.5], abs=1e-5)
    again = blur._sampled(row, places, border_between_pixels=True)[0, 0, 0]
    assert again.tolist() == pytest.approx([0, 0, 4, 4, 2.5], abs=1e-5)
