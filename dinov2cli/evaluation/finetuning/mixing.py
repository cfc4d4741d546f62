"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) with soft targets.

One mix is drawn for a whole batch, as in the recipes of DeiT and timm: a step either blends images or pastes boxes,
with one share for all. Partners are neighbours (images 0 and 1, 2 and 3 ...), which in a shuffled batch are as good as
any, and stay together however the batch is dealt out over processes and passes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Mix(NamedTuple):
    """What is done to all images of a step: they keep `share` of themselves and take the rest from their partner.

    Blended where `box` is None, else the partner's pixels stand in the box (top, bottom, left, right).
    """

    share: float = 1.0
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Mixing:
    """Shares are drawn from Beta(alpha, alpha), `mixup` and `cutmix` being the alphas (0: never).

    Where both are possible CutMix is done with probability `switch`. `smoothing` moves that much of every target evenly
    to all classes.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Mix:
        """The mix of one step for images of height x width pixels."""
        if self.mixup <= 0 and self.cutmix <= 0:
            return Mix()
        cut = self.cutmix > 0 and (self.mixup <= 0 or rng.random() < self.switch)
        alpha = self.cutmix if cut else self.mixup
        share = float(rng.beta(alpha, alpha))
        if not cut:
            return Mix(share)
        rows, columns = (int(math.sqrt(1 - share) * side) for side in (height, width))
        middle = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = (min(max(middle[0] + step, 0), height) for step in (-(rows // 2), rows // 2))
        left, right = (min(max(middle[1] + step, 0), width) for step in (-(columns // 2), columns // 2))
        # What of the box lies outside the image counts for nobody.
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))

    def targets(self, labels: Tensor, classes: int, mix: Mix) -> Tensor:
        """Soft targets float32 [B, C], rows summing to 1, of labels int64 [B] of the images before mixing."""
        own = F.one_hot(labels, classes).float()
        mixed = own if mix.share == 1 else mix.share * own + (1 - mix.share) * own[partners(len(own), own.device)]
        return mixed * (1 - self.smoothing) + self.smoothing / classes


def mixed_images(images: Tensor, mix: Mix) -> Tensor:
    """Images float [B, C, H, W] after the mix; B is even. The argument may be written to."""
    if mix.box is None:
        if mix.share == 1:
            return images
        return torch.lerp(images[partners(len(images), images.device)], images, mix.share)
    top, bottom, left, right = mix.box
    box = images[:, :, top:bottom, left:right]
    box.copy_(box[partners(len(images), images.device)])  # the indexed side is a copy
    return images


def partners(number: int, device: torch.device | None = None) -> Tensor:
    """The row of everyone's partner, int64 [number]: 1, 0, 3, 2 ... Raises ValueError for an odd number."""
    if number % 2:
        raise ValueError(f"{number} images cannot be mixed in pairs")
    return torch.arange(number, device=device) ^ 1


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy float32 [B] of logits [B, C] under targets [B, C]."""
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1)
