"""torch operators over the Triton kernels of the losses: `dinov2::sinkhorn_*` and `dinov2::soft_cross_entropy*`.

They can be traced and captured in CUDA graphs: shapes follow from shapes, nothing waits for the GPU. Importing this
module needs no Triton; calling an operator does. On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Column shift [K], row shift [M], column scale [K], row scale [M] of Sinkhorn targets, float32."""


@custom_op("dinov2::sinkhorn_columns_first", mutates_args=())
def columns_first(logits: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Maxima [K] of the columns of logits [M, K] over the rows that are `valid` (bool [M]), -inf without any, and sums
    [K] of exp2((logit - maximum) * scale)."""
    from dinov2cli.kernels import sinkhorn_triton

    with _on(logits):
        return sinkhorn_triton.columns_first(logits, valid, scale)


@custom_op("dinov2::sinkhorn_columns", mutates_args=())
def columns_sum(logits: Tensor, column_shift: Tensor, row_shift: Tensor, row_scale: Tensor, scale: float) -> Tensor:
    """Sums [K] over rows of exp2((logit - column_shift - row_shift) * scale) * row_scale; a row of scale 0 may hold
    anything."""
    from dinov2cli.kernels import sinkhorn_triton

    with _on(logits):
        return sinkhorn_triton.columns_sum(logits, column_shift, row_shift, row_scale, scale)


@custom_op("dinov2::sinkhorn_rows_first", mutates_args=())
def rows_first(logits: Tensor, column_shift: Tensor, column_scale: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Maxima [M] of logit - column_shift along the rows, and sums [M] of exp2((logit - column_shift - maximum) * scale)
    * column_scale."""
    from dinov2cli.kernels import sinkhorn_triton

    with _on(logits):
        return sinkhorn_triton.rows_first(logits, column_shift, column_scale, scale)


@custom_op("dinov2::sinkhorn_rows", mutates_args=())
def rows_sum(logits: Tensor, column_shift: Tensor, row_shift: Tensor, column_scale: Tensor, scale: float) -> Tensor:
    """Sums [M] along the rows of exp2((logit - column_shift - row_shift) * scale) * column_scale."""
    from dinov2cli.kernels import sinkhorn_triton

    with _on(logits):
        return sinkhorn_triton.rows_sum(logits, column_shift, row_shift, column_scale, scale)


@custom_op("dinov2::soft_cross_entropy", mutates_args=())
def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    factors: Sequence[Tensor],
    scale: float,
    inverse: float,
    teachers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logsumexp (base 2, of the scaled logits) and sum of the targets of each row: float32 [C, B] each.

    `student` logits [C, B, K]; `teacher` [G * B, K]: logits with `factors` (see Factors), or with an empty list the
    targets. `scale` and `inverse` are log2(e) over the teacher's and the student's temperature; bit g of `teachers[c]`
    joins crop c to teacher crop g. Only the loss has a gradient, and only for `student`.
    """
    from dinov2cli.kernels import cross_entropy_triton

    with _on(student):
        return cross_entropy_triton.forward(student, teacher, _quadruple(factors), scale, inverse, list(teachers))


@custom_op("dinov2::soft_cross_entropy_grad", mutates_args=())
def soft_cross_entropy_grad(
    student: Tensor,
    teacher: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    weight: Tensor,
    scale: float,
    inverse: float,
    teachers: Sequence[int],
) -> Tensor:
    """Gradient [C, B, K] in the logits' type. `saved`: logsumexp and sums as `soft_cross_entropy` gave them; `weight`
    float32 [C, B]: the incoming gradient over the student's temperature."""
    from dinov2cli.kernels import cross_entropy_triton

    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    with _on(student):
        cross_entropy_triton.backward(
            grad, student, teacher, _quadruple(factors), _pair(saved), weight, scale, inverse, list(teachers)
        )
    return grad


@custom_op("dinov2::soft_cross_entropy_grad_", mutates_args=("student",))
def soft_cross_entropy_grad_(
    student: Tensor,
    teacher: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    weight: Tensor,
    scale: float,
    inverse: float,
    teachers: Sequence[int],
) -> None:
    """`soft_cross_entropy_grad` written over `student`."""
    from dinov2cli.kernels import cross_entropy_triton

    with _on(student):
        cross_entropy_triton.backward(
            student, student, teacher, _quadruple(factors), _pair(saved), weight, scale, inverse, list(teachers)
        )


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _quadruple(factors: Sequence[Tensor]) -> Factors | None:
    return (factors[0], factors[1], factors[2], factors[3]) if factors else None


def _pair(saved: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return saved[0], saved[1]


def _vector(logits: Tensor, axis: int) -> Tensor:
    return logits.new_empty(logits.shape[axis], dtype=torch.float32)


@columns_first.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _vector(logits, 1), _vector(logits, 1)


@columns_sum.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return _vector(logits, 1)


@rows_first.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _vector(logits, 0), _vector(logits, 0)


@rows_sum.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return _vector(logits, 0)


@soft_cross_entropy.register_fake
def _(student: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, mass = (student.new_empty(student.shape[:2], dtype=torch.float32) for _ in range(3))
    return loss, lse, mass


@soft_cross_entropy_grad.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


@soft_cross_entropy_grad_.register_fake
def _(*_: Any) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, factors, ctx.scale, ctx.inverse, ctx.teachers = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(student, teacher, *output[1:], *factors)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    student, teacher, lse, mass, *factors = ctx.saved_tensors
    weight = student_weight(grads[0], ctx.inverse)
    options = (ctx.scale, ctx.inverse, ctx.teachers)
    grad = soft_cross_entropy_grad(student, teacher, factors, [lse, mass], weight, *options)
    return grad, None, [None] * len(factors), None, None, None


def student_weight(grad: Tensor, inverse: float) -> Tensor:
    """What `soft_cross_entropy_grad` calls weight: the gradient [C, B] of the loss over the student's temperature."""
    return (grad.float() * (inverse * 0.6931471805599453)).contiguous()


register_autograd(soft_cross_entropy, _backward, setup_context=_setup)
