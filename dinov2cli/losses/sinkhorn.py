"""Sinkhorn-Knopp teacher targets (SwAV, arXiv 2006.09882; used by DINOv2) kept as scaling vectors.

The published loop rewrites the whole matrix Q = exp(logits / T) at every normalisation. But Q only ever differs from
E = exp(logits / T) by a factor per row and a factor per column, Q = diag(v) E diag(u), so it is enough to iterate

    u = (B / K) / (E' v)  columns: every prototype gets the same share of the batch
    v = 1 / (E u)         rows: every sample's target sums to one

from v = 1, B being the true number of rows over all ranks, which may hold different numbers of them. (Constant factors,
B / K among them, cancel in the row step that follows; it only keeps u and v from drifting by K / B per iteration.)
Over ranks one row count and K-vectors are exchanged: one maximum, then one sum per iteration.

Overflow: exp(logit / 0.04) leaves float32 once a logit exceeds 3.5, which trainable prototype norms allow. Here
E is taken relative to the maximum c of each column (over all ranks) and then to the maximum r of each row of what is
left: E[m, k] = exp((logit[m, k] - c[k] - r[m]) / T) <= 1 with a 1 in every row and every column, so no sum can
vanish or overflow, for any finite logits. The shifts are absorbed by u and v, but for the start v = exp(r / T).

On a GPU with Triton the same vectors come from kernels that read the logits six times for three iterations and write
vectors only (`dinov2cli.kernels.sinkhorn_triton`): the first column step needs no shift per row yet, so it finds maxima
and sums in one pass, and so does the first row step.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2cli.kernels.dispatch import choose
from dinov2cli.losses.collectives import reduce_max, reduce_sum
from dinov2cli.losses.cross_entropy import chunks_of, compute_dtype


@dataclass(frozen=True)
class SinkhornTargets:
    """Sinkhorn targets [M, K] as `row_scale * exp((logits - column_shift - row_shift) / temperature) * column_scale`.

    Rows are computed when asked for; padding rows (`valid` False) are zero. Implements `RowTargets`.
    """

    logits: Tensor  # [M, K], as the teacher head gave them
    temperature: float
    column_shift: Tensor  # c [K]
    row_shift: Tensor  # r [M]
    column_scale: Tensor  # u [K]
    row_scale: Tensor  # v [M]
    valid: Tensor | None  # bool [M]

    @property
    def shape(self) -> torch.Size:
        """[M, K]."""
        return self.logits.shape

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Column shift, row shift, column scale and row scale, for kernels that compute the targets themselves."""
        return self.column_shift, self.row_shift, self.column_scale, self.row_scale

    def rows(self, start: int, stop: int) -> Tensor:
        """Targets of rows `start` to `stop`: [stop - start, K], each valid row summing to 1."""
        kernel = _kernel_rows(self, start, stop)
        return kernel.mul_(self.column_scale).mul_(self.row_scale[start:stop, None])

    def materialize(self) -> Tensor:
        """All targets, [M, K] in float32 (float64 for float64 logits). For few rows only."""
        out = torch.empty(self.shape, dtype=self.row_scale.dtype, device=self.logits.device)
        for start, stop in chunks_of(self.logits):
            out[start:stop] = self.rows(start, stop)
        return out


