"""k-means on Faiss: fitted on a sample, then one streaming pass that assigns every row."""

from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress, over_blocks
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors, sample_rows

POINTS_PER_CENTROID = 256
"""Sample size per centroid: more points move the centroids no more than another seed does (Faiss's own default)."""


@dataclass(frozen=True)
class KMeans:
    """Fitted centroids [K, D]; `spherical` ones have unit length and are compared by cosine, others by distance.

    `inertia` is the mean squared distance of the fitted sample to its centroids.
    """

    centroids: Float32
    spherical: bool
    inertia: float
    sample: int

    @property
    def k(self) -> int:
        return int(self.centroids.shape[0])


@dataclass(frozen=True)
class Assignment:
    """The centroid of every row: label [N], and the squared distance [N] to it."""

    label: Int64
    distance: Float32

    def sizes(self, k: int) -> Int64:
        """Rows per centroid, [k]; zero for a centroid nobody is nearest to."""
        return np.bincount(self.label, minlength=k).astype(np.int64)


def fit_kmeans(
    vectors: Vectors | npt.NDArray[np.floating],
    k: int,
    *,
    iterations: int = 20,
    spherical: bool = True,
    seed: int = 0,
    init: str = "random",
    points_per_centroid: int = POINTS_PER_CENTROID,
    ranks: Ranks = ALONE,
) -> KMeans:
    """Lloyd's k-means on at most k x points_per_centroid rows.

    spherical: rows and centroids of unit length (cosine), for features of a network. A cluster that empties gets
    half of a large one (Faiss's rule). init: `random` rows, which after ten iterations reach the same inertia as
    k-means++ at a fifth of its cost; or `spread` (see `spread_centroids`), which also reaches the thinly
    populated regions that random rows miss. Memory: the sample and the centroids. Deterministic by seed; under a
    launch the main process fits, and all get its centroids. Raises UserError where there are fewer rows than clusters.
    """
    source = as_vectors(vectors, unit=spherical)
    if not 1 <= k <= source.rows:
        raise UserError(
            f"k-means: {k} clusters asked of {source.rows} rows; expected between 1 and the number of rows; "
            "ask for fewer clusters"
        )

    def fit() -> KMeans:
        sample = source.gather(sample_rows(source.rows, k * points_per_centroid, seed))
        if k == len(sample):
            return KMeans(sample, spherical, 0.0, k)  # every row its own centroid; Faiss would warn and copy as well
        clustering = faiss.Kmeans(
            source.dim,
            k,
            niter=iterations,
            seed=seed + 1,
            spherical=spherical,
            min_points_per_centroid=1,
            max_points_per_centroid=points_per_centroid,
        )
        start = spread_centroids(sample, k, seed) if init == "spread" else None
        clustering.train(sample, init_centroids=start)
        centroids = np.asarray(clustering.centroids, dtype=np.float32).copy()
        inertia = float(assign(sample, KMeans(centroids, spherical, 0.0, 0)).distance.mean())
        return KMeans(centroids, spherical, inertia, len(sample))

    return ranks.first(fit)


def spread_centroids(sample: Float32, k: int, seed: int) -> Float32:
    """k rows of the sample [N, D], drawn far from each other: k-means++ (Arthur and Vassilvitskii 2007) in rounds.

    Each round draws as many new rows as there are, by squared distance to those chosen before, so that all rounds
    together cost one pass of k-means instead of k passes one after the other.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xD2]))
    chosen = np.array([rng.integers(len(sample))])
    distance = np.full(len(sample), np.inf, dtype=np.float64)
    fresh = chosen
    while len(chosen) < k:
        for start in range(0, len(sample), 16384):
            nearest, _ = faiss.knn(sample[start : start + 16384], sample[fresh], 1)
            part = distance[start : start + 16384]
            np.minimum(part, np.maximum(nearest[:, 0], 0), out=part)
        distance[chosen] = 0
        # Copies of rows that were chosen have no distance left, yet k rows must come out.
        weight = distance if np.count_nonzero(distance) >= k else distance + 1e-12
        weight[chosen] = 0
        size = min(len(chosen), k - len(chosen))
        fresh = rng.choice(len(sample), size=size, replace=False, p=weight / weight.sum())
        chosen = np.concatenate([chosen, fresh])
    return np.ascontiguousarray(sample[chosen])


def assign(
    vectors: Vectors | npt.NDArray[np.floating],
    kmeans: KMeans,
    *,
    block: int = 16384,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Assignment:
    """The nearest centroid of every row, read by blocks that `ranks` share; equally near ones go to the lower one."""
    source = as_vectors(vectors, unit=kmeans.spherical)
    metric = faiss.METRIC_INNER_PRODUCT if kmeans.spherical else faiss.METRIC_L2
    label = np.empty(source.rows, dtype=np.int64)
    distance = np.empty(source.rows, dtype=np.float32)

    def nearest(start: int) -> tuple[int, Int64, Float32]:
        rows = source.block(start, min(start + block, source.rows))
        value, found = faiss.knn(rows, kmeans.centroids, 1, metric=metric)
        # |x - c|^2 = 2 - 2 x.c for vectors of unit length; rounding may leave it a hair below zero.
        squared = 2 - 2 * value[:, 0] if kmeans.spherical else value[:, 0]
        return start, found[:, 0], np.maximum(squared, 0)

    for start, found, squared in over_blocks(nearest, source.rows, block, progress=progress, ranks=ranks):
        label[start : start + len(found)], distance[start : start + len(found)] = found, squared
    return Assignment(label, distance)


def closest_in_cluster(assignment: Assignment, limit: int) -> Int64:
    """The `limit` rows of every cluster that lie nearest to its centroid, sorted by row (ties by row)."""
    order = np.lexsort((np.arange(len(assignment.label)), assignment.distance, assignment.label))
    return np.sort(order[rank_in_group(assignment.label[order]) < limit])


def rank_in_group(sorted_group: Int64) -> Int64:
    """Position of every element within its run of equal values: [3, 3, 5, 5, 5] -> [0, 1, 0, 1, 2]."""
    n = len(sorted_group)
    position = np.arange(n, dtype=np.int64)
    new = np.ones(n, dtype=bool)
    new[1:] = sorted_group[1:] != sorted_group[:-1]
    return position - np.maximum.accumulate(np.where(new, position, 0))
