"""The patch-level loss: student tokens at masked positions against the teacher's tokens there, which it saw whole."""

import torch
from torch import Tensor

from dinov2cli.losses.cross_entropy import RowTargets, soft_cross_entropy


def ibot_loss(
    student: Tensor,
    targets: Tensor | RowTargets,
    weights: Tensor,
    n_crops: int,
    *,
    temperature: float = 0.1,
) -> Tensor:
    """iBOT loss of M masked tokens (iBOT, arXiv 2111.07832, equation 2): a scalar.

    `student` logits [M, K]; `targets` [M, K], a tensor or computed on demand (`sinkhorn_scalings`); `weights` [M]
    = 1 / (masked tokens of that token's image). The weighted sum is divided by `n_crops`, ALL global crops of
    the batch, masked or not, as in the released code. Weight 0 marks padding: such rows add nothing, whatever
    they hold. With M = 0 the loss is 0. Raises ValueError when shapes disagree.
    """
    if weights.shape != student.shape[:1]:
        raise ValueError(f"weights {list(weights.shape)} must have one entry per row of {list(student.shape)}")
    loss = soft_cross_entropy(student, targets, temperature)
    # where, not only the product: 0 * NaN of a padding row would be NaN.
    weighted = torch.where(weights > 0, loss * weights.to(loss.dtype), 0)
    return weighted.sum() / n_crops
