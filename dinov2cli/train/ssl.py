"""The DINOv2 objective on one batch: student, EMA teacher and the DINO + iBOT + KoLeo losses (METHOD §2, §8).

Legend: G global crops (2), L local crops, B images, N patches of a global crop, M masked patches, D width,
K prototypes. Global crops are laid out crop after crop, [G * B], also in the masks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli.data.masks import MaskedTokens, masked_tokens
from dinov2cli.losses.cross_entropy import RowTargets
from dinov2cli.losses.dino import dino_loss
from dinov2cli.losses.ibot import ibot_loss
from dinov2cli.losses.koleo import koleo_loss
from dinov2cli.losses.sinkhorn import sinkhorn_scalings
from dinov2cli.models.depth import Share
from dinov2cli.models.vit import VisionTransformer

if TYPE_CHECKING:
    from dinov2cli.losses.center import SoftmaxCenter
    from dinov2cli.train.network import Network, SSLModel

Scope = Literal["global", "rank"]
"""Over which samples a thing is computed under a launch: those of all processes, or this process's alone."""


@dataclass(frozen=True)
class Objective:
    """Weights and temperatures of the loss that do not change during a run, and where KoLeo looks for neighbours:
    among the images of all processes, or as in the paper of one ("rank")."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3
    koleo_scope: Scope = "global"


@dataclass(frozen=True)
class SSLStep:
    """Losses of one batch and what the monitor looks at. `terms` are weighted already: `total` is their sum.

    student_tokens [G, B, D] are the student's class tokens of the global crops, watched_tokens [G, B, D] those that are
    watched for collapse: the teacher's, or where that is frozen the student's. targets: of the class tokens, None in
    forms of distillation without prototypes.
    """

    total: Tensor
    terms: dict[str, Tensor]
    watched_tokens: Tensor
    student_tokens: Tensor
    targets: RowTargets | None


@dataclass
class TeacherTargets:
    """What the teacher says of one batch: class tokens [G, B, D], DINO targets [G * B, K], iBOT targets [M, K].

    `ibot` holds the teacher's logits of all masked patches; `loss_terms` drops them once they have been used.
    """

    tokens: Tensor
    dino: RowTargets
    ibot: RowTargets | None


@torch.no_grad()
def teacher_targets(
    model: "SSLModel",
    global_crops: Tensor,
    indices: Tensor,
    *,
    temperature: float,
    iterations: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> TeacherTargets:
    """Tokens and targets of the teacher, which sees the crops whole.

    global_crops [G, B, 3, S, S]; `indices` [M] into the [G * B * N] patches. Sinkhorn (or the centre) runs over the
    class tokens of all crops and ranks together, and over all masked patches together.
    """
    crops, batch = global_crops.shape[:2]
    cls, class_logits, patch_logits = model.teacher.class_and_patches(global_crops.flatten(0, 1), indices)
    dino = spread_targets(class_logits, model.dino_center, temperature, iterations, group)
    ibot = spread_targets(patch_logits, model.ibot_center, temperature, iterations, group)
    return TeacherTargets(cls.unflatten(0, (crops, batch)), dino, ibot)


def spread_targets(
    logits: Tensor,
    center: "SoftmaxCenter | None",
    temperature: float,
    iterations: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> RowTargets:
    """Targets of a teacher's logits [M, K]: by Sinkhorn-Knopp, or by the softmax around a running `center`."""
    if torch.is_autocast_enabled(logits.device.type):
        # They live through the student's forward pass. fp16, not bf16: near 1 it is eight times as fine.
        logits = logits.half()
    if center is not None:
        targets: RowTargets = center(logits, temperature, group=group)
        return targets
    return sinkhorn_scalings(logits, temperature, iterations=iterations, group=group)


class StudentViews(NamedTuple):
    """What the student sees in one batch: class tokens [G, B, D] and [L, B, D] (or None), masked patches [M, D]."""

    global_tokens: Tensor
    local_tokens: Tensor | None
    patches: Tensor


