"""Softmax-centring, the older way to keep the teacher from collapsing (DINO, arXiv 2104.14294, section 3.1)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2cli.losses.collectives import reduce_sum
from dinov2cli.losses.cross_entropy import chunks_of, compute_dtype


@dataclass(frozen=True)
class CenteredTargets:
    """Targets softmax((logits - center) / temperature) [M, K], rows computed when asked for; padding rows zero."""

    logits: Tensor
    temperature: float
    center: Tensor
    valid: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """[M, K]."""
        return self.logits.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Targets of rows `start` to `stop`: [stop - start, K], each valid row summing to 1."""
        shifted = self.logits[start:stop].to(compute_dtype(self.logits)) - self.center
        probabilities = shifted.div_(self.temperature).softmax(-1)
        return probabilities if self.valid is None else torch.where(self.valid[start:stop, None], probabilities, 0)

    def materialize(self) -> Tensor:
        """All targets, [M, K]. For few rows only."""
        return self.rows(0, self.shape[0])


class SoftmaxCenter(nn.Module):
    """Running mean of the teacher logits, taken off before the softmax. One instance per head.

    The centre a batch is given knows only EARLIER batches (as in the released code): it is updated after use. It
    is a buffer, so it is saved and restored with the module's state dict.
    """

    center: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        """`prototypes` K; `momentum` of the exponential moving average over batches."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(
        self,
        logits: Tensor,
        temperature: float,
        *,
        valid: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> CenteredTargets:
        """Targets of teacher logits [M, K], then the update by their mean over the valid rows of all ranks of `group`.

        Ranks may hold different numbers of rows; a batch without any valid row leaves the centre as it is.
        """
        targets = CenteredTargets(logits.detach(), temperature, self.center.clone(), valid)
        total = torch.zeros_like(self.center)
        for start, stop in chunks_of(logits):
            block = logits[start:stop].to(total.dtype)
            total += (block if valid is None else torch.where(valid[start:stop, None], block, 0)).sum(0)
        rows = logits.shape[0] if valid is None else valid.sum()
        # One message: the sums and, as its last element, the true number of rows behind them.
        message = reduce_sum(torch.cat([total, total.new_ones(1) * rows]), group)
        mean, count = message[:-1] / message[-1].clamp(min=1), message[-1]
        updated = torch.lerp(mean, self.center, self.momentum)
        # A batch that is not finite must not spoil every later one: the step that met it is skipped.
        self.center.copy_(torch.where((count > 0) & torch.isfinite(updated).all(), updated, self.center))
        return targets
