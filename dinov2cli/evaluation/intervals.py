"""Confidence intervals for what the benchmarks report: Wilson for proportions, percentile bootstrap for the rest.

The paired bootstrap answers "is model B better than model A on these very images": it resamples the images, not the
two scores separately, so what is common to both models cancels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from dinov2cli.errors import UserError
from dinov2cli.evaluation.clustered import cluster_weights, clustered_share_interval, expanded_confidence
from dinov2cli.evaluation.group_rates import all_pairs, cells_of, rates
from dinov2cli.evaluation.statistics import Statistic

DEFAULT_CONFIDENCE = 0.95
DEFAULT_RESAMPLES = 2000
# Draws made at once by the resampling of general values: 8 M indices of 8 bytes stay at 64 MB.
_DRAWS_PER_CHUNK = 8_000_000
# Weights of units that are held at once: 4 M float64 are 32 MB, and what is made of them a few times that.
_WEIGHTS_PER_CHUNK = 4_000_000
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
        """Whether the interval leaves out zero; never so for a single unit, whose interval has no width."""
        return self.n > 1 and (self.low > 0.0 or self.high < 0.0)


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
    """Of the replicates that exist: a resample may hold no unit with a say in the metric."""
    tail = (1 - confidence) / 2
    found = replicates[~np.isnan(replicates)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [tail, 1 - tail])
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


def _check_counts(n: int, resamples: int) -> None:
    if n < 2 or resamples < 2:
        raise ValueError(f"a bootstrap needs at least 2 samples and 2 resamples, got {n} and {resamples}")


def resample_weights(n: int, resamples: int, *, seed: int) -> Iterator[np.ndarray]:
    """How often each of n units is drawn in each resample: float64 [r, n] blocks, `resamples` rows in all, the same for
    the same n and seed, whatever they are used for."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    rows = max(1, _WEIGHTS_PER_CHUNK // n)
    for start in range(0, resamples, rows):
        block = np.empty((min(rows, resamples - start), n))
        for row in block:
            row[:] = np.bincount(rng.integers(0, n, size=n), minlength=n)
        yield block


def interval(
    statistic: Statistic,
    *,
    clusters: np.ndarray | None = None,
    seed: int,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = DEFAULT_CONFIDENCE,
) -> tuple[float, float]:
    """Interval (low, high) of a metric over the choice of its units: Wilson for shares of units (a mean of zeros and
    ones), else percentile bootstrap.

    clusters: int64 [n], where units come in clusters (see `clustered`): a share, or a mean within 0..1, then has
    `clustered_share_interval`, and all else a bootstrap of clusters. A gap or drop between groups has the simultaneous
    interval of `group_rates`. With one unit there is nothing to resample: low and high are its value. NaN where the
    metric has no value, or where there is one cluster only.
    """
    _check_confidence(confidence)
    if statistic.kind in ("gap", "drop"):
        return _range_interval(statistic, clusters, seed=seed, resamples=resamples, confidence=confidence)
    if clusters is not None:
        return _clustered_interval(statistic, clusters, seed=seed, resamples=resamples, confidence=confidence)
    n = len(statistic)
    if statistic.kind == "mean" and n:
        values = statistic.values[:, 0]
        if np.isin(values, (0.0, 1.0)).all():
            return wilson_interval(int(values.sum()), n, confidence=confidence)
        if n > 1 and not np.isnan(values).any():
            return bootstrap_mean_interval(values, seed=seed, resamples=resamples, confidence=confidence)
    share = _share(statistic)
    if share is not None:
        return wilson_interval(*share, confidence=confidence)
    value = statistic.value()
    if n < 2 or np.isnan(value):
        return value, value
    _check_counts(n, resamples)
    blocks = [statistic.replicates(weights) for weights in resample_weights(n, resamples, seed=seed)]
    return _percentiles(np.concatenate(blocks), confidence)


def _clustered_interval(
    statistic: Statistic, clusters: np.ndarray, *, confidence: float, **how: int
) -> tuple[float, float]:
    counted, values = np.ones(len(statistic), dtype=bool), statistic.values[:, 0]
    if statistic.kind == "ratio" and _share(statistic) is not None:
        counted = statistic.values[:, 1] > 0
    elif statistic.kind != "mean" or not ((values >= 0) & (values <= 1)).all():
        return _percentiles(*_clustered_replicates(clusters, statistic, confidence=confidence, **how))
    if not counted.any():
        return float("nan"), float("nan")
    return clustered_share_interval(values[counted], clusters[counted], confidence=confidence)


