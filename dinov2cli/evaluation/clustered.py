"""Intervals where test images come in clusters, as several photographs of one person or of one household.

Images of a cluster are alike, so that they say less than as many images of different clusters. What is drawn again by
the bootstrap are the clusters, and a share gets the score interval at the number of independent images that its
clusters are worth.
"""

from collections.abc import Hashable, Iterator, Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from dinov2cli.evaluation.group_rates import cells_of, rates

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

# Weights of units that are held at once: 4 M float64 are 32 MB, and what is made of them a few times that.
_WEIGHTS_PER_CHUNK = 4_000_000


def cluster_codes(names: Sequence[Hashable | None]) -> Codes:
    """The cluster of each of n units as a number, int64 [n], in order of first appearance; None is a cluster of its
    own."""
    known: dict[Hashable, int] = {}
    codes = np.empty(len(names), dtype=np.int64)
    for row, name in enumerate(names):
        codes[row] = known.setdefault((row,) if name is None else (name, ""), len(known))
    return codes


def cluster_sums(values: npt.ArrayLike, clusters: Codes) -> Floats:
    """Sums of the rows of `values` [n, width] over each cluster, float64 [C, width], C the clusters that there are."""
    values = np.asarray(values, dtype=np.float64)
    _, inverse = np.unique(clusters, return_inverse=True)
    size = int(inverse.max(initial=-1)) + 1
    return np.stack([np.bincount(inverse, column, size) for column in values.T], axis=1).astype(np.float64)


def cluster_weights(clusters: Codes, resamples: int, *, seed: int) -> Iterator[Floats]:
    """How often each of n units is drawn in each resample of whole clusters [n] with replacement: float64 [r, n]
    blocks, `resamples` rows in all. Clusters of one unit each give the weights of `intervals.resample_weights`."""
    _, inverse = np.unique(clusters, return_inverse=True)
    n, count = len(inverse), int(inverse.max(initial=-1)) + 1
    rng = np.random.Generator(np.random.Philox(key=seed))
    rows = max(1, _WEIGHTS_PER_CHUNK // max(n, 1))
    for start in range(0, resamples, rows):
        block = np.empty((min(rows, resamples - start), n))
        for row in block:
            row[:] = np.bincount(rng.integers(0, count, size=count), minlength=count)[inverse]
        yield block


def expanded_confidence(confidence: float, clusters: int) -> float:
    """Confidence at which percentiles of a bootstrap over few clusters hold what is asked (Hesterberg 2015, The
    American Statistician 69, "expanded percentile interval"): the normal quantile becomes sqrt(C / (C - 1)) times
    Student's t of C - 1 degrees of freedom, because resamples of C clusters spread too little by that factor."""
    widened = sqrt(clusters / (clusters - 1)) * float(stdtrit(clusters - 1, 0.5 + confidence / 2))
    return 2 * NormalDist().cdf(widened) - 1


def clustered_share_interval(hits: npt.ArrayLike, clusters: Codes, *, confidence: float) -> tuple[float, float]:
    """Interval (low, high) of a share, or of a mean of values within 0..1, of n units in C clusters; both [n].

    Wilson's form with the effective number of units p (1 - p) / V, where V is the linearised variance of the ratio,
    C / (C - 1) sum over clusters of (hits - p counts)^2 / n^2, and with Student's t in place of the normal quantile
    (Korn & Graubard 1998, Survey Methodology 24, do so to Clopper and Pearson's). Its degrees of freedom are C - 1, or
    2 C / (kurtosis - 1) of what the clusters add to V where few of them make it. Zeros and ones in clusters never say
    more than as many independent ones; a share of 0 or 1 shows no variance and counts one unit for each cluster. One
    cluster says nothing of others: (0, 1).
    """
    hits = np.asarray(hits, dtype=np.float64)
    found = rates(cells_of(hits, np.zeros(len(hits), dtype=np.int64), clusters, 1))
    low, high = found.limits((1 - confidence) / 2)
    return float(low[0]), float(high[0])
