"""Parts of a transformer block that work on packed tokens: several groups of crops in one long sequence.

Legend of shape suffixes: T tokens of all groups together, B samples of one group, N tokens of one sample, D width,
H heads, C width of a head. A pack x_TD is described by `groups`, a list of (B, N), laid out one group after another.
Parameter names are those of the official DINOv2 checkpoints.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dinov2cli.kernels.attention import attention
from dinov2cli.models.depth import Groups, Kept, add_fused, add_residual


def swiglu_hidden(embed_dim: int, mlp_ratio: float) -> int:
    """Hidden width of the SwiGLU layer: two thirds of the MLP's, rounded up to a multiple of 8 (METHOD: §2)."""
    return (int(int(embed_dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


class PatchEmbed(nn.Module):
    """Cuts images into square patches and projects each to a token."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, h, w] images to [B, N, D] tokens in row order."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention inside each sample of a pack, block-diagonal by construction."""

    def __init__(self, embed_dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_TD: Tensor, groups: Groups) -> Tensor:
        """Attend within every sample, by what suits device, type and length (kernels/attention.py)."""
        qkv_T3D = self.qkv(x_TD).unflatten(-1, (3, -1))
        return self.proj(attention(qkv_T3D.unflatten(-1, (self.num_heads, -1)), groups))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        inner = self.fc1(x_TD)
        out: Tensor = _GeluLinear.apply(inner, self.fc2.weight.to(inner.dtype), self.fc2.bias.to(inner.dtype))
        return out


class _GeluLinear(torch.autograd.Function):
    """gelu(x) w' + b that keeps only x for the backward pass and computes the gelu again: a fifth less memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)
        grad_weight = rows.t() @ F.gelu(x).flatten(0, -2)
        return torch.ops.aten.gelu_backward(grads[0] @ weight, x), grad_weight, rows.sum(0)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020): w3(silu(gate) * value), gate and value packed in w12, gate first."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(embed_dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, embed_dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        gate, value = self.w12(x_TD).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, embed_dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((embed_dim,), init))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return x_TD * self.gamma


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the type of its input, whatever type FSDP2 gathered the weights in."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """Pre-norm transformer block on a pack of tokens, with stochastic depth that skips the work."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        ffn: str = "mlp",
        layerscale: float | None = 1e-5,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(embed_dim, eps=norm_eps)
        self.attn = Attention(embed_dim, num_heads, qkv_bias)
        self.ls1 = nn.Identity() if layerscale is None else LayerScale(embed_dim, layerscale)
        self.norm2 = LayerNorm(embed_dim, eps=norm_eps)
        self.mlp: Mlp | SwiGLU
        if ffn == "swiglu":
            self.mlp = SwiGLU(embed_dim, swiglu_hidden(embed_dim, mlp_ratio))
        else:
            self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))
        self.ls2 = nn.Identity() if layerscale is None else LayerScale(embed_dim, layerscale)

    def attention_branch(self, x_TD: Tensor, groups: Groups) -> Tensor:
        """Residual branch of the attention, without the skip connection."""
        return self.ls1(self.attn(self.norm1(x_TD), groups))

    def ffn_branch(self, x_TD: Tensor, groups: Groups) -> Tensor:  # noqa: ARG002 - one signature for both branches
        """Residual branch of the feed-forward layer, without the skip connection."""
        return self.ls2(self.mlp(self.norm2(x_TD)))

    def forward(self, x_TD: Tensor, groups: Groups, kept: Kept | None = None) -> Tensor:
        """One block over a pack. `kept` names the samples the branches run on; None runs them on all."""
        if kept is None:
            x_TD = x_TD + self.attention_branch(x_TD, groups)
            return x_TD + self.ffn_branch(x_TD, groups)
        if kept.fused:
            return self.fused(x_TD, groups, kept)
        x_TD = add_residual(self.attention_branch, x_TD, groups, kept.attention, kept.scale)
        return add_residual(self.ffn_branch, x_TD, groups, kept.ffn, kept.scale)

    def fused(self, x_TD: Tensor, groups: Groups, kept: Kept) -> Tensor:
        """`forward` for kept samples, norms and gains done by the kernels that gather and add back."""

        def feed_forward(y_TD: Tensor, _: Groups) -> Tensor:
            return self.mlp(y_TD)

        gains = [ls.gamma if isinstance(ls, LayerScale) else None for ls in (self.ls1, self.ls2)]
        x_TD = add_fused(self.attn, x_TD, groups, kept.attention, kept.scale, norm=self.norm1, gamma=gains[0])
        return add_fused(feed_forward, x_TD, groups, kept.ffn, kept.scale, norm=self.norm2, gamma=gains[1])
