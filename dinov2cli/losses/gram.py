"""Gram-matrix matching: a student's patches are to resemble each other as the teacher's do (DINOv3's Gram anchoring).

The matrices of cosines [N, N] of all images would be the largest tensors of a distillation step. They are made for a
few images at a time, and the gradient with them: with unit rows S and T and E = SS' - TT', d |E|^2 / d S = 4 E S.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dinov2cli.losses.cross_entropy import compute_dtype, row_chunks


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the patches' cosine similarities: a scalar, 0 for an empty batch.

    student [B, N, Ds] and teacher [B, N, Dt] patches, whose widths may differ: the N x N matrices of cosines of an
    image's patches are compared, mean over their N^2 entries and over the images (DINOv3, arXiv 2508.10104, section
    4.2, whose Frobenius norm is the sum over the entries). Turning the features of either side changes nothing.

    Computed in float32 (float64 for float64 patches), also under autocast. The teacher receives no gradient. Raises
    ValueError for shapes that do not fit together.
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2] or teacher.ndim != 3:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must be [B, N, D]")
    with torch.autocast(device_type=student.device.type, enabled=False):
        dtype = compute_dtype(student)
        own = F.normalize(student.to(dtype), dim=-1)
        wanted = F.normalize(teacher.detach().to(dtype), dim=-1)
        loss: Tensor = _GramDifference.apply(own, wanted)
    return loss


class _GramDifference(torch.autograd.Function):
    """Mean squared difference of the Gram matrices of unit rows [B, N, D], with its gradient for the first."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        batch, patches, _ = student.shape
        entries = max(batch * patches**2, 1)
        total = student.new_zeros(())
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start, stop in row_chunks(batch, patches**2, student.device):
            s, t = student[start:stop], teacher[start:stop]
            difference = torch.bmm(s, s.transpose(1, 2))
            difference.baddbmm_(t, t.transpose(1, 2), alpha=-1)
            if grad is not None:
                torch.bmm(difference, s, out=grad[start:stop])
            total += difference.square_().sum()
        if grad is not None:
            ctx.save_for_backward(grad.mul_(4 / entries))
        return total / entries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None
