"""Fingerprints of images: digests for exact copies, and a 256-bit perceptual hash for altered ones."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2cli.search.framing import pictures_within

Uint8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

HASH_BYTES = 32
ORIENTATIONS = 8
THUMB = 12
"""Side of the thumbnails kept for a second look."""

WHOLE, FRAMED, INNER = 0, 1, 2
"""Kinds of views: a whole image without a picture inside, one with a picture inside, and that picture."""

_SIDE = 36
_FREQUENCIES = 16
_MIN_CONTRAST = 0.8  # root mean square of the coefficients, in grey levels; rounding to whole ones makes 0.3
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _dct_rows() -> Float32:
    """Rows 1 .. 16 of the DCT-II of 36 points, [16, 36]; row 0, the mean brightness, is left out."""
    n = np.arange(_SIDE)
    f = np.arange(1, _FREQUENCIES + 1)[:, None]
    return (np.sqrt(2 / _SIDE) * np.cos(np.pi * f * (2 * n + 1) / (2 * _SIDE))).astype(np.float32)


_DCT = _dct_rows()
# Mirroring an axis changes the sign of its odd frequencies.
_ODD = np.arange(1, _FREQUENCIES + 1) % 2 == 1


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
    """The views of one image that have a hash: kind [V], bits [V, 32] uint8 (256 bits each), thumbs [V, 12, 12, 3].

    The first view is the whole image, unless it has too little contrast: hashes of flat images are noise and would
    join everything that is nearly empty. Each further view is a picture found within it, see `pictures_within`.
    """

    kind: Uint8
    bits: Uint8
    thumbs: Uint8

    def __len__(self) -> int:
        return int(self.bits.shape[0])


def image_views(image: Uint8, closer: Uint8 | None = None) -> Uint8:
    """The whole image [H, W, 3] uint8 and, given a `closer` look at it, the pictures within: [V, 36, 36, 3] uint8.

    A reduced image will do for the whole, as long as its sides keep about 64 pixels; for the pictures within, whose
    edges must be known to half a percent, about 256.
    """
    views = [_scaled(image)]
    if closer is not None:
        views += [_scaled(closer[top:bottom, left:right]) for left, top, right, bottom in pictures_within(closer)]
    return np.stack(views)


def view_kinds(count: int) -> Uint8:
    """What each view is, of those that `image_views` made of one image: [count] of WHOLE, FRAMED and INNER."""
    return np.array([WHOLE if count == 1 else FRAMED, *[INNER] * (count - 1)], dtype=np.uint8)


def hash_views(views: Uint8) -> tuple[Uint8, npt.NDArray[np.bool_], Uint8]:
    """DCT hashes of views [V, 36, 36, 3], in the manner of pHash and PDQ.

    Returns bits [V, 32], valid [V] and thumbs [V, 12, 12, 3].

    A bit says whether one of the 16 x 16 lowest frequencies (without the mean) of the luminance is positive. Unlike a
    comparison with their median, this makes the hashes of the 8 mirrored and turned forms of an image functions of
    each other, see `turn_bits`. Views without contrast are not valid.
    """
    luminance = views.astype(np.float32) @ _LUMINANCE
    coefficients = _DCT @ luminance @ _DCT.T
    valid = np.sqrt(np.square(coefficients).mean(axis=(1, 2))) >= _MIN_CONTRAST
    bits = np.packbits((coefficients > 0).reshape(len(views), -1), axis=1)
    step = _SIDE // THUMB
    blocks = views.reshape(len(views), THUMB, step, THUMB, step, 3).astype(np.uint16)
    thumbs = (blocks.sum(axis=(2, 4), dtype=np.uint16) + step * step // 2) // (step * step)
    return bits, valid, thumbs.astype(np.uint8)


def _scaled(image: Uint8) -> Uint8:
    """[36, 36, 3]. With a triangle and not a box, whose half-open pixels are not mirror images of each other."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def perceptual_hash(image: Uint8) -> PerceptualHash:
    """The hash of one image [H, W, 3] uint8; `hash_views` does many at once."""
    bits, valid, thumbs = hash_views(image_views(image, image))
    return PerceptualHash(view_kinds(len(bits))[valid], bits[valid], thumbs[valid])


def turn_bits(bits: Uint8, orientation: int) -> Uint8:
    """Hashes [N, 32] of images as the hashes of their forms in an orientation, 0 .. 7, numbered as in `oriented`.

    Of a picture p, `oriented(p, o)` has the hash `turn_bits(hash of p, o)`, but for frequencies that are zero.
    """
    forms = np.unpackbits(bits, axis=1).reshape(-1, _FREQUENCIES, _FREQUENCIES).view(np.bool_)
    if orientation >= 4:
        forms = forms.transpose(0, 2, 1)
    if orientation & 2:
        forms = forms ^ _ODD[:, None]
    if orientation & 1:
        forms = forms ^ _ODD[None, :]
    return np.packbits(forms.reshape(len(bits), -1), axis=1)


def oriented(thumbs: npt.NDArray, orientation: int) -> npt.NDArray:
    """Pictures [N, S, S, ...] transposed (orientation 4 and up), then mirrored top to bottom (2), left to right (1)."""
    turned = thumbs if orientation < 4 else thumbs.swapaxes(1, 2)
    if orientation & 2:
        turned = turned[:, ::-1]
    return turned[:, :, ::-1] if orientation & 1 else turned


def sharpness(image: Uint8) -> float:
    """Variance of the Laplacian of the luminance: larger is sharper, among images of one size."""
    pixels = np.asarray(Image.fromarray(image).convert("L")).astype(np.int16)
    if min(pixels.shape) < 3:
        return 0.0
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - (pixels[1:-1, 1:-1] << 2)
    values = around.ravel().astype(np.float32)
    return max(0.0, float(values @ values) / values.size - float(values.mean()) ** 2)
