"""What a retrieval tells: where every image came from, every pair behind it, and the counts of the paper's Table 15."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.query_sets import Asked, QuerySet
from dinov2cli.curation.retrieval_clusters import Clusters
from dinov2cli.search.vectors import Int64


def set_table(
    queries: Sequence[QuerySet], asked: Sequence[Asked], ks: Sequence[int], rows: Int64, total: int
) -> dict[str, Any]:
    """The counts as plain values: `table` (one entry per set), `overlap` and `per_set`.

    table: dataset, images, retrieval, settings, pairs (query, neighbour), retrieved (distinct, before limits), final
    (within its budget and the target), only (asked for by no other set). The finals sum to more than is kept where sets
    overlap. ks: the k of the sample sets, in order, as a target may have raised it.
    """
    wanted = _wanted(asked, rows, total)
    alone = wanted.sum(axis=0) == 1
    searched = iter(ks)
    table = []
    for query, answer, mine in zip(queries, asked, wanted, strict=True):
        settings = query.settings()
        if query.mode == "sample":
            settings["neighbours"] = next(searched)
        else:
            settings["clusters_used"] = answer.clusters
        table.append(
            {
                "dataset": query.name,
                "images": len(query.ids),
                "retrieval": query.mode,
                "settings": settings,
                "pairs": answer.pairs,
                "retrieved": answer.retrieved,
                "final": int(mine.sum()),
                "only": int((mine & alone).sum()),
            }
        )
    shared = [
        {"sets": [queries[a].name, queries[b].name], "images": int((wanted[a] & wanted[b]).sum())}
        for a, b in combinations(range(len(queries)), 2)
    ]
    return {"table": table, "overlap": shared, "per_set": {str(row["dataset"]): row["final"] for row in table}}


def provenance(
    queries: Sequence[QuerySet], asked: Sequence[Asked], clusters: Clusters | None, rows: Int64, total: int
) -> dict[str, pa.Array]:
    """The columns of kept that say where each of `rows` [K] came from."""
    wanted = _wanted(asked, rows, total)
    patterns, pattern = np.unique(wanted.T, axis=0, return_inverse=True)
    joined = pa.array([";".join(q.name for q, mine in zip(queries, row, strict=True) if mine) for row in patterns])
    columns: dict[str, pa.Array] = {"query_source": joined.take(pa.array(pattern.reshape(-1)))}
    if any(answer.hits is not None for answer in asked):
        columns |= _best_hits(queries, asked, rows)
    if clusters is not None:
        label = clusters.label[rows]
        by_cluster = [position for position, query in enumerate(queries) if query.mode == "cluster"]
        count = (clusters.counts[:, label] * wanted[by_cluster]).sum(axis=0)
        columns |= {"cluster": pa.array(label, pa.int64()), "query_count": pa.array(count, pa.int64())}
    return columns


def hit_table(
    pool: pa.Table,
    queries: Sequence[QuerySet],
    asked: Sequence[Asked],
    clusters: Clusters | None,
    rows: Int64,
    total: int,
) -> pa.Table:
    """Every (image, query) pair behind the choice: id, row, query_source, query_id, rank, similarity, and for cluster
    sets, which have one line per image and set, cluster and query_count (the set's images in it)."""
    chosen = np.zeros(total, dtype=bool)
    chosen[rows] = True
    names = pa.array([query.name for query in queries], pa.string())
    parts = []
    counts = iter(() if clusters is None else clusters.counts)
    for position, (query, answer) in enumerate(zip(queries, asked, strict=True)):
        if answer.hits is not None:
            hits = answer.hits.take(chosen[answer.hits.row])
            row = hits.row
            columns = {
                "query_id": pa.array(_ids(query).take(pa.array(hits.query))),
                "rank": pa.array(hits.rank, pa.int64()),
                "similarity": pa.array(hits.similarity, pa.float32()),
            }
        else:
            row = answer.rows[chosen[answer.rows]]
            columns = {}
            if clusters is not None:
                label = clusters.label[row]
                columns = {
                    "cluster": pa.array(label, pa.int64()),
                    "query_count": pa.array(next(counts)[label], pa.int64()),
                }
        source = names.take(pa.array(np.full(len(row), position)))
        parts.append(pa.table({"row": pa.array(row, pa.int64()), "query_source": source, **columns}))
    table = pa.concat_tables(parts, promote_options="default")
    ids = pool.column("id").cast(pa.string()).take(table.column("row"))
    return table.add_column(0, "id", ids)


def table_lines(summary: dict[str, Any]) -> list[str]:
    """The counts of a retrieval as lines of text in columns; [] for a summary without them."""
    cells = table_cells(summary)
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    left = {0, 2}
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def table_cells(summary: dict[str, Any]) -> list[list[str]]:
    """The counts of a retrieval as rows of text, the header first and the total last; [] for a summary without."""
    table = summary.get("table")
    if not table:
        return []
    cells = [["data set", "images", "retrieval", "retrieved", "final", "by no other"]]
    for row in table:
        given = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in row["settings"].items())
        cells.append(
            [row["dataset"], f"{row['images']:,}", f"{row['retrieval']}: {given}"]
            + [f"{row[key]:,}" for key in ("retrieved", "final", "only")]
        )
    included = summary.get("included")
    for row in (included or {}).get("table", []):
        cells.append([row["dataset"], f"{row['images']:,}", "as it is", "", f"{row['final']:,}", ""])
    kept = summary["kept"] + (included["images"] if included else 0)
    cells.append(["all, each image once", f"{sum(row['images'] for row in table):,}", "", "", f"{kept:,}", ""])
    return cells


