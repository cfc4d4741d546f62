"""Most similar rows, and all pairs above a threshold, over sets of vectors read by blocks."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.edges import Edges, join_raw, make_edges
from dinov2cli.search.index import SearchIndex, Tell, build_index, merge_lists
from dinov2cli.search.plan import QUERY_ROWS, list_rows
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors

_UNITS = 4096


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
    block: int = QUERY_ROWS,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[NeighbourBlock]:
    """The k most similar rows of every query, `block` queries at a time, on every rank; each searches its share.

    With `exclude_self` query i is row i of the index and never its own neighbour. Exact copies tie with the row
    itself and may push it out of the first place, or out of the list, so it is taken out wherever it stands.
    Where the index holds fewer than k other rows, row is -1 and similarity -inf. An index in shards is filled anew
    for every 256 MB of lists. Raises ValueError for k < 1 or vectors of another length than the index's.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    source = as_vectors(queries)
    _check_length(source, index)
    wanted = k + 1 if exclude_self else k

    def search(start: int) -> NeighbourBlock:
        return _finished(start, index.search(source.block(start, min(start + block, source.rows)), wanted))

    def _finished(start: int, found: tuple[Float32, Int64]) -> NeighbourBlock:
        similarity, row = _without_self(*found, start) if exclude_self else found
        return NeighbourBlock(start, *_exactly_k(similarity, row, k))

    if index.shards == 1:
        yield from over_blocks(search, source.rows, block, progress=progress, ranks=ranks)
        return
    size = max(block, list_rows(k) // block * block)
    for first in range(0, source.rows, size):
        stop = min(first + size, source.rows)
        for start, found in _over_shards(index, source, (first, stop), wanted, block, ranks):
            yield _finished(start, found)
            if progress is not None:
                progress(min(start + block, source.rows), source.rows)


def _over_shards(
    index: SearchIndex, source: Vectors, rows: tuple[int, int], k: int, block: int, ranks: Ranks
) -> Iterator[tuple[int, tuple[Float32, Int64]]]:
    """The merged lists of the queries rows[0] .. rows[1], block by block; one shard is filled at a time."""
    first, stop = rows
    lists: list[tuple[Float32, Int64]] = []
    for shard in range(index.shards):

        def search(start: int, shard: int = shard) -> tuple[Float32, Int64]:
            vectors = source.block(first + start, min(first + start + block, stop))
            return index.search_shard(shard, vectors, k)

        found = over_blocks(search, stop - first, block, ranks=ranks)
        if not lists:
            lists = list(found)
        else:
            for place, other in enumerate(found):
                lists[place] = merge_lists(lists[place], other, k)
    for place, merged in enumerate(lists):
        yield first + place * block, merged


def top_k(
    vectors: Vectors | npt.NDArray[np.floating],
    k: int,
    *,
    queries: Vectors | npt.NDArray[np.floating] | None = None,
    index: str = "auto",
    nprobe: int | None = None,
    seed: int = 0,
    recall: float = 0.95,
    memory: int | None = None,
    tell: Tell | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Float32, Int64]:
    """The k most similar rows of `vectors` for every query: cosine [n, k], row [n, k].

    Without `queries` every row is compared with all others (itself excluded). The lists are held in memory
    (12 bytes x n x k, not part of `memory`); use `neighbour_blocks` where that is too much. See `build_index` for
    `index`, `nprobe`, `recall` and `memory`; `tell` is given the report of an approximate search.
    """
    options = {"index": index, "nprobe": nprobe, "seed": seed, "recall": recall, "memory": memory}
    built = build_index(vectors, k=k, queries=queries, ranks=ranks, **options)  # type: ignore[arg-type]
    if tell is not None:
        tell(built.report)
    source = as_vectors(vectors if queries is None else queries)
    blocks = list(neighbour_blocks(built, source, k, exclude_self=queries is None, progress=progress, ranks=ranks))
    if not blocks:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
    return np.concatenate([b.similarity for b in blocks]), np.concatenate([b.row for b in blocks])


def best_match(
    vectors: Vectors | npt.NDArray[np.floating],
    reference: Vectors | npt.NDArray[np.floating],
    *,
    index: str = "auto",
    nprobe: int | None = None,
    seed: int = 0,
    memory: int | None = None,
    tell: Tell | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Float32, Int64]:
    """For every row the most similar row of `reference`: cosine [N], row [N] (-1 where the reference is empty)."""
    similarity, row = top_k(
        reference,
        1,
        queries=vectors,
        index=index,
        nprobe=nprobe,
        seed=seed,
        memory=memory,
        tell=tell,
        progress=progress,
        ranks=ranks,
    )
    return similarity[:, 0], row[:, 0]


def similarity_edges(
    vectors: Vectors | npt.NDArray[np.floating],
    threshold: float,
    *,
    k: int = 64,
    index: str = "auto",
    nprobe: int | None = None,
    seed: int = 0,
    recall: float = 0.95,
    memory: int | None = None,
    bias: Float32 | None = None,
    store: Store | None = None,
    tell: Tell | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Edges:
    """All pairs of rows with cosine > threshold among the k nearest neighbours of each row (METHOD.md section 1).

    The edges of `edge_blocks`, joined: each pair once. Every rank searches its share and gets all edges, which are
    held in memory (20 bytes each, and as much again while they are joined; not part of `memory`).
    """
    return join_raw(
        list(
            _edge_arrays(
                vectors,
                threshold,
                k=k,
                search={"index": index, "nprobe": nprobe, "seed": seed, "recall": recall, "memory": memory},
                bias=bias,
                store=store,
                tell=tell,
                progress=progress,
                ranks=ranks,
            )
        )
    )


def edge_blocks(
    vectors: Vectors | npt.NDArray[np.floating],
    threshold: float,
    *,
    k: int = 64,
    index: str = "auto",
    nprobe: int | None = None,
    seed: int = 0,
    recall: float = 0.95,
    memory: int | None = None,
    bias: Float32 | None = None,
    store: Store | None = None,
    tell: Tell | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Edges]:
    """The edges of `similarity_edges` as they are found, none held; for components of a set of any size.

    A pair that is found from both of its rows comes twice, in two blocks. Each block is sorted and has a pair once.

    memory: bytes for the index and the search (see `plan_index`). Where that means shards, a row's neighbours are the
    k nearest in every shard: more pairs than of one index, never fewer by design. bias: [N] of every row, see
    `background_bias`; a pair's score is then its cosine less the mean of the two biases, and the score is what is
    compared with the threshold and reported. Rows whose k-th neighbour still lies above the threshold are named in
    `Edges.truncated`. store: keeps the trained index, what was measured, and the edges of every finished block.
    """
    search = {"index": index, "nprobe": nprobe, "seed": seed, "recall": recall, "memory": memory}
    for arrays in _edge_arrays(
        vectors,
        threshold,
        k=k,
        search=search,
        bias=bias,
        store=store,
        tell=tell,
        progress=progress,
        ranks=ranks,
    ):
        yield make_edges(arrays["src"], arrays["dst"], arrays["similarity"], truncated=arrays["truncated"])


def _edge_arrays(
    vectors: Vectors | npt.NDArray[np.floating],
    threshold: float,
    *,
    k: int,
    search: dict,
    bias: Float32 | None,
    store: Store | None,
    tell: Tell | None,
    progress: Progress | None,
    ranks: Ranks,
) -> Iterator[Arrays]:
    """Every block's pairs as arrays, of unsorted (src, dst) in both directions."""
    source = as_vectors(vectors)
    if bias is not None and len(bias) != source.rows:
        raise ValueError(f"bias: expected one value for each of {source.rows} rows, found {len(bias)}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    # Pairs above the threshold are so by cosine less bias; recall is judged at the cosine that this is on average.
    level = threshold + (float(np.mean(bias)) if bias is not None and len(bias) else 0.0)
    built = build_index(source, k=k, purpose="edges", threshold=level, ranks=ranks, store=store, **search)
    if tell is not None:
        tell(built.report)
    unit = QUERY_ROWS * -(-source.rows // (_UNITS * QUERY_ROWS)) if source.rows else QUERY_ROWS
    key = {
        **built.plan.key,
        "effort": [built.report.nprobe, built.report.k_factor],
        "seed": search["seed"],
        "threshold": threshold,
        "unit": unit,
        "bias": None if bias is None else hashlib.sha256(bias.tobytes()).hexdigest(),
    }
    for shard in range(built.shards):
        stage = None if store is None else store.stage("edges", {**key, "shard": shard})
        work = _unit_of_edges(built, source, shard, threshold, k=k, unit=unit, bias=bias)
        shown = progress if shard == built.shards - 1 else None
        yield from over_blocks(kept(work, stage), source.rows, unit, progress=shown, ranks=ranks)


def _unit_of_edges(
    index: SearchIndex, source: Vectors, shard: int, threshold: float, *, k: int, unit: int, bias: Float32 | None
) -> Callable[[int], Arrays]:
    """What finds the edges of `unit` rows from a given one on, `QUERY_ROWS` queries at a time."""
    dtype = np.uint32 if source.rows < 1 << 32 else np.int64
    cut = min(index.plan.shard_rows, source.rows - 1) > k

    def find(first: int) -> Arrays:
        parts = []
        for start in range(first, min(first + unit, source.rows), QUERY_ROWS):
            vectors = source.block(start, min(start + QUERY_ROWS, first + unit, source.rows))
            parts.append(_above(*index.search_shard(shard, vectors, k + 1), start, threshold, k=k, cut=cut, bias=bias))
        src, dst, similarity, truncated = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return {
            "src": src.astype(dtype),
            "dst": dst.astype(dtype),
            "similarity": similarity.astype(np.float32),
            "truncated": truncated.astype(dtype),
        }

    return find


def _above(
    similarity: Float32, row: Int64, start: int, threshold: float, *, k: int, cut: bool, bias: Float32 | None
) -> tuple[Int64, Int64, Float32, Int64]:
    """Pairs above the threshold in lists of k + 1 with the row itself: (row, neighbour, score), and the rows whose
    list of k is full of them where lists are `cut` off."""
    own = np.arange(start, start + len(row))[:, None]
    is_own = row == own
    # The row itself is not listed where copies of it pushed it out, or where it lies in another shard.
    listed = is_own.any(axis=1)
    if bias is not None:
        cosine = similarity
        similarity = np.where(row < 0, -np.inf, cosine - 0.5 * (bias[row] + bias[own])).astype(np.float32)
    above = (similarity > threshold) & ~is_own
    full = np.zeros(len(row), dtype=bool)
    if row.shape[1] > k:
        above[~listed, -1] = False
    if cut and row.shape[1] >= k:
        last = np.where(listed, row.shape[1] - 1, k - 1)[:, None]
        score = np.take_along_axis(similarity, last, 1)[:, 0]
        if bias is not None:  # whatever comes next has at most this cosine, and at best the lowest bias of all
            score = np.take_along_axis(cosine, last, 1)[:, 0] - 0.5 * (bias.min() + bias[own[:, 0]])
        full = (np.take_along_axis(row, last, 1)[:, 0] >= 0) & (score > threshold)
    offset, rank = np.nonzero(above)
    return offset + start, row[offset, rank], similarity[offset, rank], np.flatnonzero(full) + start


def _check_length(source: Vectors, index: SearchIndex) -> None:
    if source.rows and source.dim != index.dim:
        raise ValueError(f"queries: expected vectors of length {index.dim}, found {source.dim}")


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
