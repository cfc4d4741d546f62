"""Pages, overlays and frames that photographs are put into: the templates that copies and look-alikes share.

Everything here is drawn from a generator of random numbers alone, never from the photograph: the same generator state
makes the same page around another picture, which is what deceives a search for copies.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
_FREQUENT = np.array([8, 2, 3, 4, 12, 2, 2, 6, 7, 0.2, 1, 4, 3, 7, 8, 2, 0.1, 6, 6, 9, 3, 1, 2, 0.2, 2, 0.1])
_CANVAS = {"page": (720, 960), "phone": (540, 960), "desktop": (1024, 640), "slide": (960, 600)}
_BOX = {
    "page": (0.12, 0.16, 0.88, 0.62),
    "phone": (0.0, 0.16, 1.0, 0.68),
    "desktop": (0.24, 0.14, 0.76, 0.86),
    "slide": (0.46, 0.2, 0.95, 0.85),
}
"""Where the picture may lie on each kind of page: left, top, right, bottom as shares of its sides."""


def page(picture: Image.Image, look: np.random.Generator, rng: np.random.Generator) -> Image.Image:
    """The picture on a page [about 1 megapixel]: a document, a phone's or a browser's screen, or a slide.

    look: draws the page, its text and where the picture lies on it; rng: draws what differs from one use to the
    next, the caption. The picture is scaled to fit, never cut.
    """
    style = str(look.choice(list(_CANVAS)))
    dark = style != "page" and look.random() < 0.35
    paper, ink = _paper(look, dark)
    width, height = _CANVAS[style]
    canvas = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = (round(a * b) for a, b in zip(_BOX[style], (width, height) * 2, strict=True))
    shrink = look.uniform(0.8, 1.0)
    scale = shrink * min((right - left) / picture.width, (bottom - top) / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    corner = ((left + right - size[0]) // 2, top)
    _bars(draw, look, style, (width, height), ink)
    if style == "page":
        _text(draw, look, (left, round(0.07 * height), right, top - 8), 24, ink)
        _text(draw, look, (left, bottom + 24, right, round(0.95 * height)), 15, ink)
    elif style == "phone":
        _text(draw, look, (12, round(0.8 * height), width - 12, round(0.93 * height)), 17, ink)
        _circle(draw, (round(0.08 * width), round(0.12 * height)), 20, _colour(look))
        _text(draw, look, (round(0.15 * width), round(0.1 * height), round(0.6 * width), round(0.14 * height)), 17, ink)
    elif style == "desktop":
        _text(draw, look, (14, round(0.15 * height), left - 20, round(0.95 * height)), 14, ink)
        _thumbnails(draw, look, (right + 20, round(0.15 * height), width - 14, round(0.95 * height)))
    else:
        _text(draw, look, (40, round(0.08 * height), width - 40, round(0.17 * height)), 30, ink)
        _text(draw, look, (40, top + 10, left - 30, round(0.9 * height)), 18, ink)
    canvas.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), corner)
    under = corner[1] + size[1] + 6
    _text(draw, rng, (corner[0] + 4, under, corner[0] + size[0], under + 22), 14, ink)
    return canvas


def text_page(look: np.random.Generator, rng: np.random.Generator) -> Image.Image:
    """A page of text only, 720 x 960: title and margins drawn by look, the words of the text by rng."""
    paper, ink = _paper(look, dark=False)
    canvas = Image.new("RGB", (720, 960), paper)
    draw = ImageDraw.Draw(canvas)
    margin = int(look.integers(40, 110))
    _text(draw, look, (margin, 40, 720 - margin, 90), 28, ink)
    columns, gap = int(look.integers(1, 3)), 24
    wide = (720 - 2 * margin - gap * (columns - 1)) // columns
    for column in range(columns):
        left = margin + column * (wide + gap)
        _text(draw, rng, (left, 110, left + wide, 920), 15, ink)
    return canvas


def overlay(picture: Image.Image, look: np.random.Generator) -> Image.Image:
    """The picture with a caption, a watermark, a logo in a corner or a face drawn over 3 to 15 % of it."""
    canvas = picture.convert("RGB").copy()
    width, height = canvas.size
    draw = ImageDraw.Draw(canvas, "RGBA")
    kind = str(look.choice(["caption", "watermark", "logo", "face"]))
    colour, words = _colour(look), _words(look, 6)
    if kind == "caption":
        tall = max(1, round(look.uniform(0.08, 0.15) * height))
        top = 0 if look.random() < 0.3 else height - tall
        draw.rectangle((0, top, width, top + tall), fill=(*((0, 0, 0) if look.random() < 0.5 else colour), 210))
        draw.text((tall // 3, top + tall // 6), words, fill=(255, 255, 255), font=font(max(6, round(0.6 * tall))))
    elif kind == "watermark":
        size = max(6, round(look.uniform(0.08, 0.14) * min(width, height)))
        for row in range(3):
            place = (round(look.uniform(0.0, 0.3) * width), round((0.15 + 0.3 * row) * height))
            draw.text(place, words, fill=(255, 255, 255, 130), font=font(size))
    elif kind == "logo":
        side = max(2, round(math.sqrt(look.uniform(0.03, 0.08) * width * height)))
        left = 4 if look.random() < 0.5 else max(0, width - side - 4)
        top = 4 if look.random() < 0.5 else max(0, height - side - 4)
        draw.rounded_rectangle((left, top, left + side, top + side), radius=side // 6, fill=(*colour, 255))
        draw.text(
            (left + side // 6, top + side // 5), words[:2].upper(), fill=(255, 255, 255), font=font(side // 2 + 6)
        )
    else:
        radius = max(2, round(math.sqrt(look.uniform(0.03, 0.12) * width * height / math.pi)))
        _face(draw, (round(look.uniform(0.2, 0.8) * width), round(look.uniform(0.2, 0.8) * height)), radius)
    return canvas


def letterbox(picture: Image.Image, look: np.random.Generator) -> Image.Image:
    """The picture between bars of one colour above and below, left and right, or framed, 5 to 20 % of a side each."""
    width, height = picture.size
    share, kind = look.uniform(0.05, 0.2), str(look.choice(["rows", "columns", "frame"]))
    shades: list[Colour] = [(0, 0, 0), (255, 255, 255), (128, 128, 128), _colour(look)]
    fill = shades[int(look.choice(4, p=[0.45, 0.35, 0.1, 0.1]))]
    x = 0 if kind == "rows" else max(1, round(share * width))
    y = 0 if kind == "columns" else max(1, round(share * height))
    canvas = Image.new("RGB", (width + 2 * x, height + 2 * y), fill)
    canvas.paste(picture.convert("RGB"), (x, y))
    return canvas


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface that comes with Pillow, `size` pixels high: no file of the system is needed."""
    return ImageFont.load_default(size)


