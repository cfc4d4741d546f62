"""Cross-entropy to soft targets over very many classes, without float32 copies of the whole logits.

For a row with target q (any non-negative weights) and student logits s at temperature T,

    loss = sum(q) * logsumexp(s / T) - sum(q * s) / T,        d loss / d s = (sum(q) * softmax(s / T) - q) / T,

so no log-softmax has to be kept for the backward pass: it is recomputed a few rows at a time, and so are targets that
know how to recompute themselves (`RowTargets`). Only logits, one number per row and one gradient remain.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 22
"""Logits worked on at a time: 16 MiB in float32, so scratch memory does not grow with rows or prototypes."""


class RowTargets(Protocol):
    """Soft targets [M, K] that give any range of their rows on demand."""

    @property
    def shape(self) -> torch.Size:
        """[M, K]."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Targets of rows `start` to `stop`, [stop - start, K], in float32 or float64."""
        ...


def compute_dtype(x: Tensor) -> torch.dtype:
    """Losses are computed in float32 whatever the model's precision, in float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cut `rows` rows into (start, stop) ranges of at most CHUNK_ELEMENTS elements (at least one row) each."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def soft_cross_entropy(logits: Tensor, targets: Tensor | RowTargets, temperature: float) -> Tensor:
    """Cross-entropy of each row of `logits` [M, K] at `temperature` to `targets` [M, K]: float [M].

    Target rows need not sum to one: the sum of several distributions gives the sum of their cross-entropies. A row
    whose target is all zero (padding) has loss and gradient exactly 0, whatever its logits hold, NaN included.
    Targets receive no gradient. Raises ValueError when the shapes differ.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits {list(logits.shape)} and targets {list(targets.shape)} must both be [M, K]")
    loss: Tensor = _SoftCrossEntropy.apply(logits, targets, temperature)
    return loss


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor | RowTargets, temperature: float) -> Tensor:
        rows, columns = logits.shape
        dtype = compute_dtype(logits)
        loss, lse, mass = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(3))
        for start, stop in row_chunks(rows, columns):
            scaled = logits[start:stop].to(dtype) / temperature
            target = _target_rows(targets, start, stop, dtype)
            lse[start:stop] = torch.logsumexp(scaled, dim=-1)
            mass[start:stop] = target.sum(-1)
            loss[start:stop] = mass[start:stop] * lse[start:stop] - (target * scaled).sum(-1)
        ctx.targets = targets.detach() if isinstance(targets, Tensor) else targets
        ctx.temperature = temperature
        ctx.save_for_backward(logits, lse, mass)
        return torch.where(mass > 0, loss, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, lse, mass = ctx.saved_tensors
        rows, columns = logits.shape
        weight = grads[0].to(lse.dtype) / ctx.temperature
        grad = torch.empty_like(logits)
        for start, stop in row_chunks(rows, columns):
            scaled = logits[start:stop].to(lse.dtype) / ctx.temperature
            chunk = scaled.sub_(lse[start:stop, None]).exp_().mul_(mass[start:stop, None])
            chunk.sub_(_target_rows(ctx.targets, start, stop, lse.dtype)).mul_(weight[start:stop, None])
            grad[start:stop] = torch.where(mass[start:stop, None] > 0, chunk, 0)
        return grad, None, None


def _target_rows(targets: Tensor | RowTargets, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    rows = targets[start:stop] if isinstance(targets, Tensor) else targets.rows(start, stop)
    return rows.to(dtype)
