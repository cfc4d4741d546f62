"""One optimisation step: augment, mask, losses, backward, clip, AdamW, EMA.

Everything random is keyed on (seed, step), so a resumed run repeats an uninterrupted one bit for bit on the CPU, and on
the place of an image in the batch of all ranks, so the same batch over more ranks gives the same loss. A step
whose loss or gradient is not finite leaves the student and its moments as they were.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data.masks import make_masks
from dinov2cli.errors import UserError
from dinov2cli.models.depth import Share
from dinov2cli.train.ema import ema_update, pair_parameters
from dinov2cli.train.graphs import BlockGraphs
from dinov2cli.train.optim import apply_schedule, clip_gradients
from dinov2cli.train.parallel import Parallel
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import Spread
from dinov2cli.train.ssl import Objective, Scope, SSLStep, ssl_losses

_MASKS, _DEPTH = (1 << 63) + 1, (1 << 63) + 2


class Augmentation(Protocol):
    """Colour augmentation and normalisation on the device, keyed on (seed, epoch, sample)."""

    def __call__(
        self, global_crops: Tensor, local_crops: Tensor, *, seed: int, epoch: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor]: ...


FirstBatch = Callable[[Tensor, Tensor | None, Tensor], None]
"""Told of the first batch trained on: augmented crops [2, B, 3, S, S], [L, B, 3, s, s] or None, masks [2 * B, N]."""


@dataclass(frozen=True)
class Settings:
    """What a step needs to know and no batch changes. `clip` is per sub-module, None only measures.

    `accumulate` splits a batch into that many equal parts, whose gradients are averaged: Sinkhorn, KoLeo and stochastic
    depth then see one part at a time, and only the memory of one part is needed. `depth_scope` says whether stochastic
    depth keeps its share of the samples of all ranks, or (as in the paper) of each. `graphs` replays the blocks as CUDA
    graphs (see `check_graphs` for where that works).
    """

    objective: Objective
    seed: int = 0
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    clip: float | None = 3.0
    accumulate: int = 1
    depth_scope: Scope = "global"
    graphs: bool = False


@dataclass(frozen=True)
class StepResult:
    """Mean losses of all ranks by name with their `total`, gradient norms, the features of this rank's last part, and
    whether the step was skipped."""

    losses: dict[str, Tensor]
    norms: dict[str, Tensor]
    views: SSLStep
    skipped: Tensor


def step_rng(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Random numbers of one step: Philox keyed on (seed, purpose), the step as the top word of its counter."""
    word = (1 << 64) - 1
    key = np.array([seed & word, purpose & word], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=np.array([0, 0, 0, step], dtype=np.uint64), key=key))


class Stepper:
    """Makes the steps of one phase. `batch_size` images per rank, global crops of `grid` patches.

    Raises UserError if the batch cannot be split evenly into `settings.accumulate` parts of two or more.
    """

    def __init__(
        self,
        networks: Spread,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        *,
        augment: Augmentation,
        parallel: Parallel,
        batch_size: int,
        grid: tuple[int, int],
    ) -> None:
        if batch_size % settings.accumulate or (settings.accumulate > 1 and batch_size < 2 * settings.accumulate):
            raise UserError(
                f"train.accumulate: found {settings.accumulate} parts of {batch_size} images; "
                "expected a divisor of data.batch_size that leaves 2 images or more"
            )
        self.networks, self.optimizer, self.settings = networks, optimizer, settings
        self.augment, self.parallel, self.batch_size, self.grid = augment, parallel, batch_size, grid
        self.scaler = parallel.grad_scaler()
        model = networks.model
        self.graphs = BlockGraphs([model.student.backbone, model.teacher.backbone]) if settings.graphs else None
        self.averaged = pair_parameters(model.teacher, model.student)
        self.clipped = {name: list(part.parameters()) for name, part in model.student.named_children()}
        everyone = batch_size * parallel.world_size
        own = range(parallel.rank * batch_size, (parallel.rank + 1) * batch_size)
        self._home = optimizer.param_groups[0]["params"][0].device
        self.own_crops = [crop * everyone + image for crop in range(2) for image in own]

    def __call__(
        self, batch: Mapping[str, Any], values: StepValues, step: int, *, seed: int, told: FirstBatch | None = None
    ) -> StepResult:
        """Train on `batch` (uint8 crops, see BatchSource). `seed` is the phase's; `told` sees the augmented crops."""
        device = self.parallel.device
        crops = self.augment(
            batch["global_crops"].to(device),
            batch["local_crops"].to(device),
            seed=seed,
            epoch=batch["epoch"],
            sample=batch["index"],
        )
        masks = make_masks(
            2 * self.batch_size * self.parallel.world_size,
            self.grid,
            rng=step_rng(self.settings.seed, step, _MASKS),
            probability=self.settings.mask_probability,
            ratio_min=self.settings.mask_ratio[0],
            ratio_max=self.settings.mask_ratio[1],
            wanted=self.own_crops,
        )
        if told is not None:
            told(crops[0], crops[1] if len(crops[1]) else None, masks)
        apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        views, losses = self._backward(*crops, masks, values, step)
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.clipped, self.settings.clip)
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

    def _backward(
        self, global_crops: Tensor, local_crops: Tensor, masks: Tensor, values: StepValues, step: int
    ) -> tuple[SSLStep, dict[str, Tensor]]:
        """Accumulate gradients over the parts of a batch: features of the last one, losses averaged over all."""
        parts = self.settings.accumulate
        size = self.batch_size // parts
        by_crop = masks.unflatten(0, (2, self.batch_size))
        parallel, alone = self.parallel, self.parallel.world_size == 1
        together = alone or self.settings.depth_scope == "global"
        purpose = _DEPTH + (0 if together else 2 * parallel.rank)
        depth_seed = step_rng(self.settings.seed, step, purpose).integers(1 << 63)
        generator = torch.Generator().manual_seed(int(depth_seed))
        losses: dict[str, Tensor] = {}
        for number in range(parts):
            part = slice(number * size, (number + 1) * size)
            with self.networks.part(number + 1 == parts):
                with parallel.autocast(), self.graphs.running() if self.graphs else nullcontext():
                    views = ssl_losses(
                        self.networks.model,
                        self.settings.objective,
                        global_crops=global_crops[:, part],
                        local_crops=local_crops[:, part],
                        masks=by_crop[:, part].flatten(0, 1),
                        teacher_temperature=values.teacher_temperature,
                        generator=generator,
                        group=parallel.group,
                        share=None if alone or not together else Share(parallel.rank, parallel.world_size, size),
                        student=self.networks.student,
                    )
                self.scaler.scale(views.total / parts).backward()
            for name, value in {"total": views.total.detach(), **views.terms}.items():
                losses[name] = losses[name] + value / parts if name in losses else value / parts
        # One small reduction: every rank sees the same losses, and skips the same steps.
        means = parallel.mean(torch.stack(list(losses.values())))
        # Nobody differentiates it any more, and its graph would live on with what the monitor keeps.
        return replace(views, total=views.total.detach()), dict(zip(losses, means.unbind(), strict=True))
