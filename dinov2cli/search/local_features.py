"""Local features of images: SIFT keypoints, described in 64 numbers of 8 bits, and a small grey picture of each image.

SIFT (Lowe 2004) finds patches that are found again after scaling, turning and cropping. Its 128 histogram counts are
taken to the square root (RootSIFT, Arandjelovic and Zisserman 2012) and to a fixed cosine basis, of which the 64 axes
that carry most of the variance are kept (93 % on photographs). A fixed basis needs no training, so features of
different sets compare; and as each of its axes is even or odd under reflection, the features of the mirrored picture
are those of the picture with some signs changed: mirrored copies cost no second extraction.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.fft import dct

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.vectors import Float32, Int64

Uint8 = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]

SIDE = 512
"""Longest side in pixels at which features are looked for: a picture on a page is a third of it, and still 170."""

MOST = 400
"""Features kept of an image, spread over its area."""

WIDTH = 64
"""Numbers that describe a feature."""

THUMB = 96
"""Side of the small grey picture that aligned images are compared on; squeezed to a square."""

BLOCK = 64
"""Images described between two looks at the store."""

_UNIT = 65535  # of positions, in the longest side
_SCALE = 256.0  # of codes: the largest entry of a unit vector in this basis is below 0.5
_CONTRAST = 0.015  # a third of OpenCV's: blurred and dark pictures have features too
_LEAST_SIDE, _SMALL = 16, 128
_GRID = 8
_CIRCLE = 256
_FIELDS = (("xy", np.uint16, (2,)), ("scale", np.float16, ()), ("angle", np.uint8, ()), ("codes", np.int8, (WIDTH,)))
_PER_IMAGE = (("count", np.int64, ()), ("extent", np.float32, (2,)), ("thumbs", np.uint8, (THUMB, THUMB)))
BYTES_PER_IMAGE = MOST * (4 + 2 + 1 + WIDTH) + 16 + THUMB * THUMB

_MEMORY = 8 << 30


@dataclass(frozen=True)
class LocalFeatures:
    """Features of N images, F in all; those of image i are rows offsets[i] to offsets[i + 1]. At most 38 kB an image.

    offsets [N + 1] int64; extent [N, 2] float32: width and height over the longer of the two (0 for no image);
    xy [F, 2] uint16: position over the longer side of the image, 65535 for 1; scale [F] float16: diameter, likewise
    in 1/1000 of it; angle [F] uint8: direction, 256 for a full turn; codes [F, 64] int8; thumbs [N, 96, 96] uint8.
    The arrays may be memory-mapped.
    """

    offsets: Int64
    extent: Float32
    xy: npt.NDArray[np.uint16]
    scale: npt.NDArray[np.float16]
    angle: Uint8
    codes: Int8
    thumbs: Uint8

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def places(self, row: int) -> Float32:
        """[n, 4] of one image: x, y and diameter over the longer side, direction in radians."""
        here = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        xy = self.xy[here].astype(np.float32) / _UNIT
        scale = self.scale[here].astype(np.float32) / 1000
        angle = self.angle[here].astype(np.float32) * np.float32(2 * np.pi / _CIRCLE)
        return np.column_stack([xy, scale, angle]).astype(np.float32)

    def descriptors(self, row: int) -> Float32:
        """[n, 64] float32 of one image, of length about 1."""
        here = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return np.asarray(self.codes[here], dtype=np.float32) / np.float32(_SCALE)


def extract_local_features(
    read: Callable[[int], Uint8 | None],
    rows: int,
    *,
    most: int = MOST,
    side: int = SIDE,
    workers: int = 1,
    memory: int | None = None,
    scratch: Path | None = None,
    store: Store | None = None,
    key: str = "",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> LocalFeatures:
    """Features of images read one by one.

    Args:
        read: pixels of a row, uint8 [H, W], [H, W, 3] or [H, W, 4] (its last channel means nothing); None for an image
            that cannot be read, which has no features. Called from `workers` threads.
        rows: how many images there are.
        most: features kept of an image: the strongest of each part of it.
        side: pictures larger than this are shrunk to it.
        memory: bytes (8 GiB if None); where the features would take more than a quarter of it, they lie in an
            unnamed file that the system reads as needed.
        scratch: folder of that file; the system's own for temporary files unless given.
        store, key: finished blocks are kept there; `key` says which images these are (their fingerprint).
        progress, ranks: as everywhere; the ranks share the images, and all get all features.

    Raises UserError where OpenCV is not installed.
    """
    cv2 = opencv()
    stage = None
    if store is not None:
        stage = store.stage(
            "local-features", {"images": key, "rows": rows, "most": most, "side": side, "code": [WIDTH, THUMB, 1]}
        )
    with ThreadPoolExecutor(max(1, workers)) as threads:

        def one(row: int) -> dict[str, np.ndarray]:
            return describe(read(row), most=most, side=side)

        def block(start: int) -> Arrays:
            return _stacked(list(threads.map(one, range(start, min(start + BLOCK, rows)))))

        spill = rows * most * (BYTES_PER_IMAGE // MOST) > (_MEMORY if memory is None else memory) // 4
        found = over_blocks(kept(block, stage), rows, BLOCK, progress=progress, ranks=ranks)
        before = cv2.getNumThreads()
        cv2.setNumThreads(1)  # images side by side use the cores better than parts of one
        try:
            return _assembled(found, spill, scratch)
        finally:
            cv2.setNumThreads(before)


def describe(image: Uint8 | None, *, most: int = MOST, side: int = SIDE) -> dict[str, np.ndarray]:
    """The features of one image [H, W] or [H, W, 3] as the arrays of `LocalFeatures`, for one row; None has none."""
    empty = {name: np.zeros((0, *shape), kind) for name, kind, shape in _FIELDS}
    if image is None or not image.size:
        return {**empty, "extent": np.zeros(2, np.float32), "thumbs": np.zeros((THUMB, THUMB), np.uint8)}
    cv2 = opencv()
    grey = np.ascontiguousarray(image)
    if image.ndim == 3:
        grey = cv2.cvtColor(grey, cv2.COLOR_RGB2GRAY if image.shape[2] == 3 else cv2.COLOR_RGBA2GRAY)
    height, width = grey.shape
    longest = max(height, width)
    # Area averages, for any other filter would show details of the pixel grid.
    thumb = cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA)
    extent = np.array([width / longest, height / longest], dtype=np.float32)
    factor = min(side, max(longest, _SMALL)) / longest
    if factor != 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    if min(grey.shape) < _LEAST_SIDE:
        return {**empty, "extent": extent, "thumbs": thumb}
    return {**(_features(cv2, grey, most) or empty), "extent": extent, "thumbs": thumb}


def mirror_signs() -> Int8:
    """[64] of 1 and -1: what to multiply codes with to get those of the mirrored picture."""
    return _SIGNS


def opencv() -> Any:
    """The module cv2. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise UserError(
            "geometric verification needs OpenCV, which cannot be imported here; expected the package "
            "opencv-python-headless 4.8 or later; run `pip install 'dinov2cli[geometric]'`"
        ) from error


