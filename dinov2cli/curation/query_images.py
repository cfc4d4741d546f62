"""The curated sets themselves, joined to what was retrieved for them: LVD-142M holds both (METHOD.md section 1)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.curation.tables import IDENTITY, Curated
from dinov2cli.data.derived import DerivedSource
from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import parse_spec
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.neighbours import best_match
from dinov2cli.search.vectors import Int64, SubsetVectors, Vectors, as_vectors

ORIGINS = ("retrieved", "query")


@dataclass(frozen=True)
class QueryImages:
    """A query set to join: its name, its rows as a table (id, image_path, source, row, ...), their vectors [Q, D]."""

    name: str
    table: pa.Table
    vectors: Vectors | npt.NDArray[np.floating]


def include_queries(
    found: Curated,
    pool: Vectors | npt.NDArray[np.floating],
    queries: Sequence[QueryImages],
    *,
    threshold: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Curated, list[Int64]]:
    """`found` with the images of the query sets behind the retrieved ones, and which rows [J] of each set joined.

    A query image stays out when a kept image, or a query image before it, is the same: the same row of the same source,
    the same sha256 where both are known, or, with a `threshold`, a cosine above it to a kept image or to an image of a
    set before. What was retrieved stays whole. kept gets `origin` (`retrieved` or `query`); joined rows have their own
    source and row, null in columns that do not fit the pool's, their set as `query_source`, and an id of their own
    where theirs was taken. `rows` of the result counts on from the pool's rows: pool row, or N + position in the sets
    laid end to end. The summary gets `included`.
    """
    source = as_vectors(pool)
    plain = found.kept.select([name for name in found.kept.column_names if name != "origin"])
    kept = plain.append_column("origin", pa.repeat(ORIGINS[0], plain.num_rows))
    seen = {name: pc.drop_null(_key(kept, name)) for name in ("place", "sha256")}
    vectors: list[Vectors] = [SubsetVectors(source, found.rows)]
    ids = kept.column("id").cast(pa.string()).combine_chunks()
    parts, joined, counts, offset, schema = [kept], [], [], source.rows, kept.schema
    rows = [found.rows]
    for query in queries:
        own = as_vectors(query.vectors)
        known = np.zeros(query.table.num_rows, dtype=bool)
        for name in seen:
            known |= _known(_key(query.table, name), seen[name])
        if threshold is not None:
            for others in vectors:
                if others.rows:
                    similarity, _ = best_match(own, others, seed=seed, memory=memory, ranks=ranks)
                    known |= similarity > threshold
        new = np.flatnonzero(~known)
        table = _fitting(_named(query, ids, new), schema)
        schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        parts.append(table)
        ids = pa.concat_arrays([ids, table.column("id").combine_chunks()])
        seen = {name: pa.concat_arrays([seen[name], pc.drop_null(_key(table, name))]) for name in seen}
        vectors.append(SubsetVectors(own, new))
        joined.append(new)
        rows.append(new + offset)
        offset += query.table.num_rows
        counts.append({"dataset": query.name, "images": query.table.num_rows, "final": len(new)})
    images = sum(len(new) for new in joined)
    included: dict[str, Any] = {"images": images, "threshold": threshold, "table": counts}
    total = found.kept.num_rows + images
    message = (
        f"{images:,} images of the query sets joined, {sum(c['images'] for c in counts) - images:,} of theirs were "
        f"there already: {total:,} images in all"
    )
    return replace(
        found,
        kept=pa.concat_tables(parts, promote_options="permissive"),
        rows=np.concatenate(rows),
        summary={**found.summary, "included": included},
        messages=[*found.messages, message],
    ), joined


def images_of_all(pool: ImageSource, queries: Sequence[ImageSource]) -> ImageSource:
    """The images of the pool and, behind them, of the query sets: what `rows` of `include_queries` count in."""
    sources = [pool, *queries]
    which = np.concatenate([np.full(len(each), number) for number, each in enumerate(sources)])
    rows = np.concatenate([np.arange(len(each)) for each in sources])
    names = pa.chunked_array([pa.array(each.ids, pa.string()) for each in sources])
    paths = pa.chunked_array([pa.array(each.paths, pa.string()) for each in sources])
    return DerivedSource(parse_spec(pool.spec), pa.table({"id": names, "image_path": paths}), sources, which, rows)


def _named(query: QueryImages, taken: pa.Array, rows: Int64) -> pa.Table:
    """The rows of a query set as rows of a selection, ids that are taken already with the set's name before them."""
    table = query.table.take(pa.array(rows))
    ids = table.column("id").cast(pa.string()).combine_chunks()
    for ending in (ids, pa.array(rows).cast(pa.string())):
        longer = pc.binary_join_element_wise(query.name, ending, "/")
        ids = pc.if_else(pc.is_in(ids, value_set=taken), longer, ids)
    table = table.set_column(table.schema.get_field_index("id"), "id", ids)
    rest = [name for name in table.column_names if name not in IDENTITY]
    extra = {"query_source": pa.repeat(query.name, len(rows)), "origin": pa.repeat(ORIGINS[1], len(rows))}
    table = table.select([*IDENTITY, *(name for name in rest if name not in extra)])
    for name, column in extra.items():
        table = table.append_column(name, column)
    return table


def _fitting(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with its columns in the types of their namesakes in `schema`; null where a set's do not fit (labels
    that are names there and numbers here)."""
    for place, name in enumerate(table.column_names):
        wanted = schema.field(name).type if name in schema.names else table.column(name).type
        if table.column(name).type != wanted:
            try:
                column = table.column(name).cast(wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                column = pa.nulls(table.num_rows, wanted)
            table = table.set_column(place, name, column)
    return table


def _key(table: pa.Table, name: str) -> pa.Array:
    """What tells an image from others: `place`, its source and row, or a column of the table (nulls without one)."""
    if name == "place":
        row = table.column("row").cast(pa.string())
        return pc.binary_join_element_wise(table.column("source").cast(pa.string()), row, "\n").combine_chunks()
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    return table.column(name).cast(pa.string()).combine_chunks()


def _known(keys: pa.Array, seen: pa.Array) -> npt.NDArray[np.bool_]:
    """Which keys were seen, or came before in their own list; nulls never."""
    first = np.zeros(len(keys), dtype=bool)
    encoded = keys.dictionary_encode()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    first[np.unique(codes, return_index=True)[1]] = True
    before = np.asarray(pc.fill_null(pc.is_in(keys, value_set=seen), False).to_numpy(zero_copy_only=False))
    return (before | ~first) & (codes >= 0)
