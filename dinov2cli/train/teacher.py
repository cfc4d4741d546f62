"""The frozen teacher of a distillation: any backbone with tokens, seen on the student's grid (METHOD §4)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2cli.errors import UserError
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from dinov2cli.models.vit import VisionTransformer, patch_advice


class TeacherTokens(NamedTuple):
    """What a teacher gives of C crops, after its final norm: cls [C, D]; patches [C, N, D] on the student's grid."""

    cls: Tensor
    patches: Tensor


class FrozenTeacher(nn.Module):
    """A backbone that is only looked at, with its projection heads where it has them; always in eval mode.

    `mean` and `std` are those of the teacher's own images; crops come normalised by ImageNet's. `image_size` is the
    side in pixels that crops are brought to for the teacher; None: it sees them as they are. Tied heads: `dino_head`
    alone, which serves the patches too. Raises ValueError for an iBOT head without a DINO head.
    """

    gain: Tensor
    shift: Tensor

    def __init__(
        self,
        network: VisionTransformer | Encoder,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_size: int | None = None,
        dino_head: ProjectionHead | None = None,
        ibot_head: ProjectionHead | None = None,
    ) -> None:
        super().__init__()
        if dino_head is None and ibot_head is not None:
            raise ValueError("an iBOT head without a DINO head: tied heads are given as dino_head")
        self.network, self.dino_head, self.ibot_head = network, dino_head, ibot_head
        self.image_size = image_size
        # crop * std + mean are colours again: both steps, back and to the teacher's own, in one.
        own, crops = (
            torch.tensor([m, s], dtype=torch.float64) for m, s in ((mean, std), (IMAGENET_MEAN, IMAGENET_STD))
        )
        self.renormalizes = not torch.equal(own, crops)
        self.register_buffer("gain", (crops[1] / own[1]).float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((crops[0] - own[0]) / own[1]).float().view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def embed_dim(self) -> int:
        """D, the width of the tokens."""
        return self.network.embed_dim

    @property
    def tied(self) -> bool:
        """Whether the DINO head serves the patches too."""
        return self.dino_head is not None and self.ibot_head is None

    @property
    def patch_head(self) -> ProjectionHead | None:
        """The head for patches: the iBOT head, or the DINO head when tied; None without heads."""
        return self.dino_head if self.ibot_head is None else self.ibot_head

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Eval mode, whatever is asked: a teacher never drops a residual branch."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def tokens(self, global_crops: Tensor, grid: int) -> TeacherTokens:
        """Tokens of the last block after the final norm, of crops [C, 3, S, S] normalised by ImageNet's statistics.

        Patches on another grid than `grid` x `grid` are resampled to it (`resample_patches`). Raises UserError for
        crops of a size that does not go through.
        """
        images = self.images(global_crops)
        if isinstance(self.network, VisionTransformer):
            # forward_crops as in the student's pass: FSDP2 gathers the weights of what its hooks are on.
            (seen,) = self.network.forward_crops([images])
            return TeacherTokens(seen.cls, resample_patches(seen.patches, grid))
        ((patches, cls),) = self.network.intermediate(images, [self.network.depth - 1])
        return TeacherTokens(cls, resample_patches(patches, grid))

    @torch.no_grad()
    def logits(self, tokens: TeacherTokens, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [C, K] of all class tokens, and [M, K'] of the patches `indices` [M] among the C * N.

        Raises ValueError without heads.
        """
        if self.dino_head is None or self.patch_head is None:
            raise ValueError("this teacher has no heads")
        return self.dino_head(tokens.cls), self.patch_head(tokens.patches.flatten(0, 1)[indices])

    def images(self, global_crops: Tensor) -> Tensor:
        """What the teacher looks at: the crops in its own normalisation and size."""
        images = global_crops
        if self.renormalizes:
            images = images * self.gain + self.shift
        if self.image_size is not None and self.image_size != images.shape[-1]:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
        return images

    def check(self, size: int, patch_size: int) -> None:
        """Raise UserError unless crops of `size` pixels go through the teacher and through a student's patches.

        The grids may differ, tokens are resampled; but the teacher's patch must divide what the teacher sees.
        """
        if size < patch_size or size % patch_size:
            raise UserError(f"crops.global_size {size} {patch_advice(size, patch_size)}")
        seen, own = self.image_size or size, self.network.patch_size
        if isinstance(self.network, VisionTransformer):
            if self.network.in_chans != 3:
                raise UserError(f"the teacher takes images of {self.network.in_chans} channels, expected 3")
            suits = seen >= own and seen % own == 0
        else:
            suits = self._takes(seen)
        if suits:
            return
        raise UserError(
            f"the teacher's patch size {own} does not divide the {seen} pixels it would see, so its grid cannot be "
            f"matched with the student's of {size // patch_size}x{size // patch_size}: "
            f"use {_advice(size, patch_size, own)}"
        )

    def _takes(self, size: int) -> bool:
        """Whether an encoder takes images of so many pixels; UserError where its patch is not what hinders it."""
        assert isinstance(self.network, Encoder)
        try:
            self.network.check_size(size)
        except UserError as error:
            if size < self.network.patch_size or size % self.network.patch_size:
                return False
            raise UserError(f"teacher: {error}; set teacher.image_size to a size that it takes") from None
        return True


def resample_patches(patches: Tensor, grid: int) -> Tensor:
    """Patch tokens [C, n * n, D] in row order on `grid` x `grid` places: [C, grid * grid, D], bilinear.

    On the same grid they are returned as they are. Raises UserError if they lie on no square.
    """
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise UserError(f"the teacher gives {patches.shape[1]} patches of a square image; expected a square number")
    if side == grid:
        return patches
    maps = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def _advice(size: int, patch_size: int, own: int) -> str:
    """Crop sizes that suit both patches, and sides that suit the teacher's."""
    both = math.lcm(patch_size, own)
    below = size // both * both
    crops = f"{below} or {below + both}" if below else str(both)
    same, near = size // patch_size * own, max(size // own, 1) * own
    others = " or ".join(str(side) for side in (near, near + own) if side != same)
    return (
        f"crops.global_size {crops}, which suits both patches, or teacher.image_size {same}, which gives the student's "
        f"grid, or {others}, whose tokens are resampled"
    )
