"""Attention of packed samples in float32, forward and backward written out: what the kernels are measured against.

Legend of shape suffixes: see attention.py. The formulas are those of FlashAttention-2 (Dao 2023, arXiv:2307.08691, §2)
without its tiling: the backward pass gets the softmax back from its logarithmic sums instead of keeping it.
"""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def reference_forward(qkv_T3HC: Tensor, groups: list[tuple[int, int]], scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H * C] in the type of qkv, and log2 of each row's sum of exp(scale q k'), float32 [T, H].

    Computed in float32, for float64 input in float64.
    """
    heads, width = qkv_T3HC.shape[2:]
    outputs = [qkv_T3HC.new_empty((0, heads * width))]
    sums = [qkv_T3HC.new_empty((0, heads), dtype=torch.float32)]
    for q_BHNC, k_BHNC, v_BHNC in _samples(qkv_T3HC, groups):
        scores_BHNN = q_BHNC @ k_BHNC.transpose(-1, -2) * scale
        out_BHNC = scores_BHNN.softmax(-1) @ v_BHNC
        outputs.append(out_BHNC.transpose(1, 2).reshape(-1, heads * width).to(qkv_T3HC.dtype))
        lse_BHN = scores_BHNN.logsumexp(-1) * LOG2_E
        sums.append(lse_BHN.transpose(1, 2).reshape(-1, heads).float())
    return torch.cat(outputs), torch.cat(sums)


def reference_backward(
    grad_TD: Tensor, qkv_T3HC: Tensor, out_TD: Tensor, lse_TH: Tensor, groups: list[tuple[int, int]], scale: float
) -> Tensor:
    """Gradient of qkv [T, 3, H, C] in its type, from the gradient, the output and the log2 sums of the forward pass."""
    heads, width = qkv_T3HC.shape[2:]
    gradients = [qkv_T3HC.new_empty((0, 3, heads, width))]
    sizes = [b * n for b, n in groups]
    rows = zip(grad_TD.split(sizes), out_TD.split(sizes), lse_TH.split(sizes), groups, strict=True)
    for (q, k, v), (grad, out, lse, (b, n)) in zip(_samples(qkv_T3HC, groups), rows, strict=True):
        do_BHNC, o_BHNC = (x.view(b, n, heads, width).transpose(1, 2).to(q.dtype) for x in (grad, out))
        lse_BHN1 = lse.view(b, n, heads).transpose(1, 2).unsqueeze(-1).to(q.dtype)
        p_BHNN = torch.exp2(q @ k.transpose(-1, -2) * (scale * LOG2_E) - lse_BHN1)
        dp_BHNN = do_BHNC @ v.transpose(-1, -2)
        ds_BHNN = p_BHNN * (dp_BHNN - (do_BHNC * o_BHNC).sum(-1, keepdim=True)) * scale
        grads = (ds_BHNN @ k, ds_BHNN.transpose(-1, -2) @ q, p_BHNN.transpose(-1, -2) @ do_BHNC)
        stacked_BN3HC = torch.stack(grads).permute(1, 3, 0, 2, 4)
        gradients.append(stacked_BN3HC.reshape(b * n, 3, heads, width).to(qkv_T3HC.dtype))
    return torch.cat(gradients)


def _samples(qkv_T3HC: Tensor, groups: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v [B, H, N, C] of every group, in the type to compute in."""
    heads, width = qkv_T3HC.shape[2:]
    exact = qkv_T3HC.to(torch.promote_types(qkv_T3HC.dtype, torch.float32))
    found = []
    for chunk, (b, n) in zip(exact.split([b * n for b, n in groups]), groups, strict=True):
        q_BHNC, k_BHNC, v_BHNC = chunk.reshape(b, n, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        found.append((q_BHNC, k_BHNC, v_BHNC))
    return found
