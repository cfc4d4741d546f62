"""Where k-means starts: random rows, or rows spread over the data."""

import faiss
import numpy as np

from dinov2cli.errors import UserError
from dinov2cli.search.vectors import Float32, Vectors, sample_rows

INITS = ("random", "spread")
SPREAD_ROWS_PER_CENTROID = 64
"""Rows that the `spread` start draws from, for each centroid."""


def start_centroids(source: Vectors, k: int, init: str, seed: int, *, limit: int | None = None) -> Float32:
    """k rows of `source` to start from, [k, D].

    init: `random` rows, which after ten iterations reach the same inertia as k-means++ at a fifth of its cost; or
    `spread` (see `spread_centroids`) over a sample of 64 rows per centroid, at most `limit` rows. Raises UserError for
    another name.
    """
    if init not in INITS:
        raise UserError(f"k-means start '{init}': expected one of {', '.join(INITS)}")
    if init == "random":
        return source.gather(sample_rows(source.rows, k, seed))
    size = max(k, min(k * SPREAD_ROWS_PER_CENTROID, limit or source.rows))
    return spread_centroids(source.gather(sample_rows(source.rows, size, seed)), k, seed)


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
