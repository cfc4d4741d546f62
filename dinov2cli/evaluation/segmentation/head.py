"""Semantic segmentation with frozen patch tokens: a batch norm and a linear layer (paper §7.4; METHOD §6).

`linear` reads the last block. `+ms` reads the last four, concatenated, and is tested at several scales, mirrored too.
The logits of a patch are upsampled bilinearly to pixels. Training as in the released configurations: AdamW 1e-3, weight
decay 1e-4, linear warm-up, then linear decay to zero, 40,000 batches of 16.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli.evaluation.dense.batches import Part
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.dense.norm import SyncedBatchNorm
from dinov2cli.evaluation.dense.tokens import Window, sampled, slide, upsampled
from dinov2cli.evaluation.segmentation.labels import IGNORED, Classes

SCALES = (1.0, 1.32, 1.73, 2.28, 3.0)
"""Factors on the size at which `+ms` is tested, each also on the mirror image: those of the released configurations."""

WARMUP, WARMUP_START = 0.0375, 1e-6
_CLASSES_AT_ONCE = 16  # whose full-resolution logits are held before they are brought to the size of the answer
Counts = npt.NDArray[np.int64]


class LinearSegmenter(nn.Module):
    """Logits of every patch from its tokens: batch norm over the channels, then a linear layer."""

    def __init__(
        self, channels: int, classes: int, *, generator: torch.Generator, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.norm = SyncedBatchNorm(channels, group=group)
        self.classifier = nn.Linear(channels, classes)
        nn.init.normal_(self.classifier.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def flat(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [tokens, K] of all tokens of several maps [b, C, h, w], normalised together; perhaps of none."""
        rows = [part.movedim(1, -1).flatten(0, 2) for part in maps]
        joined = torch.cat(rows) if rows else self.classifier.weight.new_empty(0, self.classifier.in_features)
        logits: Tensor = self.classifier(self.norm(joined))
        return logits

    def forward(self, maps: Tensor) -> Tensor:
        """Logits [b, K, h, w] of maps [b, C, h, w]."""
        return _unflat(self.flat([maps]), [maps])[0]


