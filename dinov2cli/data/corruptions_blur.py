"""Corruptions that move light: defocus, glass, motion and zoom blur, and elastic transforms.

Every function takes pixels uint8 [S, S, 3], and a generator where it draws; it returns float32 [S, S, 3] in 0..255.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.ndimage

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_MARGIN = 2
_REACH_OF_SIGMA = 3.0


def defocus_blur(pixels: Pixels, _rng: np.random.Generator, *, radius: float, softness: float) -> Floats:
    """A disk as point spread, softened by a small Gaussian; borders mirrored."""
    return correlate(pixels.astype(np.float32), disk(radius, softness), "reflect")


@lru_cache(maxsize=16)
def disk(radius: float, softness: float) -> Floats:
    """Weights [k, k] of all grid points within `radius` pixels, softened by a Gaussian of 3 taps (5 for radii above 8);
    they sum to 1."""
    half = math.ceil(radius) + _MARGIN
    steps = np.arange(-half, half + 1)
    inside = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float64)
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    soft = np.exp(-(taps**2) / (2 * softness**2))
    for axis in (0, 1):
        inside = scipy.ndimage.convolve1d(inside, soft, axis=axis, mode="constant")
    return (inside / inside.sum()).astype(np.float32)


def correlate(image: Floats, kernel: Floats, border: str) -> Floats:
    """out[y, x] = sum of kernel[i, j] * image[y + i - h, x + j - h] for a kernel [2h + 1, 2h + 1], image [S, S, C].

    By the Fourier transform: the kernels here are wide. border: how `numpy.pad` goes on outside.
    """
    half, side = len(kernel) // 2, len(image)
    planes = np.moveaxis(image, -1, 0)
    padded = np.pad(planes, ((0, 0), (half, half), (half, half)), mode=border)  # type: ignore[call-overload]
    n = scipy.fft.next_fast_len(side + 2 * half, real=True)
    spectrum = scipy.fft.rfft2(padded, s=(n, n)) * scipy.fft.rfft2(kernel, s=(n, n)).conj()
    return np.moveaxis(scipy.fft.irfft2(spectrum, s=(n, n))[:, :side, :side], 0, -1)


def glass_blur(pixels: Pixels, rng: np.random.Generator, *, sigma: float, reach: float, passes: float) -> Floats:
    """Blurred, then every pixel taken from a random place near by, pixel after pixel from the bottom right, and blurred
    again.

    The paper speaks of swapped pixels. Its published program swaps views of one array, which copies: so were the
    published images made, and so it is here.
    """
    delta = max(1, round(reach))
    blurred = np.floor(_gaussian(pixels.astype(np.float32), sigma))
    origins = np.arange(pixels.shape[0] * pixels.shape[1])
    for _ in range(round(passes)):
        origins = origins[_copied(len(pixels), delta, rng)]
    return _gaussian(blurred.reshape(-1, 3)[origins].reshape(pixels.shape), sigma)


def _copied(side: int, delta: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Which pixel's value every pixel has, int64 [side * side], when all have been overwritten one after another.

    From the last to the first of those that have all their neighbours, each by one -delta to delta - 1 away. One behind
    it was written before and hands on what it was given; one before it still had its own.
    """
    steps = np.arange(delta + 1, side - delta + 1)
    targets = (steps[:, None] * side + steps).ravel()
    moves = rng.integers(-delta, delta, (2, len(targets)))
    given_by = np.arange(side * side)
    given_by[targets] += moves[0] * side + moves[1]
    written = np.zeros(side * side, dtype=bool)
    written[targets] = True
    own = np.arange(side * side)
    before = np.where(written[given_by] & (given_by > own), given_by, own)
    while ((further := before[before]) != before).any():
        before = further
    return given_by[before]


def _gaussian(image: Floats, sigma: float) -> Floats:
    return scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def motion_blur(pixels: Pixels, rng: np.random.Generator, *, radius: float, sigma: float) -> Floats:
    """Dragged along a line up to 45 degrees from the horizontal."""
    angle = rng.uniform(-45, 45)
    return dragged(pixels.astype(np.float32), radius, sigma, angle)


