"""From edges to a decision: one image stays per component, and every other one learns why it goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.curation.tables import dropped_table
from dinov2cli.curation.tiers import TIERS, Matches, Reference, Tier
from dinov2cli.search.components import component_labels
from dinov2cli.search.vectors import Float32, Int64


@dataclass(frozen=True)
class EdgeTable:
    """Edges of all tiers in one: each pair once, by its most certain tier (a position in TIERS), with the largest
    strength that any tier gives it."""

    src: Int64
    dst: Int64
    similarity: Float32
    strength: Float32
    tier: npt.NDArray[np.int8]

    def take(self, which: npt.NDArray[np.bool_] | Int64) -> "EdgeTable":
        """The edges of a mask or of positions."""
        return EdgeTable(
            self.src[which], self.dst[which], self.similarity[which], self.strength[which], self.tier[which]
        )

    def plus(self, src: Int64, dst: Int64, similarity: npt.NDArray[np.floating], tier: str) -> "EdgeTable":
        """The same with further edges of a tier, of strength 0."""
        return EdgeTable(
            np.concatenate([self.src, np.minimum(src, dst)]),
            np.concatenate([self.dst, np.maximum(src, dst)]),
            np.concatenate([self.similarity, similarity.astype(np.float32)]),
            np.concatenate([self.strength, np.zeros(len(src), np.float32)]),
            np.concatenate([self.tier, np.full(len(src), TIERS.index(tier), np.int8)]),
        )


def join_tiers(tiers: Sequence[Tier]) -> EdgeTable:
    """The union of the tiers' edges, sorted by (src, dst)."""
    table = EdgeTable(
        np.concatenate([t.edges.src for t in tiers]),
        np.concatenate([t.edges.dst for t in tiers]),
        np.concatenate([t.edges.similarity for t in tiers]).astype(np.float32),
        np.concatenate([t.strength() for t in tiers]).astype(np.float32),
        np.concatenate([np.full(len(t.edges), TIERS.index(t.name), np.int8) for t in tiers]),
    )
    table = table.take(np.lexsort((table.tier, table.dst, table.src)))
    new = np.ones(len(table.src), dtype=bool)
    new[1:] = (table.src[1:] != table.src[:-1]) | (table.dst[1:] != table.dst[:-1])
    first = np.flatnonzero(new)
    strongest = np.maximum.reduceat(table.strength, first) if len(first) else table.strength
    table = table.take(first)
    return EdgeTable(table.src, table.dst, table.similarity, strongest, table.tier)


def keep_order(pool: pa.Table) -> Int64:
    """Rank of every row in the order in which copies are preferred, [N]: 0 is kept first.

    Largest area, then sharpest (where there is a `sharpness` column), then lowest id; unknown sizes count as 0.
    """
    names = pool.column_names
    area = np.zeros(pool.num_rows)
    if "width" in names and "height" in names:
        area = _numbers(pool, "width") * _numbers(pool, "height")
    sharp = _numbers(pool, "sharpness") if "sharpness" in names else np.zeros(pool.num_rows)
    keys = pa.table({"area": area, "sharp": sharp, "id": pool.column("id")})
    order = pc.sort_indices(keys, [("area", "descending"), ("sharp", "descending"), ("id", "ascending")]).to_numpy()
    rank = np.empty(pool.num_rows, dtype=np.int64)
    rank[order] = np.arange(pool.num_rows)
    return rank


def drop_outright(
    pool: pa.Table,
    edges: EdgeTable,
    matches: Matches | None,
    against: Sequence[Reference],
    unreadable: Sequence[int],
    whole_components: bool,
) -> tuple[npt.NDArray[np.bool_], list[pa.Table]]:
    """Rows that go before any group is formed: unreadable ones and those a reference holds."""
    gone = np.zeros(pool.num_rows, dtype=bool)
    parts: list[pa.Table] = []
    if unreadable:
        rows = np.array(unreadable, dtype=np.int64)
        gone[rows] = True
        parts.append(dropped_table(pool, rows, reason="unreadable"))
    if matches is None:
        return gone, parts
    leaked = matches.row >= 0
    origin = np.where(leaked, np.arange(pool.num_rows), -1)  # the row of the pool whose match decides
    if whole_components:
        label = component_labels(pool.num_rows, edges.src, edges.dst)
        first = np.full(pool.num_rows, -1, dtype=np.int64)
        direct = np.flatnonzero(leaked)
        # Of several matching rows in a component the most similar decides, of equal ones the first.
        direct = direct[np.lexsort((-direct, matches.similarity[direct]))]
        first[label[direct]] = direct
        origin = np.where(leaked, origin, first[label])
    rows = np.flatnonzero((origin >= 0) & ~gone)
    gone[rows] = True
    source = origin[rows]
    ids = pool.column("id")
    parts.append(
        dropped_table(
            pool,
            rows,
            reason="against",
            duplicate_of=pa.array(
                [against[n].ids[r] for n, r in zip(matches.set[source], matches.row[source], strict=True)], pa.string()
            ),
            similarity=matches.similarity[source],
            tier=_tier_names(matches.tier[source]),
            via=ids.take(pa.array(source, mask=source == rows)),
            reference=pa.array([against[n].name for n in matches.set[source]], pa.string()),
        )
    )
    return gone, parts