def student_views(
    backbone: VisionTransformer,
    global_crops: Tensor,
    local_crops: Tensor | None,
    masks: Tensor,
    indices: Tensor,
    *,
    generator: torch.Generator | None = None,
    share: Share | None = None,
) -> StudentViews:
    """ONE packed pass of the student's backbone over all crops of all sizes. Arguments as for `ssl_losses`."""
    views = [global_crops.flatten(0, 1)]
    view_masks: list[Tensor | None] = [masks]
    if local_crops is not None and len(local_crops):
        views.append(local_crops.flatten(0, 1))
        view_masks.append(None)
    outputs = backbone.forward_crops(views, view_masks, generator=generator, share=share)
    batch = global_crops.shape[1]
    return StudentViews(
        global_tokens=outputs[0].cls.unflatten(0, (-1, batch)),
        local_tokens=outputs[1].cls.unflatten(0, (-1, batch)) if len(outputs) > 1 else None,
        patches=outputs[0].patches.flatten(0, 1)[indices],
    )


def loss_terms(
    student: "Network",
    views: StudentViews,
    objective: Objective,
    targets: TeacherTargets,
    weights: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of the loss, by name; `weights` [M] of the masked patches (METHOD §8.4).

    The mean over the ranks of `group` is the loss of the whole batch.

    The heads run here, patches first: logits are the largest tensors of a step, and so only one head's are there at a
    time. `targets.ibot` is None afterwards. Raises ValueError if it was before.
    """
    if targets.ibot is None:
        raise ValueError("these targets have been used")
    temperature = objective.student_temperature
    crops, batch = views.global_tokens.shape[:2]
    patch_logits = student.patch_head(views.patches)
    ibot = ibot_loss(patch_logits, targets.ibot, weights, crops * batch, temperature=temperature)
    targets.ibot = None
    del patch_logits
    tokens = views.global_tokens if views.local_tokens is None else torch.cat([views.global_tokens, views.local_tokens])
    dino = dino_loss(student.class_head(tokens), targets.dino, n_global=crops, temperature=temperature)
    return {
        "dino_local": objective.dino_weight * dino.dino_local,
        "dino_global": objective.dino_weight * dino.dino_global,
        "ibot": objective.ibot_weight * ibot,
        "koleo": objective.koleo_weight
        * koleo_loss(views.global_tokens, group=group if objective.koleo_scope == "global" else None),
    }


def student_terms(
    student: "Network",
    crops: tuple[Tensor, Tensor | None],
    masks: Tensor,
    tokens: MaskedTokens,
    objective: Objective,
    targets: TeacherTargets,
    *,
    generator: torch.Generator | None = None,
    share: Share | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The student's pass over (global, local) crops: its loss terms, and its class tokens [G, B, D] without gradient.

    Arguments as for `ssl_losses`, with `tokens` of the masks on the device and the teacher's `targets`.
    """
    views = student_views(student.backbone, *crops, masks, tokens.indices, generator=generator, share=share)
    terms = loss_terms(student, views, objective, targets, tokens.weights, group)
    return terms, views.global_tokens.detach()


def ssl_losses(
    model: "SSLModel",
    objective: Objective,
    *,
    global_crops: Tensor,
    local_crops: Tensor | None,
    masks: Tensor,
    teacher_temperature: float,
    generator: torch.Generator | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    share: Share | None = None,
    student: nn.Module | None = None,
) -> SSLStep:
    """The DINOv2 loss of one batch (paper §4), with ONE packed student pass over all crops of all sizes.

    global_crops [2, B, 3, S, S] and local_crops [L, B, 3, s, s] (or None) are normalised floats, masks bool [2 * B, N]:
    the patches of the student's global crops that are hidden. `generator` drives stochastic depth, in the batch of all
    ranks where `share` says which part this is. `group` joins the ranks in Sinkhorn and, by the objective's scope,
    KoLeo. `student` is what to call for the student's pass, where the model's is wrapped. Call it under autocast for
    16 bit.
    """
    device = global_crops.device
    # Counted where the masks were drawn: on a GPU the host would have to wait for the number of masked patches.
    tokens = MaskedTokens(*(part.to(device, non_blocking=True) for part in masked_tokens(masks)))
    masks = masks.to(device, non_blocking=True)
    targets = teacher_targets(
        model,
        global_crops,
        tokens.indices,
        temperature=teacher_temperature,
        iterations=objective.sinkhorn_iterations,
        group=group,
    )
    terms, student_tokens = (model.student if student is None else student)(
        (global_crops, local_crops), masks, tokens, objective, targets, generator=generator, share=share, group=group
    )
    return SSLStep(
        total=torch.stack(list(terms.values())).sum(),
        terms={name: term.detach() for name, term in terms.items()},
        watched_tokens=targets.tokens,
        student_tokens=student_tokens,
        targets=targets.dino,
    )
