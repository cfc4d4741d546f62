"""Query sets: the curated images that a retrieval looks for, and the budget of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.errors import InputError, UserError
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors

MORE_THAN = 3
"""A cluster is used when it holds more than this many images of a query set."""

PER_CLUSTER = 10_000
PER_SET = 1_000_000
"""The paper's limits of cluster-based retrieval; sample-based retrieval has none of its own."""


@dataclass(frozen=True)
class QuerySet:
    """A curated set to look for: its name (kept as provenance), its vectors [Q, D], the ids of its images, its budget.

    mode `sample`: the k pool images nearest to each image, then the best-ranked `per_set` of them. mode `cluster`: from
    every cluster with more than `more_than` of its images up to `per_cluster` pool images, up to `per_set` in all.
    per_set None: no limit for `sample`, PER_SET for `cluster`.
    """

    name: str
    vectors: Vectors | npt.NDArray[np.floating]
    ids: Sequence[str] | pa.Array | pa.ChunkedArray
    mode: str = "sample"
    k: int = 4
    more_than: int = MORE_THAN
    per_cluster: int = PER_CLUSTER
    per_set: int | None = None

    @property
    def cap(self) -> int | None:
        """Images this set may bring at most; None where there is no limit."""
        return PER_SET if self.per_set is None and self.mode == "cluster" else self.per_set

    def settings(self) -> dict[str, Any]:
        """The settings that count in this set's mode, as plain values."""
        mine: dict[str, Any] = {"neighbours": self.k}
        if self.mode == "cluster":
            mine = {"more_than": self.more_than, "per_cluster": self.per_cluster}
        return mine if self.cap is None else {**mine, "per_set": self.cap}


@dataclass(frozen=True)
class Hits:
    """Pairs of a pool row and an image of one query set: row [H], query [H], rank [H] (1 = nearest), similarity [H]."""

    row: Int64
    query: Int64
    rank: npt.NDArray[np.int32]
    similarity: npt.NDArray[np.float32]

    def take(self, which: npt.NDArray[np.bool_] | Int64) -> "Hits":
        return Hits(self.row[which], self.query[which], self.rank[which], self.similarity[which])


@dataclass(frozen=True)
class Asked:
    """What one query set asks of the pool: `rows`, distinct and in the order in which it wants them, within its budget.

    retrieved: how many there were before the budget's limits. pairs: (query, image) pairs behind them, for `sample`
    every neighbour of every query. clusters: clusters used. hits: the pairs with an image in `rows` (sample only).
    """

    rows: Int64
    retrieved: int
    pairs: int
    clusters: int = 0
    hits: Hits | None = None


def check_sets(sets: Sequence[QuerySet], rows: int, dim: int, target_size: int | None) -> None:
    """Raise UserError for no set, a set without images or an impossible target, InputError for vectors that cannot be
    compared with the pool's [rows, dim]."""
    if not sets:
        raise UserError("retrieval: no query set; give --query, or leave it out for balanced sampling")
    for query in sets:
        vectors = as_vectors(query.vectors)
        if vectors.rows == 0 or vectors.rows != len(query.ids):
            raise UserError(
                f"query set {query.name}: found {vectors.rows} vectors for {len(query.ids)} ids; "
                "expected as many, at least 1"
            )
        if vectors.dim != dim:
            raise InputError(
                f"query set {query.name}: its vectors have {vectors.dim} dimensions, the pool's {dim}; expected the "
                "same model and pooling: embed one of them again"
            )
        if query.mode not in ("sample", "cluster"):
            raise UserError(f"query set {query.name}: mode '{query.mode}'; expected sample or cluster")
    if target_size is not None and not 1 <= target_size <= rows:
        raise UserError(f"--target-size {target_size}: the pool holds {rows} images; expected between 1 and that")


class VectorsOfAll:
    """The vectors of several sets, one behind the other, as one `Vectors`."""

    def __init__(self, queries: Sequence[QuerySet]) -> None:
        self._parts = [as_vectors(query.vectors) for query in queries]
        self._starts = np.cumsum([0, *(part.rows for part in self._parts)])

    @property
    def rows(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        return self._parts[0].dim

    def block(self, start: int, stop: int) -> Float32:
        return self.gather(np.arange(start, min(stop, self.rows)))

    def gather(self, index: Int64) -> Float32:
        result = np.empty((len(index), self.dim), np.float32)
        which = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(which):
            here = which == number
            result[here] = self._parts[number].gather(index[here] - self._starts[number])
        return result


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names, those given before with a number behind them: a, b, a -> a, b, `a (2)`."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def default_clusters(rows: int) -> int:
    """Clusters for a pool: one per 64 images, at most the paper's 100,000."""
    return max(1, min(rows // 64, 100_000))