def _unflat(logits: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Logits [tokens, K] as one [b, K, h, w] for each of the maps."""
    shapes = [(len(part), *part.shape[2:]) for part in maps]
    parts = logits.split([shape.numel() for shape in map(torch.Size, shapes)])
    return [part.unflatten(0, shape).movedim(-1, 1) for part, shape in zip(parts, shapes, strict=True)]


def segmentation_loss(
    head: LinearSegmenter, parts: Sequence[Part], seeing: Seeing, *, stride: int
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of labelled pixels, of every `stride`-th row and column, and their number."""
    seen = [part.seen(seeing) for part in parts]
    maps = [tokens.maps for tokens, _ in seen]
    logits = head.flat(maps)
    # A rank without an example has a loss that depends on the head too: the others wait for it in the backward pass.
    total = logits.sum() * 0
    count = torch.zeros((), device=seeing.device)
    for (_, targets), values in zip(seen, _unflat(logits, maps) if maps else [], strict=True):
        height, width = targets.shape[1:]
        chosen = targets[:, stride // 2 :: stride, stride // 2 :: stride].long()
        size = seeing.encoder.patch_size
        full = upsampled(values, height, width, size) if stride == 1 else sampled(values, height, width, size, stride)
        total = total + F.cross_entropy(full, chosen, ignore_index=IGNORED, reduction="sum")
        count = count + (chosen != IGNORED).sum()
    return total, count


def learning_rate(step: int, steps: int) -> float:
    """Factor on the rate: linear warm-up over the first 3.75 % of the steps, times a linear decay to zero."""
    warm = round(WARMUP * steps)
    rise = WARMUP_START + (1 - WARMUP_START) * step / warm if step < warm else 1.0
    return rise * (1 - step / steps)


@torch.no_grad()
def segment(
    head: LinearSegmenter,
    seeing: Seeing,
    images: Sequence[Tensor],
    *,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
) -> list[Classes]:
    """Classes int16 [H, W] of every pixel of images uint8 [3, H, W], at their own sizes.

    Logits of overlapping windows are averaged, brought to the image's size bilinearly, and the class probabilities of
    all scales and mirror images are averaged.
    """
    sums: list[Tensor | float] = [0.0] * len(images)
    views = [(scale, turned) for scale in scales for turned in ((False, True) if mirror else (False,))]
    for scale, turned in views:
        here = replace(seeing, sight=replace(seeing.sight, scale=scale))
        resized = [here.sight.resized(image) for image in images]
        tokens = here.of([image.flip(2) if turned else image for image in resized])
        for number, (image, seen) in enumerate(zip(images, tokens, strict=True)):
            answer = _full_size(head(seen.maps), here, resized[number].shape[1:], image.shape[1:])
            answer = answer.flip(2) if turned else answer
            sums[number] = sums[number] + (answer.softmax(0) if len(views) > 1 else answer)
    return [torch.as_tensor(total).argmax(0).to(torch.int16).cpu().numpy() for total in sums]


def _full_size(logits: Tensor, seeing: Seeing, seen: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Logits of the patches of all windows [n, K, h, w] as [K, H, W] of the wanted size; a few classes at a time, for
    at three times the size of a large image those of all would not fit."""
    sight, size = seeing.sight, seeing.encoder.patch_size
    number = {window: index for index, window in enumerate(sight.windows(seen[0], seen[1]))}
    answers = []
    for some in logits.split(_CLASSES_AT_ONCE, dim=1):

        def of(windows: Sequence[Window], some: Tensor = some) -> Tensor:
            chosen = some[[number[window] for window in windows]]
            return upsampled(chosen, windows[0].height, windows[0].width, size)

        full = slide(of, (seen[0], seen[1]), sight, batch_size=seeing.batch_size)
        if tuple(seen) != tuple(wanted):
            full = F.interpolate(full[None], tuple(wanted), mode="bilinear", align_corners=False)[0]
        answers.append(full)
    return torch.cat(answers)


@dataclass(frozen=True)
class Overlaps:
    """Pixels of each image and class, int64 [n, K]: truly of it, taken for it, and both. Ignored pixels are in none."""

    truth: Counts
    predicted: Counts
    both: Counts

    @property
    def unions(self) -> Counts:
        """Pixels that are of a class or were taken for it."""
        return self.truth + self.predicted - self.both

    def class_ious(self) -> npt.NDArray[np.float64]:
        """Intersection over union of each class over all images, NaN for classes that neither has [K]."""
        unions = self.unions.sum(0)
        return np.divide(self.both.sum(0), unions, out=np.full(len(unions), np.nan), where=unions > 0)

    def image_ious(self) -> npt.NDArray[np.float64]:
        """Mean over the classes of each image of its own IoU, NaN where every pixel is ignored [n]."""
        present = self.unions > 0
        shares = np.where(present, self.both / np.maximum(self.unions, 1), 0).sum(1)
        return np.divide(shares, present.sum(1), out=np.full(len(shares), np.nan), where=present.any(1))

    def image_accuracies(self) -> npt.NDArray[np.float64]:
        """Share of the counted pixels of each image that were found right, NaN where there are none [n]."""
        counted = self.truth.sum(1)
        return np.divide(self.both.sum(1), counted, out=np.full(len(counted), np.nan), where=counted > 0)


def overlaps(truths: Iterable[Classes], predictions: Iterable[Classes], classes: int) -> Overlaps:
    """Count the pixels of pairs of label maps [H, W]."""
    rows = [_overlap(truth, prediction, classes) for truth, prediction in zip(truths, predictions, strict=True)]
    truth, predicted, both = np.array(rows, dtype=np.int64).reshape(-1, 3, classes).transpose(1, 0, 2)
    return Overlaps(truth, predicted, both)


def _overlap(truth: Classes, prediction: Classes, classes: int) -> tuple[Counts, Counts, Counts]:
    counted = truth != IGNORED
    true, found = truth[counted], prediction[counted]
    return (
        np.bincount(true, minlength=classes),
        np.bincount(found, minlength=classes),
        np.bincount(true[true == found], minlength=classes),
    )


def constant_answer(truth: Counts, answer: int) -> Overlaps:
    """Overlaps of a model that takes every pixel for one class: the floor of any result. truth [n, K]."""
    predicted, both = np.zeros_like(truth), np.zeros_like(truth)
    predicted[:, answer], both[:, answer] = truth.sum(1), truth[:, answer]
    return Overlaps(truth, predicted, both)
