"""Triton kernels of Sinkhorn-Knopp on logits [M, K]: every pass is ONE read of the matrix and writes only vectors.

With c = log2(e) / T the entry of row m and column k is E[m, k] = exp2((logit - column_shift[k] - row_shift[m]) * c), as
in `dinov2cli.losses.sinkhorn`, where it is shown that no sum of it can vanish or overflow. The first pass over columns
and the first over rows find the shifts and the sums at once (online, as a softmax is computed in one pass); the later
ones only sum. Three iterations are six reads.

Column passes: a program owns BK columns and a run of rows; a thread holds whole columns of its tile, so sums down a
column cost no exchange between threads. Row passes: a program owns BM rows and a run of columns; each thread adds up V
neighbours first and keeps its own running sum until the end. Runs are there to fill a GPU when the matrix is short;
their partial results are combined in a fixed order, without atomics: the same input gives the same bits.

Compiled when first called on a GPU; with TRITON_INTERPRET=1 set before the import they run on a CPU. Imported only
where Triton is there.
"""
# mypy: disable-error-code=no-untyped-def

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMN_TILE = {"BM": 8, "BK": 1024, "STAGES": 1, "num_warps": 4}
ROW_TILE = {"BM": 16, "BK": 256, "V": 8, "STAGES": 3, "num_warps": 4}
COMBINED = 4096  # elements of a tile of the combining kernel
PROGRAMS = 1056
"""Programs wanted at least: 8 for each of the 132 multiprocessors of an H100. Fixed, so that results do not depend on
the GPU."""
_SHORTEST_RUN = 32  # rows; fewer and the partial results weigh as much as the matrix
_NARROWEST_RUN = 2048  # columns


@triton.jit
def finite_or_zero(x):
    """`x` with -inf, the maximum of nothing, replaced by 0: something that can be subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=["rows", "run"])
def columns_first_kernel(
    logits,
    valid,
    part_top,
    part_total,
    rows,
    columns,
    stride,
    run,
    scale,
    HAS_VALID: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Maximum and sum of exp2((logit - maximum) * scale) down each column of one run of rows."""
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = column < columns
    start = tl.program_id(1) * run
    stop = tl.minimum(start + run, rows)
    top = tl.full([BK], float("-inf"), tl.float32)
    total = tl.zeros([BK], tl.float32)
    for first in tl.range(start, stop, BM, num_stages=STAGES):
        row = first + tl.arange(0, BM)
        there = row < stop
        if HAS_VALID:
            there = there & (tl.load(valid + row, mask=there, other=0) != 0)
        at = logits + row.to(tl.int64)[:, None] * stride + column[None, :]
        x = tl.load(at, mask=there[:, None] & inside[None, :], other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        base = finite_or_zero(higher)
        total = total * tl.exp2((top - base) * scale) + tl.sum(tl.exp2((x - base[None, :]) * scale), 0)
        top = higher
    out = tl.program_id(1).to(tl.int64) * columns + column
    tl.store(part_top + out, top, mask=inside)
    tl.store(part_total + out, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "run"])
