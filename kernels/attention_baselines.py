"""What the attention of a pack is compared with: every way torch and xFormers have of computing it, one name each.

Each is a function of qkv [T, 3, H, C] and the groups [(B, N), ...], as `attention` is. Legend of shape suffixes: see
attention.py.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2cli.kernels.attention import by_kernel, by_xformers, per_run, products
from dinov2cli.kernels.attention_op import VARIANTS
from dinov2cli.kernels.dispatch import missing

Groups = list[tuple[int, int]]
Attend = Callable[[Tensor, Groups], Tensor]

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_BLOCK = 128  # tokens, of FlexAttention's masks
_COMPILED = 64  # packs of different groups that one process may compile FlexAttention for


def implementations(device: torch.device) -> dict[str, Attend]:
    """All that can run on `device`, by name: ours ("cuda", "cuda variant N"), then the others.

    A variant that a length or direction does not have is the default there. What can run in principle may still refuse
    a pack (samples too long, a type) by a RuntimeError. May build our kernels.
    """
    found: dict[str, Attend] = {}
    if missing("cuda", device) is None:
        found["cuda"] = by_kernel
        most = max(len(kinds) for pair in VARIANTS.values() for kinds in pair)
        found |= {f"cuda variant {number}": partial(by_kernel, variant=number) for number in range(1, most)}
    if missing("xformers", device) is None:
        found["xformers"] = by_xformers
    found["sdpa"] = partial(per_run, function=F.scaled_dot_product_attention)
    found |= {f"sdpa {name}": partial(_sdpa_by, kernel) for name, kernel in SDPA_KERNELS.items()}
    found["varlen"] = varlen
    found["torch"] = partial(per_run, function=products)
    usable = {name: attend for name, attend in found.items() if _runs(attend, device)}
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        usable["flex"] = flex  # not tried: compiling it takes seconds
    return usable


def varlen(qkv_T3HC: Tensor, groups: Groups) -> Tensor:
    """torch's varlen_attn: FlashAttention on packed samples; 16 bit, on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    q_THC, k_THC, v_THC = qkv_T3HC.unbind(1)
    ends, longest = _ends(tuple(groups), qkv_T3HC.device)
    out: Any = varlen_attn(q_THC, k_THC, v_THC, ends, ends, longest, longest)
    return out.flatten(1)


def flex(qkv_T3HC: Tensor, groups: Groups) -> Tensor:
    """FlexAttention, compiled, over the whole pack as one sequence whose mask keeps samples apart."""
    mask = document_mask(tuple(groups), qkv_T3HC.device)
    q_1HTC, k_1HTC, v_1HTC = qkv_T3HC.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
    # Without the larger limit it would run uncompiled after a few packs, with the whole T x T matrix in memory.
    with torch._dynamo.config.patch(recompile_limit=_COMPILED):
        out_1HTC = _compiled_flex()(q_1HTC, k_1HTC, v_1HTC, block_mask=mask)
    return out_1HTC.squeeze(0).transpose(0, 1).flatten(1)


@cache
def document_mask(groups: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    """FlexAttention's mask of a pack, built from the lengths: torch's own way computes all T x T entries.

    Samples are contiguous, so the blocks that a block of queries meets are those from the start of its first sample to
    the end of its last; of these, blocks inside the sample that holds all of its queries need no mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends = _ends(groups, torch.device("cpu"))[0].long()
    total = int(ends[-1])
    sample = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff())
    count = -(-total // _BLOCK)
    first = torch.arange(count) * _BLOCK
    last = (first + _BLOCK).clamp(max=total) - 1
    start, stop = ends[sample[first]], ends[sample[last] + 1]
    low, high = start // _BLOCK, (stop - 1) // _BLOCK + 1
    alone = (sample[first] == sample[last]) & (first + _BLOCK <= total)
    full_low = (start + _BLOCK - 1) // _BLOCK
    full_high = torch.where(alone, stop // _BLOCK, full_low).maximum(full_low)
    column = torch.arange(count)
    inside = (column >= full_low[:, None]) & (column < full_high[:, None])
    met = (column >= low[:, None]) & (column < high[:, None])
    part, whole = ([x.to(device) for x in _ordered(blocks)] for blocks in (met & ~inside, inside))
    sample = sample.to(device)

    def same(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sample[query] == sample[key]

    return BlockMask.from_kv_blocks(
        part[0], part[1], whole[0], whole[1], BLOCK_SIZE=_BLOCK, mask_mod=same, seq_lengths=(total, total)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row how many columns are set, [1, 1, R], and the columns, the set ones first, [1, 1, R, R]."""
    columns = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], columns.int()[None, None].contiguous()


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _sdpa_by(kernel: SDPBackend, qkv_T3HC: Tensor, groups: Groups) -> Tensor:
    with sdpa_kernel([kernel]):
        return per_run(qkv_T3HC, groups, F.scaled_dot_product_attention)


@cache
def _ends(groups: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    """0 and where each sample ends, int32 [samples + 1], and the longest sample's tokens."""
    lengths = torch.tensor([0, *(n for b, n in groups for _ in range(b))], dtype=torch.int64)
    return lengths.cumsum(0).int().to(device), int(lengths.max())


def _runs(attend: Attend, device: torch.device) -> bool:
    """Whether it goes forward and backward through a small pack in 16 bit."""
    qkv = torch.zeros(3 * 16, 3, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA says why each kernel that was not asked for is not used
            attend(qkv, [(3, 16)]).sum().backward()
    except Exception:  # whatever somebody else's kernel says no with
        return False
    return True
