"""Stochastic depth that skips the work: which samples of a pack a block runs on, drawn alike by all processes.

Legend of shape suffixes: T tokens of all groups together, B samples of one group, N tokens of one sample, D width.
A pack x_TD is described by `groups`, a list of (B, N), laid out one group after another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2cli.kernels import depth as kernels
from dinov2cli.kernels.dispatch import choose

Groups = list[tuple[int, int]]


class Kept(NamedTuple):
    """Samples on which one block runs its two residual branches: for each group an int64 index tensor (of this
    process's samples, possibly none) and what the branch is scaled by, all samples over those kept of them. `fused`:
    by our kernels rather than torch."""

    attention: list[Tensor]
    ffn: list[Tensor]
    scale: list[float]
    fused: bool = False


class Share(NamedTuple):
    """This process's samples of a batch spread over several: `images` of `world_size` x `images`, number `rank`.

    A group of crops is laid out crop after crop, [crops * images]; the whole batch is [crops * world_size * images].
    """

    rank: int
    world_size: int
    images: int

    def places(self, samples: int) -> np.ndarray:
        """For every sample of the whole batch (int64 [samples]) its number here, -1 for those of other processes."""
        places = np.full((samples // (self.world_size * self.images), self.world_size, self.images), -1)
        places[:, self.rank] = np.arange(len(places) * self.images).reshape(-1, self.images)
        return places.ravel()


def add_residual(
    branch: Callable[[Tensor, Groups], Tensor], x_TD: Tensor, groups: Groups, kept: list[Tensor], scale: list[float]
) -> Tensor:
    """x + branch(x), the branch computed for the kept samples only and added back scaled, for each group.

    With B / kept as scale the expected sum is that of the full branch (paper §5, "efficient stochastic depth").
    Indices within a group must be unique; then the sum is deterministic also on a GPU.
    """
    width = x_TD.shape[-1]
    # Whole samples as rows, so that gather and add-back move long contiguous slices.
    rows = [x.view(b, n * width) for x, (b, n) in zip(split(x_TD, groups), groups, strict=True)]
    subset = [x.index_select(0, index) for x, index in zip(rows, kept, strict=True)]
    sub_groups = [(len(index), n) for index, (_, n) in zip(kept, groups, strict=True)]
    update_TD = branch(join([x.reshape(-1, width) for x in subset]), sub_groups).to(x_TD.dtype)
    summed = []
    for x, index, update, (b, n), factor in zip(rows, kept, split(update_TD, sub_groups), groups, scale, strict=True):
        added = update.reshape(len(index), n * width)
        # The compiler keeps no more than it needs anyway, and cannot look into _AddRows where `factor` varies.
        compiling = torch.compiler.is_compiling()
        total: Tensor = x.index_add(0, index, added * factor) if compiling else _AddRows.apply(x, index, added, factor)
        summed.append(total.view(b * n, width))
    return join(summed)


def add_fused(
    branch: Callable[[Tensor, Groups], Tensor],
    x_TD: Tensor,
    groups: Groups,
    kept: list[Tensor],
    scale: list[float],
    *,
    norm: nn.LayerNorm,
    gamma: Tensor | None,
) -> Tensor:
    """As add_residual, with the `norm` before the branch and LayerScale's `gamma` behind it done in the same passes.

    Under autocast the normalised tokens are written in 16 bit, the type the branch's first linear layer would convert
    them to: one pass less. The statistics are float32 all the same.
    """
    kind = x_TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
    sizes = [number for group in groups for number in group]
    y_TD, link, slots = kernels.gather_norm(x_TD, kept, sizes, norm.weight, norm.bias, norm.eps, dtype)
    update_TD = branch(y_TD, [(len(index), n) for index, (_, n) in zip(kept, groups, strict=True)])
    return kernels.scatter_add(x_TD, link, slots, update_TD, kept, sizes, gamma, scale)


class _AddRows(torch.autograd.Function):
    """x with `scale` times each row of `update` [K, W] added to row `index` [K] of x [B, W].

    torch's index_add keeps `update` for its backward pass, of which only the shape is needed: a seventh of a block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, update: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(index)
        ctx.scale = scale
        return x.index_add(0, index, update, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0], None, grads[0].index_select(0, index).mul_(ctx.scale), None


def draw_kept(
    groups: Groups,
    rates: list[float],
    generator: torch.Generator,
    device: torch.device,
    share: Share | None = None,
) -> list[Kept | None]:
    """Which samples each block keeps: max(floor(B (1 - rate)), 1) of every group, drawn afresh for each branch.

    Drawn for the whole forward pass at once, so that a GPU sees one transfer. None where the rate is 0. With `share` B
    counts the samples of all processes, which draw alike from equal generators: each keeps those of them it has.
    """
    sizes = [b if share is None else b * share.world_size for b, _ in groups]
    counts = [[max(int(b * (1 - rate) + 1e-9), 1) for b in sizes] for rate in rates]
    places = {} if share is None else {b: share.places(b) for b in sizes}

    def draw(samples: int, count: int) -> Tensor:
        kept = torch.randperm(samples, generator=generator, device=generator.device)[:count]
        if share is None:
            return kept
        # NumPy: torch would wake all its threads for each of these, hundreds of times a step.
        here = places[samples][kept.numpy()]
        return torch.from_numpy(here[here >= 0])

    drawn = [
        draw(b, count)
        for rate, row in zip(rates, counts, strict=True)
        if rate > 0
        for _branch in range(2)
        for b, count in zip(sizes, row, strict=True)
    ]
    if not drawn:
        return [None] * len(rates)
    fused = choose("stochastic depth", device).backend == "triton"
    pieces = iter(torch.cat(drawn).to(device, non_blocking=True).split([len(index) for index in drawn]))
    return [
        Kept(
            [next(pieces) for _ in groups],
            [next(pieces) for _ in groups],
            [b / count for b, count in zip(sizes, row, strict=True)],
            fused,
        )
        if rate > 0
        else None
        for rate, row in zip(rates, counts, strict=True)
    ]


def split(x_TD: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """The pack cut into one [B * N, D] view per group."""
    return x_TD.split([b * n for b, n in groups])


def join(pieces: list[Tensor]) -> Tensor:
    """Concatenation that does not copy a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
