"""Triton kernels of the cross-entropy to soft targets: loss, and its gradient written over the logits.

Of a student row s at temperature T and its target q, the sum of the targets of one or more teacher crops:

    loss = sum(q) * logsumexp(s / T) - sum(q * s) / T,        d loss / d s = (sum(q) * softmax(s / T) - q) / T.

Neither q nor the softmax is ever written: q is computed again from the teacher's logits and the Sinkhorn factors (see
`dinov2cli.losses.sinkhorn`), or read, where it is a matrix. Student crops compared with the same teacher crops share
one computation of q. The forward pass reads student and teacher logits once, the backward pass again, and it writes
once: 6 and 10 bytes per element with float32 student and 16-bit teacher logits.

A program owns BM images and BK columns, and goes through the crops of a run one after the other. Its maxima and sums
are written per tile and combined in a fixed order: the same input gives the same bits.
"""
# mypy: disable-error-code=no-untyped-def

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2cli.kernels.sinkhorn_triton import finite_or_zero

# At more registers than 128 only one program fits on a multiprocessor, with nothing to do while it waits for memory.
TILE = {"BM": 8, "BK": 1024, "num_warps": 8, "maxnreg": 128}
_COMBINED = 4096  # elements of a tile of the combining kernel
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def target_tile(
    teacher,
    column_shift,
    row_shift,
    column_scale,
    row_scale,
    image,
    there,
    column,
    inside,
    batch,
    stride,
    scale,
    TEACHERS: tl.constexpr,
    GLOBALS: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Sum of the targets of the teacher crops whose bit is set in TEACHERS: [BM, BK], 0 outside."""
    mask = there[:, None] & inside[None, :]
    total = tl.zeros([BM, BK], tl.float32)
    if not DENSE:
        shift = tl.load(column_shift + column, mask=inside, other=0.0)
        factor = tl.load(column_scale + column, mask=inside, other=0.0)
    for crop in tl.static_range(GLOBALS):
        if (TEACHERS >> crop) & 1:
            row = crop * batch + image
            at = teacher + row.to(tl.int64)[:, None] * stride + column[None, :]
            if DENSE:
                total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            else:
                x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
                weight = tl.load(row_scale + row, mask=there, other=0.0)
                x = x - shift[None, :] - tl.load(row_shift + row, mask=there, other=0.0)[:, None]
                x = tl.where((weight != 0.0)[:, None], x, float("-inf"))
                total += tl.exp2(x * scale) * factor[None, :] * weight[:, None]
    return total


@triton.jit(do_not_specialize=["batch", "crops"])
def forward_kernel(
    student,
    teacher,
    column_shift,
    row_shift,
    column_scale,
    row_scale,
    part,
    batch,
    columns,
    crops,
    count,
    crop_stride,
    row_stride,
    teacher_stride,
    scale,
    inverse,
    TEACHERS: tl.constexpr,
    GLOBALS: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Per tile: maximum of x = s * inverse, sums of exp2(x - maximum), of q * (x - maximum) and of q.

    `part` [4, tiles, crops, batch], of which the `count` crops from the pointer on are written.
    """
    image = tl.program_id(0) * BM + tl.arange(0, BM)
    there = image < batch
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = column < columns
    mask = there[:, None] & inside[None, :]
    q = target_tile(
        teacher,
        column_shift,
        row_shift,
        column_scale,
        row_scale,
        image,
        there,
        column,
        inside,
        batch,
        teacher_stride,
        scale,
        TEACHERS,
        GLOBALS,
        DENSE,
        BM,
        BK,
    )
    mass = tl.sum(q, 1)
    line = student + image.to(tl.int64)[:, None] * row_stride + column[None, :]
    slot = part + tl.program_id(1).to(tl.int64) * crops * batch + image
    field = tl.num_programs(1).to(tl.int64) * crops * batch
    for _ in range(count):
        x = tl.load(line, mask=mask, other=float("-inf")).to(tl.float32) * inverse
        top = tl.max(x, 1)
        x = x - finite_or_zero(top)[:, None]
        tl.store(slot, top, mask=there)
        tl.store(slot + field, tl.sum(tl.exp2(x), 1), mask=there)
        tl.store(slot + 2 * field, tl.sum(tl.where(mask, q * x, 0.0), 1), mask=there)
        tl.store(slot + 3 * field, mass, mask=there)
        line += crop_stride
        slot += batch


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(part, loss, lse, mass, rows, TILES: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """What `forward_kernel` wrote [4, TILES, rows] to loss, logsumexp (base 2) and sum of the target of each row.

    Rows without target get loss 0, whatever they hold.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.arange(0, BT)
    there = row < rows
    mask = (tile < TILES)[:, None] & there[None, :]
    at = part + tile.to(tl.int64)[:, None] * rows + row[None, :]
    field = rows.to(tl.int64) * TILES
    top = tl.load(at, mask=mask, other=float("-inf"))
    total = tl.load(at + field, mask=mask, other=0.0)
    product = tl.load(at + 2 * field, mask=mask, other=0.0)
    weight = tl.load(at + 3 * field, mask=mask, other=0.0)
    best = tl.max(top, 0)
    below = tl.where(mask, top - finite_or_zero(best)[None, :], 0.0)
    total = tl.sum(total * tl.exp2(below), 0)
    product = tl.sum(product + weight * below, 0)
    weight = tl.sum(weight, 0)
    total = tl.log2(total)
    tl.store(loss + row, tl.where(weight != 0.0, (weight * total - product) * LN2, 0.0), mask=there)
    tl.store(lse + row, best + total, mask=there)
    tl.store(mass + row, weight, mask=there)


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(
    student,
    teacher,
    column_shift,
    row_shift,
    column_scale,
    row_scale,
    lse,
    mass,
    weight,
    grad,
    batch,
    columns,
    count,
    crop_stride,
    row_stride,
    grad_crop_stride,
    grad_row_stride,
    teacher_stride,
    scale,
    inverse,
    TEACHERS: tl.constexpr,
    GLOBALS: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """(mass * softmax - q) * weight; rows without target get 0. `grad` may be `student`: each tile is read, then
    written, by one program."""
    image = tl.program_id(0) * BM + tl.arange(0, BM)
    there = image < batch
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = column < columns
    mask = there[:, None] & inside[None, :]
    q = target_tile(
        teacher,
        column_shift,
        row_shift,
        column_scale,
        row_scale,
        image,
        there,
        column,
        inside,
        batch,
        teacher_stride,
        scale,
        TEACHERS,
        GLOBALS,
        DENSE,
        BM,
        BK,
    )
    line = student + image.to(tl.int64)[:, None] * row_stride + column[None, :]
    out = grad + image.to(tl.int64)[:, None] * grad_row_stride + column[None, :]
    slot = image
    for _ in range(count):
        x = tl.load(line, mask=mask, other=float("-inf")).to(tl.float32) * inverse
        share = tl.load(mass + slot, mask=there, other=0.0)
        p = tl.exp2(x - tl.load(lse + slot, mask=there, other=0.0)[:, None]) * share[:, None]
        p = (p - q) * tl.load(weight + slot, mask=there, other=0.0)[:, None]
        p = tl.where((share != 0.0)[:, None], p, 0.0)
        tl.store(out, p.to(grad.dtype.element_ty), mask=mask)
        line += crop_stride
        out += grad_crop_stride
        slot += batch


def forward(
    student: Tensor,
    teacher: Tensor,
    factors: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    scale: float,
    inverse: float,
    teachers: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logsumexp in base 2 of the scaled logits, and sum of the targets, float32 [C, B] each.

    `student` [C, B, K], any strides but 1 between columns; `teacher` [G * B, K], logits with `factors` (column shift,
    row shift, column scale, row scale), or without them the targets themselves. `scale` = log2(e) / teacher
    temperature, `inverse` = log2(e) / student temperature; bit g of `teachers[c]` joins crop c and teacher crop g.
    """
    crops, batch, columns = student.shape
    tiles = triton.cdiv(columns, TILE["BK"])
    part = torch.empty(4, tiles, crops, batch, dtype=torch.float32, device=student.device)
    loss, lse, mass = (torch.empty_like(part[0, 0]) for _ in range(3))  # apart: each is aligned, whatever the batch
    if batch * crops == 0:
        return loss, lse, mass
    for first, count, bits in _runs(teachers):
        forward_kernel[(triton.cdiv(batch, TILE["BM"]), tiles)](
            student[first],
            teacher,
            *(factors or (teacher,) * 4),
            part[:, :, first],
            batch,
            columns,
            crops,
            count,
            student.stride(0),
            student.stride(1),
            teacher.stride(0),
            scale,
            inverse,
            TEACHERS=bits,
            GLOBALS=bits.bit_length(),
            DENSE=factors is None,
            **TILE,
        )
    rows, spread = crops * batch, triton.next_power_of_2(tiles)
    width = max(1, _COMBINED // spread)
    combine_kernel[(triton.cdiv(rows, width),)](part, loss, lse, mass, rows, TILES=tiles, BT=spread, BN=width)
    return loss, lse, mass


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    factors: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    saved: tuple[Tensor, Tensor],
    weight: Tensor,
    scale: float,
    inverse: float,
    teachers: list[int],
) -> None:
    """Write the gradient to `grad` [C, B, K], which may be `student`.

    `saved`: logsumexp and sum of the targets as `forward` gave them; `weight` float32 [C, B], contiguous: the
    gradient that comes in over the student's temperature. Otherwise as `forward`.
    """
    crops, batch, columns = student.shape
    if batch * crops == 0:
        return
    for first, count, bits in _runs(teachers):
        backward_kernel[(triton.cdiv(batch, TILE["BM"]), triton.cdiv(columns, TILE["BK"]))](
            student[first],
            teacher,
            *(factors or (teacher,) * 4),
            saved[0][first],
            saved[1][first],
            weight[first],
            grad[first],
            batch,
            columns,
            count,
            student.stride(0),
            student.stride(1),
            grad.stride(0),
            grad.stride(1),
            teacher.stride(0),
            scale,
            inverse,
            TEACHERS=bits,
            GLOBALS=bits.bit_length(),
            DENSE=factors is None,
            **TILE,
        )


def _runs(teachers: list[int]) -> list[tuple[int, int, int]]:
    """(first crop, number of crops, their teachers) of each run of crops with the same teachers."""
    runs: list[tuple[int, int, int]] = []
    for crop, bits in enumerate(teachers):
        if runs and runs[-1][2] == bits:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, bits)
        else:
            runs.append((crop, 1, bits))
    return runs
