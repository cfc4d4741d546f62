"""Stochastic depth as two operators around a residual branch: gather + LayerNorm, and scaled scatter-add.

    y, link, slots = gather_norm(x, kept, groups, weight, bias, eps, dtype)
    out = scatter_add(x, link, slots, branch(y), kept, groups, gamma, scale)

is x with `scale * gamma * branch(LayerNorm(x))` added to the tokens of the kept samples. Legend: T tokens of all
groups, P tokens of their kept samples, S samples, D width; `groups` is B, N, B, N, …: samples and tokens of each.

What is one pass, and how. The gradient of x is that of the sum, passed through, plus LayerNorm's on the kept tokens.
Left to autograd, these would be two tensors of T x D and a third pass to add them. So scatter_add has no gradient for
x: it hands the gradient of its output to `link`, an output of gather_norm that stands for x and holds one number, and
the backward pass of gather_norm writes the sum in the one pass over T x D that it makes anyway.

gather_norm keeps the normalised tokens, in 16 bit where the branch is, and not x for its backward pass: where samples
are dropped that is about a third of the memory, for the same traffic.

On a GPU these are Triton kernels (depth_triton.py), on a CPU torch (depth_reference.py): the oracle of tests, and what
`torch.compile` and `opcheck` are tried with. Indices within a group must be unique.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2cli.kernels import depth_reference
from dinov2cli.kernels.dispatch import interpreted


@torch.library.custom_op("dinov2::gather_norm", mutates_args=())
def gather_norm_op(
    x: Tensor,
    kept: Sequence[Tensor],
    groups: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [P, D] of `dtype`, link [T, D], slots [S] int32, normal [P, D], rstd [P] float32)."""
    x = x.contiguous()
    y, slots, normal, rstd = _backend(x).gather_norm(x, kept, groups, weight, bias, eps, dtype)
    return y, _link(x), slots, normal, rstd


@torch.library.custom_op("dinov2::gather_norm_grad", mutates_args=())
def gather_norm_grad_op(
    grad: Tensor,
    grad_y: Tensor,
    normal: Tensor,
    rstd: Tensor,
    slots: Tensor,
    kept: Sequence[Tensor],
    groups: Sequence[int],
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, D], weight and bias [D]; `grad` is that of `link`."""
    grad, grad_y = grad.contiguous(), grad_y.contiguous()
    return _backend(grad).gather_norm_grad(grad, grad_y, normal, rstd, slots, kept, groups, weight, bias)


@torch.library.custom_op("dinov2::scatter_add", mutates_args=())
def scatter_add_op(
    x: Tensor,
    link: Tensor,  # noqa: ARG001 - what the gradient goes to
    slots: Tensor,
    update: Tensor,
    kept: Sequence[Tensor],
    groups: Sequence[int],
    gamma: Tensor | None,
    scale: Sequence[float],
) -> Tensor:
    """x [T, D] with scale * gamma * update [P, D] added to the tokens of kept samples."""
    x, update = x.contiguous(), update.contiguous()
    return _backend(x).scatter_add(x, slots, update, kept, groups, gamma, scale)


@torch.library.custom_op("dinov2::scatter_add_grad", mutates_args=())
def scatter_add_grad_op(
    grad: Tensor,
    update: Tensor | None,
    kept: Sequence[Tensor],
    groups: Sequence[int],
    gamma: Tensor | None,
    scale: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of update [P, D], in `dtype`, and of gamma [D] (empty without one)."""
    grad = grad.contiguous()
    update = None if update is None else update.contiguous()
    grad_update, grad_gamma = _backend(grad).scatter_add_grad(grad, update, kept, groups, gamma, scale, dtype)
    return grad_update, grad.new_empty(0) if grad_gamma is None else grad_gamma


