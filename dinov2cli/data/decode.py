"""From the bytes of one image file to RGB pixels, and the evaluation resize. No augmentation here.

Decisions, all tested: EXIF orientation is applied; transparent pixels are laid over white (hidden colours under full
transparency are arbitrary); 16- and 32-bit greys are scaled by the smallest number of bits that holds their largest
value (a 12-bit scan in a 16-bit file is not black); of an animation the first frame counts; a truncated file is bad.
"""

import io
import warnings
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from dinov2cli.data.bad import BadImage

# Pillow refuses above this by itself (twice its MAX_IMAGE_PIXELS); 13,000 x 13,000 passes.
MAX_PIXELS = 178_956_970
# Beyond this ratio of sides the far ends never reach the centre crop: cut before resizing, they cost no memory.
MAX_ASPECT = 4.0


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
    image = _open(data, name, max_pixels)
    try:
        image.load()
        rgb = _to_rgb(_upright(image))
        return np.array(rgb, dtype=np.uint8)
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
        raise BadImage(name, _reason(error)) from error


def probe_size(data: bytes, *, name: str = "image") -> tuple[int, int]:
    """Width and height as displayed (EXIF orientation applied), from the header alone.

    Raises:
        BadImage: not an image.
    """
    image = _open(data, name, MAX_PIXELS)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def resize_center_crop(image_HWC: np.ndarray, resize: int, crop: int) -> torch.Tensor:
    """Shorter side to `resize` (bicubic, antialiased, in uint8), then the central `crop` x `crop` square.

    Sizes and offsets round as in the published evaluation transform (Resize + CenterCrop).

    Args:
        image_HWC: uint8 [H, W, 3].
        resize: new length of the shorter side in pixels, at least `crop`.
        crop: side of the result in pixels.

    Returns:
        uint8 [3, crop, crop], contiguous.
    """
    if crop > resize:
        raise ValueError(f"crop {crop} is larger than the resized side {resize}")
    image_HWC = _trim(image_HWC)
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    new_height, new_width = int(resize * height / short), int(resize * width / short)
    pixels_CHW = resize_uint8(image_HWC, new_height, new_width)
    top, left = round((new_height - crop) / 2), round((new_width - crop) / 2)
    return pixels_CHW[:, top : top + crop, left : left + crop].contiguous()


def resize_uint8(image_HWC: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Bicubic antialiased resize in uint8: [H, W, 3] -> [3, height, width]. Within 0.04 grey levels of Pillow's."""
    pixels_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]  # a channels-last view: torch's fast path
    if pixels_1CHW.shape[2:] != (height, width):
        pixels_1CHW = F.interpolate(pixels_1CHW, (height, width), mode="bicubic", antialias=True)
    return pixels_1CHW[0]


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
    _quiet_pillow()
    # Another library in the process may have switched this on; half a picture must not pass as a whole one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with (
            warnings.catch_warnings()
        ):  # Pillow warns from half of its own limit; the limit below is the one that counts
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
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
def _quiet_pillow() -> None:
    """Pillow warns about damaged metadata and from half of its own pixel limit; here what matters raises.

    Once for the process: `warnings.catch_warnings` around each image would not be safe where threads decode.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the limit of {MAX_PIXELS} pixels"
    text = " ".join(str(error).split()) or type(error).__name__
    return "truncated file" if "truncated" in text.lower() else f"corrupt file ({text[:100]})"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


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
