"""The image-level loss: student class tokens of all crops against teacher class tokens of the OTHER global crops."""

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli.losses.cross_entropy import soft_cross_entropy


class DinoLoss(NamedTuple):
    """The two parts of the loss, already weighted: their sum is the loss."""

    dino_local: Tensor
    dino_global: Tensor


def dino_loss(
    student_global: Tensor,
    student_local: Tensor | None,
    teacher: Tensor,
    *,
    temperature: float = 0.1,
) -> DinoLoss:
    """DINO loss of G global and L local crops per image (DINOv2, arXiv 2304.07193, section 4; DINO, equation 3).

    `student_global` [G, B, K] and `student_local` [L, B, K] (or None) are logits, `teacher` [G, B, K] targets.
    A pair (student crop, teacher crop) contributes the mean over the batch of its cross-entropy. Pairs of the
    same view are left out: global crop i meets the teachers j != i, G * (G - 1) pairs; locals meet all teachers,
    L * G pairs. Each pair weighs 1 / (G * (G - 1) + max(L * G, 1)): with two global and eight local crops the
    locals carry 16/18 of the loss. Raises ValueError when shapes disagree or there are fewer than two global crops.
    """
    crops, batch = teacher.shape[:2]
    if student_global.shape != teacher.shape or crops < 2:
        raise ValueError(
            f"student {list(student_global.shape)} and teacher {list(teacher.shape)} must both be [G >= 2, B, K]"
        )
    locals_count = 0 if student_local is None else student_local.shape[0]
    weight = 1.0 / (crops * (crops - 1) + max(locals_count * crops, 1)) / max(batch, 1)
    # A crop's cross-entropies to several teachers are one cross-entropy to the sum of their targets.
    others = [sum_targets(teacher, [j for j in range(crops) if j != i]) for i in range(crops)]
    global_terms = [
        soft_cross_entropy(student, target, temperature).sum()
        for student, target in zip(student_global, others, strict=True)
    ]
    global_loss = torch.stack(global_terms).sum() * weight
    if student_local is None or locals_count == 0:
        return DinoLoss(torch.zeros_like(global_loss), global_loss)
    every = sum_targets(teacher, list(range(crops)))
    local_terms = [soft_cross_entropy(student, every, temperature).sum() for student in student_local]
    return DinoLoss(torch.stack(local_terms).sum() * weight, global_loss)


def sum_targets(teacher: Tensor, crops: list[int]) -> Tensor:
    """Sum of the targets [B, K] of the listed crops of `teacher` [G, B, K]."""
    total = teacher[crops[0]]
    for crop in crops[1:]:
        total = total + teacher[crop]
    return total
