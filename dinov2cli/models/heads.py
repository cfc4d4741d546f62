"""Projection head of DINO and iBOT: MLP, L2 normalisation, weight-normed prototypes (METHOD: §2)."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shortest length that is still stretched to 1. Its reciprocal is the largest gain of the gradient, which has to fit the
# type: 1e6, the released code's for fp16, overflows there to inf when a vector is zero.
_SHORTEST = {torch.float16: 1e-4, torch.bfloat16: 1e-6}


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

    def weight(self) -> Tensor:
        """The effective weight [K, D]."""
        return self.weight_g * normalize(self.weight_v)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to logits [..., K]."""
        return F.linear(x, self.weight())


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
