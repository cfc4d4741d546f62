"""Images with a target for every pixel (`mask`: class numbers, `depth`: distances), in full resolution.

A target keeps the numbers that its file stores: palette PNGs give indices, 16-bit PNGs are not scaled, `.npy` files
are read too. What changes sizes and positions treats both alike, images by filtering, targets by the nearest pixel, for
a mean of two classes is a third one.
"""

import hashlib
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image, open_image
from dinov2cli.data.source import ImageSource
from dinov2cli.errors import InputError

Target = npt.NDArray[np.generic]
R = TypeVar("R")
T = TypeVar("T")

_NPY_MAGIC = b"\x93NUMPY"
_READING = threading.Lock()
_AHEAD = 4  # pairs per thread that are read before they are asked for
_KINDS = {"mask": "class numbers", "depth": "distances"}


@dataclass(frozen=True)
class Pair:
    """An image and its target. image: uint8 [3, H, W], channels last in memory. target: [H, W] as stored.

    name: what to call it in messages. digest: sha256 of the image file, uint8 [32].
    """

    row: int
    name: str
    image: Tensor
    target: Target
    digest: npt.NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return int(self.image.shape[1]), int(self.image.shape[2])


def require_role(source: ImageSource, role: str) -> None:
    """Raise InputError, telling how to name it, where a source has no target of this role ('mask' or 'depth')."""
    if not source.has_role(role):
        columns = ", ".join(source.columns.column_names) or "none"
        raise InputError(
            f"{source.spec}: no {role} ({_KINDS[role]} of every pixel) beside its images, other columns: {columns}; "
            f"name the column that holds it with ?{role}=COLUMN (for a folder of images ?{role}=FOLDER)"
        )


def fetch(source: ImageSource, row: int, role: str = "image") -> bytes:
    """`source.read` by one thread at a time: a source need not expect several. Files are read fast, decoded slowly."""
    with _READING:
        return source.read(row, role)


def read_pair(source: ImageSource, row: int, role: str, *, resize_target: bool = False) -> Pair:
    """One image and its target in full resolution.

    With `resize_target` a target of another size is brought to the image's by its nearest pixels. Raises BadImage for
    an unreadable file, InputError for a target of another size or without a meaning (colours instead of numbers).
    """
    name, data = source.name(row), fetch(source, row)
    pixels = decode_image(data, name=name)
    target = read_target(source, row, role, pixels.shape[:2], resize_target=resize_target)
    digest = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
    return Pair(row, name, torch.from_numpy(pixels).permute(2, 0, 1), target, digest)


def read_target(
    source: ImageSource, row: int, role: str, size: tuple[int, int], *, resize_target: bool = False
) -> Target:
    """The target alone, for an image known to have this (height, width). Raises what `read_pair` raises."""
    name = source.name(row)
    return _of_size(decode_target(fetch(source, row, role), name=name, role=role), size, name, role, resize_target)


def _of_size(target: Target, size: Sequence[int], name: str, role: str, resize_target: bool) -> Target:
    if target.shape != tuple(size[:2]) and not resize_target:
        raise InputError(
            f"{name}: its {role} has {_size(target.shape)} pixels, the image {_size(size)}; "
            "expected equal sizes: give the right file, or --set resize_target=true to bring it to the image's"
        )
    return resize_nearest(target, size[0], size[1])


def decode_target(data: bytes, *, name: str, role: str = "mask") -> Target:
    """The numbers of a target file: uint8, uint16, int32 or float32 [H, W] (of `.npy` files any real type).

    Raises BadImage for a file that is damaged or none, InputError for one whose pixels are colours, and for a mask
    that a lossy format has blurred.
    """
    if data[:6] == _NPY_MAGIC:
        return _from_npy(data, name, role)
    image = open_image(data, name=name).image
    if image.format == "JPEG" and role == "mask":
        raise InputError(f"{name}: its mask is a JPEG, which changes class numbers; expected PNG, TIFF or .npy")
    try:
        image.load()
    except Exception as error:  # Pillow's plugins raise half a dozen unrelated types
        raise BadImage(name, f"unreadable {role} ({str(error)[:80]})") from error
    values = np.asarray(image)
    if values.ndim == 3:
        first = values[..., 0]
        if values.shape[2] < 3 or not all((values[..., channel] == first).all() for channel in (1, 2)):
            raise InputError(
                f"{name}: its {role} has colours ({image.mode}), expected one channel of {_KINDS[role]}; "
                "replace every colour by its number and save as PNG of mode L, P or I;16"
            )
        values = first
    return np.ascontiguousarray(values.astype(np.uint8) if values.dtype == bool else _native(values))


