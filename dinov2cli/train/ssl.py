"""The DINOv2 objective on one batch: student, EMA teacher and the DINO + iBOT + KoLeo losses (METHOD §2, §8).

Legend: G global crops (2), L local crops, B images, N patches of a global crop, M masked patches, D width,
K prototypes. Global crops are laid out crop after crop, [G * B], also in the masks.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli.data.masks import MaskedTokens, masked_tokens
from dinov2cli.errors import UserError
from dinov2cli.losses.center import SoftmaxCenter
from dinov2cli.losses.cross_entropy import RowTargets
from dinov2cli.losses.dino import dino_loss
from dinov2cli.losses.ibot import ibot_loss
from dinov2cli.losses.koleo import koleo_loss
from dinov2cli.losses.sinkhorn import sinkhorn_scalings
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.vit import VisionTransformer

CENTERINGS = ("sinkhorn", "softmax", "none")


class Network(nn.Module):
    """A backbone with its projection heads. Tied: `ibot_head` is None and the DINO head serves patches too."""

    def __init__(
        self, backbone: VisionTransformer, dino_head: ProjectionHead, ibot_head: ProjectionHead | None
    ) -> None:
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head

    @property
    def patch_head(self) -> ProjectionHead:
        """The head for masked patches: the iBOT head, or the DINO head when tied."""
        return self.dino_head if self.ibot_head is None else self.ibot_head


class SSLModel(nn.Module):
    """Student, teacher (its exponential moving average, no gradients) and the running centres of softmax-centring."""

    def __init__(self, student: Network, *, centering: str = "sinkhorn", center_momentum: float = 0.9) -> None:
        super().__init__()
        if centering not in CENTERINGS:
            raise UserError(f"loss.centering: found {centering!r}; expected one of {', '.join(CENTERINGS)}")
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.dino_center: SoftmaxCenter | None = None
        self.ibot_center: SoftmaxCenter | None = None
        if centering != "sinkhorn":
            # A centre with momentum 1 stays at zero: plain softmax, which collapses sooner or later.
            center_momentum = center_momentum if centering == "softmax" else 1.0
            self.dino_center = SoftmaxCenter(prototypes_of(student.dino_head), center_momentum)
            self.ibot_center = SoftmaxCenter(prototypes_of(student.patch_head), center_momentum)
        self.train()

    def train(self, mode: bool = True) -> "SSLModel":
        """Training mode for the student; the teacher stays in eval mode, so that it never drops a residual branch."""
        super().train(mode)
        self.teacher.eval()
        return self

    def teacher_side(self) -> nn.ModuleDict:
        """Everything that follows the student rather than the gradient, for the checkpoint's `teacher` part."""
        parts: dict[str, nn.Module] = {"network": self.teacher}
        if self.dino_center is not None and self.ibot_center is not None:
            parts |= {"dino_center": self.dino_center, "ibot_center": self.ibot_center}
        return nn.ModuleDict(parts)


def prototypes_of(head: ProjectionHead) -> int:
    """K, the number of prototypes of a head."""
    return head.last_layer.weight_v.shape[0]


def build_ssl_model(
    backbone: VisionTransformer,
    *,
    prototypes: int = 65536,
    hidden: int = 2048,
    bottleneck: int = 256,
    layers: int = 3,
    untied: bool = True,
    ibot_prototypes: int | None = None,
    freeze_gain: bool = False,
    centering: str = "sinkhorn",
    seed: int = 0,
) -> SSLModel:
    """Student and teacher around `backbone`, which becomes the student's (the teacher starts as its copy).

    Heads are drawn from `seed` alone. `untied` gives iBOT a head of its own with `ibot_prototypes` (default: as many
    as DINO's). Raises UserError for an unknown centring or head sizes below 1.
    """
    sizes = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck, "layers": layers}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"heads.{name}: found {size}; expected at least 1")
    generator = torch.Generator().manual_seed(seed)

    def head(size: int) -> ProjectionHead:
        return ProjectionHead(
            backbone.embed_dim,
            size,
            hidden=hidden,
            bottleneck=bottleneck,
            layers=layers,
            freeze_gain=freeze_gain,
            generator=generator,
        )

    dino_head = head(prototypes)
    ibot_head = head(ibot_prototypes or prototypes) if untied else None
    return SSLModel(Network(backbone, dino_head, ibot_head), centering=centering)


