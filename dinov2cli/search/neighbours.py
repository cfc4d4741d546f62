"""Most similar rows, and all pairs above a threshold, over sets of vectors read by blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Progress, over_blocks
from dinov2cli.search.edges import Edges, join_edges, make_edges
from dinov2cli.search.index import SearchIndex, build_index
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors

_QUERY_ROWS = 4096


@dataclass(frozen=True)
class NeighbourBlock:
    """Neighbours of the query rows start .. start + n: cosine [n, k] and row [n, k], most similar first."""

    start: int
    similarity: Float32
    row: Int64


def neighbour_blocks(
    index: SearchIndex,
    queries: Vectors | npt.NDArray[np.floating],
    k: int,
    *,
    exclude_self: bool = False,
    block: int = _QUERY_ROWS,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[NeighbourBlock]:
    """The k most similar rows of every query, `block` queries at a time, on every rank; each searches its share.

    With `exclude_self` query i is row i of the index and never its own neighbour. Exact copies tie with the row
    itself and may push it out of the first place, or out of the list, so it is taken out wherever it stands.
    Where the index holds fewer than k other rows, row is -1 and similarity -inf.
    Raises ValueError for k < 1 or vectors of another length than the index's.
    """
    search = _searcher(index, queries, k, exclude_self, block)
    yield from over_blocks(search, as_vectors(queries).rows, block, progress=progress, ranks=ranks)


def _searcher(
    index: SearchIndex, queries: Vectors | npt.NDArray[np.floating], k: int, exclude_self: bool, block: int
) -> Callable[[int], NeighbourBlock]:
    """What finds the neighbours of the block of queries that begins at a row."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    source = as_vectors(queries)
    if source.rows and source.dim != index.dim:
        raise ValueError(f"queries: expected vectors of length {index.dim}, found {source.dim}")

    def search(start: int) -> NeighbourBlock:
        vectors = source.block(start, min(start + block, source.rows))
        similarity, row = index.search(vectors, k + 1 if exclude_self else k)
        if exclude_self:
            similarity, row = _without_self(similarity, row, start)
        return NeighbourBlock(start, *_exactly_k(similarity, row, k))

    return search


def top_k(
    vectors: Vectors | npt.NDArray[np.floating],
    k: int,
    *,
    queries: Vectors | npt.NDArray[np.floating] | None = None,
    index: str = "auto",
    nprobe: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Float32, Int64]:
    """The k most similar rows of `vectors` for every query: cosine [n, k], row [n, k].

    Without `queries` every row is compared with all others (itself excluded). The lists are held in memory
    (12 bytes x n x k); use `neighbour_blocks` where that is too much. See `build_index` for `index` and `nprobe`.
    """
    built = build_index(vectors, index=index, nprobe=nprobe, seed=seed, ranks=ranks)
    source = as_vectors(vectors if queries is None else queries)
    blocks = list(neighbour_blocks(built, source, k, exclude_self=queries is None, progress=progress, ranks=ranks))
    if not blocks:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
    return np.concatenate([b.similarity for b in blocks]), np.concatenate([b.row for b in blocks])


def similarity_edges(
    vectors: Vectors | npt.NDArray[np.floating],
    threshold: float,
    *,
    k: int = 64,
    index: str = "auto",
    nprobe: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Edges:
    """All pairs of rows with cosine > threshold among the k nearest neighbours of each row (METHOD.md section 1).

    Neighbour lists are not kept: memory is the index, one block of lists, and the edges. Rows whose k-th neighbour
    still lies above the threshold are named in `Edges.truncated`. Every rank searches its share and gets all edges.
    """
    source = as_vectors(vectors)
    built = build_index(source, index=index, nprobe=nprobe, seed=seed, ranks=ranks)
    search = _searcher(built, source, k, True, _QUERY_ROWS)
    parts = over_blocks(
        lambda start: _edges_above(search(start), threshold, cut=source.rows - 1 > k),
        source.rows,
        _QUERY_ROWS,
        progress=progress,
        ranks=ranks,
    )
    return join_edges(list(parts))


def _edges_above(found: NeighbourBlock, threshold: float, *, cut: bool) -> Edges:
    """The edges of a block of neighbours; where lists are `cut` off at k, rows whose list is full are truncated."""
    above = found.similarity > threshold
    offset, rank = np.nonzero(above)
    full = np.flatnonzero(above.all(axis=1)) if cut else np.zeros(0, np.int64)
    return make_edges(
        offset + found.start, found.row[offset, rank], found.similarity[offset, rank], truncated=full + found.start
    )


def best_match(
    vectors: Vectors | npt.NDArray[np.floating],
    reference: Vectors | npt.NDArray[np.floating],
    *,
    index: str = "auto",
    nprobe: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Float32, Int64]:
    """For every row the most similar row of `reference`: cosine [N], row [N] (-1 where the reference is empty)."""
    similarity, row = top_k(
        reference, 1, queries=vectors, index=index, nprobe=nprobe, seed=seed, progress=progress, ranks=ranks
    )
    return similarity[:, 0], row[:, 0]


def _without_self(similarity: Float32, row: Int64, start: int) -> tuple[Float32, Int64]:
    """Lists of k + 1 shortened to k: the row itself goes, or the last one where the row itself is not listed."""
    n, width = row.shape
    keep = row != np.arange(start, start + n)[:, None]
    keep[keep.all(axis=1), -1] = False
    return similarity[keep].reshape(n, width - 1), row[keep].reshape(n, width - 1)


def _exactly_k(similarity: Float32, row: Int64, k: int) -> tuple[Float32, Int64]:
    missing = k - row.shape[1]
    if missing <= 0:
        return similarity[:, :k], row[:, :k]
    pad = ((0, 0), (0, missing))
    return np.pad(similarity, pad, constant_values=-np.inf), np.pad(row, pad, constant_values=-1)
