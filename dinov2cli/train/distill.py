"""Distillation: students learn from a frozen teacher, which looks at every batch once for all of them (METHOD §4).

The paper's form is pretraining's loss with another teacher: DINO on class tokens (local crops for the student only),
iBOT on the patches of both global crops, which nobody hides, and KoLeo. Beyond it two terms without prototypes: the
teacher's tokens as they are (`losses/features.py`), and the similarities between patches (`losses/gram.py`).

Legend as in `ssl`: G global crops (2), L local crops, B images, C = G * B, N patches on the student's grid, M patches
that count in the iBOT term, D width of the student, T of the teacher, K prototypes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli.data.masks import MaskedTokens
from dinov2cli.losses.dino import dino_loss
from dinov2cli.losses.features import FeatureKind, feature_loss
from dinov2cli.losses.gram import gram_loss
from dinov2cli.losses.ibot import ibot_loss
from dinov2cli.losses.koleo import koleo_loss
from dinov2cli.models.depth import Share
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.network import Network, SSLModel, build_heads
from dinov2cli.train.ssl import Scope, TeacherTargets
from dinov2cli.train.teacher import TeacherTokens


@dataclass(frozen=True)
class DistillObjective:
    """Weights and temperatures of the loss; a term of weight 0 is not computed. `feature` says how tokens are compared.

    `ibot_share` of each crop's patches, drawn anew in every step, counts in the iBOT term: 1 is all, as in the paper,
    fewer need less memory for logits.
    """

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    feature_weight: float = 0.0
    gram_weight: float = 0.0
    feature: FeatureKind = "cosine"
    ibot_share: float = 1.0
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3
    koleo_scope: Scope = "global"

    @property
    def needs_prototypes(self) -> bool:
        """Whether a term compares logits."""
        return self.dino_weight > 0 or self.ibot_weight > 0


class TokenAdapter(nn.Module):
    """Student tokens in the teacher's space: one linear map for class tokens, one for patches."""

    def __init__(self, width: int, teacher_width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.cls, self.patches = nn.Linear(width, teacher_width), nn.Linear(width, teacher_width)
        for layer in (self.cls, self.patches):
            # Unit gain: normalised tokens stay of the size that the teacher's have.
            nn.init.normal_(layer.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)


class DistillNetwork(Network):
    """A student. With `adapted_heads` its heads sit behind the adapter, in the teacher's space: their moving average
    is then the teacher's heads too (a teacher without heads of its own)."""

    def __init__(
        self,
        backbone: VisionTransformer,
        dino_head: ProjectionHead | None = None,
        ibot_head: ProjectionHead | None = None,
        adapter: TokenAdapter | None = None,
        *,
        adapted_heads: bool = False,
    ) -> None:
        super().__init__(backbone, dino_head, ibot_head)
        self.adapter, self.adapted_heads = adapter, adapted_heads
        # Nothing is masked, and DDP waits for the gradient of every parameter that trains.
        backbone.mask_token.requires_grad_(False)

    def in_teacher_space(self, tokens: Tensor, *, patches: bool = False) -> Tensor:
        """Class tokens or patches [..., D] as [..., T]; as they are without an adapter."""
        if self.adapter is None:
            return tokens
        mapped: Tensor = self.adapter.patches(tokens) if patches else self.adapter.cls(tokens)
        return mapped

    def forward(self, *arguments: Any, **named: Any) -> tuple[dict[str, Tensor], Tensor]:
        """The student's whole pass, `distill_terms`, as the one call that DDP and FSDP2 hook into."""
        return distill_terms(self, *arguments, **named)

    @torch.no_grad()
    def logits(self, tokens: TeacherTokens, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [C, K] and [M, K] of the TEACHER's tokens by these heads, which must be in its space."""
        return self.class_head(tokens.cls), self.patch_head(tokens.patches.flatten(0, 1)[indices])


def build_distill_model(
    backbone: VisionTransformer,
    teacher_width: int,
    objective: DistillObjective,
    *,
    teacher_has_heads: bool,
    adapter: bool,
    heads: dict[str, Any] | None = None,
    centering: str = "sinkhorn",
    seed: int = 0,
) -> SSLModel:
    """A student around `backbone` with what the terms of `objective` need, and its moving average.

    `heads` are the arguments of `build_heads`; where the `teacher_has_heads`, prototypes must be as many as its.
    `adapter` allows a linear map to the teacher's width; it is left out where no term compares tokens there. Heads and
    adapter are drawn from `seed` alone. Raises ValueError where the widths differ and a term needs an adapter.
    """
    learned = objective.needs_prototypes and not teacher_has_heads
    compared = learned or objective.feature_weight > 0
    if compared and not adapter and backbone.embed_dim != teacher_width:
        raise ValueError(f"tokens of width {backbone.embed_dim} and {teacher_width} need an adapter")
    mapped = None
    if compared and adapter:
        mapped = TokenAdapter(backbone.embed_dim, teacher_width, torch.Generator().manual_seed(seed + 1))
    made: tuple[ProjectionHead | None, ProjectionHead | None] = (None, None)
    if objective.needs_prototypes:
        made = build_heads(teacher_width if learned else backbone.embed_dim, seed=seed, **(heads or {}))
    student = DistillNetwork(backbone, *made, mapped, adapted_heads=learned)
    _freeze_unused(student, objective)
    return SSLModel(student, centering=centering if objective.needs_prototypes else "sinkhorn")


def _freeze_unused(student: DistillNetwork, objective: DistillObjective) -> None:
    """What no term reaches gets no gradient, which DDP would wait for."""
    patch_terms = (objective.ibot_weight > 0 and student.adapted_heads) or objective.feature_weight > 0
    class_terms = (objective.dino_weight > 0 and student.adapted_heads) or objective.feature_weight > 0
    if student.adapter is not None:
        student.adapter.cls.requires_grad_(class_terms)
        student.adapter.patches.requires_grad_(patch_terms)
    if student.ibot_head is not None:
        student.ibot_head.requires_grad_(objective.ibot_weight > 0)
        if student.dino_head is not None:
            student.dino_head.requires_grad_(objective.dino_weight > 0)


class Goal(NamedTuple):
    """What a student is to match in a part of a batch: the teacher's tokens on its grid, targets of its logits (None
    without prototypes), and which patches those of the iBOT term belong to."""

    tokens: TeacherTokens
    targets: TeacherTargets | None
    chosen: MaskedTokens


def distill_terms(
    student: DistillNetwork,
    crops: tuple[Tensor, Tensor | None],
    goal: Goal,
    objective: DistillObjective,
    *,
    generator: torch.Generator | None = None,
    share: Share | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The student's pass over (global [G, B, 3, S, S], local [L, B, 3, s, s] or None) crops: its weighted loss terms by
    name, and its class tokens [G, B, D] without gradient.

    The mean of the terms over the ranks of `group` is that of the whole batch.
    """
    global_crops, local_crops = crops
    views = [global_crops.flatten(0, 1)]
    if local_crops is not None and len(local_crops) and objective.dino_weight > 0:  # no other term looks at them
        views.append(local_crops.flatten(0, 1))
    seen = student.backbone.forward_crops(views, generator=generator, share=share)
    batch = global_crops.shape[1]
    tokens = torch.cat([output.cls for output in seen]).unflatten(0, (-1, batch))
    own, patches, o = tokens[: len(global_crops)], seen[0].patches, objective
    terms: dict[str, Tensor] = {}
    if o.ibot_weight > 0:
        terms["ibot"] = o.ibot_weight * _ibot(student, patches, goal, o)
    if o.dino_weight > 0:
        assert goal.targets is not None
        compared = student.in_teacher_space(tokens) if student.adapted_heads else tokens
        dino = dino_loss(
            student.class_head(compared), goal.targets.dino, n_global=len(own), temperature=o.student_temperature
        )
        terms["dino_local"] = o.dino_weight * dino.dino_local
        terms["dino_global"] = o.dino_weight * dino.dino_global
    if o.feature_weight > 0:
        cls = student.in_teacher_space(own.flatten(0, 1))
        inner = student.in_teacher_space(patches, patches=True)
        terms["feature"] = o.feature_weight * (
            feature_loss(cls, goal.tokens.cls, o.feature)
            + feature_loss(inner.flatten(0, 1), goal.tokens.patches.flatten(0, 1), o.feature)
        )
    if o.gram_weight > 0:
        terms["gram"] = o.gram_weight * gram_loss(patches, goal.tokens.patches)
    if o.koleo_weight > 0:
        terms["koleo"] = o.koleo_weight * koleo_loss(own, group=group if o.koleo_scope == "global" else None)
    return terms, own.detach()


def _ibot(student: DistillNetwork, patches: Tensor, goal: Goal, objective: DistillObjective) -> Tensor:
    if goal.targets is None or goal.targets.ibot is None:
        raise ValueError("these targets have been used")
    rows = patches.flatten(0, 1)[goal.chosen.indices]
    if student.adapted_heads:
        rows = student.in_teacher_space(rows, patches=True)
    loss = ibot_loss(
        student.patch_head(rows),
        goal.targets.ibot,
        goal.chosen.weights,
        len(patches),
        temperature=objective.student_temperature,
    )
    goal.targets.ibot = None  # the largest tensor of a step: not needed any more
    return loss
