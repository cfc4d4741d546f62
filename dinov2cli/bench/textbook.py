"""The DINOv2 step as a first implementation writes it: the yardstick of `dinov2 bench train --reference`.

One forward pass per crop size, stochastic depth that computes every residual branch and then drops samples, float32
Sinkhorn that rewrites the whole matrix, log-softmax kept for the backward pass, one cross-entropy per pair of crops,
clipping, AdamW and EMA one parameter at a time. It uses the weights of our modules and none of their code.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2cli.data.masks import masked_tokens
from dinov2cli.losses.koleo import koleo_loss
from dinov2cli.models.blocks import Attention
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.network import SSLModel

STUDENT_TEMPERATURE = 0.1


def textbook_loss(
    model: SSLModel,
    *,
    global_crops: Tensor,
    local_crops: Tensor,
    masks: Tensor,
    teacher_temperature: float,
    drop_path: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The objective of `ssl_losses` with default weights; crops [2, B, 3, S, S] and [L, B, 3, s, s], masks [2 * B, N].

    `drop_path` is the uniform rate of stochastic depth, drawn from `generator` (the two steps draw differently).
    """
    student, teacher, batch = model.student, model.teacher, global_crops.shape[1]
    tokens = masked_tokens(masks)
    with torch.no_grad():
        cls, patches = forward(teacher.backbone, global_crops.flatten(0, 1))
        dino_targets = sinkhorn(head(teacher.class_head, cls), teacher_temperature).unflatten(0, (2, batch))
        ibot_targets = sinkhorn(head(teacher.patch_head, patches.flatten(0, 1)[tokens.indices]), teacher_temperature)
    cls, patches = forward(student.backbone, global_crops.flatten(0, 1), masks, drop_path, generator)
    local_cls, _ = forward(student.backbone, local_crops.flatten(0, 1), None, drop_path, generator)
    global_logits = head(student.class_head, cls).unflatten(0, (2, batch))
    local_logits = head(student.class_head, local_cls).unflatten(0, (len(local_crops), batch))
    pairs = [(global_logits[0], dino_targets[1]), (global_logits[1], dino_targets[0])]
    pairs += [(logits, target) for logits in local_logits for target in dino_targets]
    dino = torch.stack([cross_entropy(logits, target).mean() for logits, target in pairs]).mean()
    patch_logits = head(student.patch_head, patches.flatten(0, 1)[tokens.indices])
    ibot = (cross_entropy(patch_logits, ibot_targets) * tokens.weights).sum() / len(masks)
    return dino + ibot + 0.1 * koleo_loss(cls.unflatten(0, (2, batch)))


def forward(
    vit: VisionTransformer,
    images: Tensor,
    masks: Tensor | None = None,
    drop_path: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Class tokens [B, D] and patch tokens [B, N, D] of images [B, 3, S, S]; masks bool [B, N]."""
    x = vit.embed(images, masks)
    block: Any
    for block in vit.blocks:
        x = x + drop(block.ls1(attention(block.attn, block.norm1(x))), drop_path, generator)
        x = x + drop(block.ls2(block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))), drop_path, generator)
    x = vit.norm(x)
    return x[:, 0], x[:, 1 + vit.num_register_tokens :]


def attention(layer: Attention, x: Tensor) -> Tensor:
    """Multi-head self-attention of tokens [B, N, D] through torch's fused kernel."""
    b, n, d = x.shape
    q, k, v = layer.qkv(x).view(b, n, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


def drop(branch: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Stochastic depth: the branch [B, ...] is zeroed for a share `rate` of the samples, the rest scaled up."""
    if rate == 0:
        return branch
    kept = torch.rand(len(branch), generator=generator).ge(rate).to(branch)
    return branch * (kept / (1 - rate)).view(-1, 1, 1)


def head(layers: ProjectionHead, tokens: Tensor) -> Tensor:
    """Tokens [n, D] to logits [n, K]: MLP, L2 normalisation, weight-normed prototypes."""
    unit = F.normalize(layers.mlp(tokens), dim=-1)
    last = layers.last_layer
    return F.linear(unit, last.weight_g * F.normalize(last.weight_v, dim=-1))


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The published loop on logits [M, K]: the whole matrix is rewritten at every normalisation."""
    q = torch.exp(logits.float() / temperature).t()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).t()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row [M, K], through a log-softmax that autograd keeps."""
    return -(targets * F.log_softmax(logits.float() / STUDENT_TEMPERATURE, dim=-1)).sum(dim=-1)


@torch.no_grad()
def ema(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """Moving average of one parameter after the other."""
    for old, new in zip(teacher, student, strict=True):
        old.mul_(momentum).add_(new, alpha=1 - momentum)
