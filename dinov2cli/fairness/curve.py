"""A rate as a smooth function of a number, as of the income of a household: local-linear regression with a band."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import InputError
from dinov2cli.evaluation.clustered import expanded_confidence

Floats = npt.NDArray[np.float64]
# With more distinct pairs of number and value, numbers are rounded to a grid this fine.
_MAX_ROWS = 4096
_GRID = 512
# Weights of resamples that are held at once.
_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class Curve:
    """A smoothed rate: at x [p], its value and the limits of a pointwise band, float64 [p]; bandwidth in units of x."""

    x: Floats
    value: Floats
    low: Floats
    high: Floats
    bandwidth: float


def silverman(x: Floats) -> float:
    """Silverman's rule of thumb for a Gaussian kernel (1986, equation 3.31), 0.9 min(sd, IQR / 1.34) n^(-1/5); 0 where
    all are equal."""
    spread = float(np.std(x, ddof=1)) if len(x) > 1 else 0.0
    middle = float(np.subtract(*np.quantile(x, [0.75, 0.25]))) / 1.34
    return 0.9 * (min(spread, middle) or spread) * len(x) ** -0.2


def smoothed(
    x: npt.ArrayLike,
    values: npt.ArrayLike,
    clusters: npt.NDArray[np.int64] | None,
    *,
    points: int = 40,
    bandwidth: float | None = None,
    confidence: float,
    resamples: int,
    seed: int,
) -> Curve:
    """Mean of `values` [n] within 0..1 as a function of `x` [n], at `points` places of its 1st to 99th percentile.

    Local-linear regression with a Gaussian kernel (Fan & Gijbels 1996, section 2.3), whose bandwidth is Silverman's
    over the clusters, as images of one household say the same of its income; clipped to 0..1. The band is the
    percentile bootstrap of clusters [n] (of images where None), widened for few of them (`expanded_confidence`): it
    holds at every point by itself. Raises InputError for fewer than two clusters or one x only.
    """
    x, values = np.asarray(x, dtype=np.float64), np.asarray(values, dtype=np.float64)
    owners = np.arange(len(x)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    count = int(owners.max(initial=-1)) + 1
    centres = np.bincount(owners, x) / np.bincount(owners) if count else np.empty(0)
    width = silverman(centres) if bandwidth is None and count else bandwidth or 0.0
    if count < 2 or width <= 0:
        raise InputError(f"a curve needs at least two different numbers of two households or images, found {count}")
    first, last = np.quantile(x, [0.01, 0.99])
    at = np.linspace(first, last, points)
    rng = np.random.Generator(np.random.Philox(key=seed))
    if clusters is None:
        x, values, copies = _distinct(x, values)
        sums = _kernel_sums(x, np.ones(len(x)), values, at, width)
    else:
        pairs, row = np.unique(np.stack([owners, x]), axis=1, return_inverse=True)
        images, hits = (np.bincount(row, of).astype(np.float64) for of in (None, values))
        sums = _kernel_sums(pairs[1], images, hits, at, width)
        sums = np.add.reduceat(sums, np.flatnonzero(np.diff(pairs[0], prepend=-1)), axis=0)
        copies = np.ones(count)
    chances = copies / copies.sum()
    value = _fitted(copies[None], sums)[0]
    replicates = np.empty((resamples, points))
    rows = max(1, _PER_CHUNK // len(chances))
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.multinomial(int(copies.sum()), chances, size=stop - start)
        replicates[start:stop] = _fitted(drawn.astype(np.float64), sums)
    tail = (1 - expanded_confidence(confidence, count)) / 2
    low, high = np.nanquantile(replicates, [tail, 1 - tail], axis=0)
    value, low, high = (np.clip(one, 0, 1) for one in (value, low, high))
    return Curve(at, value, low, high, width)


def _distinct(x: Floats, values: Floats) -> tuple[Floats, Floats, Floats]:
    """The pairs of number and value that there are, and how often: resampling them is resampling all, at less cost."""
    pairs, copies = np.unique(np.stack([x, values]), axis=1, return_counts=True)
    if pairs.shape[1] > _MAX_ROWS:
        low, step = x.min(), np.ptp(x) / (_GRID - 1)
        rounded = np.stack([low + np.rint((x - low) / step) * step, values])
        pairs, copies = np.unique(rounded, axis=1, return_counts=True)
    return pairs[0], pairs[1], copies.astype(np.float64)


def _kernel_sums(x: Floats, counts: Floats, totals: Floats, at: Floats, width: float) -> Floats:
    """Of rows with `counts` images whose values sum to `totals`: sums of the kernel's weight k, k d, k d^2, k y and k d
    y, with d the distance from each point; float64 [rows, 5, p]."""
    apart = (x[:, None] - at) / width
    kernel = np.exp(-0.5 * apart**2)
    images, hits = kernel * np.asarray(counts)[:, None], kernel * totals[:, None]
    return np.stack([images, images * apart, images * apart**2, hits, hits * apart], axis=1)


def _fitted(weights: Floats, sums: Floats) -> Floats:
    """The local line at its own point under each row of weights [r, n], float64 [r, p]; the local mean where the rows
    in reach have one number only."""
    total = (weights @ sums.reshape(len(sums), -1)).reshape(len(weights), 5, -1)
    s0, s1, s2, t0, t1 = np.moveaxis(total, 1, 0)
    determinant = s0 * s2 - s1**2
    line = determinant > 1e-9 * s0 * s2
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(line, (s2 * t0 - s1 * t1) / determinant, t0 / s0)
    return found