def _from_npy(data: bytes, name: str, role: str) -> Target:
    try:
        values: Target = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadImage(name, f"unreadable {role} ({str(error)[:80]})") from error
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "uif":
        raise InputError(
            f"{name}: its {role} is an array {list(values.shape)} of {values.dtype}; expected real numbers [H, W]"
        )
    return np.ascontiguousarray(_native(values))


def _native(values: Target) -> Target:
    return values.astype(values.dtype.newbyteorder("="))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"


def read_pairs(
    source: ImageSource,
    rows: Sequence[int],
    role: str,
    *,
    workers: int = 0,
    resize_target: bool = False,
    make: Callable[[Pair], R] | None = None,
) -> Iterator[R | BadImage]:
    """`make(pair)` (None: the pair) of every row in order, or the BadImage in place of one that cannot be read.

    workers: threads that decode and `make` (decoders and torch run beside each other); 0: none. Raises what `read_pair`
    raises but for BadImage.
    """

    def one(row: int) -> R | BadImage:
        try:
            pair = read_pair(source, row, role, resize_target=resize_target)
        except BadImage as error:
            return error
        return pair if make is None else make(pair)  # type: ignore[return-value]

    yield from in_order(one, [int(row) for row in rows], workers)


def in_order(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """`work(item)` of every item in order, computed ahead by `workers` threads (0: by this one)."""
    if workers <= 0:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also where the caller stops early
            for future in waiting:
                future.cancel()


# --- Geometry, alike for image and target ---------------------------------------------------------------------------


def resize_nearest(target: Target, height: int, width: int) -> Target:
    """A target [H, W] at another size: every pixel takes the value of the one its centre falls on."""
    rows = ((np.arange(height) + 0.5) * (target.shape[0] / height)).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * (target.shape[1] / width)).astype(np.int64)
    return target if target.shape == (height, width) else target[rows[:, None], columns]


def resize_image(image: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width], antialiased; mode 'bicubic' or 'bilinear'."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode=mode, antialias=True)[0]


def resize_pair(pair: Pair, height: int, width: int, mode: str = "bicubic") -> Pair:
    """Both at another size. Depths keep their values."""
    return replace(
        pair, image=resize_image(pair.image, height, width, mode), target=resize_nearest(pair.target, height, width)
    )


def fitted_size(height: int, width: int, shorter: int, longest: int | None = None) -> tuple[int, int]:
    """(height, width) with the aspect kept and the shorter side `shorter`, or less where the longer one would exceed
    `longest`: the `keep_ratio` resize of the usual segmentation toolboxes, sides rounded to whole pixels."""
    factor = shorter / min(height, width)
    if longest is not None:
        factor = min(factor, longest / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def pair_random(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The randomness of one image in one epoch, whoever reads it and in whatever order."""
    return np.random.default_rng([seed, epoch, row])


def flipped(pair: Pair) -> Pair:
    """Mirrored left to right."""
    return replace(pair, image=pair.image.flip(2), target=np.ascontiguousarray(pair.target[:, ::-1]))


def cut(pair: Pair, top: int, left: int, height: int, width: int) -> Pair:
    """The rectangle of both; it must lie inside."""
    return replace(
        pair,
        image=pair.image[:, top : top + height, left : left + width],
        target=np.ascontiguousarray(pair.target[top : top + height, left : left + width]),
    )


def random_crop(pair: Pair, height: int, width: int, random: np.random.Generator) -> Pair:
    """A rectangle of that size at a random place; the whole extent of a side that is shorter."""
    height, width = min(height, pair.size[0]), min(width, pair.size[1])
    top = int(random.integers(pair.size[0] - height + 1))
    left = int(random.integers(pair.size[1] - width + 1))
    return cut(pair, top, left, height, width)


def augmented(
    pair: Pair,
    random: np.random.Generator,
    *,
    shorter: int | None,
    scale: tuple[float, float] = (1.0, 1.0),
    crop: tuple[int, int] | None = None,
    flip: float = 0.5,
    mode: str = "bicubic",
) -> Pair:
    """Random scale, crop and flip, in this order, as segmentation heads are trained in the paper's appendix.

    shorter: side in pixels that scale 1 stands for (None: the image's own). scale: range of the factor, uniform.
    crop: (height, width) in pixels, None: no crop. flip: probability of a mirror image.
    """
    factor = float(random.uniform(*scale)) if scale[0] < scale[1] else scale[0]
    side = (shorter or min(pair.size)) * factor
    pair = resize_pair(pair, *fitted_size(*pair.size, max(1, round(side))), mode)
    if crop is not None:
        pair = random_crop(pair, *crop, random)
    return flipped(pair) if random.random() < flip else pair
