"""The DINOv2 vision transformer (METHOD: §2): registers, LayerScale, SwiGLU, two position-interpolation conventions.

All crops of all sizes go through the blocks in one packed pass (`forward_crops`). Nothing here knows about training
except the stochastic depth, whose randomness comes from an explicit generator. Parameter names are the official ones.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dinov2cli.errors import UserError
from dinov2cli.models.blocks import Block, LayerScale, PatchEmbed
from dinov2cli.models.depth import Groups, Kept, Share, draw_kept, join, split


class ViTOutput(NamedTuple):
    """Tokens of one batch after the final norm, and all tokens before it.

    cls [B, D]; registers [B, R, D]; patches [B, N, D] in row order; prenorm [B, 1 + R + N, D].
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    prenorm: Tensor


class VisionTransformer(nn.Module):
    """ViT backbone.

    `img_size` sets the grid of the learned position embedding; any size that is a multiple of the patch goes through
    `forward`. `interpolate_offset` and `interpolate_antialias` choose how the grid is resampled for other sizes:
    offset > 0 resamples by the scale factor (n + offset) / grid (released plain models: 0.1, no antialias), offset 0
    resamples to the exact size (released register models: with antialias; transformers' Dinov2Model: without).
    `layerscale` is the initial gain, None leaves LayerScale out. `drop_path` is the highest stochastic-depth rate,
    the same in every block if `drop_path_uniform`, else rising linearly from 0.
    Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 14,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        ffn: str = "mlp",
        qkv_bias: bool = True,
        num_register_tokens: int = 0,
        layerscale: float | None = 1e-5,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        drop_path_uniform: bool = True,
        interpolate_offset: float = 0.1,
        interpolate_antialias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(img_size, patch_size, embed_dim, num_heads, ffn, drop_path)
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.mlp_ratio, self.ffn, self.qkv_bias = mlp_ratio, ffn, qkv_bias
        self.num_register_tokens, self.layerscale, self.norm_eps = num_register_tokens, layerscale, norm_eps
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.grid = img_size // patch_size
        self.activation_checkpointing = False  # set: blocks are computed again in the backward pass, to save memory
        self.runner: Callable[[Tensor, Groups, list[Kept | None]], Tensor] | None = None  # set: runs the blocks instead
        self.set_drop_path(drop_path, uniform=drop_path_uniform)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                ffn=ffn,
                layerscale=layerscale,
                qkv_bias=qkv_bias,
                norm_eps=norm_eps,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.init_weights(generator)

    def set_drop_path(self, rate: float, *, uniform: bool = True) -> None:
        """Set the stochastic-depth rate, in [0, 1): the same in every block, or rising linearly from 0 to `rate`."""
        steps = max(self.depth - 1, 1)
        self.drop_rates = [rate if uniform else rate * i / steps for i in range(self.depth)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter afresh from `generator` (METHOD: §8.12); also what fills a model built on meta."""
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=1e-6, generator=generator)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.init)
            elif isinstance(module, nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)

    def position_embedding(self, height: int, width: int) -> Tensor:
        """Position embedding [1, 1 + N, D] of an image of height x width pixels, class position first."""
        rows, columns = height // self.patch_size, width // self.patch_size
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        source = self.pos_embed[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        if self.interpolate_offset:
            offset = self.interpolate_offset
            factors = ((rows + offset) / self.grid, (columns + offset) / self.grid)
            resized = F.interpolate(source, scale_factor=factors, mode="bicubic", antialias=self.interpolate_antialias)
        else:
            resized = F.interpolate(source, size=(rows, columns), mode="bicubic", antialias=self.interpolate_antialias)
        patches = resized.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    @torch.no_grad()
    def set_grid(self, img_size: int) -> None:
        """Resample the learned position embedding to the grid of `img_size` pixels, once and for good.

        Features at that size stay what they were, but for rounding. Raises UserError if the patch does not divide it.
        """
        if img_size % self.patch_size:
            raise UserError(f"img_size {img_size} {patch_advice(img_size, self.patch_size)}")
        resampled = self.position_embedding(img_size, img_size).clone()
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        self.img_size, self.grid = img_size, img_size // self.patch_size

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens [B, 1 + R + N, D] that enter the first block.

        Masked patches become the mask token BEFORE the position embedding is added, registers join AFTER it.
        """
        b, _, height, width = images.shape
        self.check_image(images)
        patches = self.patch_embed(images)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat([self.cls_token.expand(b, -1, -1), patches], dim=1)
        tokens = tokens + self.position_embedding(height, width)
        if self.register_tokens is None:
            return tokens
        return torch.cat([tokens[:, :1], self.register_tokens.expand(b, -1, -1), tokens[:, 1:]], dim=1)

    def forward(
        self, images: Tensor, masks: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> ViTOutput:
        """Features of one batch.

        images [B, 3, h, w] normalised floats; masks [B, N] bool, true where the patch is hidden. `generator` drives
        stochastic depth and is needed only in training mode with a drop-path rate above 0.
        """
        return self.forward_crops([images], [masks], generator=generator)[0]

    def forward_crops(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        generator: torch.Generator | None = None,
        share: Share | None = None,
    ) -> list[ViTOutput]:
        """Features of several batches of different sizes in ONE pass: linear layers see a single long sequence.

        crops: [Bi, 3, hi, wi] each; masks: [Bi, Ni] bool or None for each. Stochastic depth keeps its share of
        samples separately in each batch (METHOD: §8.11), with `share` in the batch of all processes, which must then
        bring equal generators. Raises ValueError if it is active and no generator is given.
        """
        masks = [None] * len(crops) if masks is None else masks
        embedded = [self.embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        groups: Groups = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
        x_TD = join([tokens.flatten(0, 1) for tokens in embedded])
        kept_by_block = self.draw_depth(groups, generator, x_TD.device, share)
        x_TD = (self.runner or self.run_blocks)(x_TD, groups, kept_by_block)
        normed = split(self.norm(x_TD), groups)
        first = 1 + self.num_register_tokens
        outputs = []
        for norm_TD, pre_TD, group in zip(normed, split(x_TD, groups), groups, strict=True):
            tokens, prenorm = norm_TD.unflatten(0, group), pre_TD.unflatten(0, group)
            outputs.append(ViTOutput(tokens[:, 0], tokens[:, 1:first], tokens[:, first:], prenorm))
        return outputs

    def run_blocks(self, x_TD: Tensor, groups: Groups, kept_by_block: list[Kept | None]) -> Tensor:
        """The pack after all blocks."""
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block, kept in zip(self.blocks, kept_by_block, strict=True):
            # Nothing in a block is random (`kept` is drawn already), so no random state needs to be kept either.
            x_TD = (
                checkpoint(block, x_TD, groups, kept, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else block(x_TD, groups, kept)
            )
        return x_TD

    def draw_depth(
        self, groups: Groups, generator: torch.Generator | None, device: torch.device, share: Share | None = None
    ) -> list:
        """Samples kept by each block, None everywhere in eval mode or at rate 0."""
        if not self.training or max(self.drop_rates, default=0) == 0:
            return [None] * self.depth
        if generator is None:
            raise ValueError("stochastic depth is active: pass generator=torch.Generator, or call eval()")
        return draw_kept(groups, self.drop_rates, generator, device, share)

    def intermediate(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> list[tuple[Tensor, Tensor]]:
        """(patches [B, N, D], cls [B, D]) after each of the named blocks (0 = first), in the order asked.

        With `norm` the final norm is applied to each, as the linear probe wants; depth heads take them without.
        Raises UserError for a block that does not exist.
        """
        wrong = [i for i in blocks if not 0 <= i < self.depth]
        if wrong:
            raise UserError(f"blocks {wrong} do not exist: this backbone has blocks 0 to {self.depth - 1}")
        tokens = self.embed(images)
        groups: Groups = [(tokens.shape[0], tokens.shape[1])]
        x_TD = tokens.flatten(0, 1)
        seen: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(blocks, default=-1) + 1]):
            x_TD = block(x_TD, groups)
            if i in blocks:
                seen[i] = (self.norm(x_TD) if norm else x_TD).unflatten(0, groups[0])
        first = 1 + self.num_register_tokens
        return [(seen[i][:, first:], seen[i][:, 0]) for i in blocks]

    @property
    def device(self) -> torch.device:
        """Where the network computes: `.to` moves it."""
        return self.cls_token.device

    def check_image(self, images: Tensor) -> None:
        """UserError unless the batch has this model's channels and sides that are multiples of the patch."""
        _, channels, height, width = images.shape
        if channels != self.in_chans:
            raise UserError(f"images have {channels} channels, this backbone takes {self.in_chans}")
        for side in (height, width):
            if side < self.patch_size or side % self.patch_size:
                raise UserError(f"image size {height}x{width} {patch_advice(side, self.patch_size)}")


def patch_advice(side: int, patch_size: int) -> str:
    """The end of a message about a side that the patch does not divide: what is wrong and the nearest good sizes."""
    below = side // patch_size * patch_size
    sizes = f"{below} or {below + patch_size}" if below else str(patch_size)
    return f"is not a multiple of the patch size {patch_size}: use {sizes}"


def check_sizes(img_size: int, patch_size: int, embed_dim: int, num_heads: int, ffn: str, drop_path: float) -> None:
    """UserError for the first pair of architecture numbers that do not fit together."""
    if img_size < patch_size or img_size % patch_size:
        raise UserError(f"img_size {img_size} {patch_advice(img_size, patch_size)}")
    if embed_dim % num_heads:
        raise UserError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    if ffn not in ("mlp", "swiglu"):
        raise UserError(f"ffn is {ffn!r}, expected 'mlp' or 'swiglu'")
    if not 0 <= drop_path < 1:
        raise UserError(f"drop_path is {drop_path}, expected a rate from 0 up to but not including 1")
