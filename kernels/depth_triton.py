"""Triton kernels of stochastic depth: gather + LayerNorm, scaled scatter-add + LayerScale, and their backward passes.

Legend of shape suffixes: T tokens of all groups, P tokens of the kept samples ("packed"), S samples, D width. Each
kernel serves one group of B equally long samples of N tokens, of which K are kept; the launchers below run them group
after group. Where nothing else is said statistics and sums are float32, whatever the types in memory.

What goes over the memory bus, with k the kept share and 4-byte residuals, 2-byte branches, in bytes per element of x:
gather 4k read, 2k + 2k written; scatter 4 + 2k read, 4 written; backward of scatter 4k + 2k read, 2k written; backward
of gather 4 + 4k read, 4 written. Every pass reads and writes once; there are no atomics, so results repeat bitwise.

Import it only where Triton is installed; depth.py does, when a kernel is to run.
"""
# mypy: disable-error-code=no-untyped-def

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2cli.kernels.depth_reference import kept_as

TILE = 2048  # elements a program holds of each tensor: 16 for every thread of four warps
# Programs per multiprocessor where they sum over rows: as many as their 64 and 128 registers per thread leave room for.
SCATTER_PROGRAMS, GATHER_PROGRAMS = 8, 4
# Both loop by `while`: Triton 3.6 cannot interpret `for` over a range of run-time values with NumPy 2.4.
# Numbers that change with the batch and the draw: compiled for once, not for each kind of value.
_VARYING = ["index", "slots", "tokens", "rows"]


