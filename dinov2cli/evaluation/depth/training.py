"""Training of a depth head on a frozen backbone: crops of images, the loss over the batch of all ranks, AdamW.

As the released depth heads were trained: crops, mirror images and colour changes, but no change of scale, which would
change the depth; AdamW under a linear warm-up and a cosine, in batches of 16. Rotations (2.5 degrees) are left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2cli.data.dense import Pair, Target, flipped, random_crop, resize_pair
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import WorkError
from dinov2cli.evaluation.dense.batches import Augmentation, Part, ReadBatches
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.dense.tokens import Sight, upsampled
from dinov2cli.evaluation.dense.training import Trained, group_of, train_head
from dinov2cli.evaluation.depth.data import DepthScale
from dinov2cli.evaluation.depth.heads import HeadKind
from dinov2cli.evaluation.depth.measures import (
    GRADIENT_SCALES,
    gradient_loss,
    gradient_sums,
    log_sums,
    scale_invariant_log_loss,
    valid_pixels,
)
from dinov2cli.losses.collectives import reduce_sum
from dinov2cli.search.blocks import Stage
from dinov2cli.train.schedules import warmup_cosine

WHOLE = 2**30
"""Side of a window that holds any image: depth is predicted for whole images."""
# 25 passes over NYUd in the paper's batches of 16; small sets get a thousand steps.
_EPOCHS, _MIN_STEPS, _MAX_STEPS = 25, 1_000, 38_400
_FINAL = 1e-8  # of the learning rate, at the last step
_CLIP = 35.0
_LOG_SUMS = 3


@dataclass(frozen=True)
class Recipe:
    """How a head is trained. lr: peak rate of AdamW; warmup: fraction of the steps; gradient: weight of that loss.

    crop: share of each side that a training crop keeps; flip: probability of the mirror image; colour: of a change of
    gamma (0.9 to 1.1), brightness (0.75 to 1.25) and of each channel (0.9 to 1.1).
    """

    steps: int
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 1 / 3
    gradient: float = 0.5
    crop: float = 0.85
    flip: float = 0.5
    colour: float = 0.5


def default_steps(images: int, batch_size: int) -> int:
    """25 passes over the images, but 1,000 steps at least and 38,400 (the paper's, on NYUd) at most."""
    return min(max(math.ceil(images * _EPOCHS / batch_size), _MIN_STEPS), _MAX_STEPS)


def default_rate(kind: HeadKind) -> float:
    """Peak learning rate for a head. The released 1e-4 over 38,400 steps is too little for a thousand."""
    return 3e-4 if kind == "dpt" else 3e-3


class DepthBatches(ReadBatches):
    """Crops of images with depth in metres, see `Recipe`; sides of crops are multiples of `patch_size`."""

    def __init__(
        self,
        source: ImageSource,
        rows: np.ndarray,
        sight: Sight,
        scale: DepthScale,
        recipe: Recipe,
        *,
        patch_size: int,
        seed: int,
        workers: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        def metres(target: Target, _name: str) -> Tensor:
            return torch.from_numpy(scale.metres(target))

        super().__init__(
            source,
            "depth",
            rows,
            sight,
            metres,
            augmentation=Augmentation((1.0, 1.0), recipe.flip),
            batch_size=recipe.batch_size,
            seed=seed,
            workers=workers,
            resize_target=scale.resize_target,
            ranks=ranks,
        )
        self._recipe, self._shown, self._patch = recipe, sight, patch_size

    def framed(self, pair: Pair, random: np.random.Generator) -> Pair:
        pair = resize_pair(pair, *self._shown.size(*pair.size))
        sides = [max(int(side * self._recipe.crop) // self._patch, 1) * self._patch for side in pair.size]
        pair = random_crop(pair, sides[0], sides[1], random)
        if random.random() < self._recipe.flip:
            pair = flipped(pair)
        return replace(pair, image=recoloured(pair.image, random)) if random.random() < self._recipe.colour else pair


def recoloured(image: Tensor, random: np.random.Generator) -> Tensor:
    """uint8 [3, H, W] with its gamma, brightness and channels changed a little, see `Recipe`."""
    gamma, brightness = random.uniform(0.9, 1.1), random.uniform(0.75, 1.25)
    gains = torch.from_numpy(random.uniform(0.9, 1.1, size=3)).float()
    # A function of the level: 256 of them are computed, not every pixel.
    levels = (torch.arange(256) / 255) ** gamma * brightness * 255
    table = (levels * gains[:, None]).clamp(0, 255).round().to(torch.uint8)
    return torch.stack([row[channel.long()] for row, channel in zip(table, image, strict=True)])


@dataclass(frozen=True)
class DepthLoss:
    """The loss over all valid pixels of a batch, whichever ranks hold them, for `train_head`.

    The loss is no sum over pixels, but a function of such sums. Each rank gives its sums weighted by the derivative of
    the loss by the sums of all, so that the gradients of the ranks add up to that of the loss.
    """

    head: nn.Module
    seeing: Seeing
    scale: DepthScale
    gradient: float
    ranks: Ranks = ALONE

    def __call__(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        own = self._sums(parts)
        everything = reduce_sum(own.detach().clone(), group_of(self.ranks)).requires_grad_()
        loss = self._of(everything)
        (weights,) = torch.autograd.grad(loss, everything)
        share = 1 / self.ranks.world_size
        linear = (weights * own).sum()
        return linear + (loss * share - linear).detach(), torch.tensor(share, device=own.device)

    def _sums(self, parts: Sequence[Part]) -> Tensor:
        zero = sum((parameter.sum() for parameter in self.head.parameters()), torch.zeros(())) * 0
        total = zero.double() + torch.zeros(_LOG_SUMS + 2 * GRADIENT_SCALES, device=zero.device, dtype=torch.float64)
        for part in parts:
            tokens, depth = part.seen(self.seeing)
            predicted = pixels_of(
                self.head(tokens.maps, tokens.cls), (depth.shape[1], depth.shape[2]), self.seeing.encoder.patch_size
            )
            valid = valid_pixels(depth, self.scale.min_depth, self.scale.max_depth)
            sums = [log_sums(predicted, depth, valid)]
            if self.gradient:
                sums.append(gradient_sums(predicted, depth, valid).flatten())
            total = total + nn.functional.pad(torch.cat(sums), (0, len(total) - sum(map(len, sums))))
        return total

    def _of(self, sums: Tensor) -> Tensor:
        matching = gradient_loss(sums[_LOG_SUMS:].unflatten(0, (GRADIENT_SCALES, 2)))
        return scale_invariant_log_loss(sums[:_LOG_SUMS]) + self.gradient * matching


def pixels_of(depth: Tensor, size: tuple[int, int], patch_size: int) -> Tensor:
    """Depth [B, h', w'] over the padded image at the pixels of the image of that (height, width), [B, H, W]."""
    return upsampled(depth.unsqueeze(1), *size, patch_size).squeeze(1)


def _require_finite(parts: Sequence[Part], seeing: Seeing) -> None:
    if not all(part.seen(seeing)[0].maps.isfinite().all() for part in parts):
        raise WorkError("the patch tokens of the model hold NaN or infinity; check its training, or use fp32 precision")


def train_depth(
    head: nn.Module,
    source: ImageSource,
    rows: np.ndarray,
    seeing: Seeing,
    scale: DepthScale,
    recipe: Recipe,
    *,
    seed: int,
    workers: int = 0,
    ranks: Ranks = ALONE,
    stage: Stage | None = None,
    every: int = 100,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Train `head` in place on the images `rows` of a source; the backbone stays as it is. On every rank of a launch.

    stage: where the state is kept every `every` steps. Raises WorkError for tokens that are no numbers, and when
    the loss is none any more, InputError for files that cannot be read any more.
    """
    batches = DepthBatches(
        source, rows, seeing.sight, scale, recipe,
        patch_size=seeing.encoder.patch_size, seed=seed, workers=workers, ranks=ranks,
    )  # fmt: skip
    ranks.together(lambda: _require_finite(batches(0), seeing))
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def clip(*_arguments: Any) -> None:
        nn.utils.clip_grad_norm_(head.parameters(), _CLIP)

    optimizer.register_step_pre_hook(clip)
    return train_head(
        head,
        optimizer,
        batches,
        DepthLoss(head, seeing, scale, recipe.gradient, ranks),
        steps=recipe.steps,
        rate=lambda step: warmup_cosine(step, recipe.steps, base=1.0, final=_FINAL, warmup=recipe.warmup),
        ranks=ranks,
        stage=stage,
        every=every,
        on_step=on_step,
    )