def columns_sum_kernel(
    logits,
    column_shift,
    row_shift,
    row_scale,
    part_total,
    rows,
    columns,
    stride,
    run,
    scale,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum of E * row_scale down each column of one run of rows. Rows with scale 0 may hold anything."""
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = column < columns
    start = tl.program_id(1) * run
    stop = tl.minimum(start + run, rows)
    shift = tl.load(column_shift + column, mask=inside, other=0.0)
    total = tl.zeros([BK], tl.float32)
    for first in tl.range(start, stop, BM, num_stages=STAGES):
        row = first + tl.arange(0, BM)
        there = row < stop
        at = logits + row.to(tl.int64)[:, None] * stride + column[None, :]
        x = tl.load(at, mask=there[:, None] & inside[None, :], other=float("-inf")).to(tl.float32)
        factor = tl.load(row_scale + row, mask=there, other=0.0)
        x = x - shift[None, :] - tl.load(row_shift + row, mask=there, other=0.0)[:, None]
        x = tl.where((factor != 0.0)[:, None], x, float("-inf"))
        total += tl.sum(tl.exp2(x * scale) * factor[:, None], 0)
    tl.store(part_total + tl.program_id(1).to(tl.int64) * columns + column, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "run"])
def rows_first_kernel(
    logits,
    column_shift,
    column_scale,
    part_top,
    part_total,
    rows,
    columns,
    stride,
    run,
    scale,
    BM: tl.constexpr,
    BK: tl.constexpr,
    V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Maximum of x = logit - column_shift and sum of exp2((x - maximum) * scale) * column_scale along each row."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < rows
    start = tl.program_id(1) * run * BK
    line = logits + row.to(tl.int64)[:, None] * stride
    top = tl.full([BM, BK // V], float("-inf"), tl.float32)
    total = tl.zeros([BM, BK // V], tl.float32)
    for first in tl.range(start, tl.minimum(start + run * BK, columns), BK, num_stages=STAGES):
        column = first + tl.arange(0, BK)
        inside = column < columns
        x = tl.load(line + column[None, :], mask=there[:, None] & inside[None, :], other=float("-inf")).to(tl.float32)
        x = tl.reshape(x - tl.load(column_shift + column, mask=inside, other=0.0)[None, :], [BM, BK // V, V])
        weight = tl.reshape(tl.load(column_scale + column, mask=inside, other=0.0)[None, :], [1, BK // V, V])
        higher = tl.maximum(top, tl.max(x, 2))
        base = finite_or_zero(higher)
        total = total * tl.exp2((top - base) * scale) + tl.sum(tl.exp2((x - base[:, :, None]) * scale) * weight, 2)
        top = higher
    highest = tl.max(top, 1)
    total = tl.sum(total * tl.exp2((top - finite_or_zero(highest)[:, None]) * scale), 1)
    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(part_top + out, highest, mask=there)
    tl.store(part_total + out, total, mask=there)


@triton.jit(do_not_specialize=["rows", "run"])
def rows_sum_kernel(
    logits,
    column_shift,
    row_shift,
    column_scale,
    part_total,
    rows,
    columns,
    stride,
    run,
    scale,
    BM: tl.constexpr,
    BK: tl.constexpr,
    V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum of E * column_scale along each row of one run of columns."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < rows
    start = tl.program_id(1) * run * BK
    line = logits + row.to(tl.int64)[:, None] * stride
    shift = tl.load(row_shift + row, mask=there, other=0.0)
    total = tl.zeros([BM, BK // V], tl.float32)
    for first in tl.range(start, tl.minimum(start + run * BK, columns), BK, num_stages=STAGES):
        column = first + tl.arange(0, BK)
        inside = column < columns
        x = tl.load(line + column[None, :], mask=there[:, None] & inside[None, :], other=float("-inf")).to(tl.float32)
        x = x - tl.load(column_shift + column, mask=inside, other=0.0)[None, :] - shift[:, None]
        weight = tl.load(column_scale + column, mask=inside, other=0.0)[None, :]
        total += tl.sum(tl.reshape(tl.exp2(x * scale) * weight, [BM, BK // V, V]), 2)
    tl.store(part_total + tl.program_id(1).to(tl.int64) * rows + row, tl.sum(total, 1), mask=there)


@triton.jit(do_not_specialize=["parts", "length"])
def combine_kernel(part_top, part_total, top, total, parts, length, scale, BP: tl.constexpr, BN: tl.constexpr):
    """Maxima [parts, N] and sums relative to them into one maximum and one sum. BP is at least `parts`."""
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.arange(0, BP)
    inside = index < length
    mask = (part < parts)[:, None] & inside[None, :]
    at = part.to(tl.int64)[:, None] * length + index[None, :]
    here = tl.load(part_top + at, mask=mask, other=float("-inf"))
    sums = tl.load(part_total + at, mask=mask, other=0.0)
    best = tl.max(here, 0)
    below = (here - finite_or_zero(best)[None, :]) * scale
    tl.store(top + index, best, mask=inside)
    tl.store(total + index, tl.sum(sums * tl.exp2(below), 0), mask=inside)


def columns_first(logits: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Column maxima of the valid rows [K] (-inf without any), and sums of exp2((logit - maximum) * scale) [K].

    `logits` [M, K] with neighbouring columns next to each other, `valid` bool [M].
    """
    rows, columns = logits.shape
    run, runs = _row_runs(rows, columns)
    top, total = _empty(logits, runs, columns), _empty(logits, runs, columns)
    columns_first_kernel[(triton.cdiv(columns, COLUMN_TILE["BK"]), runs)](
        logits,
        logits if valid is None else valid.view(torch.uint8),
        top,
        total,
        rows,
        columns,
        logits.stride(0),
        run,
        scale,
        HAS_VALID=valid is not None,
        **COLUMN_TILE,
    )
    return _combine(top, total, scale)


def columns_sum(logits: Tensor, column_shift: Tensor, row_shift: Tensor, row_scale: Tensor, scale: float) -> Tensor:
    """Sums of E * row_scale down the columns [K]; rows of scale 0 enter nothing."""
    rows, columns = logits.shape
    run, runs = _row_runs(rows, columns)
    total = _empty(logits, runs, columns)
    columns_sum_kernel[(triton.cdiv(columns, COLUMN_TILE["BK"]), runs)](
        logits,
        column_shift,
        row_shift,
        row_scale,
        total,
        rows,
        columns,
        logits.stride(0),
        run,
        scale,
        **COLUMN_TILE,
    )
    return total.sum(0)


def rows_first(logits: Tensor, column_shift: Tensor, column_scale: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Row maxima of logit - column_shift [M], and sums of E * column_scale with those maxima as row shifts [M]."""
    rows, columns = logits.shape
    run, runs = _column_runs(rows, columns)
    top, total = _empty(logits, runs, rows), _empty(logits, runs, rows)
    if rows == 0:
        return top[0], total[0]
    rows_first_kernel[(triton.cdiv(rows, ROW_TILE["BM"]), runs)](
        logits, column_shift, column_scale, top, total, rows, columns, logits.stride(0), run, scale, **ROW_TILE
    )
    return _combine(top, total, scale)


def rows_sum(logits: Tensor, column_shift: Tensor, row_shift: Tensor, column_scale: Tensor, scale: float) -> Tensor:
    """Sums of E * column_scale along the rows [M]."""
    rows, columns = logits.shape
    run, runs = _column_runs(rows, columns)
    total = _empty(logits, runs, rows)
    if rows > 0:
        rows_sum_kernel[(triton.cdiv(rows, ROW_TILE["BM"]), runs)](
            logits,
            column_shift,
            row_shift,
            column_scale,
            total,
            rows,
            columns,
            logits.stride(0),
            run,
            scale,
            **ROW_TILE,
        )
    return total.sum(0)


def _row_runs(rows: int, columns: int) -> tuple[int, int]:
    """Rows of a run (a multiple of a tile's) and the number of runs, at least one, for the column passes."""
    beside = triton.cdiv(columns, COLUMN_TILE["BK"])
    runs = max(1, min(triton.cdiv(PROGRAMS, beside), rows // _SHORTEST_RUN))
    run = max(1, triton.cdiv(triton.cdiv(rows, runs), COLUMN_TILE["BM"])) * COLUMN_TILE["BM"]
    return run, max(1, triton.cdiv(rows, run))


def _column_runs(rows: int, columns: int) -> tuple[int, int]:
    """Tiles of a run (in tiles, for the compiler to see that it is aligned), number of runs, for the row passes."""
    beside = max(1, triton.cdiv(rows, ROW_TILE["BM"]))
    runs = max(1, min(triton.cdiv(PROGRAMS, beside), columns // _NARROWEST_RUN))
    run = max(1, triton.cdiv(triton.cdiv(columns, runs), ROW_TILE["BK"]))
    return run, max(1, triton.cdiv(columns, run * ROW_TILE["BK"]))


def _combine(part_top: Tensor, part_total: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    parts, length = part_top.shape
    if parts == 1:
        return part_top[0], part_total[0]
    top, total = torch.empty_like(part_top[0]), torch.empty_like(part_total[0])
    height = triton.next_power_of_2(parts)
    width = max(1, COMBINED // height)
    combine_kernel[(triton.cdiv(length, width),)](
        part_top, part_total, top, total, parts, length, scale, BP=height, BN=width
    )
    return top, total


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
