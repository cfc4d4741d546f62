"""The few collectives the losses need. `group=None` always means: this process alone, no communication."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `x` over the ranks of `group`, in place; `x` itself when there is no group."""
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def reduce_max(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise maximum of `x` over the ranks of `group`, in place; `x` itself when there is no group."""
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack the rows of all ranks in rank order: [n, ...] to [world * n, ...]; every rank must bring the same n.

    Differentiable: a rank's gradient is the sum of what all ranks' losses send to its rows, so averaging
    parameter gradients over ranks afterwards gives the gradient of the mean of the ranks' losses.
    """
    if group is None:
        return x
    gathered: Tensor = _GatherRows.apply(x, group)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = reduce_sum(grads[0].clone(), ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return total[start : start + ctx.rows], None
