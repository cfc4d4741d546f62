"""Pairs of rows that are more similar than a threshold: the one format that every kind of comparison produces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dinov2cli.search.vectors import Float32, Int64


def _no_rows() -> Int64:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Edges:
    """Undirected edges src < dst, each pair once, sorted by (src, dst).

    `truncated` names the rows whose neighbour list was full of edges: such a row may have more neighbours above
    the threshold than were looked at. Its group is still found as long as the others lead to it.
    """

    src: Int64
    dst: Int64
    similarity: Float32
    truncated: Int64 = field(default_factory=_no_rows)

    def __len__(self) -> int:
        return int(self.src.shape[0])


def make_edges(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    similarity: npt.ArrayLike,
    *,
    truncated: npt.ArrayLike | None = None,
) -> Edges:
    """Edges from pairs (a, b) in any direction and order; loops go, of repeated pairs the most similar stays."""
    first, second = np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)
    values = np.asarray(similarity, dtype=np.float32)
    keep = first != second
    src = np.minimum(first, second)[keep]
    dst = np.maximum(first, second)[keep]
    values = values[keep]
    order = _pair_order(src, dst)
    src, dst, values = src[order], dst[order], values[order]
    new = np.ones(len(src), dtype=bool)
    new[1:] = (src[1:] != src[:-1]) | (dst[1:] != dst[:-1])
    best = np.maximum.reduceat(values, np.flatnonzero(new)) if len(values) else values
    rows = _no_rows() if truncated is None else np.unique(np.asarray(truncated, dtype=np.int64))
    return Edges(src[new], dst[new], best, rows)


def _pair_order(src: Int64, dst: Int64) -> Int64:
    """The order of pairs by (src, dst); of rows below 2^32 as one number each, which sorts several times as fast."""
    if len(dst) and dst.max() < 1 << 32:
        return np.argsort((src.astype(np.uint64) << np.uint64(32)) | dst.astype(np.uint64))
    return np.lexsort((dst, src))


def join_edges(parts: Sequence[Edges]) -> Edges:
    """The union of several sets of edges over the same rows."""
    if not parts:
        return make_edges([], [], [])
    return make_edges(
        np.concatenate([p.src for p in parts]),
        np.concatenate([p.dst for p in parts]),
        np.concatenate([p.similarity for p in parts]),
        truncated=np.concatenate([p.truncated for p in parts]),
    )


def join_raw(parts: Sequence[Mapping[str, npt.NDArray[np.generic]]]) -> Edges:
    """Edges from arrays `src`, `dst`, `similarity`, `truncated` in any order, as blocks of a search leave them."""
    if not parts:
        return make_edges([], [], [])
    src, dst, similarity, truncated = (
        np.concatenate([part[name] for part in parts]) for name in ("src", "dst", "similarity", "truncated")
    )
    return make_edges(src, dst, similarity, truncated=truncated)
