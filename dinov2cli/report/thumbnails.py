"""Small pictures of rows of an image source, for grids; an image that cannot be read is left out."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image
from dinov2cli.data.source import ImageSource

_SIZE = 260  # longest side in pixels: twice what a grid shows


def thumbnail(source: ImageSource, row: int, size: int = _SIZE) -> np.ndarray | None:
    """The image of one row as uint8 [H, W, 3], no side above `size` pixels; None if it cannot be read."""
    try:
        pixels = decode_image(source.read(int(row)), name=source.name(int(row)))
    except BadImage:
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def thumbnails(source: ImageSource, rows: Iterable[int], size: int = _SIZE) -> list[np.ndarray]:
    """The readable ones among the images of these rows."""
    found = (thumbnail(source, row, size) for row in rows)
    return [image for image in found if image is not None]


def spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
