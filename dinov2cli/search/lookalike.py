"""A second look at two images whose hashes are near: do their thumbnails agree?"""

import numpy as np
import numpy.typing as npt

from dinov2cli.search.hashing import ORIENTATIONS, Uint8, oriented
from dinov2cli.search.vectors import Float32, Int64

_GREY = 4  # largest difference of channels in a grey image, in grey levels
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_PAPER_TOLERANCE = 12
_FEW_CELLS = 9


def agreement(a: Uint8, b: Uint8, orientation: Int64) -> tuple[Float32, Float32]:
    """Correlation of thumbnails a [M, S, S, 3], each in its orientation, and b [M, S, S, 3]: of all cells, and of those
    that are not paper in both.

    Paper is what has the colour of most of the edge; bars, margins and the ground behind an object would make any two
    pictures alike. Brightness and contrast may differ, and where one of the two has no colour the other's does not
    count.
    """
    first = np.empty(a.shape, dtype=np.float32)
    for number in range(ORIENTATIONS):
        here = orientation == number
        first[here] = oriented(a[here], number)
    second = b.astype(np.float32)
    drawn = ~(_paper(first) & _paper(second))
    few = drawn.sum(axis=(1, 2)) < _FEW_CELLS
    drawn[few] = True
    grey = (np.ptp(first, axis=3).max(axis=(1, 2)) <= _GREY) | (np.ptp(second, axis=3).max(axis=(1, 2)) <= _GREY)
    for thumbs in (first, second):
        thumbs[grey] = (thumbs[grey] @ _LUMINANCE)[..., None]
    return _correlation(first, second, np.ones_like(drawn)), _correlation(first, second, drawn)


def _paper(thumbs: Float32) -> npt.NDArray[np.bool_]:
    """Cells [M, S, S] of thumbnails [M, S, S, 3] that have the median colour of the edge."""
    edge = np.concatenate([thumbs[:, 0], thumbs[:, -1], thumbs[:, :, 0], thumbs[:, :, -1]], axis=1)
    colour = np.median(edge, axis=1)
    near = np.abs(thumbs - colour[:, None, None]).max(axis=3) <= _PAPER_TOLERANCE
    return np.asarray(near)


def _correlation(a: Float32, b: Float32, cells: npt.NDArray[np.bool_]) -> Float32:
    """Correlation [M] over the chosen cells [M, S, S], every channel about its own mean; 0 where one is flat."""
    weight = cells[..., None].astype(np.float32)
    count = weight.sum(axis=(1, 2), keepdims=True)
    x = (a - (a * weight).sum(axis=(1, 2), keepdims=True) / count) * weight
    y = (b - (b * weight).sum(axis=(1, 2), keepdims=True) / count) * weight
    product = np.einsum("mijc,mijc->m", x, y)
    scale = np.einsum("mijc,mijc->m", x, x) * np.einsum("mijc,mijc->m", y, y)
    return np.asarray(product / np.sqrt(np.maximum(scale, 1e-6)), dtype=np.float32)
