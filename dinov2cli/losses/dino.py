"""The image-level loss: student class tokens of all crops against teacher class tokens of the OTHER global crops."""

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli.losses.cross_entropy import RowTargets, crops_cross_entropy


class DinoLoss(NamedTuple):
    """The two parts of the loss, already weighted: their sum is the loss."""

    dino_local: Tensor
    dino_global: Tensor


def dino_loss(
    student_global: Tensor,
    student_local: Tensor | None,
    teacher: Tensor | RowTargets,
    *,
    temperature: float = 0.1,
) -> DinoLoss:
    """DINO loss of G global and L local crops per image (DINOv2, arXiv 2304.07193, section 4; DINO, equation 3).

    `student_global` [G, B, K] and `student_local` [L, B, K] (or None) are logits, `teacher` [G, B, K] targets, a
    tensor or computed on demand as [G * B, K], crop after crop.
    A pair (student crop, teacher crop) contributes the mean over the batch of its cross-entropy. Pairs of the
    same view are left out: global crop i meets the teachers j != i, G * (G - 1) pairs; locals meet all teachers,
    L * G pairs. Each pair weighs 1 / (G * (G - 1) + max(L * G, 1)): with two global and eight local crops the
    locals carry 16/18 of the loss. Raises ValueError when shapes disagree or there are fewer than two global crops.
    """
    crops, batch, prototypes = student_global.shape
    targets = teacher.flatten(0, 1) if isinstance(teacher, Tensor) and teacher.ndim == 3 else teacher
    if tuple(targets.shape) != (crops * batch, prototypes) or crops < 2:
        raise ValueError(
            f"student {list(student_global.shape)} and teacher {list(teacher.shape)} must both be [G >= 2, B, K]"
        )
    locals_count = 0 if student_local is None else student_local.shape[0]
    weight = 1.0 / (crops * (crops - 1) + max(locals_count * crops, 1)) / max(batch, 1)
    others = [[j for j in range(crops) if j != i] for i in range(crops)]
    global_loss = crops_cross_entropy(student_global, targets, temperature, others).sum() * weight
    if student_local is None or locals_count == 0:
        return DinoLoss(torch.zeros_like(global_loss), global_loss)
    every = [range(crops)] * locals_count
    local_loss = crops_cross_entropy(student_local, targets, temperature, every).sum() * weight
    return DinoLoss(local_loss, global_loss)
