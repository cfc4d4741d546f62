"""Stochastic depth around a residual branch in plain torch: the oracle of the kernels, with their signatures.

Legend as in depth.py. 16-bit tensors are widened to float32 first; float64 stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_norm(
    x_TD: Tensor, kept: Sequence[Tensor], groups: Sequence[int], weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [P, D], slots [S], normal [P, D], rstd [P]): see depth_triton.gather_norm."""
    value = widened(x_TD.index_select(0, packed_rows(kept, groups)))
    centred = value - value.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normal = centred * rstd
    slots = [torch.full((b,), -1, dtype=torch.int32, device=x_TD.device) for b in groups[::2]]
    for slot, index in zip(slots, kept, strict=True):
        slot[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
    y = normal * weight + bias
    return y.to(dtype), torch.cat(slots), normal.to(kept_as(dtype)), rstd[:, 0].float()


def scatter_add(
    x_TD: Tensor, slots_S: Tensor, update_PD: Tensor, kept: Sequence[Tensor], groups: Sequence[int],  # noqa: ARG001
    gamma: Tensor | None, scale: Sequence[float],
) -> Tensor:  # fmt: skip
    """x [T, D] plus the scaled update of the kept samples."""
    added = widened(update_PD) if gamma is None else widened(update_PD) * gamma
    added = added * packed_scales(kept, groups, scale, added)
    out, rows = x_TD.clone(), packed_rows(kept, groups)
    out[rows] += added.to(x_TD.dtype)
    return out


def scatter_add_grad(
    grad_TD: Tensor, update_PD: Tensor | None, kept: Sequence[Tensor], groups: Sequence[int], gamma: Tensor | None,
    scale: Sequence[float], dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of update [P, D], in `dtype`, and of gamma [D]; `update_PD` is needed for the latter only."""
    incoming = widened(grad_TD.index_select(0, packed_rows(kept, groups)))
    incoming = incoming * packed_scales(kept, groups, scale, incoming)
    if gamma is None or update_PD is None:
        return incoming.to(dtype), None
    return (incoming * gamma).to(dtype), (incoming * update_PD).sum(0).to(gamma.dtype)


def gather_norm_grad(
    grad_TD: Tensor, grad_y_PD: Tensor, normal_PD: Tensor, rstd_P: Tensor, slots_S: Tensor,  # noqa: ARG001
    kept: Sequence[Tensor], groups: Sequence[int], weight: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [T, D], weight [D] and bias [D], from those of x after the scatter (`grad_TD`) and of y."""
    incoming, normed = widened(grad_y_PD), widened(normal_PD)
    weighted = incoming * weight
    inner = weighted - weighted.mean(1, keepdim=True) - normed * (weighted * normed).mean(1, keepdim=True)
    grad_x, rows = grad_TD.clone(), packed_rows(kept, groups)
    grad_x[rows] += (inner * rstd_P[:, None]).to(grad_TD.dtype)
    return grad_x, (incoming * normed).sum(0).to(weight.dtype), incoming.sum(0).to(bias.dtype)


def kept_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which normalised tokens are kept for the backward pass, where the branch computes in `dtype`.

    fp16 also for bf16: a normalised value is at most sqrt(D), and eight times finer it adds nothing to the error.
    """
    return torch.float16 if dtype == torch.bfloat16 else dtype


def packed_rows(kept: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """The row of x of every kept token, int64 [P]."""
    pieces, first = [], 0
    for index, b, n in zip(kept, groups[::2], groups[1::2], strict=True):
        pieces.append((first + index[:, None] * n + torch.arange(n, device=index.device)).flatten())
        first += b * n
    return torch.cat(pieces)


def packed_scales(kept: Sequence[Tensor], groups: Sequence[int], scale: Sequence[float], like: Tensor) -> Tensor:
    """The scale of every kept token, [P, 1] of the type of `like`."""
    counts = [len(index) * n for index, n in zip(kept, groups[1::2], strict=True)]
    return torch.cat([like.new_full((c, 1), s) for c, s in zip(counts, scale, strict=True)])


def widened(tensor: Tensor) -> Tensor:
    """float32 of 16-bit types, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
