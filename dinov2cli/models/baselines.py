"""Features that nobody trained, `baseline:pixels` and `baseline:histogram`: what every benchmark must beat to mean
anything. They take part as any other encoder does, with a vector per image and one per patch."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2cli.errors import InputError
from dinov2cli.models.encoder import Encoder, Seen
from dinov2cli.models.preprocess import Preprocess

PATCH = 14
SIDE = 8
"""Pixels per side that an image, and each patch, is averaged down to."""
LEVELS = 4
"""Bins of a colour histogram per channel."""


class Baseline(Encoder):
    """Base of encoders without weights: one block, no norm, class token and patches of one width.

    Images are expected as `Preprocess(mean 0, std 1)` leaves them: values from 0 to 1.
    """

    depth = 1
    patch_size = PATCH
    _place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_place", torch.zeros(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it computes: `.to` moves it."""
        return self._place.device

    def see(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> Seen:
        """As `Encoder.see`; there is no norm to apply."""
        del norm
        self.check_image(images)
        self.check_blocks(blocks)
        patches, whole = self._describe(images.float())
        return Seen([(patches, whole) for _ in blocks], whole)

    def forward(self, images: Tensor) -> Tensor:
        """The vector [B, D] of the whole image."""
        self.check_image(images)
        return self._describe(images.float())[1]

    @abstractmethod
    def _describe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of patches [B, N, D] and of whole images [B, D]."""


class PixelBaseline(Baseline):
    """Raw pixels: an image, and each of its patches, averaged down to 8 x 8 x 3 = 192 numbers (channel by channel)."""

    embed_dim = 3 * SIDE * SIDE

    def _describe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        whole = F.adaptive_avg_pool2d(images, SIDE).flatten(1)
        squares = _patches(images)
        patches = F.adaptive_avg_pool2d(squares.flatten(0, 1), SIDE).flatten(1)
        return patches.unflatten(0, squares.shape[:2]), whole


class HistogramBaseline(Baseline):
    """Colour histograms: the share of pixels in each of 4 x 4 x 4 = 64 equal boxes of RGB, of image and patches."""

    embed_dim = LEVELS**3

    def _describe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        levels = (_patches(images) * LEVELS).long().clamp_(0, LEVELS - 1)
        boxes = ((levels[:, :, 0] * LEVELS + levels[:, :, 1]) * LEVELS + levels[:, :, 2]).flatten(2)
        count, patches, pixels = boxes.shape
        first = torch.arange(count * patches, device=boxes.device).view(count, patches, 1) * self.embed_dim
        counts = torch.bincount((boxes + first).flatten(), minlength=count * patches * self.embed_dim)
        shares = counts.view(count, patches, self.embed_dim).float() / pixels
        return shares, shares.mean(dim=1)


BASELINES: dict[str, type[Baseline]] = {"pixels": PixelBaseline, "histogram": HistogramBaseline}


@dataclass(frozen=True)
class OpenedBaseline:
    """A baseline in eval mode on the CPU, and what goes with it (see `load.LoadedModel`)."""

    network: Baseline
    preprocess: Preprocess
    fingerprint: dict[str, Any]


def open_baseline(name: str) -> OpenedBaseline:
    """The baseline of this name, with shorter side 256 and centre crop 224 as our own models. InputError if unknown."""
    if name not in BASELINES:
        raise InputError(
            f"model 'baseline:{name}' not found: expected {' or '.join(f'baseline:{known}' for known in BASELINES)}"
        )
    network = BASELINES[name]().eval()
    preprocess = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)
    return OpenedBaseline(network, preprocess, {"baseline": name, "width": network.embed_dim, "patch": PATCH})


def _patches(images: Tensor) -> Tensor:
    """[B, 3, h, w] -> [B, N, 3, patch, patch] in row order."""
    return images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
