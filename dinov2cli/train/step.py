"""One optimisation step: augment, choose patches, losses, backward, and what follows in every student.

Everything random is keyed on (seed, step), so a resumed run repeats an uninterrupted one bit for bit on the CPU, and on
the place of an image in the batch of all ranks, so the same batch over more ranks gives the same loss. It does not
depend on which other students learn from the same teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dinov2cli.errors import UserError
from dinov2cli.models.depth import Share
from dinov2cli.train.learner import Learner, StepResult
from dinov2cli.train.method import Company, Crops, Method
from dinov2cli.train.parallel import Parallel
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.ssl import Scope, SSLStep

_MASKS, _DEPTH = (1 << 63) + 1, (1 << 63) + 2


class Augmentation(Protocol):
    """Colour augmentation and normalisation on the device, keyed on (seed, epoch, sample)."""

    def __call__(
        self, global_crops: Tensor, local_crops: Tensor, *, seed: int, epoch: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor]: ...


FirstBatch = Callable[[Tensor, Tensor | None, Tensor], None]
"""Told of the first batch trained on: augmented crops [2, B, 3, S, S], [L, B, 3, s, s] or None, and the patches that
the (first) student does not see, bool [2 * B, N]."""


@dataclass(frozen=True)
class Settings:
    """What a step needs to know and no batch changes. `clip` is per sub-module, None only measures.

    `accumulate` splits a batch into that many equal parts, whose gradients are averaged: Sinkhorn, KoLeo and stochastic
    depth then see one part at a time, and only the memory of one part is needed. `depth_scope` says whether stochastic
    depth keeps its share of the samples of all ranks, or (as in the paper) of each. `graphs` replays the blocks as CUDA
    graphs (see `check_graphs` for where that works).
    """

    seed: int = 0
    clip: float | None = 3.0
    accumulate: int = 1
    depth_scope: Scope = "global"
    graphs: bool = False


def step_rng(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Random numbers of one step: Philox keyed on (seed, purpose), the step as the top word of its counter."""
    word = (1 << 64) - 1
    key = np.array([seed & word, purpose & word], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=np.array([0, 0, 0, step], dtype=np.uint64), key=key))


class Stepper:
    """Makes the steps of one phase: `batch_size` images per rank, global crops of `global_size` pixels.

    `learners` by name. Raises UserError if the batch cannot be split evenly into `settings.accumulate` parts of two or
    more.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        method: Method,
        settings: Settings,
        *,
        augment: Augmentation,
        parallel: Parallel,
        batch_size: int,
        global_size: int,
    ) -> None:
        if batch_size % settings.accumulate or (settings.accumulate > 1 and batch_size < 2 * settings.accumulate):
            raise UserError(
                f"train.accumulate: found {settings.accumulate} parts of {batch_size} images; "
                "expected a divisor of data.batch_size that leaves 2 images or more"
            )
        self.learners, self.method, self.settings = dict(learners), method, settings
        self.augment, self.parallel, self.batch_size = augment, parallel, batch_size
        sides = {name: global_size // one.model.student.backbone.patch_size for name, one in self.learners.items()}
        self.grids = {name: (side, side) for name, side in sides.items()}
        everyone = batch_size * parallel.world_size
        own = range(parallel.rank * batch_size, (parallel.rank + 1) * batch_size)
        self.own_crops = [crop * everyone + image for crop in range(2) for image in own]

    def __call__(
        self, batch: Mapping[str, Any], values: StepValues, step: int, *, seed: int, told: FirstBatch | None = None
    ) -> dict[str, StepResult]:
        """Train on `batch` (uint8 crops, see BatchSource): what became of each student. `seed` is the phase's; `told`
        sees the augmented crops."""
        device = self.parallel.device
        crops = self.augment(
            batch["global_crops"].to(device),
            batch["local_crops"].to(device),
            seed=seed,
            epoch=batch["epoch"],
            sample=batch["index"],
        )
        chosen = {grid: self._chosen(grid, step) for grid in dict.fromkeys(self.grids.values())}
        if told is not None:
            first = next(iter(chosen.values()))
            hidden = torch.zeros_like(first) if self.method.frozen_teacher else first
            told(crops[0], crops[1] if len(crops[1]) else None, hidden)
        for learner in self.learners.values():
            learner.begin(values)
        done = self._backward(Crops(*crops, batch["index"], batch["epoch"]), chosen, values, step)
        return {name: self.learners[name].finish(losses, views, values) for name, (losses, views) in done.items()}

    def _chosen(self, grid: tuple[int, int], step: int) -> Tensor:
        rng = step_rng(self.settings.seed, step, _MASKS)
        return self.method.choose(2 * self.batch_size * self.parallel.world_size, grid, rng=rng, wanted=self.own_crops)

    def _backward(
        self, crops: Crops, chosen: Mapping[tuple[int, int], Tensor], values: StepValues, step: int
    ) -> dict[str, tuple[dict[str, Tensor], SSLStep]]:
        """Accumulate gradients over the parts of a batch, one student after the other in each part: losses averaged
        over all parts and ranks, and the features of the last part."""
        parts, size = self.settings.accumulate, self.batch_size // self.settings.accumulate
        companies = {name: self._company(step, size) for name in self.learners}
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in self.learners}
        last: dict[str, SSLStep] = {}
        for number in range(parts):
            part = slice(number * size, (number + 1) * size)
            piece = Crops(crops.global_crops[:, part], crops.local_crops[:, part], crops.sample[part], crops.view[part])
            seen = self.method.look(piece, self.parallel)
            for name, learner in self.learners.items():
                patches = chosen[self.grids[name]].unflatten(0, (2, self.batch_size))[:, part].flatten(0, 1)
                with learner.networks.part(number + 1 == parts):
                    with self.parallel.autocast(), learner.running():
                        views = self.method.losses(learner.networks, seen, piece, patches, values, companies[name])
                    learner.backward(views.total / parts)
                losses = sums[name]
                for term, value in {"total": views.total.detach(), **views.terms}.items():
                    losses[term] = losses[term] + value / parts if term in losses else value / parts
                # Nobody differentiates it any more, and its graph would live on with what the monitor keeps.
                last[name] = replace(views, total=views.total.detach())
                del views
            del seen  # the teacher looks at the next part before it would be given up
        # One small reduction per student: every rank sees the same losses, and skips the same steps.
        means = {name: self.parallel.mean(torch.stack(list(losses.values()))) for name, losses in sums.items()}
        return {
            name: (dict(zip(losses, means[name].unbind(), strict=True)), last[name]) for name, losses in sums.items()
        }

    def _company(self, step: int, size: int) -> Company:
        """Who shares the batch in parts of `size` images a rank; every student draws the same stochastic depth."""
        parallel, alone = self.parallel, self.parallel.world_size == 1
        together = alone or self.settings.depth_scope == "global"
        purpose = _DEPTH + (0 if together else 2 * parallel.rank)
        seed = step_rng(self.settings.seed, step, purpose).integers(1 << 63)
        share = None if alone or not together else Share(parallel.rank, parallel.world_size, size)
        return Company(torch.Generator().manual_seed(int(seed)), parallel.group, share)
