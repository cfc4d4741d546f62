"""Fitted centroids, the nearest one of every row, and what is done with the clusters."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import InputError
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.nearest import finder, squared_distance
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors, sample_rows

_SAMPLE = 2048  # rows on which an approximate assignment is compared with the exact one


@dataclass(frozen=True)
class KMeans:
    """Fitted centroids [K, D]; `spherical` ones have unit length and are compared by cosine, others by distance.

    `inertia` is the mean squared distance of the fitted rows (`sample` of them) to their nearest centroid, and `empty`
    the number of centroids that are nearest to none of them. `passes` is the work: iterations times the share of the
    rows they ran over. `splits` counts the clusters that emptied on the way and got half of a large one.
    """

    centroids: Float32
    spherical: bool
    inertia: float
    sample: int
    empty: int = 0
    splits: int = 0
    passes: float = 0.0
    converged: bool = False

    @property
    def k(self) -> int:
        return int(self.centroids.shape[0])


@dataclass(frozen=True)
class Assignment:
    """The centroid of every row: label [N], and the squared distance [N] to it.

    `agreement`: share of rows, of a sample, whose centroid is truly the nearest; 1 where all were compared.
    """

    label: Int64
    distance: Float32
    agreement: float = 1.0

    def sizes(self, k: int) -> Int64:
        """Rows per centroid, [k]; zero for a centroid nobody is nearest to."""
        return np.bincount(self.label, minlength=k).astype(np.int64)


def assign(
    vectors: Vectors | npt.NDArray[np.floating],
    kmeans: KMeans,
    *,
    block: int = 16384,
    index: str = "auto",
    device: str | None = None,
    store: Store | None = None,
    name: str = "assignment",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Assignment:
    """The nearest centroid of every row, read by blocks that `ranks` share; equally near ones go to the lower one.

    index: `flat` compares with all centroids, `ivf` with those near by (see `finder`), `auto` chooses. `store` keeps
    finished blocks. Memory: 12 bytes a row for the result, and 20 x block x D. Raises InputError for rows of another
    length than the centroids, or that are not finite.
    """
    source = as_vectors(vectors, unit=kmeans.spherical)
    check_length(source, kmeans)
    find, exact = finder(kmeans.centroids, kmeans.spherical, index=index, device=device)
    label = np.empty(source.rows, dtype=np.int64)
    distance = np.empty(source.rows, dtype=np.float32)

    def closest(start: int) -> Arrays:
        rows = source.block(start, min(start + block, source.rows))
        score, found = find(rows)
        return {"label": found, "distance": squared_distance(rows, score, found, kmeans.centroids, kmeans.spherical)}

    stage = None
    if store is not None:
        digest = hashlib.sha256(np.ascontiguousarray(kmeans.centroids).tobytes()).hexdigest()
        stage = store.stage(name, {"rows": source.rows, "block": block, "exact": exact, "centroids": digest})
    blocks = over_blocks(kept(closest, stage), source.rows, block, progress=progress, ranks=ranks)
    for start, one in zip(range(0, source.rows, block), blocks, strict=True):
        here = slice(start, start + len(one["label"]))
        label[here], distance[here] = one["label"], one["distance"]
    agreement = 1.0 if exact or not source.rows else ranks.first(lambda: _agreement(source, kmeans, label, device))
    return Assignment(label, distance, agreement)


def check_length(source: Vectors, kmeans: KMeans) -> None:
    """Raise InputError for rows of another length than the centroids."""
    dim = kmeans.centroids.shape[1]
    if source.rows and source.dim != dim:
        raise InputError(
            f"k-means: rows of length {source.dim}, centroids of length {dim}; expected one length: embed both with "
            "one model"
        )


def _agreement(source: Vectors, kmeans: KMeans, label: Int64, device: str | None) -> float:
    rows = sample_rows(source.rows, _SAMPLE, 0)
    find, _ = finder(kmeans.centroids, kmeans.spherical, index="flat", device=device)
    return float((find(source.gather(rows))[1] == label[rows]).mean())


def means_of(
    vectors: Vectors | npt.NDArray[np.floating],
    label: Int64,
    kmeans: KMeans,
    *,
    block: int = 16384,
    ranks: Ranks = ALONE,
) -> KMeans:
    """`kmeans` with each centroid moved to the mean of the rows that `label` [N] gives it; an empty one stays."""
    source = as_vectors(vectors, unit=kmeans.spherical)
    check_length(source, kmeans)

    def sums(start: int) -> tuple[Int64, npt.NDArray[np.float64]]:
        here = label[start : start + block]
        present, which = np.unique(here, return_inverse=True)
        order = np.argsort(which, kind="stable")
        rows = source.block(start, min(start + block, source.rows))[order].astype(np.float64)
        return present, np.add.reduceat(rows, np.searchsorted(which[order], np.arange(len(present))), axis=0)

    total = np.zeros(kmeans.centroids.shape, dtype=np.float64)
    for present, part in over_blocks(sums, source.rows, block, ranks=ranks):
        total[present] += part
    count = np.bincount(label, minlength=kmeans.k)
    mean = total / np.maximum(count, 1)[:, None]
    if kmeans.spherical:
        length = np.linalg.norm(mean, axis=1, keepdims=True)
        mean /= np.where(length == 0, 1, length)
    mean[count == 0] = kmeans.centroids[count == 0]
    return replace(kmeans, centroids=np.ascontiguousarray(mean, dtype=np.float32))


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