@dataclass(frozen=True)
class Objective:
    """Weights and temperatures of the loss that do not change during a run."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3


@dataclass(frozen=True)
class SSLStep:
    """Losses of one batch and what the monitor looks at. `terms` are weighted already: `total` is their sum."""

    total: Tensor
    terms: dict[str, Tensor]
    teacher_tokens: Tensor
    student_tokens: Tensor
    targets: RowTargets


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
    model: SSLModel,
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
    tokens = model.teacher.backbone(global_crops.flatten(0, 1))
    class_logits = model.teacher.dino_head(tokens.cls)
    patch_logits = model.teacher.patch_head(tokens.patches.flatten(0, 1)[indices])
    if torch.is_autocast_enabled(global_crops.device.type):
        # They live through the student's forward pass. fp16, not bf16: near 1 it is eight times as fine.
        class_logits, patch_logits = class_logits.half(), patch_logits.half()
    if model.dino_center is not None and model.ibot_center is not None:
        dino = model.dino_center(class_logits, temperature, group=group)
        ibot = model.ibot_center(patch_logits, temperature, group=group)
    else:
        dino = sinkhorn_scalings(class_logits, temperature, iterations=iterations, group=group)
        ibot = sinkhorn_scalings(patch_logits, temperature, iterations=iterations, group=group)
    return TeacherTargets(tokens.cls.unflatten(0, (crops, batch)), dino, ibot)


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
) -> StudentViews:
    """ONE packed pass of the student's backbone over all crops of all sizes. Arguments as for `ssl_losses`."""
    views = [global_crops.flatten(0, 1)]
    view_masks: list[Tensor | None] = [masks]
    if local_crops is not None and len(local_crops):
        views.append(local_crops.flatten(0, 1))
        view_masks.append(None)
    outputs = backbone.forward_crops(views, view_masks, generator=generator)
    batch = global_crops.shape[1]
    return StudentViews(
        global_tokens=outputs[0].cls.unflatten(0, (-1, batch)),
        local_tokens=outputs[1].cls.unflatten(0, (-1, batch)) if len(outputs) > 1 else None,
        patches=outputs[0].patches.flatten(0, 1)[indices],
    )


def loss_terms(
    student: Network, views: StudentViews, objective: Objective, targets: TeacherTargets, weights: Tensor
) -> dict[str, Tensor]:
    """The weighted terms of the loss, by name; `weights` [M] of the masked patches (METHOD §8.4).

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
    n_locals = 0 if views.local_tokens is None else views.local_tokens.shape[0]
    tokens = [views.global_tokens] if views.local_tokens is None else [views.global_tokens, views.local_tokens]
    logits = student.dino_head(torch.cat([part.flatten(0, 1) for part in tokens]))
    # split, not two slices: the backward pass of a slice fills a zero tensor as large as the whole.
    global_logits, local_logits = logits.split([crops * batch, n_locals * batch])
    dino = dino_loss(
        global_logits.unflatten(0, (crops, batch)),
        local_logits.unflatten(0, (n_locals, batch)) if n_locals else None,
        targets.dino,
        temperature=temperature,
    )
    return {
        "dino_local": objective.dino_weight * dino.dino_local,
        "dino_global": objective.dino_weight * dino.dino_global,
        "ibot": objective.ibot_weight * ibot,
        "koleo": objective.koleo_weight * koleo_loss(views.global_tokens),
    }


def ssl_losses(
    model: SSLModel,
    objective: Objective,
    *,
    global_crops: Tensor,
    local_crops: Tensor | None,
    masks: Tensor,
    teacher_temperature: float,
    generator: torch.Generator | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> SSLStep:
    """The DINOv2 loss of one batch (paper §4), with ONE packed student pass over all crops of all sizes.

    global_crops [2, B, 3, S, S] and local_crops [L, B, 3, s, s] (or None) are normalised floats, masks bool [2 * B, N]:
    the patches of the student's global crops that are hidden. `generator` drives stochastic depth. `group` joins the
    ranks in Sinkhorn; KoLeo stays with this rank's batch, as in the paper. Call it under autocast for 16 bit.
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
    views = student_views(model.student.backbone, global_crops, local_crops, masks, tokens.indices, generator=generator)
    terms = loss_terms(model.student, views, objective, targets, tokens.weights)
    return SSLStep(
        total=torch.stack(list(terms.values())).sum(),
        terms={name: term.detach() for name, term in terms.items()},
        teacher_tokens=targets.tokens,
        student_tokens=views.global_tokens.detach(),
        targets=targets.dino,
    )