def _features(cv2: Any, grey: Uint8, most: int) -> dict[str, np.ndarray] | None:
    sift = cv2.SIFT_create(nfeatures=0, contrastThreshold=_CONTRAST)
    points = sift.detect(grey, None)
    if not points:
        return None
    table = np.array([(*p.pt, p.size, p.angle, p.response) for p in points], dtype=np.float64)
    chosen = _spread(table, grey.shape, most)
    points, counts = sift.compute(grey, [points[i] for i in chosen])
    if counts is None or not len(points):
        return None
    table = np.array([(*p.pt, p.size, p.angle) for p in points], dtype=np.float64)
    longest = max(grey.shape)
    return {
        "xy": np.clip(np.round((table[:, :2] + 0.5) / longest * _UNIT), 0, _UNIT).astype(np.uint16),
        "scale": (table[:, 2] / longest * 1000).astype(np.float16),
        "angle": (np.round(table[:, 3] / 360 * _CIRCLE).astype(np.int64) % _CIRCLE).astype(np.uint8),
        "codes": _codes(np.asarray(counts, dtype=np.float32)),
    }


def _spread(table: np.ndarray, shape: Sequence[int], most: int) -> Int64:
    """Rows of at most `most` keypoints (x, y, size, angle, response): the best of each cell of a grid, then the second
    best, and so on; a page's letters would else leave nothing to the picture on it."""
    x = np.clip(table[:, 0] / shape[1] * _GRID, 0, _GRID - 1).astype(np.int64)
    y = np.clip(table[:, 1] / shape[0] * _GRID, 0, _GRID - 1).astype(np.int64)
    cell = y * _GRID + x
    # Ties broken by all else that is known of a keypoint, so that the order OpenCV's threads found them in is nothing.
    order = np.lexsort((table[:, 3], table[:, 1], table[:, 0], -(table[:, 2] ** 0.5) * table[:, 4], cell))
    first = np.searchsorted(cell[order], cell[order])
    place = np.arange(len(order)) - first
    strength = table[order, 2] ** 0.5 * table[order, 4]
    best = order[np.lexsort((order, -strength, place))][:most]
    return np.sort(best)


