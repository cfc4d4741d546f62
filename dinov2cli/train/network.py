"""The networks of a run: a backbone with its heads, and student and teacher side by side (METHOD §2)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dinov2cli.errors import UserError
from dinov2cli.losses.center import SoftmaxCenter
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.ssl import student_terms

CENTERINGS = ("sinkhorn", "softmax", "none")


class Network(nn.Module):
    """A backbone with its projection heads. Tied: `ibot_head` is None and the DINO head serves patches too.

    Where no loss needs them (forms of distillation), both are None.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        dino_head: ProjectionHead | None = None,
        ibot_head: ProjectionHead | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head

    @property
    def class_head(self) -> ProjectionHead:
        """The head for class tokens. Raises ValueError where there is none."""
        return _there(self.dino_head)

    @property
    def patch_head(self) -> ProjectionHead:
        """The head for patches: the iBOT head, or the DINO head when tied. Raises ValueError where there is none."""
        return _there(self.dino_head if self.ibot_head is None else self.ibot_head)

    def forward(self, *arguments: Any, **named: Any) -> tuple[dict[str, Tensor], Tensor]:
        """The student's whole pass, `student_terms`, as the one call that DDP and FSDP2 hook into."""
        return student_terms(self, *arguments, **named)

    def class_and_patches(self, global_crops: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's whole pass over global crops [G * B, 3, S, S]: class tokens [G * B, D], their logits
        [G * B, K], and the logits [M, K] of the patches `indices` [M] among all [G * B * N]."""
        # forward_crops as in the student's pass: FSDP2 gathers the weights of what its hooks are on.
        (tokens,) = self.backbone.forward_crops([global_crops])
        return tokens.cls, self.class_head(tokens.cls), self.patch_head(tokens.patches.flatten(0, 1)[indices])


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
            self.dino_center = SoftmaxCenter(prototypes_of(student.class_head), center_momentum)
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


def _there(head: ProjectionHead | None) -> ProjectionHead:
    if head is None:
        raise ValueError("this network has no such head")
    return head


def build_ssl_model(
    backbone: VisionTransformer,
    *,
    prototypes: int = 65536,
    hidden: int = 2048,
    bottleneck: int = 256,
    layers: int = 3,
    untied: bool = True,
    ibot_prototypes: int | None = None,
    ibot_bottleneck: int | None = None,
    freeze_gain: bool = False,
    centering: str = "sinkhorn",
    seed: int = 0,
) -> SSLModel:
    """Student and teacher around `backbone`, which becomes the student's (the teacher starts as its copy).

    Heads are drawn from `seed` alone. `untied` gives iBOT a head of its own, like DINO's but for what `ibot_…` say.
    Raises UserError for an unknown centring or head sizes below 1.
    """
    heads = build_heads(
        backbone.embed_dim,
        prototypes=prototypes,
        hidden=hidden,
        bottleneck=bottleneck,
        layers=layers,
        untied=untied,
        ibot_prototypes=ibot_prototypes,
        ibot_bottleneck=ibot_bottleneck,
        freeze_gain=freeze_gain,
        seed=seed,
    )
    return SSLModel(Network(backbone, *heads), centering=centering)


def build_heads(
    in_dim: int,
    *,
    prototypes: int,
    hidden: int = 2048,
    bottleneck: int = 256,
    layers: int = 3,
    untied: bool = True,
    ibot_prototypes: int | None = None,
    ibot_bottleneck: int | None = None,
    freeze_gain: bool = False,
    seed: int = 0,
) -> tuple[ProjectionHead, ProjectionHead | None]:
    """DINO and (untied) iBOT head on tokens of width `in_dim`, drawn from `seed` alone.

    Raises UserError for sizes below 1.
    """
    sizes = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck, "layers": layers}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"heads.{name}: found {size}; expected at least 1")
    generator = torch.Generator().manual_seed(seed)

    def head(size: int, bottleneck: int) -> ProjectionHead:
        return ProjectionHead(
            in_dim,
            size,
            hidden=hidden,
            bottleneck=bottleneck,
            layers=layers,
            freeze_gain=freeze_gain,
            generator=generator,
        )

    dino_head = head(prototypes, bottleneck)
    return dino_head, head(ibot_prototypes or prototypes, ibot_bottleneck or bottleneck) if untied else None