@triton.jit(do_not_specialize=_VARYING)
def gather_norm_kernel(
    x, index, weight, bias, y, normal, rstd, slots, tokens, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise the kept samples' tokens: x [B * N, D] to y and normal (before weight and bias) [K * N, D].

    Also rstd [K * N], and slots [B]: the place of each kept sample among the kept ones (others are left alone).
    """
    packed = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = packed < rows
    place = packed // tokens
    sample = tl.load(index + place, mask=live, other=0)
    inside = packed - place * tokens
    tl.store(slots + sample, place, mask=live & (inside == 0))
    column = tl.arange(0, BLOCK)
    mask = live[:, None] & (column < D)[None, :]
    value = tl.load(x + (sample * tokens + inside)[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / D
    centred = tl.where(mask, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    normed = centred * scale[:, None]
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    at = packed.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(normal + at, normed, mask=mask)
    tl.store(y + at, normed * gain[None, :] + shift[None, :], mask=mask)
    tl.store(rstd + packed, scale, mask=live)


@triton.jit(do_not_specialize=_VARYING)
def scatter_add_kernel(
    x, slots, update, gamma, out, scale, tokens, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """out = x [B * N, D], with scale * gamma * update [K * N, D] added to the tokens of kept samples."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    sample = row // tokens
    place = tl.load(slots + sample, mask=live, other=-1)
    column = tl.arange(0, BLOCK)
    mask = live[:, None] & (column < D)[None, :]
    kept = (place >= 0)[:, None] & mask
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    packed = (place * tokens + row - sample * tokens).to(tl.int64)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(update + packed[:, None] * D + column[None, :], mask=kept, other=0.0).to(tl.float32)
    if GAIN:
        added *= tl.load(gamma + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, value + scale * added, mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def scatter_add_grad_kernel(
    grad, index, update, gamma, grad_update, partial, scale, tokens, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Gradient of update [K * N, D]; with GAIN also each program's part of gamma's, partial [programs, D]."""
    column = tl.arange(0, BLOCK)
    if GAIN:
        gain = scale * tl.load(gamma + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0) * ROWS
    while first < rows:
        packed = first + tl.arange(0, ROWS)
        live = packed < rows
        place = packed // tokens
        source = tl.load(index + place, mask=live, other=0) * tokens + packed - place * tokens
        mask = live[:, None] & (column < D)[None, :]
        at = packed.to(tl.int64)[:, None] * D + column[None, :]
        incoming = tl.load(grad + source[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if GAIN:
            total += incoming * tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_update + at, incoming * gain[None, :], mask=mask)
        else:
            tl.store(grad_update + at, incoming * scale, mask=mask)
        first += tl.num_programs(0) * ROWS
    if GAIN:
        tl.store(partial + tl.program_id(0) * D + column, scale * tl.sum(total, axis=0), mask=column < D)


@triton.jit(do_not_specialize=_VARYING)
def gather_norm_grad_kernel(
    grad, grad_y, normal, rstd, slots, weight, grad_x, partial_weight, partial_bias, tokens, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of x [B * N, D] in one pass: `grad`, what comes down the skip connection, plus on the tokens of kept
    samples LayerNorm's. Each program's part of the weight's and bias's gradients goes to partial_… [programs, D]."""
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    total_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    total_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        live = row < rows
        sample = row // tokens
        place = tl.load(slots + sample, mask=live, other=-1)
        mask = live[:, None] & (column < D)[None, :]
        kept = (place >= 0)[:, None] & mask
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        packed = (place * tokens + row - sample * tokens).to(tl.int64)
        from_packed = packed[:, None] * D + column[None, :]
        through = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        incoming = tl.load(grad_y + from_packed, mask=kept, other=0.0).to(tl.float32)
        normed = tl.load(normal + from_packed, mask=kept, other=0.0).to(tl.float32)
        scale = tl.load(rstd + packed, mask=live & (place >= 0), other=0.0)
        weighted = incoming * gain
        mean = tl.sum(weighted, axis=1) / D
        slope = tl.sum(weighted * normed, axis=1) / D
        inner = (weighted - mean[:, None] - normed * slope[:, None]) * scale[:, None]
        tl.store(grad_x + at, through + inner, mask=mask)
        total_weight += incoming * normed
        total_bias += incoming
        first += tl.num_programs(0) * ROWS
    at = tl.program_id(0) * D + column
    tl.store(partial_weight + at, tl.sum(total_weight, axis=0), mask=column < D)
    tl.store(partial_bias + at, tl.sum(total_bias, axis=0), mask=column < D)


class Shape(NamedTuple):
    """Tile of a program for width D: a power of two of columns, and rows enough to fill it."""

    block: int
    rows: int
    warps: int


def shape_of(width: int) -> Shape:
    """The tile for rows of `width` elements."""
    block = triton.next_power_of_2(width)
    rows = max(TILE // block, 1)
    return Shape(block, rows, max(4, block * rows // 512))


def gather_norm(
    x_TD: Tensor, kept: Sequence[Tensor], groups: Sequence[int], weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [P, D], slots [S], normal [P, D], rstd [P]) of contiguous x; `groups` is B, N, B, N, …"""
    sizes = group_sizes(groups, kept)
    packed = sum(size.packed for size in sizes)
    y_PD = x_TD.new_empty(packed, x_TD.shape[1], dtype=dtype)
    normal_PD = y_PD.new_empty(y_PD.shape, dtype=kept_as(dtype))
    rstd_P = x_TD.new_empty(packed, dtype=torch.float32)
    slots_S = x_TD.new_full((sum(size.samples for size in sizes),), -1, dtype=torch.int32)
    shape = shape_of(x_TD.shape[1])
    with torch.cuda.device_of(x_TD):
        for size, index, x, y, normal, rstd, slots in zip(
            sizes, kept, by_row(x_TD, sizes), by_packed(y_PD, sizes), by_packed(normal_PD, sizes),
            by_packed(rstd_P, sizes), slots_S.split([size.samples for size in sizes]), strict=True,
        ):  # fmt: skip
            if size.packed:
                gather_norm_kernel[(triton.cdiv(size.packed, shape.rows),)](
                    x, index, weight, bias, y, normal, rstd, slots, size.tokens, size.packed, eps,
                    D=x_TD.shape[1], BLOCK=shape.block, ROWS=shape.rows, num_warps=shape.warps,
                )  # fmt: skip
    return y_PD, slots_S, normal_PD, rstd_P


def scatter_add(
    x_TD: Tensor, slots_S: Tensor, update_PD: Tensor, kept: Sequence[Tensor], groups: Sequence[int],
    gamma: Tensor | None, scale: Sequence[float],
) -> Tensor:  # fmt: skip
    """x [T, D] plus the scaled update of the kept samples; x and update are contiguous."""
    sizes = group_sizes(groups, kept)
    out_TD = torch.empty_like(x_TD)
    shape = shape_of(x_TD.shape[1])
    with torch.cuda.device_of(x_TD):
        for size, factor, x, slots, update, out in zip(
            sizes, scale, by_row(x_TD, sizes), slots_S.split([size.samples for size in sizes]),
            by_packed(update_PD, sizes), by_row(out_TD, sizes), strict=True,
        ):  # fmt: skip
            scatter_add_kernel[(triton.cdiv(size.rows, shape.rows),)](
                x, slots, update, gamma, out, float(factor), size.tokens, size.rows,
                D=x_TD.shape[1], BLOCK=shape.block, ROWS=shape.rows, GAIN=gamma is not None, num_warps=shape.warps,
            )  # fmt: skip
    return out_TD


def scatter_add_grad(
    grad_TD: Tensor, update_PD: Tensor | None, kept: Sequence[Tensor], groups: Sequence[int], gamma: Tensor | None,
    scale: Sequence[float], dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of update [P, D], in `dtype`, and of gamma [D]; `update_PD` is needed for the latter only."""
    sizes = group_sizes(groups, kept)
    width = grad_TD.shape[1]
    grad_update_PD = grad_TD.new_empty(sum(size.packed for size in sizes), width, dtype=dtype)
    shape = shape_of(width)
    most = resident(grad_TD, SCATTER_PROGRAMS)
    programs = [min(triton.cdiv(size.packed, shape.rows), most) for size in sizes]
    partial = None if gamma is None else grad_TD.new_empty(sum(programs), width, dtype=torch.float32)
    partials = [None] * len(sizes) if partial is None else partial.split(programs)
    updates = [None] * len(sizes) if update_PD is None else by_packed(update_PD, sizes)
    with torch.cuda.device_of(grad_TD):
        for size, factor, count, index, grad, update, grad_update, part in zip(
            sizes, scale, programs, kept, by_row(grad_TD, sizes), updates, by_packed(grad_update_PD, sizes), partials,
            strict=True,
        ):  # fmt: skip
            if size.packed:
                scatter_add_grad_kernel[(count,)](
                    grad, index, update, gamma, grad_update, part, float(factor), size.tokens, size.packed,
                    D=width, BLOCK=shape.block, ROWS=shape.rows, GAIN=gamma is not None, num_warps=shape.warps,
                )  # fmt: skip
    return grad_update_PD, None if gamma is None or partial is None else partial.sum(0).to(gamma.dtype)


def gather_norm_grad(
    grad_TD: Tensor, grad_y_PD: Tensor, normal_PD: Tensor, rstd_P: Tensor, slots_S: Tensor, kept: Sequence[Tensor],
    groups: Sequence[int], weight: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [T, D], weight [D] and bias [D], from those of x after the scatter (`grad_TD`) and of y."""
    sizes = group_sizes(groups, kept)
    width = grad_TD.shape[1]
    grad_x_TD = torch.empty_like(grad_TD)
    shape = shape_of(width)
    most = resident(grad_TD, GATHER_PROGRAMS)
    programs = [min(triton.cdiv(size.rows, shape.rows), most) for size in sizes]
    partial_weight = grad_TD.new_empty(sum(programs), width, dtype=torch.float32)
    partial_bias = torch.empty_like(partial_weight)
    with torch.cuda.device_of(grad_TD):
        for size, count, grad, grad_y, normal, rstd, slots, grad_x, for_weight, for_bias in zip(
            sizes, programs, by_row(grad_TD, sizes), by_packed(grad_y_PD, sizes), by_packed(normal_PD, sizes),
            by_packed(rstd_P, sizes), slots_S.split([size.samples for size in sizes]), by_row(grad_x_TD, sizes),
            partial_weight.split(programs), partial_bias.split(programs), strict=True,
        ):  # fmt: skip
            gather_norm_grad_kernel[(count,)](
                grad, grad_y, normal, rstd, slots, weight, grad_x, for_weight, for_bias, size.tokens, size.rows,
                D=width, BLOCK=shape.block, ROWS=shape.rows, num_warps=shape.warps,
            )  # fmt: skip
    return grad_x_TD, partial_weight.sum(0).to(weight.dtype), partial_bias.sum(0).to(bias.dtype)


class Size(NamedTuple):
    """One group: its samples, the tokens of each, and of how many samples tokens are kept."""

    samples: int
    tokens: int
    kept: int

    @property
    def rows(self) -> int:
        """Tokens of all its samples."""
        return self.samples * self.tokens

    @property
    def packed(self) -> int:
        """Tokens of its kept samples."""
        return self.kept * self.tokens


def group_sizes(groups: Sequence[int], kept: Sequence[Tensor]) -> list[Size]:
    """The groups, given as B, N, B, N, …, with the number of samples kept of each."""
    return [Size(b, n, len(index)) for b, n, index in zip(groups[::2], groups[1::2], kept, strict=True)]


def by_row(tensor_TD: Tensor, sizes: Sequence[Size]) -> Iterator[Tensor]:
    """Views of the groups of a tensor with a row for every token."""
    return iter(tensor_TD.split([size.rows for size in sizes]))


def by_packed(tensor_PD: Tensor, sizes: Sequence[Size]) -> Iterator[Tensor]:
    """Views of the groups of a tensor with a row for every kept token."""
    return iter(tensor_PD.split([size.packed for size in sizes]))


def resident(tensor: Tensor, each: int) -> int:
    """Programs that run at once on the tensor's device, `each` per multiprocessor; a few in the interpreter."""
    if tensor.device.type != "cuda":
        return 3
    return each * torch.cuda.get_device_properties(tensor.device).multi_processor_count