@torch.no_grad()
def sinkhorn_scalings(
    logits: Tensor,
    temperature: float,
    *,
    iterations: int = 3,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> SinkhornTargets:
    """Run Sinkhorn-Knopp on teacher logits [M, K] and return the targets as scaling vectors.

    `valid` (bool [M]) marks the true rows: padding rows enter nothing and come out zero. With `group` the
    prototypes are balanced over the rows of all its ranks; every rank must call, also one without rows. Raises
    ValueError on a wrong shape, fewer than one iteration or a temperature that is not positive.
    """
    if logits.ndim != 2 or (valid is not None and valid.shape != logits.shape[:1]):
        raise ValueError(f"logits must be [M, K] and valid [M], got {list(logits.shape)} and {valid}")
    if iterations < 1 or temperature <= 0:
        raise ValueError(f"need iterations >= 1 and temperature > 0, got {iterations} and {temperature}")
    if logits.dtype != torch.float64 and choose("sinkhorn", logits.device).backend == "triton":
        return _fused(logits.detach(), temperature, iterations, valid, group)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        column_shift, row_shift = _shifts(logits, valid, group)
        targets = SinkhornTargets(
            logits=logits.detach(),
            temperature=temperature,
            column_shift=column_shift,
            row_shift=row_shift,
            column_scale=torch.ones_like(column_shift),
            row_scale=(row_shift / temperature).exp_(),  # v = 1 before the row shift was taken out
            valid=valid,
        )
        _iterate(targets, iterations, group)
    return targets


def sinkhorn_targets(
    logits: Tensor,
    temperature: float,
    *,
    iterations: int = 3,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`sinkhorn_scalings` with the targets written out: [M, K], each valid row summing to 1, padding rows zero."""
    return sinkhorn_scalings(logits, temperature, iterations=iterations, valid=valid, group=group).materialize()


def _fused(
    logits: Tensor, temperature: float, iterations: int, valid: Tensor | None, group: dist.ProcessGroup | None
) -> SinkhornTargets:
    """As `sinkhorn_scalings`, by kernels. No step waits for the GPU."""
    from dinov2cli.kernels import losses as kernels

    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    valid = valid if valid is None else valid.contiguous()
    per_unit = math.log2(math.e) / temperature
    share = reduce_sum(_row_count(len(logits), valid, torch.float32, logits.device), group) / logits.shape[1]

    def row_factors(row_sum: Tensor) -> Tensor:
        scale = row_sum.reciprocal()
        return scale if valid is None else torch.where(valid, scale, 0)

    def column_factors(column_sum: Tensor) -> Tensor:
        # Sums are positive by construction; the clamp serves a batch without a single valid row anywhere.
        return share / reduce_sum(column_sum, group).clamp(min=torch.finfo(torch.float32).tiny)

    own_top, column_sum = kernels.columns_first(logits, valid, per_unit)
    top = reduce_max(own_top if group is None else own_top.clone(), group)
    column_shift = torch.where(top == -torch.inf, 0, top)
    if group is not None:
        column_sum = column_sum * ((own_top - column_shift) * per_unit).exp2_()
    column_scale = column_factors(column_sum)
    row_shift, row_sum = kernels.rows_first(logits, column_shift, column_scale, per_unit)
    row_shift = row_shift if valid is None else torch.where(valid, row_shift, 0)
    row_scale = row_factors(row_sum)
    for _ in range(iterations - 1):
        column_scale = column_factors(kernels.columns_sum(logits, column_shift, row_shift, row_scale, per_unit))
        row_scale = row_factors(kernels.rows_sum(logits, column_shift, row_shift, column_scale, per_unit))
    return SinkhornTargets(logits, temperature, column_shift, row_shift, column_scale, row_scale, valid)


def _row_count(rows: int, valid: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), rows, dtype=dtype, device=device) if valid is None else valid.sum().to(dtype)


def _iterate(targets: SinkhornTargets, iterations: int, group: dist.ProcessGroup | None) -> None:
    """Update the scale vectors in place; reads the kernel once per iteration, plus once before."""
    u, v, valid = targets.column_scale, targets.row_scale, targets.valid
    chunks = chunks_of(targets.logits)
    share = reduce_sum(_row_count(len(v), valid, u.dtype, u.device), group) / len(u)
    kept = _kernel_rows(targets, *chunks[0]) if len(chunks) == 1 else None  # small enough: exponentiate once
    for iteration in range(iterations + 1):
        column_sum = torch.zeros_like(u)
        for start, stop in chunks:
            block = _kernel_rows(targets, start, stop) if kept is None else kept
            if iteration > 0:  # the row step of the iteration before, fused with the column sum of this one
                scale = (block @ u).reciprocal_()
                v[start:stop] = scale if valid is None else torch.where(valid[start:stop], scale, 0)
            if iteration < iterations:
                column_sum += v[start:stop] @ block
        if iteration < iterations:
            # Sums are positive by construction; the clamp serves a batch without a single valid row anywhere.
            torch.div(share, reduce_sum(column_sum, group).clamp_(min=torch.finfo(u.dtype).tiny), out=u)


def _shifts(logits: Tensor, valid: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Column maxima over all ranks [K], and row maxima of the logits less those [M] (0 for padding rows)."""
    rows, columns = logits.shape
    dtype = compute_dtype(logits)
    column_shift = torch.full((columns,), -torch.inf, dtype=dtype, device=logits.device)
    for start, stop in chunks_of(logits):
        block = logits[start:stop].to(dtype)
        if valid is not None:
            block = torch.where(valid[start:stop, None], block, -torch.inf)
        torch.maximum(column_shift, block.amax(0), out=column_shift)
    reduce_max(column_shift, group)
    row_shift = torch.empty(rows, dtype=dtype, device=logits.device)
    for start, stop in chunks_of(logits):
        row_shift[start:stop] = (logits[start:stop].to(dtype) - column_shift).amax(1)
    if valid is not None:
        row_shift = torch.where(valid, row_shift, 0)
    return column_shift, row_shift


def _kernel_rows(targets: SinkhornTargets, start: int, stop: int) -> Tensor:
    """exp((logits - c - r) / T) for a range of rows, padding rows zero."""
    kernel = targets.logits[start:stop].to(targets.row_scale.dtype) - targets.column_shift
    kernel.sub_(targets.row_shift[start:stop, None]).mul_(1 / targets.temperature).exp_()
    return kernel if targets.valid is None else torch.where(targets.valid[start:stop, None], kernel, 0)
