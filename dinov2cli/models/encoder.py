"""Image encoders that are not ours (comparators, baselines), in the form that evaluation reads features from."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2cli.errors import UserError
from dinov2cli.models.vit import patch_advice


@dataclass(frozen=True)
class Seen:
    """What an encoder makes of a batch. tokens: (patches [B, N, D], class token [B, D]) after each block asked for, in
    order; pooled [B, P]: the vector that this kind of model is used by (CLIP: the projected one)."""

    tokens: list[tuple[Tensor, Tensor]]
    pooled: Tensor


class Encoder(nn.Module):
    """Base of encoders with tokens.

    `depth` blocks of width `embed_dim` can be asked for; patches come in row order, one for every patch_size x
    patch_size pixels (rest pixels at the right and lower border of a size that the model itself asks for give none).
    """

    embed_dim: int
    depth: int
    patch_size: int

    @property
    def device(self) -> torch.device:
        """Where the network computes: `.to` moves it."""
        return next(self.parameters()).device

    def check_image(self, images: Tensor) -> None:
        """Raise UserError for images [B, C, h, w] of a size or number of channels that cannot go through."""
        channels, height, width = images.shape[1:]
        if channels != 3:
            raise UserError(f"images have {channels} channels, this encoder takes 3")
        for side in (height, width):
            if side < self.patch_size or side % self.patch_size:
                raise UserError(f"image size {height}x{width} {patch_advice(side, self.patch_size)}")

    def check_size(self, size: int) -> None:
        """Raise UserError if images of `size` x `size` pixels do not go through."""
        self.check_image(torch.empty(1, 3, size, size, device="meta"))

    def check_blocks(self, blocks: Sequence[int]) -> None:
        """Raise UserError for a block that there is not."""
        beyond = [block for block in blocks if not 0 <= block < self.depth]
        if beyond:
            raise UserError(f"block {beyond[0]} is not served: expected 0 to {self.depth - 1} of this encoder")

    @abstractmethod
    def see(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> Seen:
        """Tokens after the named blocks (0 = first) and the pooled vector, of normalised images [B, 3, h, w].

        With `norm` the final norm is applied to the tokens of each block. Sides must be multiples of the patch.
        Raises UserError for a size or a block that the model cannot serve.
        """

    def intermediate(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> list[tuple[Tensor, Tensor]]:
        """(patches [B, N, D], cls [B, D]) after each of the named blocks, as `VisionTransformer.intermediate`."""
        return self.see(images, blocks, norm).tokens

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """The pooled vector [B, P] of normalised images, with gradients: what fine-tuning puts its head on."""
