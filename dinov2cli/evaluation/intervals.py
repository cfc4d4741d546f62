"""Confidence intervals for what the benchmarks report: Wilson for proportions, percentile bootstrap for the rest.

The paired bootstrap answers "is model B better than model A on these very images": it resamples the images, not the
two scores separately, so what is common to both models cancels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from dinov2cli.errors import UserError

DEFAULT_CONFIDENCE = 0.95
DEFAULT_RESAMPLES = 2000
# Draws made at once by the resampling of general values: 8 M indices of 8 bytes stay at 64 MB.
_DRAWS_PER_CHUNK = 8_000_000
# Values with at most this many distinct levels (right/wrong, and their differences) are resampled by level counts.
_MAX_LEVELS = 16


@dataclass(frozen=True)
class Difference:
    """Mean change from one model to another on the same images, with its interval (units of the scores)."""

    value: float
    low: float
    high: float
    n: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0.0 or self.high < 0.0


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence is {confidence}, expected a number between 0 and 1: use 0.95")


def wilson_interval(successes: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> tuple[float, float]:
    """Score interval (low, high) of a proportion, each in 0..1 (E. B. Wilson, JASA 1927).

    Unlike the normal approximation it stays inside 0..1 and keeps its coverage at 0 %, at 100 % and for small n.
    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    _check_confidence(confidence)
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    denominator = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / denominator
    half = z / denominator * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the closed form equals 0 or 1 only up to rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def _percentiles(replicates: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `resamples` samples drawn with replacement from `values` [n], as float64 [resamples]."""
    n = len(values)
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) <= _MAX_LEVELS:
        # Drawing n values with replacement is one multinomial draw of the level counts: the same distribution, and
        # the cost no longer depends on n.
        return rng.multinomial(n, counts / n, size=resamples) @ levels / n
    means = np.empty(resamples)
    chunk = max(1, _DRAWS_PER_CHUNK // n)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        means[start:stop] = values[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    return means


def bootstrap_interval(
    metric: Callable[[np.ndarray], float],
    n: int,
    *,
    seed: int,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = DEFAULT_CONFIDENCE,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13) of any metric over n test images.

    `metric` gets int64 indices [n] into the test set, drawn with replacement, and returns one number.
    Raises ValueError if n < 2 or resamples < 2.
    """
    _check_confidence(confidence)
    if n < 2 or resamples < 2:
        raise ValueError(f"a bootstrap needs at least 2 samples and 2 resamples, got {n} and {resamples}")
    rng = np.random.Generator(np.random.Philox(key=seed))
    replicates = np.array([metric(rng.integers(0, n, size=n)) for _ in range(resamples)], dtype=np.float64)
    return _percentiles(replicates, confidence)


def bootstrap_mean_interval(
    values: np.ndarray,
    *,
    seed: int,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = DEFAULT_CONFIDENCE,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-image scores [n]. Raises ValueError if n < 2."""
    _check_confidence(confidence)
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or resamples < 2:
        raise ValueError(f"a bootstrap needs at least 2 samples and 2 resamples, got {len(values)} and {resamples}")
    rng = np.random.Generator(np.random.Philox(key=seed))
    return _percentiles(_resampled_means(values, resamples, rng), confidence)


def paired_difference(
    before: np.ndarray,
    after: np.ndarray,
    *,
    seed: int,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = DEFAULT_CONFIDENCE,
) -> Difference:
    """Mean of `after - before` [n] (per-image scores of two models on the same images) with a paired bootstrap.

    Raises ValueError if the two do not have one score for each of the same n >= 2 images.
    """
    before = np.asarray(before, dtype=np.float64)
    after = np.asarray(after, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"paired scores must have one shape [n], got {before.shape} and {after.shape}")
    change = after - before
    low, high = bootstrap_mean_interval(change, seed=seed, resamples=resamples, confidence=confidence)
    return Difference(float(change.mean()), low, high, len(change))
