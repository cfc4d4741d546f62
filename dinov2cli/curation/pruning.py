"""Pruning of semantic duplicates within clusters (SemDeDup, Abbas et al. 2023, arXiv 2303.09540), from the paper.

Images are clustered by k-means; within a cluster they come in order, the farthest from the centroid first (the paper
keeps the least typical of a group), and one is dropped when its cosine to an image *kept* before it in that cluster
lies above 1 - eps. The published code compares with every image before, dropped ones too; comparing with kept ones
means that every dropped image has a kept one it resembles, which is named.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.tables import Curated, dropped_table, kept_table, other_rows
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.kmeans import KMeans, assign, fit_kmeans
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors

_CHUNK = 2048
_STEPS = 8
_FIELDS = ("kept", "nearest", "similarity")


@dataclass(frozen=True)
class Pruned:
    """For every row [N] whether it is kept, the row kept before it in its cluster that it is most similar to
    (`nearest`, -1 for the first of a cluster), and their cosine (`similarity`, -inf)."""

    kept: npt.NDArray[np.bool_]
    nearest: Int64
    similarity: Float32

    def representative(self) -> Int64:
        """[N]: the kept row that stands for each row; -1 where there is none (a cluster of which nothing is kept)."""
        stands = np.where(self.kept, np.arange(len(self.kept)), self.nearest)
        # A target size may have dropped the one a row was dropped for: then that one's own nearest stands for both.
        while len(left := np.flatnonzero((stands >= 0) & ~self.kept[stands])):
            stands[left] = self.nearest[stands[left]]
        return stands


def prune_semantic(
    pool: pa.Table,
    vectors: Vectors | npt.NDArray[np.floating],
    *,
    eps: float | None = None,
    target_size: int | None = None,
    clusters: int | None = None,
    iterations: int = 20,
    kmeans: KMeans | None = None,
    seed: int = 0,
    memory: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """The pool without what repeats within its clusters: by `eps`, or down to exactly `target_size` images.

    clusters: of the k-means (by default one per 1,000 images, at most the paper's 50,000), unless a fitted `kmeans` is
    given; cost is about N x D x the size of a cluster, and duplicates in different clusters are not seen. With a
    target, eps is found in a few passes (`_to_size`): the last images to go are those most similar to a kept one.
    The order within a cluster is that of the distance to the centroid, so for given clusters the choice does not
    depend on the order of the rows, but among images of equal distance. kept has `cluster` and `similarity`
    (greatest cosine to an image kept before it in the cluster, null for the first); dropped names the kept image it
    repeats. The ranks share the clusters. Raises UserError for neither or both of `eps` and `target_size`, or an
    impossible one.
    """
    source = as_vectors(vectors)
    _check(source.rows, eps, target_size)
    if kmeans is None:
        k = min(clusters or default_clusters(source.rows), source.rows)
        kmeans = fit_kmeans(
            source, k, iterations=iterations, seed=seed, memory=memory, store=store, name="clusters", ranks=ranks
        )
    k = kmeans.k
    assignment = assign(source, kmeans, store=store, name="pool", ranks=ranks)
    # The farthest from its centroid comes first; equally far ones in the order of their rows.
    order = np.lexsort((np.arange(source.rows), -assignment.distance, assignment.label))
    groups = _Groups(source, order, assignment.sizes(k))
    key: dict[str, object] = {
        "rows": source.rows,
        "dim": source.dim,
        "clusters": k,
        "iterations": iterations,
        "seed": seed,
    }

    def at(value: float) -> Pruned:
        return _prune(groups, 1 - value, progress=progress, store=store, key=key, ranks=ranks)

    if target_size is None:
        assert eps is not None
        found = at(eps)
    else:
        eps, found = _to_size(at, target_size)
    rows = np.flatnonzero(found.kept)
    rest = other_rows(source.rows, rows)
    ids = pool.column("id").cast(pa.string())
    similarity = found.similarity[rows]
    extra = {
        "cluster": pa.array(assignment.label[rows], pa.int64()),
        "similarity": pa.array(similarity, pa.float32(), mask=~np.isfinite(similarity)),
    }
    summary = {
        "images": source.rows,
        "kept": len(rows),
        "mode": "semdedup",
        "clusters": k,
        "empty_clusters": int((groups.sizes == 0).sum()),
        "eps": float(eps),
        "chosen_eps": target_size is not None,
    }
    chosen = ", chosen for the target" if target_size is not None else ""
    what = f"the others have a cosine above {1 - eps:.4f} to one kept"
    if target_size is not None:
        what = "the others are most like images kept"
    return Curated(
        kept=kept_table(pool, rows, extra),
        dropped=dropped_table(
            pool,
            rest,
            reason="semantic_duplicate",
            duplicate_of=_named(ids, found.representative()[rest]),
            similarity=np.where(np.isfinite(found.similarity[rest]), found.similarity[rest], np.nan),
            via=_named(ids, found.nearest[rest]),
        ),
        rows=rows,
        summary=summary,
        messages=[
            f"kept {len(rows):,} of {source.rows:,} images: {what} in their cluster ({k:,} clusters, eps {eps:.4f}"
            f"{chosen})"
        ],
    )


def default_clusters(rows: int) -> int:
    """Clusters for pruning: one per 1,000 images, at most the paper's 50,000."""
    return max(1, min(rows // 1000, 50_000))


def _check(rows: int, eps: float | None, target_size: int | None) -> None:
    if (eps is None) == (target_size is None):
        found = "neither" if eps is None else "both"
        raise UserError(
            f"semdedup: found {found} of eps and --target-size; expected one of them: --set eps=0.05 drops what has "
            "a cosine above 0.95, --target-size finds the eps"
        )
    if eps is not None and not 0 <= eps <= 2:
        raise UserError(f"semdedup: eps {eps}; expected a number from 0 (drops nothing) to 2 (keeps one per cluster)")
    if target_size is not None and not 1 <= target_size <= rows:
        raise UserError(f"--target-size {target_size}: the pool holds {rows} images; expected between 1 and that")


class _Groups:
    """The rows in order of cluster, then of preference: cluster i has order[starts[i] : starts[i + 1]]."""

    def __init__(self, source: Vectors, order: Int64, sizes: Int64) -> None:
        self.source, self.order, self.sizes = source, order, sizes
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        # Clusters differ in size: a block of work is as many as hold about 32 chunks of rows.
        self.per_block = max(1, min(len(sizes), 32 * _CHUNK * len(sizes) // max(1, len(order))))

    def members(self, first: int) -> Iterator[Int64]:
        """The rows of each cluster of the block that begins with cluster `first`."""
        for cluster in range(first, min(first + self.per_block, len(self.sizes))):
            yield self.order[self.starts[cluster] : self.starts[cluster + 1]]


def _prune(
    groups: _Groups,
    threshold: float,
    *,
    progress: Progress | None,
    store: Store | None,
    key: dict[str, object],
    ranks: Ranks,
) -> Pruned:
    def work(first: int) -> Arrays:
        parts = [_prune_cluster(groups.source, rows, threshold) for rows in groups.members(first)]
        return {name: np.concatenate(arrays) for name, *arrays in zip(_FIELDS, *parts, strict=True)}

    stage = None if store is None else store.stage("semdedup", {**key, "threshold": threshold})
    blocks = over_blocks(kept(work, stage), len(groups.sizes), groups.per_block, progress=progress, ranks=ranks)
    parts = list(blocks)

    def in_rows(name: str) -> npt.NDArray[Any]:
        found = np.concatenate([part[name] for part in parts])
        result = np.empty_like(found)
        result[groups.order] = found
        return result

    return Pruned(*map(in_rows, _FIELDS))


def _prune_cluster(source: Vectors, rows: Int64, threshold: float) -> tuple[npt.NDArray[np.bool_], Int64, Float32]:
    """The greedy choice among the rows [n] of one cluster, in their order: the arrays of `Pruned`.

    Memory: a chunk's cosines to the kept rows of one chunk before it, so any cluster fits.
    """
    chosen = np.zeros(len(rows), dtype=bool)
    nearest = np.full(len(rows), -1, dtype=np.int64)
    top = np.full(len(rows), -np.inf, dtype=np.float32)
    stock: list[tuple[Int64, Float32]] = []
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        mine, block = rows[part], source.gather(rows[part])
        for names, vectors in stock:
            _better(nearest[part], top[part], np.minimum(block @ vectors.T, 1), names)
        within = np.minimum(block @ block.T, 1)
        chosen[part] = _greedy(within > threshold, top[part] <= threshold)
        earlier = np.tri(len(mine), k=-1, dtype=bool) & chosen[part]
        _better(nearest[part], top[part], np.where(earlier, within, -np.inf), mine)
        if chosen[part].any():
            stock.append((mine[chosen[part]], block[chosen[part]]))
    return chosen, nearest, top


def _better(nearest: Int64, top: Float32, cosine: Float32, names: Int64) -> None:
    """Take over the greatest cosine of every line [n, m] where it exceeds `top`, with the name [m] of its column."""
    column = cosine.argmax(axis=1)
    value = cosine[np.arange(len(cosine)), column]
    new = value > top
    top[new], nearest[new] = value[new], names[column[new]]


def _greedy(near: npt.NDArray[np.bool_], alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which rows of `near` [n, n] a pass in their order keeps: those `alive` without a kept one before that is near.

    Decided in rounds: a row with no undecided near row before it is kept, and what is near after a kept one goes. Each
    round decides at least the first undecided row; a handful decide all.
    """
    before = np.tril(near, k=-1)
    undecided, chosen = alive.copy(), np.zeros(len(alive), dtype=bool)
    while undecided.any():
        ready = undecided & ~before[:, undecided].any(axis=1)
        chosen |= ready
        undecided &= ~ready & ~before[:, ready].any(axis=1)
    return chosen


def _to_size(at: Callable[[float], Pruned], target: int) -> tuple[float, Pruned]:
    """The largest eps tried that leaves at least `target` rows, and its pruning, cut to exactly the target.

    Of a pruning that leaves `spare` rows too many, the next eps is the one above which `spare` of its kept rows lie.
    Dropping those frees some that they stood for, so that the target is come down to from above, in a few steps.
    """
    eps, best = 0.0, at(0.0)
    for _ in range(_STEPS):
        left = np.sort(best.similarity[best.kept])
        spare = len(left) - target
        if spare <= target // 200:
            break
        larger = float(min(1 - left[target - 1], 2.0))
        if larger <= eps:  # copies: no eps tells them apart
            break
        found = at(larger)
        if found.kept.sum() < target:
            break
        eps, best = larger, found
    rows = np.flatnonzero(best.kept)
    # The first of a cluster has no similarity and goes last of all, by row.
    order = np.lexsort((rows, -best.similarity[rows]))
    mask = best.kept.copy()
    mask[rows[order[: len(rows) - target]]] = False
    return eps, Pruned(mask, best.nearest, best.similarity)


def _named(ids: pa.ChunkedArray, rows: Int64) -> pa.ChunkedArray:
    return ids.take(pa.array(rows, pa.int64(), mask=rows < 0))
