"""k-means of rows that need not fit in memory: Lloyd's iterations over a sample, or over all rows."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.assignment import (
    Assignment,
    KMeans,
    assign,
    closest_in_cluster,
    means_of,
    rank_in_group,
)
from dinov2cli.search.blocks import Progress, Stage, Store
from dinov2cli.search.lloyd import EIGHTHS, Passes, Rows, moved_centroids, power_above, room_for
from dinov2cli.search.seeding import spread_centroids, start_centroids
from dinov2cli.search.threads import Threads
from dinov2cli.search.vectors import Float32, SubsetVectors, Vectors, as_vectors, sample_rows

__all__ = [
    "POINTS_PER_CENTROID",
    "Assignment",
    "KMeans",
    "assign",
    "closest_in_cluster",
    "fit_kmeans",
    "means_of",
    "rank_in_group",
    "spread_centroids",
]

POINTS_PER_CENTROID = 256
"""Sample size per centroid: more points move the centroids no more than another seed does (Faiss's own default)."""

_NESTED_FROM = 16
"""Rows per centroid that the smallest nested sample must have on average."""

_SHORT = 4e11
"""Products of a fit that starts over when it is interrupted: seconds per iteration."""


def fit_kmeans(
    vectors: Vectors | npt.NDArray[np.floating],
    k: int,
    *,
    fit: str | float = "sample",
    iterations: int = 20,
    tolerance: float = 0.0,
    nested: bool = True,
    spherical: bool = True,
    seed: int = 0,
    init: str = "random",
    starts: int = 1,
    points_per_centroid: int = POINTS_PER_CENTROID,
    device: str | None = None,
    memory: int | None = None,
    store: Store | None = None,
    name: str = "kmeans",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> KMeans:
    """Lloyd's k-means (float32 products, exact float64 sums).

    fit: `sample` runs over at most k x points_per_centroid rows, `full` over all, a number in (0, 1] over that share.
    iterations: at most that many; they end when no centroid moves, or when the inertia falls by less than the share
    `tolerance`. nested: of T iterations the first 0.6 T run over an eighth of the rows, then 0.3 T over a quarter,
    0.2 T over half, and 0.2 T over all, which costs 0.45 T passes; eighths with fewer than 16 rows per
    centroid are left out. spherical: rows and centroids of unit length (cosine), for features of a network. init:
    see `start_centroids`; of several `starts` the fit of least inertia is taken. A cluster that empties gets half of
    a large one.

    memory: bytes that the process stays below; rows are kept as float32 where they fit and else read again at each
    iteration. device: torch's name of where to compute; default the CPU. With `store` a stopped fit continues at its
    last iteration (`name` tells several fits of a run apart), one of seconds starts over. The result is the same,
    bit for bit, for any number of ranks. Raises UserError for fewer rows than clusters, InputError for rows that are
    not finite.
    """
    source = as_vectors(vectors, unit=spherical)
    _check(source, k, fit, iterations)
    size = _fit_rows(source.rows, k, fit, points_per_centroid)
    sampled = size < source.rows
    if sampled:
        source = SubsetVectors(source, sample_rows(source.rows, size, seed))
    if k == size:
        return KMeans(source.block(0, k), spherical, 0.0, k, converged=True)  # every row its own centroid
    where = str(device or "cpu")
    threads = Threads(where)
    # Of one rank for all: other blocks on a machine with other cores would share the rows out twice, or not at all.
    room = ranks.first(
        lambda: room_for(size, source.dim, k, memory, per_row=8 if sampled else 0, threads=threads.count)
    )
    short = float(size) * k * source.dim <= _SHORT and room.keep
    plan = _passes(size, k, iterations, nested)
    key = {"rows": size, "dim": source.dim, "k": k, "plan": plan, "tolerance": tolerance, "spherical": spherical}
    limit = (memory or 3 << 30) // (48 * source.dim)  # a quarter of the memory, with copies
    key |= {"init": init, "block": room.block, "short": short, "start": min(limit, size)}
    rows = Rows(source, room, seed=seed, device=where)
    best: KMeans | None = None
    for one in range(max(1, starts)):
        draw = seed + 1_000_003 * one
        start = ranks.first(partial(start_centroids, source, k, init, draw, limit=limit))
        stage = None if store is None or short else store.stage(name, key | {"seed": draw})
        passes = Passes(rows, spherical, 1.0 if spherical else power_above(start), ranks, short, threads)
        found = _Fitting(passes, plan, tolerance, stage, progress).run(start)
        best = found if best is None or found.inertia < best.inertia else best
    assert best is not None
    return best


def _check(source: Vectors, k: int, fit: str | float, iterations: int) -> None:
    if not 1 <= k <= source.rows:
        raise UserError(
            f"k-means: {k} clusters asked of {source.rows} rows; expected between 1 and the number of rows; "
            "ask for fewer clusters"
        )
    if not (fit in ("sample", "full") or (isinstance(fit, int | float) and 0 < fit <= 1)):
        raise UserError(f"k-means fit '{fit}': expected sample, full or a share of the rows in (0, 1]")
    if iterations < 1:
        raise UserError(f"k-means: {iterations} iterations; expected at least 1")


def _fit_rows(rows: int, k: int, fit: str | float, points_per_centroid: int) -> int:
    if fit == "full":
        return rows
    return min(rows, max(k, k * points_per_centroid if isinstance(fit, str) else round(rows * fit)))


def _passes(rows: int, k: int, iterations: int, nested: bool) -> list[int]:
    """The eighths of the rows that each iteration runs over."""
    shares = [(1, 0.6), (2, 0.3), (4, 0.2), (EIGHTHS, 0.2)]
    usable = [(part, share) for part, share in shares if rows * part >= _NESTED_FROM * k * EIGHTHS]
    if not nested or iterations < 4 or len(usable) < 2:
        return [EIGHTHS] * iterations
    left = sum(share for part, share in shares if (part, share) not in usable)
    plan = [part for part, share in usable for _ in range(int(np.ceil(round(share * iterations, 6))))]
    # What the missing small samples would have done is left to the smallest that there is.
    return [usable[0][0]] * round(left * iterations / 2) + plan


@dataclass
class _Fitting:
    """A fit on its way: what it has to run, and where it keeps how far it is."""

    passes: Passes
    plan: list[int]
    tolerance: float
    stage: Stage | None
    progress: Progress | None
    turn: int = 0

    def run(self, start: Float32) -> KMeans:
        at, work, splits, centroids, last, converged = self._resume(start)
        while at < len(self.plan):
            part = self.plan[at]
            total, count, error = self.passes.run(centroids, part)
            moved, empty = moved_centroids(total, count, spherical=self.passes.spherical)
            work, splits, at = work + part / EIGHTHS, splits + empty, at + 1
            still = np.array_equal(moved, centroids)
            converged = not empty and (still or (last - error) <= self.tolerance * error)
            last = float("inf") if self.plan[at : at + 1] != [part] else error
            centroids = moved
            if converged:  # go on with the next larger part
                at, last = next((i for i in range(at, len(self.plan)) if self.plan[i] != part), len(self.plan)), np.inf
            self._keep(at, work, splits, centroids, last, converged)
            if self.progress is not None:
                self.progress(at, len(self.plan))
        _, count, error = self.passes.run(centroids, EIGHTHS)
        rows = self.passes.rows.source.rows
        empty = int((count == 0).sum())
        return KMeans(centroids, self.passes.spherical, error / rows, rows, empty, splits, work, converged)

    def _resume(self, start: Float32) -> tuple[int, float, int, Float32, float, bool]:
        def latest() -> tuple[int, float, int, Float32, float, bool]:
            slots = [None, None] if self.stage is None else [self.stage.load(slot) for slot in (0, 1)]
            found = [(float(state["progress"][0]), slot) for slot, state in enumerate(slots) if state is not None]
            if not found:
                return 0, 0.0, 0, start, float("inf"), False
            newest = max(found)[1]
            self.turn = 1 - newest
            state = slots[newest]
            assert state is not None
            at, work, splits, last, converged = np.asarray(state["progress"], dtype=np.float64)
            centroids = np.asarray(state["centroids"], dtype=np.float32)
            return int(at), float(work), int(splits), centroids, float(last), bool(converged)

        return self.passes.ranks.first(latest)

    def _keep(self, at: int, work: float, splits: int, centroids: Float32, last: float, converged: bool) -> None:
        """Keep the state in the older of two places, so that one is whole at any moment."""
        if self.stage is not None and self.passes.ranks.main:
            where = np.array([at, work, splits, last, converged], dtype=np.float64)
            self.stage.save(self.turn, {"centroids": centroids, "progress": where})
            self.turn = 1 - self.turn
