"""Random views of an image for training on features of a frozen model; `data.loader.View` says what a view is."""

from dataclasses import dataclass

import numpy as np
import torch

from dinov2cli.data.crops import random_box, resize_box, sample_rng
from dinov2cli.data.scratch import Scratch


@dataclass(frozen=True)
class RandomCrop:
    """A random-resized-crop, mirrored half of the time: what linear classifiers are usually trained on (arXiv
    2304.07193, B.3).

    size: side in pixels. The crop follows from (seed, epoch, row) and the size of the image alone. scale: shares of the
    image's area, aspect 3/4 to 4/3; flip: probability.
    """

    size: int
    seed: int
    epoch: int
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5

    @property
    def name(self) -> str:
        """All that tells it from other views."""
        low, high = self.scale
        return f"crop {self.size} {low:g}-{high:g} flip {self.flip:g} seed {self.seed} epoch {self.epoch}"

    def __call__(self, pixels: np.ndarray, row: int) -> torch.Tensor:
        """uint8 [H, W, 3] of row `row` -> uint8 [3, S, S]."""
        rng = sample_rng(self.seed, self.epoch, row)
        box = random_box(pixels.shape[0], pixels.shape[1], self.scale, rng)
        mirrored = rng.random() < self.flip
        usable = pixels.flags.writeable and all(stride > 0 for stride in pixels.strides)  # all that torch takes
        crop = resize_box(torch.from_numpy(pixels if usable else pixels.copy()), box, self.size, Scratch())
        return (crop.flip(1) if mirrored else crop).permute(2, 0, 1)
