"""Curation by retrieval: the images of a pool that resemble curated query sets (METHOD.md section 1).

Each set asks for images in its own order of preference and within its own budget (`retrieval_samples.py`,
`retrieval_clusters.py`); here what they ask for is joined, cut to a target size, and counted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.query_sets import Asked, QuerySet, VectorsOfAll, check_sets, default_clusters
from dinov2cli.curation.retrieval_clusters import Clusters, ask_clusters, homeless
from dinov2cli.curation.retrieval_samples import ask_samples
from dinov2cli.curation.retrieval_tables import hit_table, provenance, set_table
from dinov2cli.curation.tables import Curated, dropped_table, kept_table, other_rows
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress, Store
from dinov2cli.search.index import build_index
from dinov2cli.search.kmeans import KMeans, fit_kmeans
from dinov2cli.search.vectors import Int64, Vectors, as_vectors


def retrieve(
    pool: pa.Table,
    vectors: Vectors | npt.NDArray[np.floating],
    queries: Sequence[QuerySet],
    *,
    target_size: int | None = None,
    clusters: int | None = None,
    iterations: int = 20,
    kmeans: KMeans | None = None,
    index: str = "auto",
    nprobe: int | None = None,
    recall: float = 0.95,
    seed: int = 0,
    memory: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """The union of what the query sets ask of the pool, each image once.

    Sets of mode `sample` share one index; those of mode `cluster` one k-means of the pool into `clusters` (100,000 in
    the paper; by default one per 64 images up to that), or the given `kmeans`. The paper's k is 4 for large query sets
    and 32 for ImageNet-1k. With a target size every k is doubled until the union reaches it; a larger union is cut to
    exactly that size in proportion: a set that asked for n images keeps its first ones up to the same share of n.

    kept gets `query_source` (all sets that asked for the image, joined by ';'); for sample sets its best hit
    (`query_best` its set, `query_id`, `query_rank`, `query_similarity`) and how many queries asked (`query_hits`); for
    cluster sets its `cluster` and how many of their images lie there (`query_count`). `hits` lists every pair. The
    ranks share the work, and all get the result. index, nprobe, recall, memory (bytes): see `build_index`; the plan and
    the recall measured are in the summary. With `store` a stopped run continues at its blocks. Raises UserError without
    queries, for an impossible target, and when nothing was found; InputError for vectors that cannot be compared.
    """
    source = as_vectors(vectors)
    check_sets(queries, source.rows, source.dim, target_size)
    means: dict[str, Any] = {"store": store, "progress": progress, "ranks": ranks}
    modes = [query.mode for query in queries]
    asked: list[Asked | None] = [None] * len(queries)
    found: Clusters | None = None
    by_cluster = [query for query in queries if query.mode == "cluster"]
    by_sample = [query for query in queries if query.mode == "sample"]
    if by_cluster:
        if kmeans is None:
            k = clusters or default_clusters(source.rows)
            kmeans = fit_kmeans(
                source, k, iterations=iterations, seed=seed, memory=memory, store=store, name="clusters", ranks=ranks
            )
        mine, found = ask_clusters(source, by_cluster, kmeans, seed=seed, **means)
        _place(asked, modes, "cluster", mine)
    ks: list[int] = []
    built = None
    if by_sample:
        others = np.concatenate([np.zeros(0, np.int64), *(a.rows for a in asked if a is not None)])
        built = build_index(
            source,
            index=index,
            nprobe=nprobe,
            recall=recall,
            k=max(query.k for query in by_sample),
            queries=VectorsOfAll(by_sample),
            seed=seed,
            memory=memory,
            store=store,
            ranks=ranks,
        )
        mine, ks = ask_samples(built, by_sample, target_size=target_size, others=others, **means)
        _place(asked, modes, "sample", mine)
    answers = [a for a in asked if a is not None]
    rows = _joined([a.rows for a in answers], target_size)
    unheard = _unheard(by_cluster, found)
    if not len(rows) and not by_cluster:
        raise UserError("retrieval: no query image resembles any image of the pool; are their vectors all zeros?")
    if not len(rows):
        nothing = "the clusters in which the query sets are at home hold no image of the pool; use fewer clusters"
        raise UserError(f"cluster retrieval: {unheard[0] if unheard else nothing}")
    summary: dict[str, Any] = {
        "images": source.rows,
        "kept": len(rows),
        "mode": "+".join(dict.fromkeys(modes)),
        **set_table(queries, answers, ks, rows, source.rows),
        **({} if found is None else {"clusters": found.k, "empty_clusters": found.empty}),
        **({} if built is None else {"index": built.report.record()}),
    }
    return Curated(
        kept=kept_table(pool, rows, provenance(queries, answers, found, rows, source.rows)),
        dropped=dropped_table(pool, other_rows(source.rows, rows), reason="not_retrieved"),
        rows=rows,
        summary=summary,
        messages=[*_messages(summary, unheard, target_size), *([] if built is None else built.report.lines())],
        hits=hit_table(pool, queries, answers, found, rows, source.rows),
    )


def _place(asked: list[Asked | None], modes: Sequence[str], mode: str, mine: Sequence[Asked]) -> None:
    answers = iter(mine)
    for position, name in enumerate(modes):
        if name == mode:
            asked[position] = next(answers)


def _joined(lists: Sequence[Int64], target_size: int | None) -> Int64:
    """The distinct rows of all lists, sorted; cut to the target by how early, as a share of its list, a row comes."""
    rows = np.concatenate(lists)
    if target_size is None or len(np.unique(rows)) <= target_size:
        return np.unique(rows)
    share = np.concatenate([(np.arange(len(each)) + 0.5) / max(1, len(each)) for each in lists])
    order = np.argsort(share, kind="stable")
    _, first = np.unique(rows[order], return_index=True)
    return np.sort(rows[order[np.sort(first)[:target_size]]])


def _unheard(queries: Sequence[QuerySet], found: Clusters | None) -> list[str]:
    if found is None:
        return []
    rows = zip(queries, found.counts, strict=True)
    return [homeless(query, counts) for query, counts in rows if not (counts > query.more_than).any()]


def _messages(summary: dict[str, Any], unheard: Sequence[str], target_size: int | None) -> list[str]:
    kept, sets = summary["kept"], summary["table"]
    from_clusters = f", cut into {summary['clusters']:,} clusters" if "clusters" in summary else ""
    asked = ", ".join(f"{row['final']:,} for {row['dataset']}" for row in sets)
    lines = [f"retrieved {kept:,} of {summary['images']:,} images{from_clusters}, each once ({asked})", *unheard]
    if target_size is not None and kept < target_size:
        cures = {"sample": "raise nprobe or per_set", "cluster": "use fewer clusters, or raise per_cluster or per_set"}
        cure = "; ".join(cures[mode] for mode in summary["mode"].split("+"))
        lines.append(f"found {kept:,} images, fewer than the target of {target_size:,}: {cure}")
    return lines
