"""The tables that curation takes and gives: a pool of images, those kept, those dropped and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.search.vectors import Int64

Strings: TypeAlias = pa.Array | pa.ChunkedArray
IDENTITY = ("id", "image_path", "source", "row")


@dataclass(frozen=True)
class Curated:
    """What a policy chose.

    kept: columns id, image_path, source, row, the pool's other columns, and where each image came from.
    dropped: id, reason, duplicate_of, similarity, group, and further columns of the policy.
    rows: the kept rows of the pool [K], sorted. summary: figures for JSON. messages: the same for people, one line
    each. groups: duplicate groups (dedup only). hits: every (query, image) pair behind the choice (retrieval only).
    """

    kept: pa.Table
    dropped: pa.Table
    rows: Int64
    summary: dict[str, Any]
    messages: list[str] = field(default_factory=list)
    groups: pa.Table | None = None
    hits: pa.Table | None = None


def pool_from_metadata(metadata: pa.Table, *, source: str) -> pa.Table:
    """The pool of an embeddings directory: its metadata, with `source` and `row` that lead back to the images.

    source: the DATA string under which row i of the metadata opens as row i; columns that are there already win.
    """
    pool = metadata
    if "source" not in pool.column_names:
        pool = pool.append_column("source", pa.array([source] * pool.num_rows, pa.string()))
    if "row" not in pool.column_names:
        pool = pool.append_column("row", pa.array(np.arange(pool.num_rows), pa.int64()))
    return _identity_first(pool)


def kept_table(pool: pa.Table, rows: Int64, extra: Mapping[str, pa.Array] | None = None) -> pa.Table:
    """Rows of the pool, identity columns first, then the pool's own, then `extra` (which replaces namesakes)."""
    table = _identity_first(pool).take(pa.array(rows))
    for name, column in (extra or {}).items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def dropped_table(
    pool: pa.Table,
    rows: Int64,
    *,
    reason: Strings | str,
    duplicate_of: Strings | None = None,
    similarity: npt.NDArray[np.floating] | None = None,
    group: Int64 | None = None,
    tier: Strings | None = None,
    via: Strings | None = None,
    reference: Strings | None = None,
) -> pa.Table:
    """Dropped rows in the format of a selection; NaN similarities and negative groups become nulls.

    tier: what kind of comparison found the match. via: the image at the other end of the edge that removed this
    one, which in a chain is not the one kept. reference: the set that `duplicate_of` is of, where it is not the pool.
    """
    n = len(rows)
    nothing = pa.nulls(n, pa.string())
    values = np.full(n, np.nan) if similarity is None else np.asarray(similarity, dtype=np.float64)
    groups = np.full(n, -1, dtype=np.int64) if group is None else group
    return pa.table(
        {
            "id": pool.column("id").take(pa.array(rows)).cast(pa.string()),
            "reason": pa.repeat(reason, n) if isinstance(reason, str) else reason,
            "duplicate_of": nothing if duplicate_of is None else duplicate_of,
            "similarity": pa.array(values, pa.float64(), mask=np.isnan(values)),
            "group": pa.array(groups, pa.int64(), mask=groups < 0),
            "tier": nothing if tier is None else tier,
            "via": nothing if via is None else via,
            "reference": nothing if reference is None else reference,
        }
    )


def other_rows(total: int, rows: Int64) -> Int64:
    """The rows of 0 .. total - 1 that are not in `rows`."""
    mask = np.ones(total, dtype=bool)
    mask[rows] = False
    return np.flatnonzero(mask)


def _identity_first(table: pa.Table) -> pa.Table:
    rest = [name for name in table.column_names if name not in IDENTITY]
    return table.select([*IDENTITY, *rest])
