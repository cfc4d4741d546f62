"""Batch norm whose moments are those of the batches of all ranks, on the CPU too (torch's SyncBatchNorm needs CUDA)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2cli.losses.collectives import reduce_sum


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm of [N, C] or [N, C, ...] over all axes but C and over the ranks of `group` (None: this one alone).

    Ranks may bring different numbers of samples, also none: every sample weighs the same. Gradients are those of
    the SUM of the ranks' losses: add up parameter gradients over the ranks, do not average them. State as BatchNorm2d.
    """

    def __init__(self, channels: int, *, group: dist.ProcessGroup | None = None, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalised by the moments of the batch and, in eval mode, by the running ones."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected [N, {self.num_features}, ...], found {list(x.shape)}")
        if not self.training or self.group is None:
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                self.training, self._momentum(), self.eps,
            )  # fmt: skip
        normalised, mean, variance, count = _Normalise.apply(x, self.eps, self.group)
        self._follow(mean, variance, float(count))
        shape = (1, -1, *[1] * (x.dim() - 2))
        if self.weight is None:
            return normalised
        return normalised * self.weight.view(shape) + self.bias.view(shape)

    def _momentum(self) -> float:
        return 0.1 if self.momentum is None else self.momentum

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: float) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self._momentum())
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var), self._momentum())


def _over_samples(x: Tensor) -> Tensor:
    """Sum over all axes but the second."""
    return x.sum(dim=[axis for axis in range(x.dim()) if axis != 1])


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (1, -1, *[1] * (x.dim() - 2))
        here = x.numel() // x.shape[1]
        # Two rounds, the mean first: a sum of squares would lose the variance of features far from zero.
        sums = reduce_sum(torch.cat([_over_samples(x.double()), x.new_tensor([here], dtype=torch.float64)]), group)
        count = sums[-1]
        mean = sums[:-1] / count
        centred = x - mean.to(x.dtype).view(shape)
        variance = reduce_sum(_over_samples(centred.double().square()), group) / count
        scale = (variance + eps).rsqrt().to(x.dtype).view(shape)
        normalised = centred * scale
        ctx.save_for_backward(normalised, scale, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        normalised, scale, count = ctx.saved_tensors
        both = torch.cat([_over_samples(grad.double()), _over_samples((grad * normalised).double())])
        mean, along = (reduce_sum(both, ctx.group) / count).to(grad.dtype).view(2, *scale.shape).unbind()
        return scale * (grad - mean - normalised * along), None, None