def dragged(image: Floats, radius: float, sigma: float, degrees: float) -> Floats:
    """Weighted mean along a line from every pixel of image [S, S, C]: half a Gaussian, 2 * ceil(radius) + 1 taps one
    pixel apart, each at the nearest grid point; borders repeated (as ImageMagick's motion blur)."""
    along = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(along**2) / (2 * sigma**2))
    turn = math.radians(degrees)
    x, y = (np.ceil(along * part - 0.5).astype(np.int64) for part in (math.cos(turn), math.sin(turn)))
    half = int(max(abs(x).max(), abs(y).max()))
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    np.add.at(kernel, (y + half, x + half), weights / weights.sum())
    return correlate(image, kernel.astype(np.float32), "edge")


def zoom_blur(pixels: Pixels, _rng: np.random.Generator, *, stop: float, step: float) -> Floats:
    """Mean of the image and of it under growing zooms, 1 to below `stop`."""
    image = planes_of(pixels.astype(np.float32))
    factors = np.arange(1, stop, step)
    total = image.clone()
    for factor in factors:
        total += zoomed(image, float(factor))
    return array_of(total / (len(factors) + 1))


def zoomed(image: "torch.Tensor", factor: float) -> "torch.Tensor":
    """The middle of float32 [1, C, S, S] enlarged `factor` times (from 1), bilinear between the corners' centres."""
    import torch.nn.functional as F

    side = image.shape[-1]
    part = math.ceil(side / factor)
    start = (side - part) // 2
    middle = image[:, :, start : start + part, start : start + part]
    grown = round(part * factor)
    large = F.interpolate(middle, (grown, grown), mode="bilinear", align_corners=True)
    cut = (grown - side) // 2
    return large[:, :, cut : cut + side, cut : cut + side]


def elastic_transform(
    pixels: Pixels, rng: np.random.Generator, *, strength: float, sigma: float, shift: float
) -> Floats:
    """A random affine map (three points of a square moved by up to `shift` pixels), then a smooth random field of
    displacements: uniform noise under a Gaussian of `sigma` pixels, times `strength`."""
    import torch

    side = len(pixels)
    image = planes_of(pixels.astype(np.float32))
    across, down = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64))
    middle, arm = side // 2, side // 3
    corners = np.array([[arm, arm], [arm, -arm], [-arm, -arm]], dtype=np.float64) + middle
    moved = corners + rng.uniform(-shift, shift, corners.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # [x, y, 1] of the result to [x, y] before
    places = np.stack([across, down, np.ones_like(across)], axis=-1) @ back
    image = _sampled(image, places, border_between_pixels=False)
    fields = [smoothed(rng.uniform(-1, 1, (side, side)), sigma) * strength for _ in range(2)]
    places = np.stack([across + fields[0], down + fields[1]], axis=-1)
    found: torch.Tensor = _sampled(image, places, border_between_pixels=True)
    return array_of(found)


def smoothed(field: npt.NDArray[np.float64], sigma: float) -> npt.NDArray[np.float64]:
    """`scipy.ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)`, at any sigma in the same short time.

    Reflected at the borders, a symmetric filter only scales the cosine components of a field [S, S].
    """
    if sigma <= 0:
        return field
    reach = int(_REACH_OF_SIGMA * sigma + 0.5)
    taps = np.arange(-reach, reach + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    side = len(field)
    gains = np.cos(np.outer(np.arange(side), taps) * (np.pi / side)) @ (weights / weights.sum())
    return scipy.fft.idctn(scipy.fft.dctn(field, norm="ortho") * np.outer(gains, gains), norm="ortho")


def _sampled(image: "torch.Tensor", places: npt.NDArray[np.float64], *, border_between_pixels: bool) -> "torch.Tensor":
    """Bilinear samples of [1, C, S, S] at places [S, S, 2] (x, y in pixels). Beyond the border the image is mirrored,
    the pixels there once more or not."""
    import torch
    import torch.nn.functional as F

    side = image.shape[-1]
    relative = (2 * places + 1) / side - 1 if border_between_pixels else 2 * places / (side - 1) - 1
    grid = torch.from_numpy(relative.astype(np.float32))[None]
    return F.grid_sample(
        image, grid, mode="bilinear", padding_mode="reflection", align_corners=not border_between_pixels
    )


def planes_of(image: Floats) -> "torch.Tensor":
    """[S, S, C] as a tensor [1, C, S, S], contiguous."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))[None]


def array_of(image: "torch.Tensor") -> Floats:
    """A tensor [1, C, S, S] as [S, S, C]."""
    return np.moveaxis(image[0].numpy(), 0, -1)
