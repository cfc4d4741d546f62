"""The 15 common corruptions of Hendrycks & Dietterich (ICLR 2019, arXiv 1903.12261), at 5 severities, made on the fly.

Written from the published definitions and parameters, and applied to the square that the model sees, as there. What
differs from the published images: the textures of frost are computed, not photographed; motion blur (also of snow)
follows ImageMagick's definition without using it; elastic transforms interpolate exactly, not in 1/32 of a pixel; no
image is stored as JPEG of quality 85 afterwards; and random numbers are others.
"""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dinov2cli.data.corruptions_blur import (
    Floats,
    Pixels,
    defocus_blur,
    elastic_transform,
    glass_blur,
    motion_blur,
    zoom_blur,
)
from dinov2cli.data.corruptions_levels import CORRUPTIONS, SEVERITIES, parameters
from dinov2cli.data.corruptions_weather import brightness, fog, frost, snow
from dinov2cli.data.loader import View

if TYPE_CHECKING:
    import torch

__all__ = ["CORRUPTIONS", "LEAST_SIDE", "SEVERITIES", "CorruptedView", "corrupt"]

LEAST_SIDE = 16
_VERSION = 1  # of the pixels: raise it with any change of them, so that no feature of older ones is taken from a cache
_ROUNDING = 1e-3  # grey levels; a value that float32 left just below a whole number stays that number


def gaussian_noise(pixels: Pixels, rng: np.random.Generator, *, deviation: float) -> Floats:
    """Normal noise of `deviation` (of 1) on every channel."""
    return pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(deviation * 255)


def shot_noise(pixels: Pixels, rng: np.random.Generator, *, photons: float) -> Floats:
    """Poisson noise: full brightness is `photons` counts on average."""
    return (rng.poisson(pixels * (photons / 255)) * (255 / photons)).astype(np.float32)


def impulse_noise(pixels: Pixels, rng: np.random.Generator, *, share: float) -> Floats:
    """A `share` of all values becomes black or white, with even chances."""
    drawn = rng.random(pixels.shape, dtype=np.float32)
    white = np.where(drawn < share / 2, np.float32(255), np.float32(0))
    return np.where(drawn < share, white, pixels.astype(np.float32))


def contrast(pixels: Pixels, _rng: np.random.Generator, *, kept: float) -> Floats:
    """Distances from the mean of each channel times `kept`."""
    image = pixels.astype(np.float32)
    means = image.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return (image - means) * np.float32(kept) + means


def pixelate(pixels: Pixels, _rng: np.random.Generator, *, kept: float) -> Pixels:
    """Shrunk to `kept` of its side and enlarged again, by boxes."""
    side = len(pixels)
    small = Image.fromarray(pixels).resize((int(side * kept),) * 2, Image.Resampling.BOX)
    return np.asarray(small.resize((side, side), Image.Resampling.BOX))


def jpeg_compression(pixels: Pixels, _rng: np.random.Generator, *, quality: float) -> Pixels:
    """Through a JPEG file of this quality."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file))


_APPLY = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def corrupt(pixels: Pixels, kind: str, severity: int, *, seed: int, row: int) -> Pixels:
    """One corruption of one image, uint8 [S, S, 3], S from 16; the result is the same for the same arguments.

    kind: one of CORRUPTIONS; severity: 1 to 5; row: which image of its set this is. Raises ValueError for others.
    """
    if kind not in _APPLY or severity not in SEVERITIES:
        raise ValueError(f"corruption {kind!r} of severity {severity!r}: expected one of {CORRUPTIONS}, and 1 to 5")
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3 or len(pixels) < LEAST_SIDE:
        raise ValueError(f"corruptions need squares [S, S, 3] of {LEAST_SIDE} pixels and more, not {pixels.shape}")
    rng = np.random.Generator(np.random.PCG64([seed, CORRUPTIONS.index(kind), severity, row]))
    found = _APPLY[kind](pixels, rng, **parameters(kind, severity, len(pixels)))  # type: ignore[operator]
    if found.dtype == np.uint8:
        return found
    # Cut off, not rounded, as published.
    return np.clip(found + np.float32(_ROUNDING), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class CorruptedView:
    """What the model sees of an image under one corruption: the squares of another view, of `LEAST_SIDE` pixels or
    more, with that corruption on them."""

    base: View
    kind: str
    severity: int
    seed: int = 0

    @property
    def name(self) -> str:
        """All that the pixels depend on."""
        return f"{self.base.name} {self.kind} {self.severity} seed {self.seed} version {_VERSION}"

    @property
    def size(self) -> int:
        """Side of the result in pixels."""
        return self.base.size

    def __call__(self, pixels: Pixels, row: int) -> "torch.Tensor":
        """uint8 [H, W, 3] of row `row` of its source to uint8 [3, S, S]."""
        import torch

        seen = np.ascontiguousarray(np.moveaxis(self.base(pixels, row).numpy(), 0, -1))
        found = corrupt(seen, self.kind, self.severity, seed=self.seed, row=row)
        return torch.from_numpy(np.array(np.moveaxis(found, -1, 0), order="C"))
