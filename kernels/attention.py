"""Attention of a pack of crops: which implementation serves which samples, behind one function.

Legend of shape suffixes: T tokens of all groups together, B samples of one group, N tokens of one sample, H heads, C
width of a head. A pack is described by `groups`, a list of (B, N), laid out one group after another; samples attend
within themselves only.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2cli.kernels.attention_op import HEAD_WIDTH, KERNEL_TYPES, MAX_TOKENS, short_attention
from dinov2cli.kernels.dispatch import choose, missing, wanted

Groups = Sequence[tuple[int, int]]

PLAIN_TOKENS = 300  # longest sequence whose attention matrix is written out on a CPU

SDPA_ORDER: dict[tuple[int, int], list[SDPBackend]] = {}
"""Compute capability of a GPU to the kernels that SDPA tries there, best first; one that is not in this table gets
torch's own order, which has FlashAttention before cuDNN. To be filled from `dinov2 bench attention`, never guessed."""

_PACKED = ("cuda", "xformers")  # serve runs of several lengths at once


def attention(qkv_T3HC: Tensor, groups: Groups) -> Tensor:
    """softmax(q k' / sqrt(C)) v within every sample: qkv [T, 3, H, C] to [T, H * C], in its type.

    Runs of equally long samples go to the first of these that can take them: our CUDA kernels (16 bit, C = 64, up to
    272 tokens), xFormers, torch's fused attention; DINOV2_KERNELS decides where the order starts. If one of the first
    two takes all runs, the pack is one call and nothing is copied. Raises UserError where DINOV2_KERNELS asks for what
    is not there, RuntimeError if the groups do not add up to T.
    """
    segments = _segments(qkv_T3HC, equal_runs(groups))
    if len(segments) == 1:
        return _SERVE[segments[0][0]](qkv_T3HC, segments[0][1])
    chunks = qkv_T3HC.split([sum(b * n for b, n in runs) for _, runs in segments])
    return torch.cat([_SERVE[name](chunk, runs) for (name, runs), chunk in zip(segments, chunks, strict=True)])


def equal_runs(groups: Groups) -> list[tuple[int, int]]:
    """The groups with neighbours of equally long samples taken together, as (B, N)."""
    runs: list[tuple[int, int]] = []
    for samples, tokens in groups:
        if runs and runs[-1][1] == tokens:
            runs[-1] = (runs[-1][0] + samples, tokens)
        else:
            runs.append((samples, tokens))
    return runs


def attend(q_BHNC: Tensor, k_BHNC: Tensor, v_BHNC: Tensor) -> Tensor:
    """Attention of equally long samples: torch's fused kernel, but for short 16-bit sequences on a CPU.

    There the fused kernel's backward pass is 6 to 13 times slower than three plain products (measured for 10, 50
    and 65 tokens in bf16; forward 1.2 to 2.5 times), and a short sequence's N x N matrix is small.
    """
    plain = q_BHNC.device.type == "cpu" and q_BHNC.dtype == torch.bfloat16 and q_BHNC.shape[-2] <= PLAIN_TOKENS
    return products(q_BHNC, k_BHNC, v_BHNC) if plain else fused(q_BHNC, k_BHNC, v_BHNC)


def products(q_BHNC: Tensor, k_BHNC: Tensor, v_BHNC: Tensor) -> Tensor:
    """Attention of equally long samples by plain products, with the whole N x N matrix in memory."""
    scores_BHNN = (q_BHNC * q_BHNC.shape[-1] ** -0.5) @ k_BHNC.transpose(-1, -2)
    return scores_BHNN.softmax(-1) @ v_BHNC


def fused(q_BHNC: Tensor, k_BHNC: Tensor, v_BHNC: Tensor) -> Tensor:
    """Attention of equally long samples by torch's fused kernels (SDPA), in the order of SDPA_ORDER."""
    order = SDPA_ORDER.get(torch.cuda.get_device_capability(q_BHNC.device)) if SDPA_ORDER and q_BHNC.is_cuda else None
    if not order:
        return F.scaled_dot_product_attention(q_BHNC, k_BHNC, v_BHNC)
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q_BHNC, k_BHNC, v_BHNC)