def representatives(label: Int64, priority: Int64) -> Int64:
    """For every row the row that is kept of its component, [N]: the one of the lowest `priority`."""
    best = np.full(len(label), len(label), dtype=np.int64)
    np.minimum.at(best, label, priority)
    return np.argsort(priority)[best[label]]


@dataclass(frozen=True)
class Groups:
    """kept: rows that stay [K]. dropped: the table of the copies. table: members of the groups of two and more,
    the image kept first. sizes: how many images each group has."""

    kept: Int64
    dropped: pa.Table
    table: pa.Table
    sizes: Int64


def resolve_groups(
    pool: pa.Table, edges: EdgeTable, label: Int64, gone: npt.NDArray[np.bool_], priority: Int64
) -> Groups:
    """Keep the row of the lowest `priority` of every component; rows that are `gone` are in no group.

    edges: those that hold the components together; label: component of every row [N].
    """
    rows = pool.num_rows
    keeper = representatives(label, priority)
    size = np.bincount(label, minlength=rows)
    grouped = (size[label] > 1) & ~gone
    group = np.full(rows, -1, dtype=np.int64)
    group[grouped] = np.unique(label[grouped], return_inverse=True)[1]
    is_keeper = keeper == np.arange(rows)
    copies = np.flatnonzero(~is_keeper & ~gone)
    other, similarity, tier = _deciding_edges(edges, copies, keeper)
    ids = pool.column("id")
    reasons = _tier_names(tier)
    dropped = dropped_table(
        pool,
        copies,
        reason=reasons,
        duplicate_of=ids.take(pa.array(keeper[copies])),
        similarity=similarity,
        group=group[copies],
        tier=reasons,
        via=ids.take(pa.array(other)),
    )
    members = np.flatnonzero(grouped)
    members = members[np.lexsort((priority[members], group[members]))]
    table = pa.table(
        {
            "id": ids.take(pa.array(members)).cast(pa.string()),
            "image_path": pool.column("image_path").take(pa.array(members)),
            "group": pa.array(group[members], pa.int64()),
            "keep": pa.array(is_keeper[members], pa.bool_()),
        }
    )
    return Groups(np.flatnonzero(is_keeper & ~gone), dropped, table, np.bincount(group[members]))


def _tier_names(tier: npt.NDArray[np.integer]) -> pa.Array:
    return pa.array(TIERS, pa.string()).take(pa.array(tier))


def _deciding_edges(edges: EdgeTable, copies: Int64, keeper: Int64) -> tuple[Int64, Float32, npt.NDArray[np.int8]]:
    """For every dropped row the edge that removed it: the direct one to the image kept, else its most similar one.

    Returns the row at the other end, the similarity and the tier, each [len(copies)].
    """
    end = np.concatenate([edges.src, edges.dst])
    other = np.concatenate([edges.dst, edges.src])
    twice = np.tile(np.arange(len(edges.src)), 2)
    indirect = other != keeper[end]
    order = np.lexsort((other, -edges.similarity[twice], indirect, end))
    who, where = np.unique(end[order], return_index=True)
    chosen = order[where[np.searchsorted(who, copies)]] if len(copies) else copies
    return other[chosen], edges.similarity[twice[chosen]], edges.tier[twice[chosen]]


def _numbers(pool: pa.Table, name: str) -> npt.NDArray[np.float64]:
    column = pool.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.nan_to_num(np.asarray(column, dtype=np.float64), nan=0.0)
