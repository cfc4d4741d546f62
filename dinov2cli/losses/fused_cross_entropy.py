"""The cross-entropy of `dinov2cli.losses.cross_entropy` by kernels, with its gradient written over the logits.

Logits are the largest tensors of a training step, and nothing reads them once their loss has been differentiated: not
even the layer that made them. So the backward pass puts the gradient in their place. That is only done to contiguous
logits which autograd made in this graph (never to a leaf, whose values belong to somebody), and it is watched: logits
that changed after the forward pass, a second backward pass and a second loss of the same logits raise RuntimeError.
A loss of one part of a tensor and a loss of another part of it go together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2cli.kernels import losses as kernels

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_TEACHERS = 32
_LEDGER = "_gradients_written_over"


def fused_cross_entropy(
    logits: Tensor, targets: Any, temperature: float, teachers: Sequence[Sequence[int]]
) -> Tensor | None:
    """`crops_cross_entropy` of logits [C, B, K] by kernels: float32 [C, B]; None for what they do not cover.

    They cover 16- and 32-bit logits with targets that are Sinkhorn factors or a matrix of such types. Raises
    RuntimeError, here or in the backward pass, for logits that hold their gradient already (see the module).
    """
    described = _described(targets, temperature)
    bits = [_bits(crops) for crops in teachers]
    if described is None or logits.dtype not in _TYPES or None in bits:
        return None
    teacher, factors, per_teacher_unit = described
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    options = (per_teacher_unit, math.log2(math.e) / temperature, [int(b or 0) for b in bits])
    if not _may_be_overwritten(logits):
        loss: Tensor = kernels.soft_cross_entropy(logits, teacher, factors, *options)[0]
        return loss
    base = logits if logits._base is None else logits._base
    ledger = base.__dict__.setdefault(_LEDGER, _Ledger())
    in_place: Tensor = _OverwritingCrossEntropy.apply(logits, teacher, factors, options, ledger)
    return in_place


@dataclass
class _Ledger:
    """What of a tensor's memory holds gradients by now, and how often its version went up by writing them."""

    writes: int = 0
    parts: list[range] = field(default_factory=list)

    def check(self, part: range) -> None:
        """Raise RuntimeError if a gradient lies in `part` (of the elements of the storage)."""
        if any(part.start < other.stop and other.start < part.stop for other in self.parts):
            raise RuntimeError(
                "these logits hold the gradient of a loss: the backward pass of the fused cross-entropy writes it over "
                "them; expected one loss and one backward pass for each; set DINOV2_KERNELS=torch to keep the logits"
            )


class _OverwritingCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: Tensor,
        factors: list[Tensor],
        options: tuple[float, float, list[int]],
        ledger: _Ledger,
    ) -> Tensor:
        ledger.check(_part(logits))
        # Not by save_for_backward: the version it compares goes up when the loss of another part is differentiated.
        ctx.logits, ctx.version, ctx.ledger, ctx.writes = logits.detach(), logits._version, ledger, ledger.writes
        ctx.part, ctx.options = _part(logits), options
        loss, lse, mass = kernels.soft_cross_entropy(logits, teacher, factors, *options)
        ctx.save_for_backward(teacher, lse, mass, *factors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, ledger, part = ctx.logits, ctx.ledger, ctx.part
        ledger.check(part)
        if logits._version - ctx.version != ledger.writes - ctx.writes:
            raise RuntimeError(
                "the logits of the fused cross-entropy were changed after its forward pass; expected them as they were"
            )
        teacher, lse, mass, *factors = ctx.saved_tensors
        weight = kernels.student_weight(grads[0], ctx.options[1])
        before = logits._version
        kernels.soft_cross_entropy_grad_(logits, teacher, factors, [lse, mass], weight, *ctx.options)
        ledger.writes += logits._version - before
        ledger.parts.append(part)
        ctx.logits = None  # a loss that is kept for its value must not keep the largest tensor of the step
        return logits, None, None, None, None


def _may_be_overwritten(logits: Tensor) -> bool:
    base = logits if logits._base is None else logits._base
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and not torch.compiler.is_compiling()
        and base.grad_fn is not None
        and logits.is_contiguous()
        and logits.numel() > 0
    )


def _part(logits: Tensor) -> range:
    start = logits.storage_offset()
    return range(start, start + logits.numel())


def _described(targets: Any, temperature: float) -> tuple[Tensor, list[Tensor], float] | None:
    """Teacher matrix, factors (none: the matrix is the targets) and log2(e) over the teacher's temperature."""
    if isinstance(targets, Tensor):
        matrix, factors, own = targets.detach(), [], temperature
    elif hasattr(targets, "factors"):
        matrix, factors, own = targets.logits, list(targets.factors()), targets.temperature
    else:
        return None
    if matrix.dtype not in _TYPES or any(factor.dtype != torch.float32 for factor in factors):
        return None
    return matrix if matrix.stride(1) == 1 else matrix.contiguous(), factors, math.log2(math.e) / own


def _bits(crops: Sequence[int]) -> int | None:
    """Teacher crops as a set of bits; None where that cannot tell them."""
    if len(set(crops)) < len(crops) or max(crops) >= _MOST_TEACHERS:
        return None
    return sum(1 << crop for crop in crops)
