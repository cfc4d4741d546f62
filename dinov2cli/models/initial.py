"""A starting point from which a small ViT learns within minutes; its parameters are those of any other ViT.

A plain ViT has to find out first that images have neighbourhoods, that tokens should look at tokens like themselves and
which colours and edges matter. Three initial values tell it so (`model.init: structured`):

- positions: two-dimensional sines and cosines (Chen et al. 2021, arXiv 2104.02057) instead of noise;
- attention: query-key products near the identity and value-projection products near minus the identity, as they are in
  trained ViTs (mimetic initialisation, Trockman & Kolter 2023, arXiv 2305.09828);
- patch projection: whitened principal components of the data's own patches, with their negatives (as Coates et al. 2011
  do for features).
"""

from typing import Any

import torch
from torch import Tensor

from dinov2cli.models.blocks import Attention
from dinov2cli.models.vit import VisionTransformer

_PATCHES = 200_000  # patches looked at, which bounds memory
_POSITION_GAIN, _PATCH_GAIN, _RIDGE = 0.3, 0.5, 1e-2
_QUERY_KEY, _VALUE_PROJECTION = (0.7, 0.7), (-0.4, 0.4)  # weights of the identity and of noise (the paper's, section 4)


@torch.no_grad()
def structured_init(backbone: VisionTransformer, images: Tensor, generator: torch.Generator) -> None:
    """Overwrite positions, attention weights and patch projection of a freshly built backbone.

    `images` float [n, 3, h, w], normalised as in training, sides multiples of the patch; some hundred are enough.
    `generator` draws the noise.
    """
    backbone.pos_embed[0, 1:] = _POSITION_GAIN * sincos_positions(backbone.grid, backbone.embed_dim)
    block: Any
    for block in backbone.blocks:
        _mimetic(block.attn, backbone.embed_dim, backbone.num_heads, generator)
    components = patch_components(images, backbone.patch_size)[: backbone.embed_dim // 2]
    both = _PATCH_GAIN * torch.cat([components, -components])
    backbone.patch_embed.proj.weight[: len(both)] = both.view(-1, *backbone.patch_embed.proj.weight.shape[1:])


def sincos_positions(grid: int, dim: int) -> Tensor:
    """Positions [grid^2, dim] in row order: a quarter of the channels each for sin x, cos x, sin y, cos y."""
    quarter = dim // 4
    rates = 10_000.0 ** (-torch.arange(quarter) / max(quarter, 1))
    rows, columns = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in (columns, rows)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.nn.functional.pad(waves, (0, dim - waves.shape[1]))


def patch_components(images: Tensor, patch_size: int) -> Tensor:
    """Whitening directions [C p p, C p p] of the patches of images [n, C, h, w], largest variance first.

    Row i applied to a centred patch has variance near 1; directions of little variance are damped by a ridge.
    """
    p = patch_size
    patches = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * p * p)
    patches = patches[:: -(-len(patches) // _PATCHES)].double()
    patches -= patches.mean(0)
    variances, directions = torch.linalg.eigh(patches.t() @ patches / len(patches))
    rows = (directions / (variances.clamp_min(0) + _RIDGE).sqrt()).t().flip(0)
    # An eigenvector's sign is anybody's choice: make its largest entry positive.
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return (rows * largest.sign()).float()


def _mimetic(attention: Attention, dim: int, heads: int, generator: torch.Generator) -> None:
    width = dim // heads
    qkv, projection = attention.qkv.weight, attention.proj.weight
    left, right = _factors(_near_identity(dim, *_VALUE_PROJECTION, generator), dim)
    projection.copy_(left)
    qkv[2 * dim :] = right
    for head in range(heads):
        left, right = _factors(_near_identity(dim, *_QUERY_KEY, generator), width)
        rows = slice(head * width, (head + 1) * width)
        qkv[rows] = left.t()
        qkv[dim:][rows] = right


def _near_identity(dim: int, identity: float, noise: float, generator: torch.Generator) -> Tensor:
    return identity * torch.eye(dim) + noise * torch.randn(dim, dim, generator=generator) / dim**0.5


def _factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left [D, rank] and right [rank, D] whose product is the best approximation of that rank."""
    u, s, v = torch.linalg.svd(product)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
