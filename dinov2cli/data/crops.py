"""Multi-crop: random boxes of an image, resized to square uint8 crops. Geometry only; colours are `data/augment.py`."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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


def resize_box(image: Tensor, box: Box, size: int, *, flip: bool = False) -> Tensor:
    """Cut `box` out of `image` (uint8 [3, H, W]) and resize it to uint8 [3, size, size]: bicubic, antialiased.

    Fastest when `image` is a view of channels-last memory, as `torch.from_numpy(hwc).permute(2, 0, 1)`.
    """
    cut = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    crop = F.interpolate(cut, (size, size), mode="bicubic", antialias=True, align_corners=False)[0]
    return crop.flip(-1) if flip else crop


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
        # torch takes no read-only memory (Pillow's arrays) and no flipped views; a copy costs far less than the decode.
        usable = image.flags.writeable and image.flags.c_contiguous
        pixels = torch.from_numpy(image if usable else image.copy()).permute(2, 0, 1)
        rng = sample_rng(seed, epoch, sample)
        return (
            self._cut(pixels, 2, self.global_size, self.global_scale, rng),
            self._cut(pixels, self.local_number, self.local_size, self.local_scale, rng),
        )

    def _cut(
        self, pixels: Tensor, number: int, size: int, scale: tuple[float, float], rng: np.random.Generator
    ) -> Tensor:
        crops = torch.empty((number, 3, size, size), dtype=torch.uint8)
        for crop in crops:
            box = random_box(pixels.shape[1], pixels.shape[2], scale, rng)
            crop.copy_(resize_box(pixels, box, size, flip=bool(rng.random() < self.flip)))
        return crops
