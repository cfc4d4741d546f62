"""From the bytes of one image file to RGB pixels, and the evaluation resize. No augmentation here.

Decisions, all tested: EXIF orientation is applied; transparent pixels are laid over white (hidden colours under full
transparency are arbitrary); 16- and 32-bit greys are scaled by the smallest number of bits that holds their largest
value (a 12-bit scan in a 16-bit file is not black); of an animation the first frame counts; a truncated file is bad.
"""

import importlib
import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from dinov2cli.data import scratch
from dinov2cli.data.bad import BadImage
from dinov2cli.data.jpeg import turbo_pixels
from dinov2cli.data.scratch import Scratch

if TYPE_CHECKING:  # torch takes a second and 180 MB: who only decodes does without
    import torch

# Pillow refuses above this by itself (twice its MAX_IMAGE_PIXELS); 13,000 x 13,000 passes.
MAX_PIXELS = 178_956_970
# Beyond this ratio of sides the far ends never reach the centre crop: cut before resizing, they cost no memory.
MAX_ASPECT = 4.0
# From here on Pillow's pixels are read where they lie; below, a copy without their fourth byte is made sooner.
_IN_PLACE = 300_000
_BLOCK_BYTES = 1 << 30
# What users have as images. Pillow knows more, among them EPS, for which it would run Ghostscript on the file.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000"),
    *("AVIF", "HEIF", "TGA", "QOI", "PCX", "ICO", "PSD", "SGI"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_TURNED = 5
"""EXIF orientations from this one on swap width and height."""


@dataclass(frozen=True)
class Opened:
    """An image file whose header has been read. `height` and `width` are those of the picture as displayed.

    orientation: EXIF's number, 1 to 8; 1 where the pixels are stored as they are displayed.
    """

    name: str
    data: bytes
    image: Image.Image
    height: int
    width: int
    orientation: int


def decode_image(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to RGB.

    Args:
        data: the whole file.
        name: how to call the image in errors.
        max_pixels: width x height above which the image is refused; more than MAX_PIXELS is never accepted.

    Returns:
        uint8 [H, W, 3], C-contiguous, own memory.

    Raises:
        BadImage: not an image, truncated, corrupt, or too large.
    """
    opened = open_image(data, name=name, max_pixels=max_pixels)
    image = opened.image
    if opened.orientation == 1:
        pixels = turbo_pixels(data, image.format, image.mode, image.size)
        if pixels is not None:
            return pixels
    return np.array(_loaded(opened, upright=True), dtype=np.uint8)


def decode_small(data: bytes, *, name: str, least: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int, int]:
    """A reduced picture, upright, and the size of the whole one: for fingerprints, which need no more.

    Both sides are divided by the largest of 8, 4, 2 and 1 that leaves the shorter one `least` pixels or more. A JPEG is
    reduced while it is decoded, in the DCT domain, which saves most of the work but for reading the file to its end;
    other formats are decoded, then averaged over blocks: the pixels differ a little, the picture does not.

    Returns:
        uint8 [ceil(H / n), ceil(W / n), 3], then H and W.

    Raises:
        BadImage: as `decode_image`.
    """
    opened = open_image(data, name=name, max_pixels=max_pixels)
    image, size = opened.image, opened.image.size
    shrink = next((n for n in (8, 4, 2) if min(size) >= n * least), 1)
    pixels = turbo_pixels(data, image.format, image.mode, size, shrink)
    if pixels is None:
        picture = _loaded(opened, shrink=shrink)
        rest = round(size[0] / picture.width) if shrink > 1 else 1  # what Pillow's plugin has already reduced
        pixels = np.asarray(picture.reduce(shrink // rest) if rest < shrink else picture)
    return _turned(pixels, opened.orientation), opened.height, opened.width


def open_image(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Opened:
    """Read the header of an image file (of a PNG more than that). Raises BadImage: not an image, or too large."""
    image = _open(data, name, max_pixels)
    if image.format == "PNG" and "exif" not in image.info:  # it may come behind the pixels: Pillow would load them
        _load(image, name)
    width, height = image.size
    orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow turns a TIFF when it loads it
    if orientation >= _TURNED:
        width, height = height, width
    return Opened(name, data, image, height, width, orientation)


class Decoder:
    """Decodes one image after another for crops, in memory that is used again: for one thread of a loader's worker."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._gave_large = False

    def stored(self, opened: Opened, shrink: int = 1) -> np.ndarray:
        """RGB pixels as the file stores them, EXIF orientation not applied: uint8 [h, w, 3], or [h, w, 4] with a fourth
        channel that means nothing. They hold until the next call.

        Args:
            opened: the file.
            shrink: 1, 2, 4 or 8. A JPEG is decoded to sides divided by it (rounded up), which saves most of the work;
                other formats ignore it.

        Raises:
            BadImage: truncated or corrupt.
        """
        image = opened.image
        if self._gave_large:  # Pillow keeps the storage of the last images: not that of a huge one
            Image.core.clear_cache()
        self._gave_large = image.width * image.height * 4 > scratch.KEPT_BYTES
        pixels = turbo_pixels(opened.data, image.format, image.mode, image.size, shrink, self._room)
        return _values(_loaded(opened, shrink=shrink)) if pixels is None else pixels

    def _room(self, needed: int) -> np.ndarray:
        return self._scratch.take(needed).numpy()


def resize_center_crop(
    image_HWC: np.ndarray, resize: int, crop: int, *, square: bool = False, interpolation: str = "bicubic"
) -> "torch.Tensor":
    """Shorter side to `resize` (antialiased, in uint8), then the central `crop` x `crop` square.

    Sizes and offsets round as in the published evaluation transform (Resize + CenterCrop).

    Args:
        image_HWC: uint8 [H, W, 3].
        resize: new length of the shorter side in pixels, at least `crop`.
        crop: side of the result in pixels.
        square: both sides become `resize` instead, whatever the aspect.
        interpolation: see `resize_uint8`.

    Returns:
        uint8 [3, crop, crop], contiguous.
    """
    if crop > resize:
        raise ValueError(f"crop {crop} is larger than the resized side {resize}")
    new_height = new_width = resize
    if not square:
        image_HWC = _trim(image_HWC)
        height, width = image_HWC.shape[:2]
        short = min(height, width)
        new_height, new_width = int(resize * height / short), int(resize * width / short)
    pixels_CHW = resize_uint8(image_HWC, new_height, new_width, interpolation)
    top, left = round((new_height - crop) / 2), round((new_width - crop) / 2)
    return pixels_CHW[:, top : top + crop, left : left + crop].contiguous()


def resize_uint8(image_HWC: np.ndarray, height: int, width: int, interpolation: str = "bicubic") -> "torch.Tensor":
    """Antialiased resize in uint8: [H, W, 3] -> [3, height, width]. Bicubic is within 0.04 grey levels of Pillow's.

    interpolation: bicubic, bilinear, or (by Pillow itself) lanczos, box, hamming, nearest.
    """
    import torch
    import torch.nn.functional as F

    if image_HWC.shape[:2] == (height, width):
        return torch.from_numpy(image_HWC).permute(2, 0, 1)
    if interpolation not in ("bicubic", "bilinear"):
        resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling[interpolation.upper()])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    # The leading axis first: torch knows channels-last memory, its fast path, by all four strides.
    pixels_1CHW = torch.from_numpy(image_HWC)[None].permute(0, 3, 1, 2)
    return F.interpolate(pixels_1CHW, (height, width), mode=interpolation, antialias=True)[0]


def _trim(image_HWC: np.ndarray) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    longest = int(MAX_ASPECT * min(height, width))
    if height > longest:
        start = (height - longest) // 2
        return np.ascontiguousarray(image_HWC[start : start + longest])
    if width > longest:
        start = (width - longest) // 2
        return np.ascontiguousarray(image_HWC[:, start : start + longest])
    return image_HWC


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage(name, "empty file")
    formats = _prepare_pillow()
    # Another library in the process may have switched this on; half a picture must not pass as a whole one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with (
            warnings.catch_warnings()
        ):  # Pillow warns from half of its own limit; the limit below is the one that counts
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and "HEIF" not in formats:
            raise BadImage(name, "HEIC, which Pillow reads only after `pip install pillow-heif`") from error
        raise BadImage(name, "not an image that can be read") from error
    except Exception as error:
        raise BadImage(name, _reason(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(name, f"{width} x {height} pixels are more than the limit of {max_pixels}")
    if width < 1 or height < 1:
        raise BadImage(name, f"no pixels ({width} x {height})")
    return image


@cache
def _prepare_pillow() -> list[str]:
    """Formats to read. Sets up Pillow, once (`warnings.catch_warnings` would not be safe where threads decode).

    Pillow warns about damaged metadata and from half of its own pixel limit; here what matters raises. Its storage of
    one image serves the next: fresh memory costs a page fault per 4 KiB, a third of the time of a large image. And it
    is in one piece, so that it can be read in place.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.core.set_block_size(_BLOCK_BYTES)
    Image.core.set_blocks_max(2)
    with suppress(ImportError):  # optional: HEIC of phones
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the limit of {MAX_PIXELS} pixels"
    text = " ".join(str(error).split()) or type(error).__name__
    return "truncated file" if "truncated" in text.lower() else f"corrupt file ({text[:100]})"


def _orientation(image: Image.Image) -> int:
    try:
        number = int(image.getexif().get(0x0112, 1))
        return number if 1 <= number <= 8 else 1
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _loaded(opened: Opened, *, upright: bool = False, shrink: int = 1) -> Image.Image:
    """The picture in Pillow's RGB. Raises BadImage."""
    image = opened.image
    if shrink > 1:
        image.draft(None, (max(image.width // shrink, 1), max(image.height // shrink, 1)))
    _load(image, opened.name)
    try:
        return _to_rgb(_upright(image) if upright else image)
    except Exception as error:
        raise BadImage(opened.name, _reason(error)) from error


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [h, w, 3] as displayed under an EXIF orientation."""
    if orientation >= _TURNED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
        raise BadImage(name, _reason(error)) from error


def _values(image: Image.Image) -> np.ndarray:
    """Pixels of an RGB image: of a large one where they lie, four bytes each."""
    if image.width * image.height < _IN_PLACE:
        return np.array(image, dtype=np.uint8)
    try:
        return np.asarray(_InPlace(image))
    except ValueError:  # stored in pieces, as another library's settings may have it
        return np.array(image, dtype=np.uint8)


class _InPlace:
    """Lends the memory of an RGB image to an array, which holds on to this object and so to the memory."""

    def __init__(self, image: Image.Image) -> None:
        self._buffer = pa.array(image).buffers()[-1]
        self.__array_interface__ = {
            "version": 3,
            "data": (self._buffer.address, False),
            "shape": (image.height, image.width, 4),
            "typestr": "|u1",
        }


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # rewriting a damaged EXIF block can fail although the pixels are fine
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_scale_grey(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _scale_grey(values_HW: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(values_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if values_HW.dtype.kind == "f":
        if low < 0 or high > 255:  # no convention left: use the image's own range
            values, scale = values - low, 255 / max(high - low, 1e-12)
        else:
            scale = 255.0 if high <= 1 else 1.0
    else:
        values = values - min(low, 0.0)
        bits = max(8, int(values.max()).bit_length())
        scale = 255 / (2**bits - 1)
    return np.clip(np.round(values * scale), 0, 255).astype(np.uint8)
