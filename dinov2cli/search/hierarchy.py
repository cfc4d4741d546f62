"""Hierarchical k-means with resampling (Vo et al. 2024, arXiv 2405.15613, section 3), written from the paper."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress, Stage, Store
from dinov2cli.search.kmeans import (
    POINTS_PER_CENTROID,
    Assignment,
    KMeans,
    assign,
    closest_in_cluster,
    fit_kmeans,
)
from dinov2cli.search.splitting import SPLIT_ABOVE, fit_split
from dinov2cli.search.vectors import Int64, SubsetVectors, Vectors, as_vectors

STARTS = 5
"""Starts of a cheap fit, of which the best is taken."""

_CHEAP = 2e7  # products per iteration: a fit of milliseconds


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


def default_levels(rows: int, *, target: int | None = None, most: int = 100_000) -> list[int]:
    """Numbers of clusters, finest first: a mean of 32 rows per cluster (at most `most`), then a tenth each time.

    target: how many rows are to be sampled from the tree; finer clusters than that cannot all be drawn from. The paper
    has 10 million, 500,000, 50,000 and 10,000 for 743 million rows: 74 rows, then 20, 10 and 5 clusters, in each.
    """
    first = max(1, min(rows // 32, most, target or most))
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
    tolerance: float = 0.0,
    nested: bool = True,
    spherical: bool = True,
    seed: int = 0,
    split_above: int = SPLIT_ABOVE,
    device: str | None = None,
    memory: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Hierarchy:
    """k-means of the rows into levels[0] clusters, of those centroids into levels[1] clusters, and so on.

    k-means alone puts most centroids where the data are dense. At each level `resample_steps` times the r points
    nearest to each centroid (r = half the mean cluster size, at most 256) are clustered again and all points
    reassigned: centroids move towards a uniform cover of the support, which is what makes sampling from the tree
    balanced. Levels of more than `split_above` clusters are fitted in two stages (`fit_split`). iterations,
    tolerance, nested, device, memory: of each fit, see `fit_kmeans`. With `store` finished fits and blocks of
    assignments are kept. Deterministic by seed, the same for any number of ranks. Raises UserError for levels that do
    not shrink or more clusters than rows.
    """
    _check_levels(levels)
    points: Vectors = as_vectors(vectors, unit=spherical)
    settings: dict[str, Any] = {
        "iterations": iterations,
        "tolerance": tolerance,
        "nested": nested,
        "spherical": spherical,
    }
    key = {"rows": points.rows, "dim": points.dim, "levels": list(levels), "resample_steps": resample_steps}
    key["memory"] = memory  # a tight limit starts fits from fewer rows
    stage = None if store is None else store.stage("hierarchy", key | settings | {"seed": seed, "split": split_above})
    where: dict[str, Any] = {"device": device, "memory": memory, "ranks": ranks}
    result: list[Level] = []
    total = len(levels) * (resample_steps + 1)

    def fit(inputs: Vectors, k: int, step: int) -> KMeans:
        """The fit number `step` of all levels."""
        draw = seed * 1009 + step
        if k > split_above:
            more: dict[str, Any] = {"store": store, "name": f"hierarchy-split-{step}", "seed": draw}
            return fit_split(inputs, k, iterations=iterations, spherical=spherical, **where, **more)
        # Random rows would start where the data are dense: clusters of equal size, which resampling cannot even out.
        # A few centroids of few points end in poor places easily, and are cheap to fit again from other starts.
        starts = STARTS if inputs.rows * k * inputs.dim <= _CHEAP else 1
        more = {"store": store, "name": f"hierarchy-fit-{step}", "seed": draw, "init": "spread", "starts": starts}
        return fit_kmeans(inputs, k, **settings, **where, **more)

    for depth, k in enumerate(levels):
        first = depth * (resample_steps + 1)
        r = min(max(1, points.rows // k // 2), POINTS_PER_CENTROID)
        inputs: Vectors = points
        for step in range(first, first + resample_steps + 1):
            kmeans = _kept(stage, step, partial(fit, inputs, k, step), ranks)
            assignment = assign(points, kmeans, device=device, store=store, name=f"hierarchy-rows-{step}", ranks=ranks)
            _tell(progress, step + 1, total)
            chosen = closest_in_cluster(assignment, r)
            if len(chosen) < k:
                break  # fewer points than clusters are left to fit on: some clusters were empty
            inputs = SubsetVectors(points, chosen)
        result.append(Level(kmeans, assignment))
        points = as_vectors(kmeans.centroids, unit=spherical)
    return Hierarchy(result)


def _kept(stage: Stage | None, step: int, fit: Callable[[], KMeans], ranks: Ranks) -> KMeans:
    """The result of `fit`, or what `stage` holds of it, on every rank."""
    if stage is None:
        return fit()
    found = ranks.first(lambda: stage.load(step))
    if found is not None:
        inertia, sample, empty, splits, passes, converged = np.asarray(found["figures"], dtype=np.float64).tolist()
        centroids, spherical = np.asarray(found["centroids"], dtype=np.float32), bool(found["spherical"])
        return KMeans(centroids, spherical, inertia, int(sample), int(empty), int(splits), passes, bool(converged))
    one = fit()
    figures = np.array([one.inertia, one.sample, one.empty, one.splits, one.passes, one.converged], dtype=np.float64)

    def save() -> None:
        stage.save(step, {"centroids": one.centroids, "figures": figures, "spherical": np.array(one.spherical)})

    ranks.first(save)
    return one


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