def _paper(look: np.random.Generator, dark: bool) -> tuple[Colour, Colour]:
    if dark:
        return (18, 18, int(look.integers(18, 34))), (225, 225, 225)
    return (int(look.integers(244, 256)),) * 3, (int(look.integers(0, 60)),) * 3


def _colour(look: np.random.Generator) -> Colour:
    red, green, blue = (int(v) for v in look.integers(20, 236, 3))
    return red, green, blue


def _words(rng: np.random.Generator, count: int) -> str:
    lengths = rng.integers(2, 10, count)
    letters = rng.choice(_LETTERS, int(lengths.sum()), p=_FREQUENT / _FREQUENT.sum())
    return " ".join("".join(part) for part in np.split(letters, np.cumsum(lengths)[:-1]))


def _text(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: tuple[int, int, int, int], size: int, ink: Colour
) -> None:
    """Lines of made-up words that fill a box; the last of each paragraph is short."""
    left, top, right, bottom = box
    if right - left < size or bottom - top < size // 2:
        return
    face, line = font(size), round(1.45 * size)
    for y in range(top, max(top + 1, bottom - size), line):
        words = _words(rng, max(1, round((right - left) / (3.3 * size))))
        share = rng.uniform(0.25, 0.8) if rng.random() < 0.15 else 1.0
        draw.text((left, y), words[: max(1, round(share * (right - left) / (0.55 * size)))], fill=ink, font=face)


def _bars(draw: ImageDraw.ImageDraw, look: np.random.Generator, style: str, size: tuple[int, int], ink: Colour) -> None:
    """The bars and buttons of a screen."""
    width, height = size
    if style in ("page", "slide"):
        draw.line((40, round(0.95 * height), width - 40, round(0.95 * height)), fill=ink, width=2)
        return
    draw.rectangle((0, 0, width, round(0.08 * height)), fill=_colour(look))
    _text(draw, look, (16, round(0.025 * height), width // 2, round(0.07 * height)), 20, (255, 255, 255))
    for number in range(4):
        middle = (round((0.2 + 0.2 * number) * width), round(0.965 * height))
        if style == "phone":
            _circle(draw, middle, 14, ink)
        else:
            draw.rectangle((width - 60 * (number + 1), 10, width - 60 * number - 12, 36), outline=(255, 255, 255))


def _thumbnails(draw: ImageDraw.ImageDraw, look: np.random.Generator, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    tall = 84
    for y in range(top, max(top + 1, bottom - tall), tall + 16):
        draw.rectangle((left, y, right, y + tall), fill=_colour(look))
        draw.polygon([(left, y + tall), ((left + right) // 2, y + 20), (right, y + tall)], fill=_colour(look))


def _circle(draw: ImageDraw.ImageDraw, middle: tuple[int, int], radius: int, fill: Colour) -> None:
    x, y = middle
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _face(draw: ImageDraw.ImageDraw, middle: tuple[int, int], radius: int) -> None:
    x, y = middle
    eye = max(1, radius // 6)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 204, 51, 255), outline=(90, 60, 0, 255))
    for side in (-1, 1):
        _circle(draw, (x + side * radius // 3, y - radius // 4), eye, (60, 40, 0))
    mouth = (x - radius // 2, y - radius // 3, x + radius // 2, y + radius // 2)
    draw.arc(mouth, 20, 160, fill=(60, 40, 0, 255), width=max(1, radius // 8))


def flat(rng: np.random.Generator, side: int = 320) -> npt.NDArray[np.uint8]:
    """A nearly empty picture [side, side, 3]: one colour with a soft slope in some direction and faint noise."""
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 12)
    y, x = np.mgrid[0:side, 0:side] / side
    shade = slope * (np.cos(angle) * x + np.sin(angle) * y)
    values = rng.uniform(12, 243, 3) + shade[..., None] + rng.normal(0, rng.uniform(0, 2), (side, side, 1))
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def static(rng: np.random.Generator, side: int = 320) -> npt.NDArray[np.uint8]:
    """Noise [side, side, 3] around one colour, grey or coloured: a spectrum without any structure."""
    channels = 1 if rng.random() < 0.5 else 3
    noise = rng.normal(0, rng.uniform(8, 40), (side, side, channels))
    return np.clip(np.round(rng.uniform(60, 196, 3) + noise), 0, 255).astype(np.uint8)
