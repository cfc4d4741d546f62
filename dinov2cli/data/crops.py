"""Multi-crop: random boxes of an image, resized to square uint8 crops. Geometry only; colours are `data/augment.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.data.scratch import Scratch
from dinov2cli.errors import UserError

BOX_TRIES = 10
ASPECT_RANGE = (3 / 4, 4 / 3)
"""Width / height of a box, drawn log-uniformly (as torchvision's RandomResizedCrop)."""

_WORD = (1 << 64) - 1


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Random numbers that belong to one sample in one epoch, the same in whatever worker, rank or batch it falls.

    Philox is a counter-based generator: (seed, sample) is its key and the epoch the top word of its counter, so streams
    of different triples cannot overlap.
    """
    key = np.array([seed & _WORD, sample & _WORD], dtype=np.uint64)
    counter = np.array([0, 0, 0, epoch & _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def random_box(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Box of a random-resized-crop in an image of `height` x `width` pixels.

    Area uniform in `scale` (shares of the image's area), aspect log-uniform in ASPECT_RANGE, position uniform. After
    ten draws that do not fit: the largest centred box whose aspect is in range (torchvision's fallback).
    """
    area = height * width
    low, high = math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])
    for area_draw, aspect_draw, top_draw, left_draw in rng.random((BOX_TRIES, 4)).tolist():
        target = area * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect_draw * (high - low))
        box_width, box_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_width, box_height = width, height
    if width / height < ASPECT_RANGE[0]:
        box_height = round(width / ASPECT_RANGE[0])
    elif width / height > ASPECT_RANGE[1]:
        box_width = round(height * ASPECT_RANGE[1])
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


class Cut(NamedTuple):
    """What becomes a crop: a box of the image as displayed, and whether the crop is mirrored."""

    box: Box
    flip: bool


