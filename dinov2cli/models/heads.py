"""Projection head of DINO and iBOT: MLP, L2 normalisation, weight-normed prototypes (METHOD: §2)."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Shortest length that is still stretched to 1. Its reciprocal is the largest gain of the gradient, which has to fit the
# type: 1e6, the released code's for fp16, overflows there to inf when a vector is zero.
_SHORTEST = {torch.float16: 1e-4, torch.bfloat16: 1e-6}
_ROWS = 8192  # prototypes worked on at a time


def normalize(x: Tensor) -> Tensor:
    """L2-normalise the last axis. In 16 bit the norm is taken in float32, for squares of fp16 overflow at 256."""
    if x.dtype not in _SHORTEST:
        return F.normalize(x, dim=-1)
    return F.normalize(x.float(), dim=-1, eps=_SHORTEST[x.dtype]).to(x.dtype)


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are weight_g * weight_v / |weight_v| (Salimans & Kingma 2016).

    The two parameters are stored under the names of the official checkpoints. The gain starts at 1; `freeze_gain`
    holds it there, which bounds every logit by 1 (METHOD: §8.7).
    """

    def __init__(self, in_dim: int, prototypes: int, freeze_gain: bool = False) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not freeze_gain)
        self.weight_v = nn.Parameter(torch.empty(prototypes, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to logits [..., K], in the weights' type also under 16-bit autocast.

        At temperature 0.04 a logit rounded to bf16 is off by a tenth of the softmax's scale; the rest of the head
        bears it. Autocast only lets the product round its inputs (bf16 on a CPU that has it, TF32 on a GPU).
        """
        kind = x.device.type
        fast = kind == "cpu" and torch.is_autocast_enabled(kind)
        x = x.to(self.weight_v.dtype)
        # On a GPU a pass over the logits costs more than one over the weights, if there are more rows than widths.
        scale_weights = kind == "cuda" and x.shape[:-1].numel() > x.shape[-1]
        with torch.autocast(device_type=kind, enabled=False):
            logits: Tensor = _WeightNormLinear.apply(x, self.weight_v, self.weight_g, fast, scale_weights)
        return logits


class _WeightNormLinear(torch.autograd.Function):
    """x -> x (g v / |v|)', a part of the prototypes at a time going backward.

    With s = g / |v| per row: y = (x v') * s, and for the gradient G of y: d x = (G * s) v, P = (G * s)' x,
    c = rowsum(v * P), d v = P - v * c / |v|^2, d g = c / g. The factors s are applied to y and G, so that the
    normalised weight is never written, or with `scale_weights` to v and P: y = x (v * s)', d x = G (v * s),
    P = (G' x) * s, which saves a pass over y and one over G. `fast` is as for `_input_rounding`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_v: Tensor, weight_g: Tensor, fast: bool, scale_weights: bool) -> Tensor:
        length = torch.linalg.vector_norm(weight_v, dim=-1).clamp_min(_SHORTEST.get(weight_v.dtype, 1e-12))
        scale = weight_g[:, 0] / length
        ctx.save_for_backward(x, weight_v, weight_g, length, scale)
        ctx.fast, ctx.scale_weights = fast, scale_weights
        with _input_rounding(fast):
            if scale_weights:
                return F.linear(x, weight_v * scale[:, None])
            return F.linear(x, weight_v).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_v, weight_g, length, scale = ctx.saved_tensors
        rows, outer = x.flatten(0, -2), grads[0].flatten(0, -2)
        wanted = ctx.needs_input_grad[1]
        grad_rows, grad_v = torch.zeros_like(rows), torch.empty_like(weight_v) if wanted else None
        along = torch.empty_like(length)
        for start in range(0, len(length), _ROWS):  # a block of prototypes at a time: no second copy of the gradient
            part = slice(start, start + _ROWS)
            scaled, v, factor = outer[:, part], weight_v[part], scale[part]
            if not ctx.scale_weights:
                scaled = scaled * factor
            with _input_rounding(ctx.fast):
                grad_rows += scaled @ (v * factor[:, None] if ctx.scale_weights else v)
                if grad_v is None:
                    continue
                block = scaled.t() @ rows
            if ctx.scale_weights:
                block *= factor[:, None]
            along[part] = (v * block).sum(-1)
            torch.addcmul(block, v, (along[part] / length[part].square())[:, None], value=-1, out=grad_v[part])
        grad_x = grad_rows.view_as(x)
        grad_g = None
        if ctx.needs_input_grad[2]:  # exact but for a gain of exactly 0, which then stays where it is
            gain = weight_g[:, 0]
            grad_g = torch.where(gain == 0, 0, along / gain)[:, None]
        return grad_x, grad_v, grad_g, None, None


@contextmanager
def _input_rounding(fast: bool) -> Iterator[None]:
    """Let float32 products on a CPU round their inputs to bf16, summing in float32.

    It also takes them to oneDNN, whose plain float32 product is twice as fast as the default's on some machines. (On
    a GPU TF32 is set for the whole process, in train/parallel.py: torch refuses products whose precision was set by
    this newer switch alone.)
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to the type stubs
    before = settings.fp32_precision
    if fast:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        if fast:
            settings.fp32_precision = before


class ProjectionHead(nn.Module):
    """Class or patch tokens to prototype logits.

    `layers` linear layers with GELU between (hidden width `hidden`), the last one to `bottleneck`, then L2
    normalisation and `prototypes` weight-normed directions. Weights are drawn from `generator`.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        freeze_gain: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden] * (layers - 1) + [bottleneck]
        parts: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            parts += [nn.GELU()] if i else []
            parts.append(nn.Linear(width_in, width_out))
        self.mlp = nn.Sequential(*parts)
        self.last_layer = Prototypes(bottleneck, prototypes, freeze_gain)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter afresh from `generator`; the gain is set to 1."""
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        bound = 1 / math.sqrt(self.last_layer.weight_v.shape[1])
        nn.init.uniform_(self.last_layer.weight_v, -bound, bound, generator=generator)
        nn.init.ones_(self.last_layer.weight_g)

    def project(self, tokens: Tensor) -> Tensor:
        """[..., in_dim] tokens to unit vectors [..., bottleneck], what the prototypes are compared with."""
        return normalize(self.mlp(tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., in_dim] tokens to logits [..., prototypes]: cosines times the prototype gains."""
        return self.last_layer(self.project(tokens))
