"""Heads from the tokens of a frozen backbone to depth in metres: linear over bins, and DPT (METHOD §6).

All take the maps [B, L * D, h, w] of L blocks and their class tokens [B, L * D] (`dense.TokenMaps`), and give depth
[B, h', w'] on a finer grid. Tokens are taken as they leave the block, without final norm, as in the released models.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2cli.errors import UserError
from dinov2cli.evaluation.depth.measures import bin_depths, check_range, expected_depth

HeadKind = Literal["lin1", "lin4", "dpt"]
HEADS: tuple[HeadKind, ...] = ("lin1", "lin4", "dpt")
UPSAMPLE = 4
DPT_CHANNELS = 256
_INIT_STD = 0.01
_LAST_CHANNELS = 32
# Blocks of lin4 and DPT in the paper, counted from 0, by the depth of the backbone.
_FOUR_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
# Resolution of each of DPT's four maps over that of the tokens.
_REASSEMBLE = (4.0, 2.0, 1.0, 0.5)


def head_blocks(kind: HeadKind, depth: int) -> list[int]:
    """Blocks (0 = first) of a backbone of this depth that the head reads, oldest first.

    lin1: the last. lin4 and dpt: the paper's four, or four evenly spread ones where it names none; shallower backbones
    give some block more than once. Raises UserError for an unknown head.
    """
    if kind not in HEADS:
        raise UserError(f"depth head is {kind!r}, expected one of {', '.join(HEADS)}")
    if kind == "lin1":
        return [depth - 1]
    return list(_FOUR_BLOCKS.get(depth, [max(math.ceil(depth * part / 4), 1) - 1 for part in (1, 2, 3, 4)]))


class LinearDepth(nn.Module):
    """Scores of the bins, linear in the patch token joined with the class token of its block; the mean of the bins.

    The paper upsamples the token map four times before the layer. The layer acts on each position alone and bilinear
    weights sum to one, so the scores are upsampled instead: the same numbers from a sixteenth of the products.
    """

    depths: Tensor

    def __init__(
        self,
        embed_dim: int,
        blocks: int,
        *,
        bins: int = 256,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("depths", bin_depths(bins, min_depth, max_depth), persistent=False)
        self.patch = nn.Conv2d(embed_dim * blocks, bins, 1)
        self.cls = nn.Linear(embed_dim * blocks, bins, bias=False)
        with torch.no_grad():
            for layer in (self.patch, self.cls):
                nn.init.normal_(layer.weight, std=_INIT_STD, generator=generator)
            nn.init.zeros_(self.patch.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor, cls: Tensor) -> Tensor:
        """Depth [B, 4h, 4w]."""
        scores = self.patch(maps) + self.cls(cls)[:, :, None, None]
        scores = F.interpolate(scores, scale_factor=UPSAMPLE, mode="bilinear", align_corners=False)
        return expected_depth(scores.float(), self.depths)


class DPTDepth(nn.Module):
    """The DPT decoder (Ranftl et al. 2021, arXiv 2103.13413) on the tokens of four blocks; depth by regression.

    Maps of embed_dim / 8, / 4, / 2 and / 1 channels at 4, 2, 1 and 1/2 times the resolution of the tokens are fused
    from the coarsest on, `channels` wide. `start` is the depth that an untrained head gives on average: a head that
    began below zero everywhere would have no gradient.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        channels: int = DPT_CHANNELS,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        start: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_range(min_depth, max_depth)
        self.min_depth = min_depth
        widths = [max(embed_dim // 2**power, 1) for power in (3, 2, 1, 0)]
        self.reassemble = nn.ModuleList(
            _Reassemble(embed_dim, width, factor) for width, factor in zip(widths, _REASSEMBLE, strict=True)
        )
        self.narrow = nn.ModuleList(nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths)
        self.fuse = nn.ModuleList(_Fusion(channels, joins=index > 0) for index in range(len(widths)))
        self.project = nn.Conv2d(channels, channels, 3, padding=1)
        self.first = nn.Conv2d(channels, max(channels // 2, 1), 3, padding=1)
        self.second = nn.Conv2d(max(channels // 2, 1), _LAST_CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(_LAST_CHANNELS, 1, 1)
        _draw(self, generator)
        nn.init.constant_(self.last.bias, start)  # type: ignore[arg-type]

    def forward(self, maps: Tensor, cls: Tensor) -> Tensor:
        """Depth [B, 32 * ceil(h / 2), 32 * ceil(w / 2)]: 16 times the grid of the tokens, where its sides are even."""
        parts = zip(self.reassemble, self.narrow, maps.chunk(4, dim=1), cls.chunk(4, dim=1), strict=True)
        levels = [narrow(stage(patches, token)) for stage, narrow, patches, token in parts]
        x = None
        for fuse, found in zip(self.fuse, reversed(levels), strict=True):
            x = fuse(found) if x is None else fuse(x, found)
        x = self.first(torch.relu(self.project(x)))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = self.last(torch.relu(self.second(x)))
        return torch.relu(x.squeeze(1).float()) + self.min_depth


class _Reassemble(nn.Module):
    """Tokens to a map of `width` channels at `factor` times their resolution; the class token is mixed in first."""

    def __init__(self, embed_dim: int, width: int, factor: float) -> None:
        super().__init__()
        self.readout = nn.Conv2d(2 * embed_dim, embed_dim, 1)
        self.project = nn.Conv2d(embed_dim, width, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(width, width, int(factor), stride=int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(width, width, 3, stride=round(1 / factor), padding=1)

    def forward(self, patches: Tensor, cls: Tensor) -> Tensor:
        both = torch.cat([patches, cls[:, :, None, None].expand_as(patches)], dim=1)
        return self.resize(self.project(F.gelu(self.readout(both))))


class _Residual(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(torch.relu(x))))


class _Fusion(nn.Module):
    """The coarser map, with a finer one added if it `joins` one, refined and brought to twice its resolution."""

    def __init__(self, channels: int, *, joins: bool) -> None:
        super().__init__()
        self.join = _Residual(channels) if joins else None
        self.refine = _Residual(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if self.join is not None and finer is not None:
            if finer.shape != x.shape:
                finer = F.interpolate(finer, size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x + self.join(finer)
        x = F.interpolate(self.refine(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(x)


@torch.no_grad()
def _draw(module: nn.Module, generator: torch.Generator | None) -> None:
    """Weights and biases of all layers, uniform within 1 / sqrt(inputs of a unit), from `generator`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def build_head(
    kind: HeadKind,
    embed_dim: int,
    *,
    bins: int = 256,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    channels: int = DPT_CHANNELS,
    start: float = 1.0,
    generator: torch.Generator | None = None,
) -> LinearDepth | DPTDepth:
    """The head of a kind for tokens of width embed_dim. Raises UserError for an unknown kind or impossible numbers."""
    if kind == "dpt":
        return DPTDepth(
            embed_dim, channels=channels, min_depth=min_depth, max_depth=max_depth, start=start, generator=generator
        )
    blocks = len(head_blocks(kind, 4))
    return LinearDepth(embed_dim, blocks, bins=bins, min_depth=min_depth, max_depth=max_depth, generator=generator)
