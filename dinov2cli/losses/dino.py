"""The image-level loss: student class tokens of all crops against teacher class tokens of the OTHER global crops."""

from typing import NamedTuple

from torch import Tensor

from dinov2cli.losses.cross_entropy import RowTargets, crops_cross_entropy


class DinoLoss(NamedTuple):
    """The two parts of the loss, already weighted: their sum is the loss."""

    dino_local: Tensor
    dino_global: Tensor


def dino_loss(
    student: Tensor, teacher: Tensor | RowTargets, *, n_global: int = 2, temperature: float = 0.1
) -> DinoLoss:
    """DINO loss of G global and L local crops per image (DINOv2, arXiv 2304.07193, section 4; DINO, equation 3).

    `student` [G + L, B, K] logits, the `n_global` = G global crops first; `teacher` [G, B, K] targets, a tensor or
    computed on demand as [G * B, K], crop after crop. One tensor of all crops, so that its gradient is one as well.
    A pair (student crop, teacher crop) contributes the mean over the batch of its cross-entropy. Pairs of the
    same view are left out: global crop i meets the teachers j != i, G * (G - 1) pairs; locals meet all teachers,
    L * G pairs. Each pair weighs 1 / (G * (G - 1) + max(L * G, 1)): with two global and eight local crops the
    locals carry 16/18 of the loss. Raises ValueError when shapes disagree or there are fewer than two global crops.
    """
    crops, batch, prototypes = student.shape
    n_local = crops - n_global
    targets = teacher.flatten(0, 1) if isinstance(teacher, Tensor) and teacher.ndim == 3 else teacher
    if tuple(targets.shape) != (n_global * batch, prototypes) or not 2 <= n_global <= crops:
        raise ValueError(
            f"student {list(student.shape)} must be [G + L, B, K] and teacher {list(teacher.shape)} [G >= 2, B, K], "
            f"with G = {n_global}"
        )
    weight = 1.0 / (n_global * (n_global - 1) + max(n_local * n_global, 1)) / max(batch, 1)
    others = [[j for j in range(n_global) if j != i] for i in range(n_global)]
    every = [range(n_global)] * n_local
    loss = crops_cross_entropy(student, targets, temperature, [*others, *every])
    return DinoLoss(loss[n_global:].sum() * weight, loss[:n_global].sum() * weight)
