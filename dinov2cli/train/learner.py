"""One student in training: its network and moving average, its optimizer, and what a step does to them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2cli.train.ema import ema_update, pair_parameters
from dinov2cli.train.graphs import BlockGraphs
from dinov2cli.train.network import SSLModel
from dinov2cli.train.optim import apply_schedule, clip_gradients
from dinov2cli.train.parallel import Parallel
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import Spread
from dinov2cli.train.ssl import SSLStep


@dataclass(frozen=True)
class StepResult:
    """Mean losses of all ranks by name with their `total`, gradient norms, the features of this rank's last part, and
    whether the step was skipped."""

    losses: dict[str, Tensor]
    norms: dict[str, Tensor]
    views: SSLStep
    skipped: Tensor


class Learner:
    """Trains one student. Students that learn from one teacher share nothing else: what happens to one (a step that is
    skipped, a loss scale) never touches another."""

    def __init__(
        self,
        networks: Spread,
        optimizer: torch.optim.Optimizer,
        parallel: Parallel,
        *,
        clip: float | None = 3.0,
        graphs: bool = False,
    ) -> None:
        """`clip` is per sub-module, None only measures. `graphs` replays the blocks as CUDA graphs."""
        self.networks, self.optimizer, self.clip = networks, optimizer, clip
        model = networks.model
        self.scaler = parallel.grad_scaler()
        self.averaged = pair_parameters(model.teacher, model.student)
        self.clipped = {name: list(part.parameters()) for name, part in model.student.named_children()}
        self._graphs = BlockGraphs([model.student.backbone, model.teacher.backbone]) if graphs else None
        self._home = optimizer.param_groups[0]["params"][0].device
        self._parallel = parallel

    @property
    def model(self) -> SSLModel:
        """Student and moving average, spread over the ranks."""
        return self.networks.model

    def running(self) -> AbstractContextManager[Any]:
        """Context of the forward passes of a step."""
        return self._graphs.running() if self._graphs else nullcontext()

    def begin(self, values: StepValues) -> None:
        """Set the step's rates and forget the last one's gradients."""
        apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part of a batch."""
        self.scaler.scale(loss).backward()

    def finish(self, losses: dict[str, Tensor], views: SSLStep, values: StepValues) -> StepResult:
        """Clip, AdamW, EMA. Where loss or gradient is not finite, student and moments stay as they were."""
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.clipped, self.clip)
        skipped, overflow = ~torch.isfinite(losses["total"]), ~torch.isfinite(norms["all"])
        if self.scaler.is_enabled():
            # The scaler looks for itself and lowers its scale; once that is 1, the scale is not to blame any more.
            skipped = skipped | (overflow & bool(self.scaler.get_scale() <= 1))
        else:
            skipped = skipped | overflow
            # Fused AdamW leaves weights and moments alone where this is 1, without the host having to look.
            # (Where weights are: with CPU offload that is not where the losses are.)
            self.optimizer.found_inf = skipped.float().to(self._home)  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        ema_update(*self.averaged, values.momentum)
        return StepResult(losses, norms, views, skipped)
