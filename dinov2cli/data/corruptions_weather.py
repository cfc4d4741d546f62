"""Corruptions by weather: snow, frost, fog and brightness.

Every function takes pixels uint8 [S, S, 3], and a generator where it draws; it returns float32 [S, S, 3] in 0..255.
"""

from functools import lru_cache

import numpy as np
import scipy.fft

from dinov2cli.data.corruptions_blur import Floats, Pixels, array_of, dragged, planes_of, zoomed

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_TEXTURES = 5
_TEXTURE_SEED = 20190327
_TINT = np.array([0.86, 0.95, 1.0], dtype=np.float32)  # of ice in shade
_NEEDLES = 7


def brightness(pixels: Pixels, _rng: np.random.Generator, *, added: float) -> Floats:
    """The value of HSV raised by `added` (of 1), hue and saturation kept."""
    image = pixels.astype(np.float32)
    value = image.max(axis=-1, keepdims=True)
    raised = np.minimum(value + np.float32(added * 255), 255)
    # Black has no hue to keep: it becomes grey.
    return np.where(value > 0, image * (raised / np.maximum(value, 1)), raised)


def fog(pixels: Pixels, rng: np.random.Generator, *, thickness: float, decay: float) -> Floats:
    """A fractal cloud on top, and the whole brought back to the image's own highest value."""
    side = len(pixels)
    image = pixels.astype(np.float32) / 255
    highest = image.max()
    cloud = plasma(1 << (side - 1).bit_length(), decay, rng)[:side, :side, None]
    return (image + np.float32(thickness) * cloud) * (highest / (highest + np.float32(thickness)) * 255)


def plasma(side: int, decay: float, rng: np.random.Generator) -> Floats:
    """A fractal height map [side, side] in 0..1 by the diamond-square algorithm, periodic; side: a power of 2.

    The random part of each halving of the grid has an amplitude smaller by `decay` squared, as it was published.
    """
    heights = np.zeros((1, 1), dtype=np.float32)
    scale = 100.0
    while (n := len(heights)) < side:
        noise = (rng.random((3, n, n), dtype=np.float32) * 2 - 1) * np.float32(scale * scale)
        below, right = np.roll(heights, -1, axis=0), np.roll(heights, -1, axis=1)
        centres = (heights + below + right + np.roll(below, -1, axis=1)) / 4 + noise[0]
        fine = np.empty((2 * n, 2 * n), dtype=np.float32)
        fine[::2, ::2], fine[1::2, 1::2] = heights, centres
        fine[::2, 1::2] = (heights + right + centres + np.roll(centres, 1, axis=0)) / 4 + noise[1]
        fine[1::2, ::2] = (heights + below + centres + np.roll(centres, 1, axis=1)) / 4 + noise[2]
        heights, scale = fine, scale / decay
    heights = heights - heights.min()
    return heights / max(float(heights.max()), 1e-12)


def snow(
    pixels: Pixels,
    rng: np.random.Generator,
    *,
    mean: float,
    deviation: float,
    zoom: float,
    least: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Floats:
    """Flakes (noise enlarged `zoom` times, what is below `least` removed) dragged downwards, laid on twice, on an image
    that is bleached by 1 - `kept`."""
    side = len(pixels)
    noise = rng.standard_normal((side, side, 1), dtype=np.float32) * np.float32(deviation) + np.float32(mean)
    flakes = array_of(zoomed(planes_of(noise), max(zoom, 1.0)))
    flakes = np.floor(np.clip(np.where(flakes < least, 0, flakes), 0, 1) * 255)
    fallen = np.clip(dragged(flakes, radius, sigma, rng.uniform(-135, -45)), 0, 255)
    image = pixels.astype(np.float32)
    bleached = np.maximum(image, (image @ _GREY)[..., None] * 1.5 + 127.5)
    return np.float32(kept) * image + np.float32(1 - kept) * bleached + fallen + np.rot90(fallen, k=2)


def frost(pixels: Pixels, rng: np.random.Generator, *, kept: float, added: float) -> Floats:
    """A part of a texture of ice crystals on top.

    The published program takes photographs of frost; these textures are computed, so figures under frost are not to be
    compared with published ones.
    """
    side = len(pixels)
    texture = ice(2 * side, int(rng.integers(_TEXTURES)))
    top, left = rng.integers(0, side, 2)
    part = texture[top : top + side, left : left + side]
    return np.float32(kept) * pixels.astype(np.float32) + np.float32(added) * part


@lru_cache(maxsize=2 * _TEXTURES)
def ice(side: int, number: int) -> Floats:
    """One of the textures, float32 [side, side, 3] in 0..255: bright needles in several directions, denser in some
    places than in others, on a dim ground."""
    rng = np.random.Generator(np.random.PCG64([_TEXTURE_SEED, number]))
    down, across = np.meshgrid(scipy.fft.fftfreq(side), scipy.fft.rfftfreq(side), indexing="ij")
    far = np.hypot(down, across) * side

    def field(spectrum: np.ndarray) -> np.ndarray:
        white = scipy.fft.rfft2(rng.standard_normal((side, side)))
        made = scipy.fft.irfft2(white * spectrum, s=(side, side))
        return (made - made.mean()) / made.std()

    ground = field(1 / (1 + far) ** 1.6)
    needles = np.full((side, side), -np.inf)
    for turn in (np.arange(_NEEDLES) + rng.random()) * (np.pi / _NEEDLES):
        along = (np.cos(turn) * across + np.sin(turn) * down) * side
        beside = (-np.sin(turn) * across + np.cos(turn) * down) * side
        needles = np.maximum(needles, field(np.exp(-((along / 8) ** 2) - (beside / 60) ** 2)))
    density = 1 / (1 + np.exp(-2 * ground))
    bright = np.clip((needles - 0.8) / 2.2, 0, 1) * (0.25 + 0.75 * density)
    grey = np.clip(0.12 + 0.22 * density + 0.85 * bright, 0, 1)
    return (255 * grey[..., None] * (_TINT + (1 - _TINT) * bright[..., None])).astype(np.float32)
