"""Fingerprints of images: digests for exact copies, and a 256-bit perceptual hash for re-encoded ones."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Uint8 = npt.NDArray[np.uint8]

HASH_BYTES = 32
ORIENTATIONS = 8
VIEWS = 2
THUMB = 8
_WHOLE = (slice(None), slice(None))
_SIDE = 64
_FREQUENCIES = 16
_MIN_CONTRAST = 4.0
_BORDER_TOLERANCE = 12
_BORDER_KEEP = (0.25, 0.98)


def _dct_rows() -> npt.NDArray[np.float32]:
    """Rows 1 .. 16 of the DCT-II of 64 points, [16, 64]; row 0, the mean brightness, is left out."""
    n = np.arange(_SIDE)
    f = np.arange(1, _FREQUENCIES + 1)[:, None]
    return (np.sqrt(2 / _SIDE) * np.cos(np.pi * f * (2 * n + 1) / (2 * _SIDE))).astype(np.float32)


_DCT = _dct_rows()
# Mirroring an axis changes the sign of its odd frequencies.
_MIRROR: npt.NDArray[np.float32] = np.where(np.arange(1, _FREQUENCIES + 1) % 2 == 1, -1, 1).astype(np.float32)


def bytes_digest(data: bytes) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def pixel_digest(image: Uint8) -> str:
    """SHA-256 of the decoded pixels [H, W, 3] and their shape, in hex: the same for lossless copies in any format."""
    digest = hashlib.sha256(np.asarray(image.shape, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class PerceptualHash:
    """bits [2, 8, 32] uint8: two views (whole image, uniform border trimmed) in 8 orientations, 256 bits each.

    valid [2] bool: a view without a border to trim, or without contrast, has no hash: hashes of flat images are
    noise and would join everything that is nearly empty.
    thumbs [2, 8, 8, 3] uint8: the views in colour, for a second look at what the bits call alike.
    """

    bits: Uint8
    valid: npt.NDArray[np.bool_]
    thumbs: Uint8


def perceptual_hash(image: Uint8) -> PerceptualHash:
    """DCT hash of an image [H, W, 3] uint8 in the manner of pHash and PDQ.

    Luminance is scaled to 64 x 64; of its DCT the 16 x 16 lowest frequencies (without the mean) are compared with
    their median. Orientation 0 is the image as given; the others are its mirrored and turned forms, computed from
    the same coefficients: any two of the 8 forms of one image share a hash.
    """
    luminance = np.asarray(Image.fromarray(image).convert("L"))
    thumbs = np.zeros((VIEWS, THUMB, THUMB, 3), dtype=np.uint8)
    bits = np.zeros((VIEWS, ORIENTATIONS, HASH_BYTES), dtype=np.uint8)
    valid = np.zeros(VIEWS, dtype=bool)
    for view, inside in enumerate((_WHOLE, trim_border(luminance))):
        if inside is None:
            continue
        small = _shrink(luminance[inside])
        if small.std() < _MIN_CONTRAST:
            continue
        bits[view], valid[view] = _orientations((_DCT @ small @ _DCT.T).astype(np.float32)), True
        thumb = Image.fromarray(np.ascontiguousarray(image[inside])).resize((THUMB, THUMB), Image.Resampling.BILINEAR)
        thumbs[view] = np.asarray(thumb)
    return PerceptualHash(bits, valid, thumbs)


def sharpness(image: Uint8) -> float:
    """Variance of the Laplacian of the luminance: larger is sharper, among images of one size."""
    pixels = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)
    if min(pixels.shape) < 3:
        return 0.0
    inner = pixels[1:-1, 1:-1]
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    return float((around - 4 * inner).var())


def trim_border(luminance: Uint8) -> tuple[slice, slice] | None:
    """Rows and columns of an image [H, W] without its border of one colour (letterbox, frame), None if it has none.

    A border is what differs by at most 12 grey levels from the top left pixel. A trim that would leave more
    than 98 % or less than a quarter of the image is not taken for a border.
    """
    inside = np.abs(luminance.astype(np.int16) - int(luminance[0, 0])) > _BORDER_TOLERANCE
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    low, high = _BORDER_KEEP
    if not low <= height * width / luminance.size <= high:
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def oriented(thumbs: npt.NDArray, orientation: int) -> npt.NDArray:
    """Thumbnails [N, S, S, 3] in the orientation of that number, numbered as the rows of `PerceptualHash.bits`."""
    turned = thumbs if orientation < 4 else thumbs.transpose(0, 2, 1, 3)
    if orientation & 2:
        turned = turned[:, ::-1]
    return turned[:, :, ::-1] if orientation & 1 else turned


def _shrink(luminance: Uint8) -> npt.NDArray[np.float32]:
    """The image [H, W] as [64, 64] float32. In float, for rounding to grey levels would move the small
    coefficients; with a triangle and not a box, whose half-open pixels are not mirror images of each other."""
    floating = Image.fromarray(np.ascontiguousarray(luminance)).convert("F")
    return np.asarray(floating.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float32)


def _orientations(coefficients: npt.NDArray[np.float32]) -> Uint8:
    """Packed bits [8, 32] of coefficients [16, 16] under the 8 symmetries of the square."""
    result = np.empty((ORIENTATIONS, HASH_BYTES), dtype=np.uint8)
    position = 0
    for turned in (coefficients, coefficients.T):
        for vertical in (np.float32(1), _MIRROR[:, None]):
            for horizontal in (np.float32(1), _MIRROR[None, :]):
                form = turned * vertical * horizontal
                result[position] = np.packbits(form > np.median(form))
                position += 1
    return result