def _wanted(asked: Sequence[Asked], rows: Int64, total: int) -> npt.NDArray[np.bool_]:
    """Which sets [S] asked for which of the rows [K]: [S, K]."""
    result = np.empty((len(asked), len(rows)), dtype=bool)
    for position, answer in enumerate(asked):
        mask = np.zeros(total, dtype=bool)
        mask[answer.rows] = True
        result[position] = mask[rows]
    return result


def _best_hits(queries: Sequence[QuerySet], asked: Sequence[Asked], rows: Int64) -> dict[str, pa.Array]:
    """The nearest query of every row and how many queries asked for it; nulls for rows that only clusters brought."""
    of_set = [(s, answer.hits) for s, answer in enumerate(asked) if answer.hits is not None]
    row = np.concatenate([hits.row for _, hits in of_set])
    number = np.concatenate([np.full(len(hits.row), s) for s, hits in of_set])
    query = np.concatenate([hits.query for _, hits in of_set])
    rank = np.concatenate([hits.rank for _, hits in of_set])
    similarity = np.concatenate([hits.similarity for _, hits in of_set])
    order = np.lexsort((query, number, -similarity, rank, row))
    found, first, count = np.unique(row[order], return_index=True, return_counts=True)
    best = order[first]
    place = np.searchsorted(found, rows)
    known = place < len(found)
    known[known] = found[place[known]] == rows[known]
    place = np.where(known, place, 0)
    absent = ~known
    pick = best[place] if len(best) else np.zeros(len(rows), np.int64)
    starts = np.cumsum([0, *(len(q.ids) for q in queries)])
    ids = pa.chunked_array([chunk for q in queries for chunk in pa.chunked_array([_ids(q)]).chunks], pa.string())
    names = pa.array([q.name for q in queries], pa.string())
    return {
        "query_best": names.take(pa.array(number[pick], pa.int64(), mask=absent)),
        "query_id": ids.take(pa.array(starts[number[pick]] + query[pick], pa.int64(), mask=absent)).combine_chunks(),
        "query_rank": pa.array(rank[pick].astype(np.int64), pa.int64(), mask=absent),
        "query_similarity": pa.array(similarity[pick], pa.float32(), mask=absent),
        "query_hits": pa.array(np.where(known, count[place], 0), pa.int64()),
    }


def _ids(query: QuerySet) -> pa.Array:
    ids = query.ids
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    return ids.cast(pa.string()) if isinstance(ids, pa.Array) else pa.array(list(ids), pa.string())
