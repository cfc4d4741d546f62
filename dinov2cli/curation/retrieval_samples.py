"""Sample-based retrieval: the nearest pool images of every query image (METHOD.md section 1)."""

from collections.abc import Iterator, Sequence

import numpy as np

from dinov2cli.curation.query_sets import Asked, Hits, QuerySet
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.index import SearchIndex
from dinov2cli.search.neighbours import neighbour_blocks
from dinov2cli.search.plan import QUERY_ROWS
from dinov2cli.search.vectors import Float32, Int64, as_vectors

_MOST_PAIRS = 1 << 27
"""Pairs of a query and a neighbour that are held at once (24 bytes each) when k grows to reach a target."""


def ask_samples(
    built: SearchIndex,
    queries: Sequence[QuerySet],
    *,
    target_size: int | None,
    others: Int64,
    store: Store | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[list[Asked], list[int]]:
    """What each set asks for, and the k it was searched with.

    A target size that the union (with the rows `others` that other sets ask for) does not reach doubles every k until
    it does, no new image is found, or the pairs would no longer fit in memory. With `store` finished blocks of queries
    are kept.
    """

    def ask(ks: Sequence[int]) -> list[Asked]:
        sets = enumerate(zip(queries, ks, strict=True))
        return [_asked(query, _search(built, query, k, number, store, progress, ranks)) for number, (query, k) in sets]

    ks = [min(query.k, built.rows) for query in queries]
    asked = ask(ks)
    before = -1
    while target_size is not None and any(k < built.rows for k in ks):
        now = len(np.unique(np.concatenate([others, *(a.rows for a in asked)])))
        if now >= target_size or now == before:
            break
        before = now
        more = [min(2 * k, built.rows) for k in ks]
        if sum(k * len(query.ids) for k, query in zip(more, queries, strict=True)) > _MOST_PAIRS:
            break
        ks, asked = more, ask(more)
        if all(query.cap is not None and len(a.rows) >= query.cap for query, a in zip(queries, asked, strict=True)):
            break
    return asked, ks


def _asked(query: QuerySet, hits: Hits) -> Asked:
    # Best hit of every row first: lowest rank, then most similar, then the first query.
    hits = hits.take(np.lexsort((hits.query, -hits.similarity, hits.rank, hits.row)))
    rows, first = np.unique(hits.row, return_index=True)
    best = hits.take(first)
    order = np.lexsort((rows, -best.similarity, best.rank))
    wanted = rows[order][: query.cap]
    kept_hits = hits if len(wanted) == len(rows) else hits.take(np.isin(hits.row, wanted))
    return Asked(wanted, len(rows), len(hits.row), hits=kept_hits)


def _search(
    built: SearchIndex,
    query: QuerySet,
    k: int,
    number: int,
    store: Store | None,
    progress: Progress | None,
    ranks: Ranks,
) -> Hits:
    parts: list[Hits] = []
    for start, similarity, row in _blocks(built, query, k, number, store, progress, ranks):
        offset, rank = np.nonzero(row >= 0)
        parts.append(Hits(row[offset, rank], offset + start, (rank + 1).astype(np.int32), similarity[offset, rank]))
    return Hits(
        np.concatenate([p.row for p in parts]),
        np.concatenate([p.query for p in parts]),
        np.concatenate([p.rank for p in parts]),
        np.concatenate([p.similarity for p in parts]),
    )


def _blocks(
    built: SearchIndex,
    query: QuerySet,
    k: int,
    number: int,
    store: Store | None,
    progress: Progress | None,
    ranks: Ranks,
) -> Iterator[tuple[int, Float32, Int64]]:
    """The neighbours of a block of queries after the other: start, cosine [n, k], row [n, k] (-1 for none)."""
    source = as_vectors(query.vectors)
    if built.shards > 1:  # searched shard by shard for many queries at once: no block is finished before the last shard
        for found in neighbour_blocks(built, query.vectors, k, progress=progress, ranks=ranks):
            block = source.block(found.start, found.start + len(found.row))
            found.row[~block.any(axis=1)] = -1
            yield found.start, found.similarity, found.row
        return
    stage = None
    if store is not None:
        effort = {"nprobe": built.report.nprobe, "k_factor": built.report.k_factor}
        stage = store.stage(f"samples-{number}", {**built.plan.key, **effort, "k": k, "queries": source.rows})

    def work(start: int) -> Arrays:
        block = source.block(start, min(start + QUERY_ROWS, source.rows))
        similarity, row = built.search(block, k)
        row[~block.any(axis=1)] = -1  # a row of zeros resembles nothing
        return {"similarity": similarity, "row": row}

    blocks = over_blocks(kept(work, stage), source.rows, QUERY_ROWS, progress=progress, ranks=ranks)
    for start, arrays in zip(range(0, source.rows, QUERY_ROWS), blocks, strict=True):
        yield start, np.asarray(arrays["similarity"]), np.asarray(arrays["row"])
