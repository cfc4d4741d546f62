"""Curation by retrieval: the images of a pool that resemble curated query sets (METHOD.md section 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.sampling import waterfill
from dinov2cli.curation.tables import Curated, dropped_table, kept_table, other_rows
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress
from dinov2cli.search.index import SearchIndex, build_index
from dinov2cli.search.kmeans import KMeans, assign, fit_kmeans, rank_in_group
from dinov2cli.search.neighbours import neighbour_blocks
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors

MORE_THAN = 3
"""A cluster is used when it holds more than this many images of a query set."""

PER_CLUSTER = 10_000
PER_SET = 1_000_000


@dataclass(frozen=True)
class QuerySet:
    """A curated set to look for: its name (kept as provenance), its vectors [Q, D] and the ids of its images."""

    name: str
    vectors: Vectors | npt.NDArray[np.floating]
    ids: Sequence[str]


@dataclass(frozen=True)
class _Hits:
    """Pairs of a pool row and a query: row [H], set [H], query [H], rank [H] (1 = nearest), similarity [H]."""

    row: Int64
    set: Int64
    query: Int64
    rank: Int64
    similarity: Float32

    def take(self, which: npt.NDArray[np.bool_] | Int64) -> "_Hits":
        return _Hits(self.row[which], self.set[which], self.query[which], self.rank[which], self.similarity[which])


def retrieve_samples(
    pool: pa.Table,
    vectors: Vectors | npt.NDArray[np.floating],
    queries: Sequence[QuerySet],
    *,
    k: int = 4,
    target_size: int | None = None,
    index: str = "auto",
    nprobe: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """Sample-based retrieval: the k pool images nearest to every query image, each once.

    The paper's k is 4 for large query sets and 32 for ImageNet-1k. With a target size k is doubled until the union
    reaches it, and the union is then cut to exactly that size by rank: every query's first neighbour before any
    query's second. kept has the best hit of every image (query_source, query_id, query_rank, query_similarity) and
    how many queries asked for it (query_hits); `hits` lists all pairs. The ranks share the search, and all get the
    result. Raises UserError without queries or for a target the pool cannot give.
    """
    source = as_vectors(vectors)
    _check(queries, target_size, source.rows)
    built = build_index(source, index=index, nprobe=nprobe, seed=seed, ranks=ranks)
    k = min(k, source.rows)
    hits = _search(built, queries, k, progress, ranks)
    while target_size is not None and len(np.unique(hits.row)) < target_size and k < source.rows:
        k = min(2 * k, source.rows)
        hits = _search(built, queries, k, progress, ranks)
    # Best hit first: lowest rank, then most similar, then the order of sets, queries and rows.
    order = np.lexsort((hits.query, hits.set, -hits.similarity, hits.rank, hits.row))
    hits = hits.take(order)
    rows, first, count = np.unique(hits.row, return_index=True, return_counts=True)
    if target_size is not None and len(rows) > target_size:
        best = hits.take(first)
        keep = np.sort(np.lexsort((rows, -best.similarity, best.rank))[:target_size])
        rows, first, count = rows[keep], first[keep], count[keep]
        hits_kept = hits.take(np.isin(hits.row, rows))
    else:
        hits_kept = hits
    best = hits.take(first)
    extra = {
        "query_source": pa.array([queries[s].name for s in best.set], pa.string()),
        "query_id": pa.array([queries[s].ids[q] for s, q in zip(best.set, best.query, strict=True)], pa.string()),
        "query_rank": pa.array(best.rank, pa.int64()),
        "query_similarity": pa.array(best.similarity, pa.float32()),
        "query_hits": pa.array(count, pa.int64()),
    }
    per_set = {q.name: len(np.unique(hits_kept.row[hits_kept.set == i])) for i, q in enumerate(queries)}
    summary = {"images": source.rows, "kept": len(rows), "mode": "sample", "k": k, "per_set": per_set}
    asked = ", ".join(f"{count} for {name}" for name, count in per_set.items())
    messages = [
        f"retrieved {len(rows)} of {source.rows} images: the {k} nearest of each query image, each once ({asked})"
    ]
    if target_size is not None and len(rows) < target_size:
        messages.append(f"found {len(rows)} images, fewer than the target of {target_size}: raise --nprobe")
    return Curated(
        kept=kept_table(pool, rows, extra),
        dropped=dropped_table(pool, other_rows(source.rows, rows), reason="not_retrieved"),
        rows=rows,
        summary=summary,
        messages=messages,
        hits=_hit_table(pool, hits_kept, queries),
    )


def retrieve_clusters(
    pool: pa.Table,
    vectors: Vectors | npt.NDArray[np.floating],
    queries: Sequence[QuerySet],
    *,
    clusters: int | None = None,
    more_than: int = MORE_THAN,
    per_cluster: int = PER_CLUSTER,
    per_set: int = PER_SET,
    target_size: int | None = None,
    iterations: int = 20,
    kmeans: KMeans | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """Cluster-based retrieval: random pool images from the clusters in which a query set is at home.

    The pool is cut into `clusters` by k-means (100,000 in the paper; by default one per 64 images up to that). A
    cluster with more than `more_than` images of a query set gives up to `per_cluster` images, and a query set gets
    up to `per_set`, poured evenly over its clusters; a target size is poured over all chosen clusters alike. The
    draw order within a cluster is one for all sets, so that sets meeting in a cluster share images and the limit
    holds for their union. kept has `cluster`, `query_source` (all sets that chose the image, joined by ';') and
    `query_count` (their images in the cluster). The ranks share the passes, and all get the result. Raises UserError
    when no cluster qualifies.
    """
    source = as_vectors(vectors)
    _check(queries, target_size, source.rows)
    if kmeans is None:
        k = clusters or default_clusters(source.rows)
        kmeans = fit_kmeans(source, k, iterations=iterations, seed=seed, ranks=ranks)
    label = assign(source, kmeans, progress=progress, ranks=ranks).label
    size = np.bincount(label, minlength=kmeans.k)
    counts = np.stack(
        [np.bincount(assign(q.vectors, kmeans, ranks=ranks).label, minlength=kmeans.k) for q in queries]
    )  # [sets, clusters]
    at_home = counts > more_than
    if not at_home.any():
        raise UserError(
            f"cluster retrieval: no cluster holds more than {more_than} images of a query set (at most "
            f"{int(counts.max())} of {kmeans.k} clusters); use fewer clusters, or --mode sample for small query sets"
        )
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xC105]))
    capacity = np.where(at_home, np.minimum(size, per_cluster), 0)
    shares = np.stack([waterfill(row, min(per_set, int(row.sum())), rng) for row in capacity])
    ceiling = shares.max(axis=0)
    if target_size is not None:
        ceiling = waterfill(ceiling, target_size, rng)
    order = np.lexsort((rng.random(source.rows), label))
    position = rank_in_group(label[order])
    chosen = position < ceiling[label[order]]
    rows, position = order[chosen], position[chosen]
    back = np.argsort(rows)
    rows, position = rows[back], position[back]
    wanted = position[None, :] < shares[:, label[rows]]  # [sets, K]: which sets asked for each image
    names = np.array([q.name for q in queries], dtype=object)
    extra = {
        "cluster": pa.array(label[rows], pa.int64()),
        "query_source": pa.array([";".join(names[column]) for column in wanted.T], pa.string()),
        "query_count": pa.array((counts[:, label[rows]] * wanted).sum(axis=0), pa.int64()),
    }
    got = {q.name: int(wanted[i].sum()) for i, q in enumerate(queries)}
    used = {q.name: int(at_home[i].sum()) for i, q in enumerate(queries)}
    summary = {
        "images": source.rows,
        "kept": len(rows),
        "mode": "cluster",
        "clusters": kmeans.k,
        "empty_clusters": int((size == 0).sum()),
        "clusters_used": used,
        "per_set": got,
    }
    messages = [f"retrieved {len(rows)} of {source.rows} images from {kmeans.k} clusters"]
    messages += [f"{name}: {got[name]} images from {used[name]} clusters" for name in got]
    if target_size is not None and len(rows) < target_size:
        messages.append(
            f"the clusters of the query sets hold {len(rows)} images, fewer than the target of {target_size}: "
            "use fewer clusters or raise --per-cluster"
        )
    return Curated(
        kept=kept_table(pool, rows, extra),
        dropped=dropped_table(pool, other_rows(source.rows, rows), reason="not_retrieved"),
        rows=rows,
        summary=summary,
        messages=messages,
        hits=_cluster_table(counts, shares, queries),
    )


def default_clusters(rows: int) -> int:
    """Clusters for a pool: one per 64 images, at most the paper's 100,000."""
    return max(1, min(rows // 64, 100_000))


def _check(queries: Sequence[QuerySet], target_size: int | None, rows: int) -> None:
    if not queries:
        raise UserError("retrieval: no query set; give --query, or leave it out for balanced sampling")
    for query in queries:
        found = as_vectors(query.vectors).rows
        if found == 0 or found != len(query.ids):
            raise UserError(
                f"query set {query.name}: found {found} vectors for {len(query.ids)} ids; expected as many, at least 1"
            )
    if target_size is not None and not 1 <= target_size <= rows:
        raise UserError(f"--target-size {target_size}: the pool holds {rows} images; expected between 1 and that")


def _search(built: SearchIndex, queries: Sequence[QuerySet], k: int, progress: Progress | None, ranks: Ranks) -> _Hits:
    parts: list[_Hits] = []
    for position, query in enumerate(queries):
        for found in neighbour_blocks(built, query.vectors, k, progress=progress, ranks=ranks):
            offset, rank = np.nonzero(found.row >= 0)
            parts.append(
                _Hits(
                    found.row[offset, rank],
                    np.full(len(offset), position, dtype=np.int64),
                    offset + found.start,
                    rank + 1,
                    found.similarity[offset, rank],
                )
            )
    return _Hits(
        np.concatenate([p.row for p in parts]),
        np.concatenate([p.set for p in parts]),
        np.concatenate([p.query for p in parts]),
        np.concatenate([p.rank for p in parts]),
        np.concatenate([p.similarity for p in parts]),
    )


def _hit_table(pool: pa.Table, hits: _Hits, queries: Sequence[QuerySet]) -> pa.Table:
    return pa.table(
        {
            "id": pool.column("id").take(pa.array(hits.row)),
            "row": pa.array(hits.row, pa.int64()),
            "query_source": pa.array([queries[s].name for s in hits.set], pa.string()),
            "query_id": pa.array([queries[s].ids[q] for s, q in zip(hits.set, hits.query, strict=True)], pa.string()),
            "rank": pa.array(hits.rank, pa.int64()),
            "similarity": pa.array(hits.similarity, pa.float32()),
        }
    )


def _cluster_table(counts: Int64, shares: Int64, queries: Sequence[QuerySet]) -> pa.Table:
    which, cluster = np.nonzero(counts)
    return pa.table(
        {
            "query_source": pa.array([queries[int(s)].name for s in which], pa.string()),
            "cluster": pa.array(cluster, pa.int64()),
            "query_count": pa.array(counts[which, cluster], pa.int64()),
            "share": pa.array(shares[which, cluster], pa.int64()),
        }
    )
