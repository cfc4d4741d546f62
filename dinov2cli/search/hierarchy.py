"""Hierarchical k-means with resampling (Vo et al. 2024, arXiv 2405.15613, section 3), written from the paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress
from dinov2cli.search.kmeans import (
    POINTS_PER_CENTROID,
    Assignment,
    KMeans,
    assign,
    closest_in_cluster,
    fit_kmeans,
)
from dinov2cli.search.vectors import Int64, SubsetVectors, Vectors, as_vectors


@dataclass(frozen=True)
class Level:
    """One level: its centroids, and for every point of the level below (rows at the first) its centroid."""

    kmeans: KMeans
    assignment: Assignment


@dataclass(frozen=True)
class Hierarchy:
    """Levels from the finest (over the rows) to the coarsest."""

    levels: list[Level]

    def labels(self) -> list[Int64]:
        """For every level the cluster of every row: list of [N]."""
        result = [self.levels[0].assignment.label]
        for level in self.levels[1:]:
            result.append(level.assignment.label[result[-1]])
        return result


def default_levels(rows: int) -> list[int]:
    """Numbers of clusters, finest first: a mean of 32 rows per cluster (at most 100,000), then a tenth each time."""
    first = max(1, min(rows // 32, 100_000))
    levels = [first]
    while levels[-1] >= 100:
        levels.append(levels[-1] // 10)
    return levels


def fit_hierarchy(
    vectors: Vectors | npt.NDArray[np.floating],
    levels: Sequence[int],
    *,
    resample_steps: int = 5,
    iterations: int = 10,
    spherical: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Hierarchy:
    """k-means of the rows into levels[0] clusters, of those centroids into levels[1] clusters, and so on.

    k-means alone puts most centroids where the data are dense. At each level `resample_steps` times the r points
    nearest to each centroid (r = half the mean cluster size, at most 256) are clustered again and all points
    reassigned: centroids move towards a uniform cover of the support, which is what makes sampling from the tree
    balanced. Deterministic by seed; the main process fits, all `ranks` assign. Raises UserError for levels that do
    not shrink.
    """
    _check_levels(levels)
    points: Vectors = as_vectors(vectors, unit=spherical)
    result: list[Level] = []
    total = len(levels) * (resample_steps + 1)
    # Random rows would start where the data are dense: clusters of equal size, which resampling cannot even out.
    fit: dict[str, Any] = {"iterations": iterations, "spherical": spherical, "init": "spread", "ranks": ranks}
    for depth, k in enumerate(levels):
        level_seed = seed * 1009 + depth * 101
        kmeans = fit_kmeans(points, k, **fit, seed=level_seed)
        assignment = assign(points, kmeans, ranks=ranks)
        _tell(progress, depth * (resample_steps + 1) + 1, total)
        r = min(max(1, points.rows // k // 2), POINTS_PER_CENTROID)
        for step in range(resample_steps):
            chosen = closest_in_cluster(assignment, r)
            if len(chosen) < k:
                break  # fewer points than clusters are left to fit on: some clusters were empty
            kmeans = fit_kmeans(SubsetVectors(points, chosen), k, **fit, seed=level_seed + step + 1)
            assignment = assign(points, kmeans, ranks=ranks)
            _tell(progress, depth * (resample_steps + 1) + step + 2, total)
        result.append(Level(kmeans, assignment))
        points = as_vectors(kmeans.centroids, unit=spherical)
    return Hierarchy(result)


def _check_levels(levels: Sequence[int]) -> None:
    shrinking = all(a > b for a, b in pairwise(levels))
    if not levels or min(levels) < 1 or not shrinking:
        shown = ",".join(map(str, levels)) or "none"
        raise UserError(
            f"cluster levels: found {shown}; expected numbers of clusters that shrink, finest first, "
            "such as 1000,100,10"
        )


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
