"""k-means into very many clusters in two stages: a coarse one, and each of its clusters split by its share of rows."""

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.assignment import KMeans, assign
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.kmeans import POINTS_PER_CENTROID, fit_kmeans
from dinov2cli.search.vectors import Int64, SubsetVectors, Vectors, as_vectors, sample_rows

SPLIT_ABOVE = 20_000
"""Clusters above which the hierarchy splits in two stages: rows are then compared with 2 sqrt(K) centroids, not K."""


def fit_split(
    vectors: Vectors | npt.NDArray[np.floating],
    k: int,
    *,
    coarse: int | None = None,
    iterations: int = 20,
    spherical: bool = True,
    seed: int = 0,
    points_per_centroid: int = POINTS_PER_CENTROID,
    device: str | None = None,
    memory: int | None = None,
    store: Store | None = None,
    name: str = "split",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> KMeans:
    """k centroids from `coarse` clusters (default sqrt(k)), each split in proportion to its rows.

    The way Vo et al. 2024 (section 4) reach 10 million clusters: 100,000, each split into 100. It runs over at most
    k x points_per_centroid rows. `inertia` is to the nearest centroid within the coarse cluster: an upper bound. The
    `ranks` share the splits; with `store` finished ones are kept. Raises UserError for fewer rows than clusters.
    """
    source = as_vectors(vectors, unit=spherical)
    if not 1 <= k <= source.rows:
        raise UserError(
            f"k-means: {k} clusters asked of {source.rows} rows; expected between 1 and the number of rows; "
            "ask for fewer clusters"
        )
    size = min(source.rows, k * points_per_centroid)
    if size < source.rows:
        source = SubsetVectors(source, sample_rows(source.rows, size, seed))
    same: dict[str, Any] = {"iterations": iterations, "spherical": spherical, "device": device, "memory": memory}
    parent = fit_kmeans(
        source, min(k, coarse or math.isqrt(k)), **same, seed=seed, store=store, name=f"{name}-coarse", ranks=ranks
    )
    label = assign(source, parent, device=device, store=store, name=f"{name}-coarse-rows", ranks=ranks).label
    quota = shares(np.bincount(label, minlength=parent.k), k)
    order = np.argsort(label, kind="stable")
    ends = np.cumsum(np.bincount(label, minlength=parent.k))

    def split(cluster: int) -> Arrays:
        if not quota[cluster]:
            return {"centroids": np.zeros((0, source.dim), np.float32), "error": np.zeros(2)}
        rows = np.sort(order[ends[cluster - 1] if cluster else 0 : ends[cluster]])
        one = fit_kmeans(SubsetVectors(source, rows), int(quota[cluster]), **same, seed=seed + cluster + 1)
        return {"centroids": one.centroids, "error": np.array([one.inertia * len(rows), one.splits])}

    stage = None
    if store is not None:
        digest = hashlib.sha256(parent.centroids.tobytes()).hexdigest()
        key = {"rows": size, "k": k, "parent": digest, "iterations": iterations, "spherical": spherical, "seed": seed}
        stage = store.stage(name, key)
    parts = list(over_blocks(kept(split, stage), parent.k, 1, progress=progress, ranks=ranks))
    centroids = np.concatenate([np.asarray(part["centroids"], dtype=np.float32) for part in parts])
    error, splits = np.sum([np.asarray(part["error"], dtype=np.float64) for part in parts], axis=0)
    return KMeans(centroids, spherical, float(error) / size, size, splits=int(splits), passes=parent.passes)


def shares(sizes: Int64, total: int) -> Int64:
    """`total` dealt out in proportion to `sizes` [n], by largest remainder: at least 1 where there is any, at most all.

    total must lie between the number of sizes that are not zero and their sum.
    """
    ideal = sizes * (total / sizes.sum())
    share = np.minimum(np.maximum(np.floor(ideal).astype(np.int64), sizes > 0), sizes)
    while (left := total - int(share.sum())) != 0:
        step = 1 if left > 0 else -1
        able = np.flatnonzero(share < sizes if step > 0 else share > 1)
        order = able[np.argsort(-step * (ideal - share)[able], kind="stable")]
        share[order[: abs(left)]] += step
    return share