def _range_interval(
    statistic: Statistic, clusters: np.ndarray | None, *, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    groups = statistic.values.shape[1] // 2
    hits, counted = statistic.values[:, :groups], statistic.values[:, groups:]
    rows, columns = np.nonzero(counted)
    found = rates(cells_of(hits[rows, columns], columns, rows if clusters is None else clusters[rows], groups))
    present = np.flatnonzero(~np.isnan(found.value))
    if len(present) < 2 or np.isnan(statistic.value()):
        return float("nan"), float("nan")
    pairs = all_pairs(found.of(present), confidence=confidence, draws=resamples, seed=seed)
    return pairs.gap() if statistic.kind == "gap" else pairs.drop()


def _clustered_replicates(
    clusters: np.ndarray, *metrics: Statistic, confidence: float, resamples: int, seed: int
) -> tuple[np.ndarray, float]:
    """A metric, or the second minus the first of two, in resamples of clusters, and the confidence to read them at."""
    count = len(np.unique(clusters))
    if count < 2 or np.isnan([metric.value() for metric in metrics]).any():
        return np.empty(0), confidence
    _check_counts(count, resamples)
    pooled = [metric.pooled(clusters) for metric in metrics]
    over_clusters = [metric for metric in pooled if metric is not None]
    if len(over_clusters) == len(metrics):
        blocks, metrics = resample_weights(count, resamples, seed=seed), tuple(over_clusters)
    else:
        blocks = cluster_weights(clusters, resamples, seed=seed)
    found = [
        metrics[-1].replicates(weights) - (metrics[0].replicates(weights) if len(metrics) > 1 else 0)
        for weights in blocks
    ]
    return np.concatenate(found), expanded_confidence(confidence, count)


def _share(statistic: Statistic) -> tuple[int, int] | None:
    """(successes, n) of a ratio that is a share of some of the units; None for any other metric."""
    if statistic.kind != "ratio" or statistic.values.shape[1] != 2 or not statistic.n:
        return None
    hits, counted = statistic.values.T
    if not np.isin(counted, (0.0, 1.0)).all() or not np.isin(hits[counted > 0], (0.0, 1.0)).all():
        return None
    return int(hits[counted > 0].sum()), statistic.n


def difference(
    before: Statistic,
    after: Statistic,
    *,
    clusters: np.ndarray | None = None,
    seed: int,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = DEFAULT_CONFIDENCE,
) -> Difference:
    """Change of a metric from one model to another over the same units, in the same order, by a paired bootstrap: every
    resample weighs the units of both alike, or whole clusters [n] of them.

    With one unit low and high are the change; NaN where one of the two has no value, or of a single cluster. Raises
    ValueError for metrics of two kinds or over different numbers of units.
    """
    _check_confidence(confidence)
    if before.kind != after.kind or len(before) != len(after):
        raise ValueError(
            f"a paired comparison needs one metric on the same units, got {before.kind} over {len(before)} and "
            f"{after.kind} over {len(after)}"
        )
    n, change = len(before), after.value() - before.value()
    if n < 2 or np.isnan(change):
        return Difference(change, change, change, n)
    if clusters is not None:
        how = {"resamples": resamples, "seed": seed}
        low, high = _percentiles(*_clustered_replicates(clusters, before, after, confidence=confidence, **how))
        return Difference(change, low, high, n)
    if before.kind == "mean":
        return paired_difference(
            before.values[:, 0], after.values[:, 0], seed=seed, resamples=resamples, confidence=confidence
        )
    _check_counts(n, resamples)
    blocks = [
        after.replicates(weights) - before.replicates(weights) for weights in resample_weights(n, resamples, seed=seed)
    ]
    low, high = _percentiles(np.concatenate(blocks), confidence)
    return Difference(change, low, high, n)


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
    _check_counts(n, resamples)
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
    _check_counts(len(values), resamples)
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
