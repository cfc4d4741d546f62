"""Distillation as the training loop runs it: the frozen teacher's pass over a batch, and every student's loss."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2cli.data.masks import MaskedTokens, masked_tokens
from dinov2cli.device import PRECISIONS
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.distill import DistillNetwork, DistillObjective, Goal
from dinov2cli.train.graphs import BlockGraphs
from dinov2cli.train.method import Company, Crops
from dinov2cli.train.network import SSLModel
from dinov2cli.train.parallel import Parallel
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import Spread
from dinov2cli.train.ssl import SSLStep, TeacherTargets, spread_targets
from dinov2cli.train.teacher import FrozenTeacher, TeacherTokens, resample_patches

if TYPE_CHECKING:
    from dinov2cli.train.teacher_cache import TokenCache


@dataclass
class Seen:
    """The teacher's tokens of a part of a batch on its own grid, and what has been made of them for the students."""

    tokens: TeacherTokens
    by_grid: dict[int, TeacherTokens] = field(default_factory=dict)
    targets: dict[Any, TeacherTargets] = field(default_factory=dict)


class Distillation:
    """The `Method` of distillation (see `train/distill.py`).

    The teacher computes in `precision` ("" for that of the run), its tokens come from `cache` where that holds them;
    `shared` keeps its targets for further students, which is for several. `graphs` replays its blocks as CUDA graphs.
    """

    frozen_teacher = True

    def __init__(
        self,
        teacher: FrozenTeacher,
        objective: DistillObjective,
        *,
        precision: str = "",
        cache: "TokenCache | None" = None,
        shared: bool = False,
        graphs: bool = False,
    ) -> None:
        self.teacher, self.objective, self.cache = teacher, objective, cache
        self._precision, self._shared = precision, shared
        self._graphs: BlockGraphs | None = None
        if graphs and isinstance(teacher.network, VisionTransformer):
            self._graphs = BlockGraphs([teacher.network])

    def place(self, parallel: Parallel) -> None:
        """Put the teacher on the device, or its shards on the ranks; in 16 bit it keeps 16-bit matrices only."""
        self._precision = self._precision or parallel.precision
        if not parallel.sharding.sharded:  # shards are gathered in 16 bit
            to_16_bit(self.teacher.network, self._precision)
        parallel.spread_frozen(self.teacher, self._precision)

    def choose(self, crops: int, grid: tuple[int, int], *, rng: np.random.Generator, wanted: Sequence[int]) -> Tensor:
        """The patches that count in the iBOT term: of each crop `ibot_share`, at random, at least one."""
        patches = grid[0] * grid[1]
        number = max(1, round(self.objective.ibot_share * patches))
        chosen = torch.ones(len(wanted), patches, dtype=torch.bool)
        if number < patches:
            # Each crop has a stream of its own: a rank draws those of its crops as one process would.
            streams = rng.integers(1 << 63, size=crops)[np.asarray(wanted)]
            chosen[:] = False
            for row, stream in zip(chosen, streams, strict=True):
                row[np.random.default_rng(int(stream)).permutation(patches)[:number]] = True
        return chosen

    def look(self, crops: Crops, parallel: Parallel) -> Seen:
        """The teacher's pass over the global crops of a part of a batch: once for all students."""
        if self.cache is None:
            return Seen(self._tokens(crops.global_crops, parallel.device))

        def compute(rows: Tensor) -> TeacherTokens:
            return self._tokens(crops.global_crops[:, rows.to(parallel.device)], parallel.device)

        return Seen(self.cache.fetch(crops.sample, crops.view, compute, device=parallel.device))

    def _tokens(self, global_crops: Tensor, device: torch.device) -> TeacherTokens:
        images = global_crops.flatten(0, 1)
        grid = (self.teacher.image_size or images.shape[-1]) // self.teacher.network.patch_size
        dtype = PRECISIONS[self._precision]
        # Spelled out for fp32 as well: the teacher's precision holds whatever the run computes in around it.
        own = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        with own, self._graphs.running() if self._graphs else nullcontext():
            return self.teacher.tokens(images, grid)

    def losses(
        self, networks: Spread, seen: Seen, crops: Crops, chosen: Tensor, values: StepValues, company: Company
    ) -> SSLStep:
        """The student's pass and its loss (see `distill_terms`)."""
        device, o = crops.global_crops.device, self.objective
        patches = MaskedTokens(*(part.to(device, non_blocking=True) for part in masked_tokens(chosen)))
        side = crops.global_crops.shape[-1] // networks.model.student.backbone.patch_size
        if side not in seen.by_grid:
            seen.by_grid[side] = TeacherTokens(seen.tokens.cls, resample_patches(seen.tokens.patches, side))
        tokens = seen.by_grid[side]
        targets = self._targets(networks.model, seen, tokens, patches, side, values, company)
        terms, own = networks.student(
            (crops.global_crops, crops.local_crops),
            Goal(tokens, targets, patches),
            o,
            generator=company.generator,
            share=company.share,
            group=company.group,
        )
        return SSLStep(
            total=torch.stack(list(terms.values())).sum(),
            terms={name: term.detach() for name, term in terms.items()},
            watched_tokens=own,
            student_tokens=own,
            # Those of a head that no term trains mean nothing.
            targets=None if targets is None or o.dino_weight == 0 else targets.dino,
        )

    def _targets(
        self,
        model: SSLModel,
        seen: Seen,
        tokens: TeacherTokens,
        patches: MaskedTokens,
        side: int,
        values: StepValues,
        company: Company,
    ) -> TeacherTargets | None:
        """Targets of a student: by the teacher's own heads, which all students share, or by its learned ones."""
        student, o = model.student, self.objective
        if not o.needs_prototypes:
            return None
        assert isinstance(student, DistillNetwork) and isinstance(model.teacher, DistillNetwork)
        # The centres of softmax-centring are every student's own, though they move alike.
        sharing = self._shared and not student.adapted_heads and model.dino_center is None
        if sharing and side in seen.targets:
            return dataclasses.replace(seen.targets[side])
        heads: Callable[..., tuple[Tensor, Tensor]] = (
            model.teacher.logits if student.adapted_heads else self.teacher.logits
        )
        wanted = patches.indices if o.ibot_weight > 0 else patches.indices[:0]
        class_logits, patch_logits = heads(tokens, wanted)

        def spread_out(logits: Tensor, center: Any) -> Any:
            return spread_targets(logits, center, values.teacher_temperature, o.sinkhorn_iterations, company.group)

        made = TeacherTargets(
            tokens.cls.unflatten(0, (2, -1)),
            spread_out(class_logits, model.dino_center),
            spread_out(patch_logits, model.ibot_center) if o.ibot_weight > 0 else None,
        )
        if sharing:
            seen.targets[side] = dataclasses.replace(made)
        return made

    def flush(self) -> None:
        """Mark as kept what the cache holds."""
        if self.cache is not None:
            self.cache.flush()


def to_16_bit(network: nn.Module, precision: str) -> None:
    """Keep the matrices of a frozen network in the 16-bit type of `precision`: autocast would make the same numbers of
    them in every step. Norms, gains and tokens stay in float32. Nothing in fp32."""
    dtype = PRECISIONS[precision]
    if dtype is None or not isinstance(network, VisionTransformer):
        return
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