def by_xformers(qkv_T3HC: Tensor, groups: Groups) -> Tensor:
    """`attention` of the whole pack by xFormers, its samples told apart by a block-diagonal mask."""
    from xformers.ops import memory_efficient_attention

    q_1THC, k_1THC, v_1THC = qkv_T3HC.unsqueeze(0).unbind(2)
    mask = _block_diagonal(tuple(groups), qkv_T3HC.device)
    return memory_efficient_attention(q_1THC, k_1THC, v_1THC, attn_bias=mask).reshape(len(qkv_T3HC), -1)


def by_kernel(qkv_T3HC: Tensor, groups: Groups, variant: int = 0) -> Tensor:
    """`attention` of the whole pack by our CUDA kernels; raises RuntimeError for what they do not take."""
    return short_attention(qkv_T3HC, [size for run in groups for size in run], variant)


def per_run(qkv_T3HC: Tensor, groups: Groups, function: Callable[[Tensor, Tensor, Tensor], Tensor] = attend) -> Tensor:
    """`attention` by a function of q, k and v [B, H, N, C], called for every run of equally long samples."""
    outputs = []
    runs = equal_runs(groups)
    chunks = [qkv_T3HC] if len(runs) == 1 else qkv_T3HC.split([b * n for b, n in runs])
    heads, width = qkv_T3HC.shape[2:]
    for chunk, (b, n) in zip(chunks, runs, strict=True):
        q_BHNC, k_BHNC, v_BHNC = chunk.view(b, n, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        outputs.append(function(q_BHNC, k_BHNC, v_BHNC).transpose(1, 2).reshape(b * n, heads * width))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


_SERVE: dict[str, Callable[[Tensor, Groups], Tensor]] = {
    "cuda": by_kernel,
    "xformers": by_xformers,
    "auto": per_run,
    "sdpa": lambda qkv, groups: per_run(qkv, groups, fused),
    "torch": lambda qkv, groups: per_run(qkv, groups, products),
}


def _segments(qkv_T3HC: Tensor, runs: list[tuple[int, int]]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Who serves which neighbouring runs."""
    order = _order(qkv_T3HC.device.type, qkv_T3HC.device.index)
    segments: list[tuple[str, list[tuple[int, int]]]] = []
    for run in runs:
        name = next(name for name in order if _takes(name, qkv_T3HC, run[1]))
        if segments and segments[-1][0] == name:
            segments[-1][1].append(run)
        else:
            segments.append((name, [run]))
    return segments


def _takes(name: str, qkv_T3HC: Tensor, tokens: int) -> bool:
    """Whether an implementation has a kernel for this type, head width and length."""
    width, dtype = qkv_T3HC.shape[-1], qkv_T3HC.dtype
    if name == "cuda":
        return width == HEAD_WIDTH and dtype in KERNEL_TYPES and tokens <= MAX_TOKENS
    if name == "xformers":  # wants rows of whole 16 bytes, and has nothing for an empty pack
        return len(qkv_T3HC) > 0 and width % 8 == 0 and dtype != torch.float64
    return True


@torch.compiler.assume_constant_result
def _order(kind: str, index: int | None) -> tuple[str, ...]:
    """The implementations to try on a device, best first; the last one takes everything.

    The environment decides it once per process, so that a compiled graph may have it as a constant.
    """
    device = torch.device(kind) if index is None else torch.device(kind, index)
    return _order_of(choose("attention", device).backend, wanted(), device)


@cache
def _order_of(backend: str, setting: str, device: torch.device) -> tuple[str, ...]:
    if backend in ("sdpa", "torch"):
        return (backend if backend == setting else "auto",)
    after = ("xformers",) if backend == "cuda" and missing("xformers", device) is None else ()
    return (backend, *after, "auto")


@cache
def _block_diagonal(groups: tuple[tuple[int, int], ...], device: torch.device) -> object:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([n for b, n in groups for _ in range(b)], device=device)