def gather_norm(
    x: Tensor,
    kept: Sequence[Tensor],
    groups: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of the tokens of the kept samples, packed: (y [P, D] of `dtype`, link, slots), for `scatter_add`.

    x [T, D]; `kept` holds an int64 index tensor of unique samples per group, possibly empty. Statistics are float32.
    """
    y, link, slots, _, _ = gather_norm_op(x, kept, groups, weight, bias, eps, dtype)
    return y, link, slots


def scatter_add(
    x: Tensor,
    link: Tensor,
    slots: Tensor,
    update: Tensor,
    kept: Sequence[Tensor],
    groups: Sequence[int],
    gamma: Tensor | None,
    scale: Sequence[float],
) -> Tensor:
    """x [T, D] plus scale * gamma * update [P, D] on the tokens of the kept samples; `scale` is per group.

    `link` and `slots` are those of the gather_norm of the same x, through which alone x gets its gradient.
    """
    return scatter_add_op(x.detach(), link, slots, update, kept, groups, gamma, scale)


def _backend(tensor: Tensor) -> Any:
    """The module that computes: Triton's kernels, also where they are interpreted on a CPU, else plain torch."""
    if tensor.device.type == "cuda" or interpreted():
        from dinov2cli.kernels import depth_triton

        return depth_triton
    return depth_reference


def _link(x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(x.shape)


def _packed(kept: Sequence[Tensor], groups: Sequence[int]) -> Any:
    return sum(index.shape[0] * n for index, n in zip(kept, groups[1::2], strict=True))


@gather_norm_op.register_fake
def _(x: Any, kept: Any, groups: Any, weight: Any, bias: Any, eps: Any, dtype: Any) -> Any:  # noqa: ARG001
    y = x.new_empty(_packed(kept, groups), x.shape[1], dtype=dtype)
    slots = x.new_empty(sum(groups[::2]), dtype=torch.int32)
    normal = y.new_empty(y.shape, dtype=depth_reference.kept_as(dtype))
    return y, _link(x), slots, normal, y.new_empty(y.shape[0], dtype=torch.float32)


@gather_norm_grad_op.register_fake
def _(
    grad: Any, _y: Any, _normal: Any, _rstd: Any, _slots: Any, _kept: Any, _groups: Any, weight: Any, bias: Any
) -> Any:
    return grad.new_empty(grad.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@scatter_add_op.register_fake
def _(x: Any, link: Any, slots: Any, update: Any, kept: Any, groups: Any, gamma: Any, scale: Any) -> Any:  # noqa: ARG001
    return x.new_empty(x.shape)


@scatter_add_grad_op.register_fake
def _(grad: Any, update: Any, kept: Any, groups: Any, gamma: Any, scale: Any, dtype: Any) -> Any:  # noqa: ARG001
    rows = grad.new_empty(_packed(kept, groups), grad.shape[1], dtype=dtype)
    return rows, grad.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)


def _keep_gather(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, kept, groups, weight, bias, _, ctx.y_dtype = inputs
    _, _, slots, normal, rstd = output
    ctx.mark_non_differentiable(slots, normal, rstd)
    ctx.set_materialize_grads(False)  # or zeros as large as `normal` would be written for nothing
    ctx.save_for_backward(normal, rstd, slots, weight, bias, *kept)
    ctx.groups, ctx.dtype = groups, x.dtype


def _gather_backward(ctx: Any, grad_y: Tensor | None, grad_link: Tensor | None, *_: Any) -> tuple:
    normal, rstd, slots, weight, bias, *kept = ctx.saved_tensors
    if grad_link is None:  # only y was used
        rows = sum(b * n for b, n in zip(ctx.groups[::2], ctx.groups[1::2], strict=True))
        grad_link = normal.new_zeros((), dtype=ctx.dtype).expand(rows, normal.shape[1])
    grad_y = torch.zeros_like(normal, dtype=ctx.y_dtype) if grad_y is None else grad_y
    grads = gather_norm_grad_op(grad_link, grad_y, normal, rstd, slots, kept, ctx.groups, weight, bias)
    return grads[0], [None] * len(kept), None, grads[1], grads[2], None, None


def _keep_scatter(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001 - the signature is torch's
    _, _, _, update, kept, groups, gamma, scale = inputs
    ctx.gained = gamma is not None
    ctx.save_for_backward(*((update, gamma) if ctx.gained else ()), *kept)
    ctx.groups, ctx.scale, ctx.dtype = groups, scale, update.dtype


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple:
    update, gamma, *kept = ctx.saved_tensors if ctx.gained else (None, None, *ctx.saved_tensors)
    found = scatter_add_grad_op(grad, update, kept, ctx.groups, gamma, ctx.scale, ctx.dtype)
    return None, grad, None, found[0], [None] * len(kept), None, found[1] if ctx.gained else None, None


gather_norm_op.register_autograd(_gather_backward, setup_context=_keep_gather)
scatter_add_op.register_autograd(_scatter_backward, setup_context=_keep_scatter)