def resize_box(pixels: Tensor, box: Box, size: int, scratch: Scratch) -> Tensor:
    """Cut `box` out of uint8 [H, W, C] and resize it to uint8 [size, size, C]: bicubic, antialiased (torch's)."""
    cut = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    # Copied out first: what is not contiguous torch would copy itself, into fresh memory.
    whole = scratch.take(1, *cut.shape)
    whole[0].copy_(cut)
    # The leading axis before the permutation: by all four strides torch knows channels-last memory, twice as fast.
    return F.interpolate(whole.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


@dataclass(frozen=True)
class MultiCrop:
    """Two global and `local_number` local crops of an image; picklable, so that it travels to loader workers.

    Sizes in pixels, scales as shares of the image's area (DINOv2: 224 px in 0.32-1 and 98 px in 0.05-0.32).
    Raises UserError when made with values out of range.
    """

    global_size: int = 224
    local_size: int = 98
    local_number: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.global_size < 1 or self.local_size < 1 or self.local_number < 0:
            raise UserError(
                f"crops: sizes {self.global_size} and {self.local_size}, local_number {self.local_number} found, "
                "expected sizes of at least 1 pixel and local_number of at least 0; correct these keys"
            )
        for name, scale in (("global_scale", self.global_scale), ("local_scale", self.local_scale)):
            if not 0 < scale[0] <= scale[1] <= 1:
                raise UserError(
                    f"crops: {name} {tuple(scale)} found, expected 0 < low <= high <= 1 "
                    "(shares of the image's area); correct this key"
                )
        if not 0 <= self.flip <= 1:
            raise UserError(f"crops: flip {self.flip} found, expected a probability between 0 and 1; correct this key")

    def __call__(self, image: np.ndarray, seed: int, epoch: int, sample: int) -> tuple[Tensor, Tensor]:
        """Crops of `image` (uint8 [H, W, 3]): uint8 [2, 3, S, S] and uint8 [local_number, 3, s, s].

        They depend on the image, (seed, epoch, sample) and these settings only. Raises ValueError on other arrays.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        height, width = image.shape[:2]
        into = [torch.empty((n, s, s, 3), dtype=torch.uint8) for n, s, _ in self._kinds()]
        self.cut(image, self.draw(height, width, seed, epoch, sample), (height, width), into, Scratch())
        return into[0].permute(0, 3, 1, 2), into[1].permute(0, 3, 1, 2)

    def draw(self, height: int, width: int, seed: int, epoch: int, sample: int) -> list[Cut]:
        """Boxes and flips of an image of `height` x `width` pixels, two global ones first: a function of the
        arguments and these settings only."""
        rng = sample_rng(seed, epoch, sample)
        return [
            Cut(random_box(height, width, scale, rng), bool(rng.random() < self.flip))
            for number, _, scale in self._kinds()
            for _ in range(number)
        ]

    def cut(
        self,
        image: np.ndarray,
        cuts: Sequence[Cut],
        displayed: tuple[int, int],
        into: Sequence[Tensor],
        scratch: Scratch,
        orientation: int = 1,
        shrink: int = 1,
    ) -> None:
        """Make the crops that `draw` chose.

        Args:
            image: uint8 [h, w, 3 or 4] as stored, of which three channels count; its sides may be those of the picture
                divided by `shrink`, rounded up.
            cuts: boxes and flips in the picture as displayed, height and width `displayed`.
            into: uint8 [2, S, S, 3] and [local_number, s, s, 3], written to.
            orientation: EXIF's number; it is applied to boxes and crops, never to the whole image.
            shrink: as the image was decoded; boxes are then moved onto the coarser grid, by less than that many pixels.
        """
        # torch takes no read-only memory (Pillow's arrays) and no flipped views; a copy costs far less than the decode.
        usable = image.flags.writeable and all(stride > 0 for stride in image.strides)
        pixels = torch.from_numpy(image if usable else image.copy())
        places = [(out, size) for part, (_, size, _) in zip(into, self._kinds(), strict=True) for out in part]
        for (box, flip), (out, size) in zip(cuts, places, strict=True):
            crop = resize_box(pixels, stored_box(box, displayed, image.shape, orientation, shrink), size, scratch)
            out.copy_(turned(crop[..., :3], orientation, flip))

    def shrink(self, cuts: Sequence[Cut]) -> int:
        """By how much (1, 2, 4 or 8) the sides of an image may be divided before cutting, so that every crop is still
        made from at least as many pixels as it has."""
        sizes = [size for number, size, _ in self._kinds() for _ in range(number)]
        least = min(min(cut.box.height, cut.box.width) / size for cut, size in zip(cuts, sizes, strict=True))
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(least, 1))

    def _kinds(self) -> tuple[tuple[int, int, tuple[float, float]], ...]:
        """(number, size, scale) of global and local crops."""
        return (
            (2, self.global_size, self.global_scale),
            (self.local_number, self.local_size, self.local_scale),
        )


# EXIF orientation as (transpose, then mirror rows, then mirror columns) of the stored pixels.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def stored_box(
    box: Box, displayed: tuple[int, int], stored: Sequence[int], orientation: int = 1, shrink: int = 1
) -> Box:
    """Where a box of a picture of `displayed` (height, width) lies in its pixels as `stored` (height, width, …).

    Where those are fewer, each stands for `shrink` x `shrink` pixels of the file, counted from its top left, the last
    ones for what is left over. The box begins and ends on that grid: half a pixel beside it, a crop would differ three
    times as much from one of the full image.
    """
    transpose, rows, columns = _TURNS[orientation]
    top = displayed[0] - box.top - box.height if rows else box.top
    left = displayed[1] - box.left - box.width if columns else box.left
    found, full = Box(top, left, box.height, box.width), displayed
    if transpose:
        found, full = Box(left, top, box.width, box.height), (displayed[1], displayed[0])
    if shrink == 1 or tuple(stored[:2]) == full:
        return found
    return Box(*(first // shrink for first in found[:2]), *(max(length // shrink, 1) for length in found[2:]))


def turned(crop: Tensor, orientation: int, flip: bool) -> Tensor:
    """A square crop [S, S, C] of stored pixels as displayed, mirrored left to right where `flip` says so."""
    transpose, rows, columns = _TURNS[orientation]
    if transpose:
        crop = crop.transpose(0, 1)
    axes = [axis for axis, mirrored in ((0, rows), (1, columns != flip)) if mirrored]
    return crop.flip(axes) if axes else crop
