"""Cross-entropy to soft targets over very many classes, without float32 copies of the whole logits.

For a row with target q (any non-negative weights) and student logits s at temperature T,

    loss = sum(q) * logsumexp(s / T) - sum(q * s) / T,        d loss / d s = (sum(q) * softmax(s / T) - q) / T.

Both are computed in one go, a few rows at a time, while the rows are in cache: neither a log-softmax nor the targets
exist as a whole (`RowTargets` recompute their rows), only one gradient in the logits' own type.

On a GPU with Triton, kernels do it (`dinov2cli.kernels.cross_entropy_triton`, through `fused_cross_entropy`): there the
backward pass writes the gradient over the logits, which must not be read any more after it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2cli.kernels.dispatch import choose

CHUNK_ELEMENTS = 1 << 18
"""Logits worked on at a time on a CPU: 1 MiB in float32, so that the passes over a chunk stay in its cache."""
_GPU_CHUNK_FACTOR = 64  # on a GPU launches cost more than memory traffic


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


def chunks_of(logits: Tensor) -> list[tuple[int, int]]:
    """`row_chunks` of [M, K] logits, on their device."""
    return row_chunks(logits.shape[0], logits.shape[1], logits.device)


def row_chunks(rows: int, columns: int, device: torch.device | None = None) -> list[tuple[int, int]]:
    """Cut `rows` rows into (start, stop) ranges of at most CHUNK_ELEMENTS elements (at least one row) each."""
    elements = CHUNK_ELEMENTS * (_GPU_CHUNK_FACTOR if device is not None and device.type == "cuda" else 1)
    step = max(1, elements // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def soft_cross_entropy(logits: Tensor, targets: Tensor | RowTargets, temperature: float) -> Tensor:
    """Cross-entropy of each row of `logits` [M, K] at `temperature` to `targets` [M, K]: float [M].

    Target rows need not sum to one: the sum of several distributions gives the sum of their cross-entropies. A row
    whose target is all zero (padding) has loss and gradient exactly 0, whatever its logits hold, NaN included.
    Targets receive no gradient. Raises ValueError when the shapes differ.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits {list(logits.shape)} and targets {list(targets.shape)} must both be [M, K]")
    return _apply(logits[None], targets, temperature, ((0,),))[0]


def crops_cross_entropy(
    logits: Tensor, targets: Tensor | RowTargets, temperature: float, teachers: Sequence[Sequence[int]]
) -> Tensor:
    """Cross-entropy of C student crops of B images, each to the sum of some teacher crops' targets: float [C, B].

    `logits` [C, B, K]; `targets` [G * B, K], teacher crop after teacher crop; `teachers[c]` lists the teacher crops
    (0 to G - 1) that student crop c is compared with. Otherwise as `soft_cross_entropy`. Raises ValueError when the
    shapes or the lists do not fit.
    """
    if logits.ndim != 3 or len(targets.shape) != 2 or targets.shape[-1] != logits.shape[-1]:
        raise ValueError(f"logits {list(logits.shape)} must be [C, B, K], targets {list(targets.shape)} [G * B, K]")
    crops, rest = divmod(targets.shape[0], max(logits.shape[1], 1))
    if rest or len(teachers) != len(logits) or any(not (t and 0 <= min(t) <= max(t) < crops) for t in teachers):
        raise ValueError(f"{list(teachers)} must name, for each of {len(logits)} crops, teacher crops below {crops}")
    return _apply(logits, targets, temperature, tuple(map(tuple, teachers)))


def _apply(
    logits: Tensor, targets: Tensor | RowTargets, temperature: float, teachers: tuple[tuple[int, ...], ...]
) -> Tensor:
    if logits.dtype != torch.float64 and choose("cross-entropy", logits.device).backend == "triton":
        from dinov2cli.losses.fused_cross_entropy import fused_cross_entropy

        fused = fused_cross_entropy(logits, targets, temperature, teachers)
        if fused is not None:
            return fused
    with torch.autocast(device_type=logits.device.type, enabled=False):  # vecdot would fall to 16 bit
        loss: Tensor = _CropsCrossEntropy.apply(logits, targets, temperature, teachers)
    return loss


class _CropsCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor | RowTargets,
        temperature: float,
        teachers: tuple[tuple[int, ...], ...],
    ) -> Tensor:
        crops, batch, columns = logits.shape
        dtype = compute_dtype(logits)
        loss = torch.empty(crops, batch, dtype=dtype, device=logits.device)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start, stop in row_chunks(batch, columns, logits.device):
            sums = {group: _target_sum(targets, group, batch, start, stop, dtype) for group in dict.fromkeys(teachers)}
            for crop, group in enumerate(teachers):
                out = None if grad is None else grad[crop, start:stop]
                loss[crop, start:stop] = _rows_loss(logits[crop, start:stop], *sums[group], temperature, out)
        ctx.temperature = temperature
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        weight = (grads[0] / ctx.temperature).to(grad.dtype)
        return grad * weight[..., None], None, None, None


def _rows_loss(logits: Tensor, target: Tensor, mass: Tensor, temperature: float, grad: Tensor | None) -> Tensor:
    """Loss [b] of rows [b, K]; writes temperature times their gradient into `grad`."""
    scaled = logits.to(target.dtype) * (1 / temperature)
    scaled.sub_(scaled.amax(-1, keepdim=True))
    product = torch.linalg.vecdot(target, scaled)
    exponentials = scaled.exp_()
    total = exponentials.sum(-1)
    # where, not only the product: 0 * NaN of a padding row would be NaN. Targets that are NaN give NaN, not 0.
    there = mass != 0
    if grad is not None:
        difference = exponentials.mul_((mass / total)[:, None]).sub_(target)
        grad.copy_(torch.where(there[:, None], difference, 0))
    return torch.where(there, mass * total.log() - product, 0)


def _target_sum(
    targets: Tensor | RowTargets, crops: Sequence[int], batch: int, start: int, stop: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum of the targets of some teacher crops for images `start` to `stop` [b, K], and its row sums [b]."""
    total = _target_rows(targets, crops[0] * batch + start, crops[0] * batch + stop, dtype)
    for crop in crops[1:]:
        total = total + _target_rows(targets, crop * batch + start, crop * batch + stop, dtype)
    return total, total.sum(-1)


def _target_rows(targets: Tensor | RowTargets, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    rows = targets.detach()[start:stop] if isinstance(targets, Tensor) else targets.rows(start, stop)
    return rows.to(dtype)
