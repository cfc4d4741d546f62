"""Edits that people and web sites make to photographs: from pixels to the bytes of a new file.

`EDITS` maps the name of each kind of edit to a function (image [H, W, 3] uint8, rng) -> bytes of an image file. How
strong an edit is, is drawn from `rng`. Every edit takes an image of any size from 1 x 1 pixel.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from dinov2cli.curation.pages import letterbox, overlay, page

Uint8 = npt.NDArray[np.uint8]
Edit = Callable[[Uint8, np.random.Generator], bytes]
Step = Callable[[Image.Image, np.random.Generator], Image.Image]

_ORIENTATION = 0x0112
_UNDONE_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What to do to the pixels so that a reader who obeys this EXIF orientation sees the picture as it was."""


def encode(picture: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file: JPEG of quality 95 unless told otherwise."""
    stream = io.BytesIO()
    if form == "JPEG":
        options = {"quality": 95, **options}
    picture.save(stream, form, **options)
    return stream.getvalue()


def exact(image: Uint8, rng: np.random.Generator) -> bytes:
    """The original's own file, as `copies.original_file` makes it of pixels."""
    del rng
    return encode(Image.fromarray(image))


def reencode(image: Uint8, rng: np.random.Generator) -> bytes:
    """JPEG of quality 30 to 90."""
    return encode(Image.fromarray(image), quality=int(rng.integers(30, 91)))


def other_format(image: Uint8, rng: np.random.Generator) -> bytes:
    """PNG or WebP, the latter lossless or of quality 70 to 95."""
    kind = int(rng.integers(0, 3))
    if kind == 0:
        return encode(Image.fromarray(image), "PNG", compress_level=1)
    if kind == 1:
        return encode(Image.fromarray(image), "WEBP", lossless=True, method=0, quality=0)
    return encode(Image.fromarray(image), "WEBP", quality=int(rng.integers(70, 96)), method=2)


def exif(image: Uint8, rng: np.random.Generator) -> bytes:
    """Pixels turned or mirrored, with the EXIF orientation that undoes it: the same picture to whoever obeys it."""
    orientation = int(rng.integers(2, 9))
    tags = Image.Exif()
    tags[_ORIENTATION] = orientation
    stored = Image.fromarray(image).transpose(_UNDONE_BY[orientation])
    return encode(stored, exif=tags, quality=int(rng.integers(85, 96)))


def resize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Both sides scaled by 0.3 to 0.8."""
    scale = rng.uniform(0.3, 0.8)
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, filters[int(rng.integers(0, 3))])


def crop(share: float) -> Step:
    """A step that keeps a part of `share` of the area, of the same shape, anywhere in the picture."""

    def step(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = math.sqrt(share)
        width, height = max(1, round(picture.width * side)), max(1, round(picture.height * side))
        left = int(rng.integers(0, picture.width - width + 1))
        top = int(rng.integers(0, picture.height - height + 1))
        return picture.crop((left, top, left + width, top + height))

    return step


def flip(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrored, left for right."""
    del rng
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def rot90(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by 90, 180 or 270 degrees."""
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return picture.transpose(turns[int(rng.integers(0, 3))])


def rotate(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by 3 to 10 degrees either way: corners filled with black or white, or cut off."""
    degrees = float(rng.uniform(3, 10) * rng.choice([-1, 1]))
    shade = int(rng.choice([0, 255]))
    cut = bool(rng.random() < 0.5)
    turned = picture.rotate(degrees, Image.Resampling.BICUBIC, expand=not cut, fillcolor=(shade,) * 3)
    if not cut:
        return turned
    width, height = inscribed(*picture.size, degrees)
    left, top = (turned.width - width) // 2, (turned.height - height) // 2
    return turned.crop((left, top, left + width, top + height))


def inscribed(width: int, height: int, degrees: float) -> tuple[int, int]:
    """Sides of the largest upright rectangle of the same shape within a rectangle turned about its middle.

    A rectangle scaled by s fits where each of its turned corners stays inside: s (w |cos| + h |sin|) <= w, and
    s (w |sin| + h |cos|) <= h.
    """
    c, s = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    scale = min(width / (width * c + height * s), height / (width * s + height * c))
    return max(1, math.floor(width * scale) - 1), max(1, math.floor(height * scale) - 1)


def jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation each multiplied by 0.7 to 1.3."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(float(rng.uniform(0.7, 1.3)))
    return picture


def gray(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Luminance only."""
    del rng
    return picture.convert("L").convert("RGB")


def blur(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur; standard deviation 0.4 to 1.2 % of the shorter side."""
    return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.004, 0.012)) * min(picture.size)))


def noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise of 8 to 25 grey levels."""
    values = np.asarray(picture, dtype=np.float32)
    values = values + rng.standard_normal(values.shape, dtype=np.float32) * np.float32(rng.uniform(8, 25))
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))


def screenshot(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """On a page or a screen, see `pages.page`; page and caption both drawn from `rng`."""
    return page(picture, rng, rng)


_CHAINED: dict[str, Step] = {
    "crop": crop(0.8),
    "flip": flip,
    "rotate": rotate,
    "resize": resize,
    "jitter": jitter,
    "gray": gray,
    "blur": blur,
    "overlay": overlay,
    "letterbox": letterbox,
    "noise": noise,
}


def chain(image: Uint8, rng: np.random.Generator) -> bytes:
    """Two different edits one after the other, then JPEG of quality 40 to 85."""
    picture = Image.fromarray(image)
    for name in rng.choice(list(_CHAINED), 2, replace=False):
        picture = _CHAINED[str(name)](picture, rng)
    return encode(picture, quality=int(rng.integers(40, 86)))


def saved(step: Step) -> Edit:
    """An edit of pixels as an edit of files: the result as JPEG of quality 75 to 95."""

    def edit(image: Uint8, rng: np.random.Generator) -> bytes:
        picture = step(Image.fromarray(image), rng)
        return encode(picture, quality=int(rng.integers(75, 96)))

    edit.__doc__ = step.__doc__
    return edit


EDITS: dict[str, Edit] = {
    "exact": exact,
    "reencode": reencode,
    "format": other_format,
    "resize": saved(resize),
    "exif": exif,
    "crop80": saved(crop(0.8)),
    "crop50": saved(crop(0.5)),
    "flip": saved(flip),
    "rot90": saved(rot90),
    "rotate": saved(rotate),
    "jitter": saved(jitter),
    "gray": saved(gray),
    "blur": saved(blur),
    "overlay": saved(overlay),
    "letterbox": saved(letterbox),
    "screenshot": saved(screenshot),
    "noise": saved(noise),
    "chain": chain,
}
"""Kind of edit -> function of (image [H, W, 3] uint8, rng) that gives the bytes of a file."""

TEMPLATES: dict[str, Callable[[Image.Image, np.random.Generator, np.random.Generator], Image.Image]] = {
    "screenshot": page,
    "overlay": lambda picture, look, _: overlay(picture, look),
    "letterbox": lambda picture, look, _: letterbox(picture, look),
}
"""Kinds whose look is a template: functions of (picture, generator of the look, generator of the rest)."""
