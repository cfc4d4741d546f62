"""Whether two aligned images show the same where they overlap: their pixels, patch by patch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.search.local_features import THUMB, Uint8, opencv
from dinov2cli.search.vectors import Float32

CELLS = 7
"""Side of the maps that say where two images agree."""

_GRID = 32
_FINE = 64  # samples along a side, averaged in pairs
_WINDOW, _STEP = 6, 2
_WINDOWS = (_GRID - _WINDOW) // _STEP + 1
_FLAT = 2.5  # grey levels: standard deviation below which a patch says nothing
_NOISE = 4.0  # variance that compression makes
_TEXTURED = 20.0  # standard deviation from where on texture counts no more
_LOW, _HIGH = 0.3, 0.8  # correlation of a patch that shows something else, and of one that shows the same
_OTHER, _SEEN = 0.5, 0.04  # agreement of a cell below which it shows something else, and contrast needed to say so
_REACH = 0.15  # of a side: how far around a matched feature a patch counts as found again
_INSIDE = np.float32(0.02)  # of a side: what an alignment may be off


@dataclass(frozen=True)
class Comparison:
    """How far an image (the frame) is shown again by another one laid over it.

    overlap: share of the frame's area that lies in the other image; share: 0 .. 1, of its texture there that agrees;
    covered: the same, counting only what lies near a feature found in both; reach: share of the texture near one;
    changed: share of the overlap, by area, that shows something else; evidence: how many patches of full contrast were
    compared; support, weight [7, 7]: agreement 0 .. 1 near matched
    features, and contrast 0 .. 1, in each part of the frame.
    """

    overlap: float
    share: float
    covered: float
    reach: float
    changed: float
    evidence: float
    support: Float32
    weight: Float32


def compare(
    frame: Uint8, extent: Float32, other: Uint8, other_extent: Float32, transform: np.ndarray, found: np.ndarray
) -> Comparison:
    """What of the frame is shown again.

    Args:
        frame, other: thumbs [96, 96]; extent, other_extent [2]: their sides over the longer.
        transform: [2, 3] from positions in the frame to the other.
        found: [I, 2] positions in the frame of the features that agree.
    """
    inside, there = _laid_over(other, other_extent, extent, transform)
    cv2 = opencv()
    here = cv2.resize(
        cv2.resize(frame, (_FINE, _FINE), interpolation=cv2.INTER_LINEAR), (_GRID, _GRID), interpolation=3
    )
    agree, weight = _patches(here.astype(np.float64), there, inside)
    near = _near(found / np.maximum(extent, 1e-6))
    total = max(float(weight.sum()), 1e-6)
    pooled = _pooled(weight)
    same = _pooled(agree * weight) / np.maximum(pooled, 1e-6)
    area = max(float(inside.mean()), 1e-6)
    return Comparison(
        overlap=area,
        share=float((agree * weight).sum()) / total,
        covered=float((agree * weight * near).sum()) / total,
        reach=float((weight * near).sum()) / total,
        changed=float(((same < _OTHER) & (pooled > _SEEN)).mean()) / area,
        evidence=float(weight.sum()),
        support=(_pooled(agree * weight * near) / np.maximum(pooled, 1e-6)).astype(np.float32),
        weight=pooled.astype(np.float32),
    )


def _laid_over(
    other: Uint8, other_extent: Float32, extent: Float32, transform: np.ndarray
) -> tuple[npt.NDArray[np.bool_], np.ndarray]:
    """(which of the frame's grid points lie in the other image, its grey values there), [32, 32] each."""
    cv2 = opencv()
    width, height = np.maximum(other_extent, 1e-6)
    # From pixels of the fine grid to those of the thumb: pixel i of n has its middle at (i + 1/2) / n of a side.
    scale = np.array([[THUMB / width], [THUMB / height]]) * transform.astype(np.float64)
    step = np.array(extent, dtype=np.float64) / _FINE
    matrix = np.column_stack([scale[:, :2] * step, scale[:, 2] + scale[:, :2] @ (step / 2) - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fine = cv2.warpAffine(other, matrix, (_FINE, _FINE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    there = cv2.resize(fine, (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    middle = (np.arange(_GRID) + 0.5) * 2 - 0.5
    x = matrix[0, 0] * middle[None, :] + matrix[0, 1] * middle[:, None] + matrix[0, 2] + 0.5
    y = matrix[1, 0] * middle[None, :] + matrix[1, 1] * middle[:, None] + matrix[1, 2] + 0.5
    low, high = -_INSIDE * THUMB, (1 + _INSIDE) * THUMB
    return (x >= low) & (x <= high) & (y >= low) & (y <= high), there.astype(np.float64)


def _patches(a: np.ndarray, b: np.ndarray, inside: npt.NDArray[np.bool_]) -> tuple[np.ndarray, np.ndarray]:
    """(agreement, weight) [14, 14] of windows of two grey pictures [32, 32].

    Agreement is by correlation, so brightness and contrast may differ. Weight is by the contrast of the picture that
    has more: a patch that is empty in one and not in the other is a disagreement.
    """
    a, b = a * inside, b * inside
    n = _sums(inside.astype(np.float64))
    enough = n >= 0.6 * _WINDOW**2
    n = np.maximum(n, 1)
    mean_a, mean_b = _sums(a) / n, _sums(b) / n
    var_a = np.maximum(_sums(a * a) / n - mean_a**2, 0)
    var_b = np.maximum(_sums(b * b) / n - mean_b**2, 0)
    correlation = (_sums(a * b) / n - mean_a * mean_b) / (np.sqrt(var_a * var_b) + _NOISE)
    contrast = np.sqrt(np.maximum(var_a, var_b))
    weight = np.clip((contrast - _FLAT) / (_TEXTURED - _FLAT), 0, 1) * enough
    return np.clip((correlation - _LOW) / (_HIGH - _LOW), 0, 1), weight


def _near(found: np.ndarray) -> npt.NDArray[np.bool_]:
    """Which windows [14, 14] lie near one of the positions [I, 2] in 0 .. 1."""
    middle = (np.arange(_WINDOWS) * _STEP + _WINDOW / 2) / _GRID
    x = np.abs(middle[None, :, None] - found[None, None, :, 0])
    y = np.abs(middle[:, None, None] - found[None, None, :, 1])
    return (x * x + y * y <= _REACH**2).any(axis=2)


def _sums(values: np.ndarray) -> np.ndarray:
    """Sums over windows, [14, 14]."""
    total = np.zeros((_GRID + 1, _GRID + 1))
    total[1:, 1:] = values.cumsum(0).cumsum(1)
    at = np.arange(_WINDOWS) * _STEP
    rows = total[at + _WINDOW] - total[at]
    return rows[:, at + _WINDOW] - rows[:, at]


def _pooled(values: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 windows: [7, 7]."""
    return values.reshape(CELLS, _WINDOWS // CELLS, CELLS, _WINDOWS // CELLS).mean(axis=(1, 3))