def _codes(counts: Float32) -> Int8:
    """SIFT counts [n, 128] in the cosine basis, rounded: [n, 64] int8."""
    root = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-9))
    return np.clip(np.round(root @ _BASIS * _SCALE), -127, 127).astype(np.int8)


def _cosine_basis() -> tuple[Float32, Int8]:
    """The kept axes [128, 64] and their signs under reflection [64].

    Rows and columns of the 4 x 4 histograms go to a cosine transform, their 8 directions to a Fourier series.
    Variance falls with the frequency, and among directions is largest for the first. Reflected across a keypoint's
    direction, the rows change order and directions their sign: odd rows are odd, and so are sines.
    """
    along = dct(np.eye(4), axis=0, norm="ortho")
    turn = np.arange(8) * (2 * np.pi / 8)
    waves = [(0, 1, np.full(8, 8**-0.5)), (4, 1, np.cos(4 * turn) * 8**-0.5)]
    for f in (1, 2, 3):
        waves += [(f, 1, np.cos(f * turn) / 2), (f, -1, np.sin(f * turn) / 2)]
    cost = {1: 0, 2: 1, 0: 2, 3: 3, 4: 3}
    axes = []
    for u in range(4):
        for v in range(4):
            for f, parity, wave in waves:
                if (u, v, f) != (0, 0, 0):  # nearly the same for all features
                    axis = np.einsum("r,c,o->rco", along[u], along[v], wave).ravel()
                    axes.append((u + v + cost[f], f != 1, u, v, f, parity, axis))
    axes.sort(key=lambda a: a[:6])
    chosen = axes[:WIDTH]
    signs = [(-1 if a[2] % 2 else 1) * a[5] for a in chosen]
    return np.stack([a[6] for a in chosen], axis=1).astype(np.float32), np.array(signs, dtype=np.int8)


_BASIS, _SIGNS = _cosine_basis()


def _stacked(found: Sequence[dict[str, np.ndarray]]) -> Arrays:
    """One block of the store: fields of all features of the block one after another, and of its images."""
    block: dict[str, np.ndarray] = {name: np.concatenate([one[name] for one in found]) for name, _, _ in _FIELDS}
    block["count"] = np.array([len(one["xy"]) for one in found], dtype=np.int64)
    block["extent"] = np.stack([one["extent"] for one in found])
    block["thumbs"] = np.stack([one["thumbs"] for one in found])
    return block


def _assembled(blocks: Iterator[Arrays], spill: bool, scratch: Path | None) -> LocalFeatures:
    columns = {name: _Column(kind, shape, spill, scratch) for name, kind, shape in (*_FIELDS, *_PER_IMAGE)}
    for block in blocks:
        for name, column in columns.items():
            column.add(block[name])
    done = {name: column.array() for name, column in columns.items()}
    offsets = np.concatenate([[0], np.cumsum(done.pop("count"))]).astype(np.int64)
    return LocalFeatures(offsets=offsets, **done)


class _Column:
    """An array that grows by blocks, in memory or in a file without a name, which goes when nobody reads it."""

    def __init__(self, kind: type, shape: tuple[int, ...], spill: bool, scratch: Path | None) -> None:
        self._kind, self._shape, self._rows = np.dtype(kind), shape, 0
        self._parts: list[np.ndarray] = []
        self._file = TemporaryFile(dir=scratch) if spill else None  # noqa: SIM115 - closed with the last array

    def add(self, part: npt.NDArray[Any]) -> None:
        self._rows += len(part)
        if self._file is None:
            self._parts.append(part)
        else:
            self._file.write(np.ascontiguousarray(part, dtype=self._kind).data)

    def array(self) -> npt.NDArray[Any]:
        shape = (self._rows, *self._shape)
        if self._file is not None and self._rows:
            self._file.flush()
            return np.memmap(self._file, dtype=self._kind, mode="r", shape=shape)
        return np.concatenate([np.zeros((0, *self._shape), self._kind), *self._parts]).astype(self._kind, copy=False)
