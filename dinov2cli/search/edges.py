"""Pairs of rows that are more similar than a threshold: the one format that every kind of comparison produces."""

from collections.abc import Sequence
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
    order = np.lexsort((-values, dst, src))
    src, dst, values = src[order], dst[order], values[order]
    new = np.ones(len(src), dtype=bool)
    new[1:] = (src[1:] != src[:-1]) | (dst[1:] != dst[:-1])
    rows = _no_rows() if truncated is None else np.unique(np.asarray(truncated, dtype=np.int64))
    return Edges(src[new], dst[new], values[new], rows)


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
