"""k-means whose clusters hold no more than a given number of rows."""

import math
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.assignment import check_length
from dinov2cli.search.blocks import Progress, over_blocks
from dinov2cli.search.kmeans import Assignment, KMeans, fit_kmeans, means_of
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors

CANDIDATES = 32
"""Nearest centroids that a row bids for; 8 bytes each for every row, in memory."""

_STEP = 0.01
_ROUNDS = 5000

_BLOCK = 16384


@dataclass(frozen=True)
class _Wishes:
    """The nearest centroids of rows, in order: cluster [n, m] int32, distance [n, m] float32.

    `outside` [n]: what a row pays at most before it leaves its list; infinite where the list holds all centroids.
    """

    cluster: npt.NDArray[np.int32]
    distance: Float32
    outside: npt.NDArray[np.float64]


def balanced_assign(
    vectors: Vectors | npt.NDArray[np.floating],
    kmeans: KMeans,
    capacity: int,
    *,
    candidates: int = CANDIDATES,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Assignment:
    """A near centroid for every row, none of them chosen by more than `capacity` rows.

    An auction (Bertsekas 1988): every row without a place bids for the centroid of least distance + price, as much
    as makes the second best look equally good and `step` more; a full centroid keeps the highest bids (then the lower
    row), and its price is the lowest of them. With at most `candidates` centroids the total distance ends within
    N x step of the least possible; step is 1 % of the mean distance to the nearest. With more, a row looks at its
    nearest `candidates`, and one priced out of them bids among the centroids that have room left afterwards. With a
    capacity that no cluster reaches it is the plain assignment. The ranks share the distances; all get the same.
    Memory: 8 bytes x N x candidates. Raises UserError where k x capacity is less than the number of rows,
    InputError as `assign`.
    """
    source = as_vectors(vectors, unit=kmeans.spherical)
    check_length(source, kmeans)
    rows, k = source.rows, kmeans.k
    if capacity < 1 or capacity * k < rows:
        raise UserError(
            f"balanced clusters: {k} clusters of at most {capacity} rows hold {max(0, capacity) * k}, found {rows} "
            f"rows; expected a capacity of at least {math.ceil(rows / k)}"
        )
    label = np.full(rows, -1, dtype=np.int64)
    distance = np.zeros(rows, dtype=np.float32)
    waiting, open_ = np.arange(rows, dtype=np.int64), np.arange(k, dtype=np.int64)
    room = np.full(k, capacity, dtype=np.int64)
    while len(waiting):
        wishes = _wishes(source, kmeans, waiting, open_, candidates, None if len(waiting) < rows else progress, ranks)
        got, far = _auction(wishes, room)
        placed = got >= 0
        label[waiting[placed]], distance[waiting[placed]] = got[placed], far[placed]
        room -= np.bincount(got[placed], minlength=k)
        waiting, open_ = waiting[~placed], np.flatnonzero(room > 0)
    return Assignment(label, distance)


def fit_balanced(
    vectors: Vectors | npt.NDArray[np.floating],
    k: int,
    *,
    slack: float = 1.0,
    rounds: int = 3,
    iterations: int = 20,
    spherical: bool = True,
    seed: int = 0,
    memory: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[KMeans, Assignment]:
    """k clusters of at most ceil(slack x N / k) rows each: centroids, and the assignment of every row.

    Starts from plain k-means; then `rounds` times the rows are assigned within the capacity and the centroids moved
    to the means. slack 1 makes all clusters equally large up to rounding. Deterministic by seed, the same for any
    number of ranks. Raises UserError for slack below 1 or fewer rows than clusters.
    """
    if slack < 1:
        raise UserError(f"balanced clusters: slack {slack:g}; expected 1 (all equally large) or more")
    source = as_vectors(vectors, unit=spherical)
    kmeans = fit_kmeans(source, k, iterations=iterations, spherical=spherical, seed=seed, memory=memory, ranks=ranks)
    capacity = math.ceil(slack * source.rows / k)
    assignment = balanced_assign(source, kmeans, capacity, ranks=ranks)
    for _ in range(rounds):
        moved = means_of(source, assignment.label, kmeans, ranks=ranks)
        again = balanced_assign(source, moved, capacity, ranks=ranks)
        if float(again.distance.mean(dtype=np.float64)) >= float(assignment.distance.mean(dtype=np.float64)):
            break
        kmeans, assignment = moved, again
    inertia = float(assignment.distance.mean(dtype=np.float64))
    return KMeans(kmeans.centroids, spherical, inertia, source.rows), assignment


def _wishes(
    source: Vectors,
    kmeans: KMeans,
    rows: Int64,
    open_: Int64,
    candidates: int,
    progress: Progress | None,
    ranks: Ranks,
) -> _Wishes:
    """The nearest of the open centroids for some rows, in order; the ranks share the search."""
    centroids = np.ascontiguousarray(kmeans.centroids[open_])
    m = min(candidates, len(open_))
    metric = faiss.METRIC_INNER_PRODUCT if kmeans.spherical else faiss.METRIC_L2
    whole = len(rows) == source.rows
    cluster = np.empty((len(rows), m), dtype=np.int32)
    distance = np.empty((len(rows), m), dtype=np.float32)

    def nearest(start: int) -> tuple[int, Float32, npt.NDArray[np.int32]]:
        stop = min(start + _BLOCK, len(rows))
        block = source.block(start, stop) if whole else source.gather(rows[start:stop])
        value, found = faiss.knn(block, centroids, m, metric=metric)
        squared = 2 - 2 * value if kmeans.spherical else value
        return start, np.maximum(squared, 0), open_[found].astype(np.int32)

    for start, far, who in over_blocks(nearest, len(rows), _BLOCK, progress=progress, ranks=ranks):
        cluster[start : start + len(who)], distance[start : start + len(who)] = who, far
    outside = np.full(len(rows), np.inf)
    if m < len(open_):
        outside = 2 * distance[:, -1].astype(np.float64) - distance[:, 0]
    return _Wishes(cluster, distance, outside)


def _auction(wishes: _Wishes, room: Int64) -> tuple[Int64, Float32]:
    """Who gets which cluster, [n] (-1: priced out), and its distance; `room` [k] is how many each takes."""
    n = len(wishes.cluster)
    step = max(_STEP * float(wishes.distance[:, 0].mean(dtype=np.float64)), 1e-6)
    price = np.where(room > 0, 0.0, np.inf)
    # Where all that is listed is equally far, a row must still bid once, or nobody would ever be placed.
    limit = np.maximum(wishes.outside, wishes.distance[:, 0] + 2 * step)
    held, paid = np.full(n, -1, dtype=np.int64), np.zeros(n)
    asking = np.arange(n, dtype=np.int64)
    for _ in range(_ROUNDS):
        if not len(asking):
            break
        cost = wishes.distance[asking] + price[wishes.cluster[asking]]
        best = cost.argmin(axis=1)
        at = np.arange(len(asking))
        first = cost[at, best]
        stays = first < limit[asking]
        cost[at, best] = np.inf
        second = np.minimum(cost.min(axis=1), limit[asking])
        wanted = wishes.cluster[asking, best].astype(np.int64)
        # Where there is nothing else to go to, any price will do.
        offer = np.where(np.isfinite(second), second - first + price[wanted] + step, np.inf)
        asking, wanted, offer = asking[stays], wanted[stays], offer[stays]
        held[asking], paid[asking] = wanted, offer
        asked = np.zeros(len(room), dtype=bool)
        asked[wanted] = True
        crowd = np.flatnonzero((held >= 0) & asked[held])
        crowd = crowd[np.lexsort((crowd, -paid[crowd], held[crowd]))]
        cluster = held[crowd]
        place = np.arange(len(crowd)) - np.searchsorted(cluster, cluster)  # within the run of its cluster
        last = place == room[cluster] - 1
        price[cluster[last]] = paid[crowd[last]]
        asking = crowd[place >= room[cluster]]
        held[asking] = -1
    where = (wishes.cluster == held[:, None]).argmax(axis=1)
    return held, wishes.distance[np.arange(n), where]
