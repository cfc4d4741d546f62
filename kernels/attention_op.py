"""The operator dinov2::short_attention: our CUDA kernels as torch sees them, with gradient, tracing and a reference.

A custom operator with a fake implementation, so that torch.compile takes it whole (fullgraph=True) and CUDA graphs
capture it: lengths are integers of the host, nothing is read back from the GPU. On a CPU the same operator is the
float32 reference, for tests. Legend of shape suffixes: see attention.py.
"""

from typing import Any

import torch
from torch import Tensor

from dinov2cli.kernels.attention_reference import reference_backward, reference_forward

HEAD_WIDTH = 64
KERNEL_TYPES = (torch.bfloat16, torch.float16)
MAX_TOKENS = 272  # of one sample: dk_attention_max_tokens of the sources
SHORT_TOKENS = 64  # up to here a sample is one tile, with kernels of its own
VARIANTS = {"forward": (range(2), range(6)), "backward": (range(2), range(4))}
"""The kernels to choose from for samples up to SHORT_TOKENS and for longer ones; listed in short_attention.cu."""

_SCHEMA = "(Tensor qkv, SymInt[] groups, float scale, int variant=0) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, SymInt[] groups, float scale, int variant=0) -> Tensor"
)


def short_attention(qkv_T3HC: Tensor, groups: list[int], variant: int = 0) -> Tensor:
    """Attention within samples of up to 272 tokens: qkv [T, 3, H, C] to [T, H * C].

    `groups`: samples and tokens of one sample, in turn (B, N, B, N, ...). `variant` picks one of
    VARIANTS where a length and direction has it, 0 what is fastest so far. Differentiable once.
    """
    out, _ = torch.ops.dinov2.short_attention(qkv_T3HC, groups, qkv_T3HC.shape[-1] ** -0.5, variant)
    return out


def _forward(qkv: Tensor, groups: list[int], scale: float, _variant: int = 0) -> tuple[Tensor, Tensor]:
    """Output [T, H * C] and the base-2 logarithm of each row's softmax sum, float32 [T, H]."""
    return reference_forward(qkv, _pairs(groups, len(qkv)), scale)


def _backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: list[int], scale: float, _variant: int = 0
) -> Tensor:
    """Gradient of qkv [T, 3, H, C] from that of the output [T, H * C]."""
    return reference_backward(grad_out, qkv, out, lse, _pairs(groups, len(qkv)), scale)


_forward_op = torch.library.custom_op(
    "dinov2::short_attention", _forward, mutates_args=(), schema=_SCHEMA, device_types="cpu"
)
_backward_op = torch.library.custom_op(
    "dinov2::short_attention_backward", _backward, mutates_args=(), schema=_BACKWARD_SCHEMA, device_types="cpu"
)


@_forward_op.register_kernel("cuda")
def _forward_cuda(qkv: Tensor, groups: list[int], scale: float, variant: int = 0) -> tuple[Tensor, Tensor]:
    _load(qkv.device)
    qkv = _rows_contiguous(qkv)
    out, lse = _forward_like(qkv)
    launches = _launches(groups, variant, "forward")
    torch.ops.dinov2_kernels.attention_forward(qkv, out, lse, launches, scale)
    return out, lse


@_backward_op.register_kernel("cuda")
def _backward_cuda(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: list[int], scale: float, variant: int = 0
) -> Tensor:
    _load(qkv.device)
    qkv = _rows_contiguous(qkv)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    out, grad_out, lse = _aligned(out), _aligned(grad_out), _aligned(lse)
    launches = _launches(groups, variant, "backward")
    torch.ops.dinov2_kernels.attention_backward(qkv, out, grad_out, lse, grad_qkv, launches, scale)
    return grad_qkv


@_forward_op.register_fake
def _forward_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _forward_like(qkv)


@_backward_op.register_fake
def _backward_fake(_grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, list[int], float, int], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.groups, ctx.scale, ctx.variant = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse)


def _gradient(ctx: Any, grad_out: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, None, None, None]:
    if grad_out is None:
        return None, None, None, None
    qkv, out, lse = ctx.saved_tensors
    grad_qkv = torch.ops.dinov2.short_attention_backward(grad_out, qkv, out, lse, ctx.groups, ctx.scale, ctx.variant)
    return grad_qkv, None, None, None


def _no_second_gradient(_ctx: Any, *_grads: Any) -> None:
    raise RuntimeError(
        "dinov2::short_attention is differentiable once; set DINOV2_KERNELS=torch for second derivatives"
    )


_forward_op.register_autograd(_gradient, setup_context=_keep)
_backward_op.register_autograd(_no_second_gradient)


def _forward_like(qkv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, heads, width = qkv.shape
    return qkv.new_empty((tokens, heads * width)), qkv.new_empty((tokens, heads), dtype=torch.float32)


def _load(device: torch.device) -> None:
    """Build and load the kernels if that is still to be done; RuntimeError if they cannot run on this GPU."""
    from dinov2cli.kernels import build

    why = build.missing(device)
    if why is not None:
        raise RuntimeError(f"dinov2::short_attention: {why}")


def _rows_contiguous(qkv: Tensor) -> Tensor:
    """qkv with each row [3, H, C] contiguous and on 16 bytes; the rows may lie further apart (a slice of columns)."""
    row = qkv[:1].is_contiguous() and qkv.stride(0) >= qkv[:1].numel() and qkv.stride(0) % 8 == 0
    return qkv if row and qkv.data_ptr() % 16 == 0 else qkv.clone(memory_format=torch.contiguous_format)


def _aligned(tensor: Tensor) -> Tensor:
    fits = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _launches(groups: list[int], variant: int, direction: str) -> list[int]:
    """Samples, tokens and variant of each launch; the default where a direction and length has no such variant."""
    launches = []
    for samples, tokens in zip(groups[::2], groups[1::2], strict=True):
        if samples > 0:
            known = VARIANTS[direction][tokens > SHORT_TOKENS]
            launches += [samples, tokens, variant if variant in known else 0]
    return launches


def _pairs(groups: list[int], rows: int) -> list[tuple[int, int]]:
    pairs = list(zip(groups[::2], groups[1::2], strict=True))
    if sum(b * n for b, n in pairs) != rows:
        raise RuntimeError(f"dinov2::short_attention: found groups {pairs} and {rows} rows of qkv; expected their sum")
    return pairs
