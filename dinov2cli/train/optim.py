"""AdamW parameter groups of DINOv2 and gradient clipping per sub-module (METHOD §2, §8.9, §8.10); also for fine-tuning,
whose backbone may be any encoder with numbered layers."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import full

_TOKENS = ("cls_token", "pos_embed", "mask_token", "register_tokens")
# `blocks.3.` in ours, `layers.3.` or `layer.3.` in other encoders; likewise what comes before the first of them.
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?|stages)\.(\d+)\.")
_BEFORE = re.compile(r"(?:^|\.)(?:patch_embed|embeddings|pre_layrnorm)\.")


def layer_id(name: str, depth: int) -> int:
    """Layer of a backbone parameter for the decay: 0 tokens and patch embedding, i + 1 block i, depth + 1 the rest."""
    if name in _TOKENS or _BEFORE.search(name):
        return 0
    block = _BLOCK.search(name)
    return int(block[1]) + 1 if block else depth + 1


def lr_scale(name: str, depth: int, *, layerwise_decay: float, patch_embed_lr: float) -> float:
    """Learning-rate multiplier of the student parameter `name` ('backbone....', 'dino_head....')."""
    if not name.startswith("backbone."):
        return 1.0
    inner = name.removeprefix("backbone.")
    scale = layerwise_decay ** (depth + 1 - layer_id(inner, depth))
    return scale * patch_embed_lr if inner.startswith("patch_embed.") else scale


def has_weight_decay(name: str) -> bool:
    """False for biases, norm weights and LayerScale gammas; class, position, mask and register tokens do decay."""
    parts = name.split(".")
    return not (parts[-1] in ("bias", "gamma") or any(part.startswith("norm") for part in parts[:-1]))


def parameter_groups(
    student: nn.Module, *, depth: int, layerwise_decay: float = 1.0, patch_embed_lr: float = 0.2
) -> list[dict]:
    """Trainable parameters grouped by (lr_scale, wd_scale, last_layer): few groups, so that foreach calls stay long.

    Each group also holds `names`, in the order of its `params`.
    """
    groups: dict[tuple[float, float, bool], dict] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = lr_scale(name, depth, layerwise_decay=layerwise_decay, patch_embed_lr=patch_embed_lr)
        # Of encoders whose names follow other customs: what is no matrix is a bias, a gain or a single token.
        decay = 1.0 if has_weight_decay(name) and parameter.ndim > 1 else 0.0
        key = (scale, decay, "last_layer" in name)
        new = {"params": [], "names": [], "lr_scale": scale, "wd_scale": decay, "last_layer": key[2]}
        group = groups.setdefault(key, new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(
    student: nn.Module,
    *,
    depth: int,
    layerwise_decay: float = 1.0,
    patch_embed_lr: float = 0.2,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> torch.optim.AdamW:
    """Fused AdamW over the student's groups; rates and decay are set every step by `apply_schedule`.

    `student` is the module holding `backbone` (with `depth` blocks), `dino_head` and, when untied, `ibot_head`.
    """
    groups = parameter_groups(student, depth=depth, layerwise_decay=layerwise_decay, patch_embed_lr=patch_embed_lr)
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), weight_decay=0.0, fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Write the step's learning rate and weight decay into every group, times the group's multipliers."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["last_layer"] else values.lr
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = values.weight_decay * group["wd_scale"]


def clip_gradients(modules: Mapping[str, Iterable[Tensor]], max_norm: float | None) -> dict[str, Tensor]:
    """Clip the gradient of each sub-module (backbone, DINO head, iBOT head) to `max_norm` on its own.

    Returns the norms before clipping as 0-d tensors by sub-module, plus 'all' over everything, the same on every rank
    of a sharded model. `max_norm` None or 0 only measures.
    """
    norms: dict[str, Tensor] = {}
    for name, parameters in modules.items():
        held = [p for p in parameters if p.grad is not None]
        # Of sharded gradients it is a sum over the ranks, still to be made.
        norm = full(torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None]))
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_(held, max_norm, norm)
        norms[name] = norm
    norms["all"] = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return norms
