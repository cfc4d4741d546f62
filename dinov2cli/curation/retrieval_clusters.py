"""Cluster-based retrieval: pool images of the clusters in which a query set is at home (METHOD.md section 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.curation.query_sets import Asked, QuerySet
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Progress, Store
from dinov2cli.search.kmeans import KMeans, assign, rank_in_group
from dinov2cli.search.vectors import Int64, Vectors


@dataclass(frozen=True)
class Clusters:
    """The pool's clusters: label [N] of every row, k of them, and the images of each set in each, counts [S, k]."""

    label: Int64
    k: int
    counts: npt.NDArray[np.int64]

    @property
    def empty(self) -> int:
        """Clusters without any image of the pool."""
        return int((np.bincount(self.label, minlength=self.k) == 0).sum())


def ask_clusters(
    source: Vectors,
    queries: Sequence[QuerySet],
    kmeans: KMeans,
    *,
    seed: int,
    store: Store | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[list[Asked], Clusters]:
    """What each set asks for: images of its clusters, one of each cluster in turn, so that a limit is poured evenly.

    The draw order within a cluster is one for all sets: sets that meet in a cluster share images there, and
    `per_cluster` holds for their union. A set that is at home nowhere asks for nothing (see `homeless`).
    """
    label = assign(source, kmeans, store=store, name="pool", progress=progress, ranks=ranks).label
    # Each set under its own name: two sets may hold equally many images.
    homes = (
        assign(query.vectors, kmeans, store=store, name=f"queries-{number}", ranks=ranks).label
        for number, query in enumerate(queries)
    )
    counts = np.stack([np.bincount(home, minlength=kmeans.k) for home in homes]).astype(np.int64)
    at_home = np.stack([mine > query.more_than for query, mine in zip(queries, counts, strict=True)])
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xC105]))
    member = np.flatnonzero(np.logical_or.reduce(at_home)[label])
    group = label[member]
    order = np.lexsort((rng.random(len(member)), group))
    position = np.empty(len(member), dtype=np.int64)
    position[order] = rank_in_group(group[order])
    # Another draw than that of the positions: the smallest numbers of a large cluster are smaller than a small one's.
    turn = np.lexsort((rng.random(len(member)), position))
    member, group, position = member[turn], group[turn], position[turn]
    asked = []
    for query, used in zip(queries, at_home, strict=True):
        mine = member[used[group] & (position < query.per_cluster)]
        asked.append(Asked(mine[: query.cap], len(mine), len(mine), clusters=int(used.sum())))
    return asked, Clusters(label, kmeans.k, counts)


def homeless(query: QuerySet, counts: npt.NDArray[np.int64]) -> str:
    """Why a set of which the clusters hold `counts` [k] images got nothing, and what to do."""
    return (
        f"no cluster holds more than {query.more_than} images of query set {query.name} (at most {int(counts.max())} "
        f"in any of {len(counts)} clusters); use fewer clusters, or mode sample for a small query set"
    )
