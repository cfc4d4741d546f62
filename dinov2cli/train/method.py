"""What a step teaches the students: the interface of pretraining and distillation to the loop, and pretraining.

Legend: C global crops of one process (2 per image, crop after crop), N patches of a crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data.masks import make_masks
from dinov2cli.models.depth import Share
from dinov2cli.train.parallel import Parallel
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import Spread
from dinov2cli.train.ssl import Objective, SSLStep, ssl_losses


@dataclass(frozen=True)
class Crops:
    """A part of a batch: normalised crops [2, B, 3, S, S] and [L, B, 3, s, s] (L may be 0), and which images in which
    views they are (`sample`, `view`: int64 [B] on the host)."""

    global_crops: Tensor
    local_crops: Tensor
    sample: Tensor
    view: Tensor


@dataclass(frozen=True)
class Company:
    """Who else computes the step: the group of ranks, this rank's share of the batch for stochastic depth, and the
    generator that draws it, the same on every rank that shares."""

    generator: torch.Generator
    group: Any = None
    share: Share | None = None


class Method(Protocol):
    """What the training loop asks of a way to train."""

    frozen_teacher: bool
    """Whether the teacher is another model. If not, the student must not see the patches chosen."""

    def place(self, parallel: Parallel) -> None:
        """Put on the devices what belongs to no student. Called once, before the first step."""

    def choose(self, crops: int, grid: tuple[int, int], *, rng: np.random.Generator, wanted: Sequence[int]) -> Tensor:
        """The patches that the patch-level loss is about, bool [len(wanted), N]: those of the crops `wanted` among the
        `crops` of the whole batch."""

    def look(self, crops: Crops, parallel: Parallel) -> Any:
        """What all students need to know of a part of a batch, computed once."""

    def losses(
        self, networks: Spread, seen: Any, crops: Crops, chosen: Tensor, values: StepValues, company: Company
    ) -> SSLStep:
        """The loss of one student; `seen` is what `look` gave, `chosen` [C, N]. Called under autocast for 16 bit."""

    def flush(self) -> None:
        """Keep on disk what a checkpoint that is about to be written relies on."""


@dataclass
class SelfDistillation:
    """Pretraining: the student learns from its own moving average (METHOD §2)."""

    objective: Objective = field(default_factory=Objective)
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    frozen_teacher: bool = False

    def place(self, parallel: Parallel) -> None:
        """Nothing: the teacher is the student's."""

    def choose(self, crops: int, grid: tuple[int, int], *, rng: np.random.Generator, wanted: Sequence[int]) -> Tensor:
        """The masks of the student's global crops."""
        low, high = self.mask_ratio
        return make_masks(
            crops,
            grid,
            rng=rng,
            probability=self.mask_probability,
            ratio_min=low,
            ratio_max=high,
            wanted=wanted,
        )

    def look(self, crops: Crops, parallel: Parallel) -> None:
        """Nothing: there is one student, whose teacher looks with it."""

    def losses(
        self, networks: Spread, seen: Any, crops: Crops, chosen: Tensor, values: StepValues, company: Company
    ) -> SSLStep:
        """`ssl_losses` of this part."""
        del seen
        return ssl_losses(
            networks.model,
            self.objective,
            global_crops=crops.global_crops,
            local_crops=crops.local_crops,
            masks=chosen,
            teacher_temperature=values.teacher_temperature,
            generator=company.generator,
            group=company.group,
            share=company.share,
            student=networks.student,
        )

    def flush(self) -> None:
        """Nothing is kept."""
