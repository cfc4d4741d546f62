"""What the ranks of a pretraining run send each other in a step, in closed form: a model of the volumes.

Volumes are those of ring algorithms: of a tensor of S bytes over n ranks, a rank sends (n - 1) / n * S for an
all-gather or a reduce-scatter (S is the whole tensor) and twice that for an all-reduce. Rings run node by node, so that
a share `Layout.crossing` of all hops leaves a node.

Blocks travel in the precision of the linear layers, heads and the root group in fp32, DDP's gradients in fp32. EMA and
AdamW work on shards and send nothing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dinov2cli.train.sizes import GLOBAL_CROPS, Batch, Layout, NetworkSizes, shard_of

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
BUCKET = 25 * 2**20
"""Bytes that DDP sends at a time (its default)."""
SCALARS = 8
"""All-reduces of single numbers in a step, about: gradient norms and what the log averages."""


@dataclass(frozen=True)
class Collective:
    """`calls` equal collectives of a step. `size` is the whole tensor's bytes; `crossing` the share of hops of its ring
    over `ranks` that leave the node. `blocking` ones have nothing to hide behind: the next operation needs them."""

    kind: str
    purpose: str
    calls: int
    size: float
    ranks: int
    crossing: float
    blocking: bool = False

    @property
    def hops(self) -> int:
        """Steps of the ring in one call."""
        return (self.ranks - 1) * (2 if self.kind == "all_reduce" else 1)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all calls together."""
        return self.calls * self.hops * self.size / self.ranks


def traffic(
    network: NetworkSizes, batch: Batch, layout: Layout, *, iterations: int = 3, koleo_global: bool = True
) -> dict[str, dict[str, float]]:
    """Bytes SENT per rank and step, by kind and in `total`, each as {inside, between, total} of nodes."""
    rows = collectives(network, batch, layout, iterations=iterations, koleo_global=koleo_global)
    sums = {kind: _split(row for row in rows if row.kind == kind) for kind in KINDS}
    return sums | {"total": _split(rows)}


def collectives(
    network: NetworkSizes, batch: Batch, layout: Layout, *, iterations: int = 3, koleo_global: bool = True
) -> list[Collective]:
    """Every collective of a step; none for a single rank.

    `iterations` of Sinkhorn; `koleo_global` searches KoLeo's neighbours among all ranks. With `batch.accumulate`
    weights are gathered for every part, gradients are sent with the last one.
    """
    if layout.ranks == 1:
        return []
    weights = _replicated(network, layout) if layout.sharding == "ddp" else _sharded(network, batch, layout)
    return weights + _losses(network, batch, layout, iterations, koleo_global)


def _replicated(network: NetworkSizes, layout: Layout) -> list[Collective]:
    size = 4 * network.parameters()
    calls = math.ceil(size / BUCKET)
    crossing = layout.crossing(layout.ranks)
    return [Collective("all_reduce", "gradients", calls, size / calls, layout.ranks, crossing)]


def _sharded(network: NetworkSizes, batch: Batch, layout: Layout) -> list[Collective]:
    """Gathered weights of student and teacher, scattered gradients, and for `hybrid` their sums between nodes."""
    shards, parts = layout.shards, batch.accumulate
    replicas = layout.ranks // shards
    within, across = layout.crossing(shards), layout.crossing(replicas, stride=shards)
    rows = []
    for group in network.groups():
        piece = (batch.wide if group.half else 4) * shard_of(group.shapes, shards)
        times, calls, whole = group.times, group.times * parts, piece * shards
        if shards > 1:
            gathers = 2 if layout.reshard and not group.kept else 1
            rows += [
                Collective("all_gather", "student", gathers * calls, whole, shards, within),
                Collective("all_gather", "teacher", calls, whole, shards, within),
                Collective("reduce_scatter", "gradients", times, whole, shards, within),
            ]
        if replicas > 1:
            rows.append(Collective("all_reduce", "gradients", times, piece, replicas, across))
    return rows


def _losses(
    network: NetworkSizes, batch: Batch, layout: Layout, iterations: int, koleo_global: bool
) -> list[Collective]:
    """Small tensors in fp32: Sinkhorn's K-vectors (one maximum, a sum per iteration), KoLeo's class tokens, scalars."""
    ranks, parts, crossing = layout.ranks, batch.accumulate, layout.crossing(layout.ranks)

    def row(kind: str, purpose: str, calls: int, size: float) -> Collective:
        return Collective(kind, purpose, calls * parts, size, ranks, crossing, blocking=True)

    # A tied head still gives two sets of targets, of class tokens and of patches.
    prototypes = [network.heads[0].prototypes, network.heads[-1].prototypes]
    rows = [row("all_reduce", "sinkhorn", 1 + iterations, 4 * size) for size in prototypes]
    rows.append(row("all_reduce", "sinkhorn", len(prototypes), 4))  # counts of rows
    if koleo_global:
        tokens = 4 * network.width * batch.part * ranks
        rows.append(row("all_gather", "koleo", GLOBAL_CROPS, tokens))
        rows.append(row("all_gather", "koleo", GLOBAL_CROPS, 4 * batch.part * ranks))  # which tokens are there
        rows.append(row("all_reduce", "koleo", GLOBAL_CROPS, tokens))
        rows.append(row("all_reduce", "koleo", GLOBAL_CROPS, 4))  # how many
    return [*rows, Collective("all_reduce", "scalars", SCALARS, 4, ranks, crossing, blocking=True)]


def _split(rows: Iterable[Collective]) -> dict[str, float]:
    inside = between = 0.0
    for row in rows:
        between += row.sent * row.crossing
        inside += row.sent * (1 - row.crossing)
    return {"inside": inside, "between": between, "total": inside + between}
