"""Rates of several groups of one test set together: limits that hold for all their differences at once.

Who asks for the largest difference of G groups has looked at all pairs of them, so each pair gets an interval at a
critical value that the largest of all standardised differences exceeds in 5 of 100 samples only (max-t). The interval
of a difference is put together from the score limits of both rates at that critical value (MOVER: Newcombe 1998,
Statistics in Medicine 17, method 10; Zou & Donner 2008, Statistics in Medicine 27), that of a ratio likewise (MOVER-R:
Donner & Zou 2012, Statistical Methods in Medical Research 21). As the true range of the rates is the difference of one
of the pairs, it lies between the largest lower and the largest upper limit whenever all the intervals hold.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
# Degrees of freedom that the design effect of all groups has beside a group's own.
_PRIOR = 5.0
# Numbers that are held at once: draws of the joint distribution, what clusters add to the rates.
_PER_CHUNK = 1 << 20


def score_limits(share: npt.ArrayLike, n: npt.ArrayLike, critical: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Wilson's limits of shares at a critical value (1.96 for 95 %), all broadcast; `n` need not be a whole number."""
    share, n, critical = (np.asarray(one, dtype=np.float64) for one in (share, n, critical))
    square = critical * critical / n
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    # At the ends the closed form equals 0 or 1 only up to rounding.
    low = np.where(share <= 0, 0.0, np.clip(centre - half, 0, 1))
    high = np.where(share >= 1, 1.0, np.clip(centre + half, 0, 1))
    return low, high


@dataclass(frozen=True)
class Rates:
    """Rates of G groups as an estimate.

    value: float64 [G]; size: independent units that each is worth; freedom: degrees of freedom of its variance, inf
    where none is estimated; correlation: float64 [G, G] of the estimates. A group without a unit has NaN.
    """

    value: Floats
    size: Floats
    freedom: Floats
    correlation: Floats

    def limits(self, tail: float) -> tuple[Floats, Floats]:
        """Score limits [G] with the probability `tail` outside each side."""
        critical = np.full(len(self.value), -NormalDist().inv_cdf(tail))
        estimated = np.isfinite(self.freedom)
        # One cluster says nothing of others: its limits are 0 and 1.
        critical[estimated] = -stdtrit(np.maximum(self.freedom[estimated], 1), tail)
        low, high = score_limits(self.value, np.maximum(self.size, 1e-9), critical)
        unsure = self.freedom == 0
        return np.where(unsure, 0.0, low), np.where(unsure, 1.0, high)

    def of(self, rows: Codes) -> "Rates":
        """The same of some of the groups."""
        return Rates(self.value[rows], self.size[rows], self.freedom[rows], self.correlation[np.ix_(rows, rows)])


@dataclass(frozen=True)
class Pairs:
    """Simultaneous intervals of all pairs of G rates, float64 [G, G]: entry (i, j) is of rate i minus rate j, and of
    their ratio rate i / rate j (NaN where rate j is 0). All are NaN for rates of two families, which are no pair."""

    low: Floats
    high: Floats
    ratio_low: Floats
    ratio_high: Floats

    def gap(self) -> tuple[float, float]:
        """Interval of the largest rate minus the least."""
        return max(0.0, float(np.nanmax(self.low))), float(np.nanmax(self.high))

    def drop(self) -> tuple[float, float]:
        """Interval of (largest - least) / largest; NaN where no rate differs from 0."""
        if np.isnan(self.ratio_low).all():
            return float("nan"), float("nan")
        return max(0.0, 1 - float(np.nanmin(self.ratio_high))), 1 - float(np.nanmin(self.ratio_low))


@dataclass(frozen=True)
class Cells:
    """What is counted of each group in each cluster: m cells that are not empty, in order of cluster, then group.

    cluster, group: int64 [m]; count: units, hits: sum of their values, float64 [m]; groups: G; binary: whether the
    values are zeros and ones.
    """

    cluster: Codes
    group: Codes
    count: Floats
    hits: Floats
    groups: int
    binary: bool

    def sums(self, values: Floats) -> Floats:
        """Sum over the cells of each group, float64 [G]."""
        return np.bincount(self.group, values, self.groups).astype(np.float64)  # of no cells it is whole numbers


def cells_of(values: npt.ArrayLike, groups: Codes, clusters: Codes | None, count: int) -> Cells:
    """The cells of n units: values float64, groups int64 0..count-1, clusters int64 [n], or None: each its own."""
    values = np.asarray(values, dtype=np.float64)
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if clusters is None:
        return Cells(np.arange(len(values)), groups, np.ones(len(values)), values, count, binary)
    _, cluster = np.unique(clusters, return_inverse=True)
    keys, inverse = np.unique(cluster * count + groups, return_inverse=True)
    hits = np.bincount(inverse, values, len(keys)).astype(np.float64)
    return Cells(
        keys // count, keys % count, np.bincount(inverse, minlength=len(keys)).astype(float), hits, count, binary
    )


def rates(cells: Cells) -> Rates:
    """Rates of the groups, with the variances and covariances of linearised ratios over clusters.

    What a group is worth is its units over its design effect: how many times larger its variance is than that of
    independent units. The effect of few clusters, or of few that differ, is known badly: it has the clusters less one
    as degrees of freedom, or what their kurtosis leaves of them (the variance of a variance), and is drawn towards that
    of all groups together, which counts for `_PRIOR` degrees of freedom more. Zeros and ones never count for more than
    their units; where each is alone in its cluster the variance is known with the share, and nothing is estimated.
    Where no group shows any variance, a cluster counts as one unit.
    """
    n, clusters = cells.sums(cells.count), cells.sums(np.ones(len(cells.count)))
    value = np.divide(cells.sums(cells.hits), n, out=np.full(cells.groups, np.nan), where=n > 0)
    factor = np.divide(clusters, clusters - 1, out=np.zeros_like(clusters), where=clusters > 1)
    parts = (cells.hits - value[cells.group] * cells.count) / n[cells.group] * np.sqrt(factor[cells.group])
    variance = cells.sums(parts * parts)
    effect, freedom = _design_effects(cells, parts, variance, n, clusters, np.nan_to_num(value * (1 - value)))
    if cells.binary:
        alone = clusters == n
        effect, freedom = np.where(alone, 1.0, np.maximum(effect, 1.0)), np.where(alone, np.inf, freedom)
    freedom = np.where(clusters > 1, freedom, 0.0)
    return Rates(value, n / effect, freedom, _correlation(cells, parts, variance))


def _design_effects(
    cells: Cells, parts: Floats, variance: Floats, n: Floats, clusters: Floats, spread: Floats
) -> tuple[Floats, Floats]:
    """Design effect of each group and its degrees of freedom, both [G]."""
    simple = np.divide(spread, n, out=np.zeros_like(n), where=n > 0)  # variance of independent units
    shown = variance > 1e-12 * simple  # what rounding leaves of no variance is none
    if not shown.any():
        return np.divide(n, clusters, out=np.ones_like(n), where=clusters > 0), np.maximum(clusters - 1, 1.0)
    fourth = np.divide(clusters * cells.sums(parts**4), variance**2, out=np.full_like(n, np.inf), where=shown)
    own = np.divide(2 * clusters, fourth - 1, out=np.full_like(n, np.inf), where=fourth > 1)
    own = np.where(shown, np.clip(own, 1.0, np.maximum(clusters - 1, 1.0)), 0.0)
    common = variance[shown].sum() / simple[shown].sum()
    effect = np.divide(variance, simple, out=np.zeros_like(n), where=shown)
    drawn = (own * effect + _PRIOR * common) / (own + _PRIOR)
    return drawn, np.minimum(own + _PRIOR, own.sum())


def _correlation(cells: Cells, parts: Floats, variance: Floats) -> Floats:
    """Of the rates, float64 [G, G]: they are related by the clusters that have units of several groups."""
    several = np.bincount(cells.cluster)[cells.cluster] > 1
    covariance = np.diag(variance)
    _, row = np.unique(cells.cluster[several], return_inverse=True)
    if len(row):
        column, part = cells.group[several], parts[several]
        order = np.argsort(row, kind="stable")
        row, column, part = row[order], column[order], part[order]
        covariance = np.zeros_like(covariance)
        step = max(1, _PER_CHUNK // cells.groups)
        for first in range(0, int(row[-1]) + 1, step):
            own = slice(*np.searchsorted(row, [first, first + step]))
            dense = np.zeros((step, cells.groups))
            dense[row[own] - first, column[own]] = part[own]
            covariance += dense.T @ dense
    scale = np.sqrt(np.outer(variance, variance))
    found = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
    np.fill_diagonal(found, 1.0)
    return found


def critical_value(found: Rates, families: Codes, *, confidence: float, draws: int, seed: int) -> float:
    """The value that the largest standardised difference of any pair of the rates stays below with `confidence`, for
    normal estimates with their variances and correlations, from `draws` of them (Hothorn, Bretz & Westfall 2008).

    families: int64 [G], only rates of one family are pairs.
    """
    # Laplace's share has a variance at 0 and 1 too.
    share = (found.value * found.size + 1) / (found.size + 2)
    deviation = np.sqrt(share * (1 - share) / found.size)
    if len(share) == 2:
        return NormalDist().inv_cdf(0.5 + confidence / 2)
    covariance = found.correlation * np.outer(deviation, deviation)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    rng = np.random.Generator(np.random.Philox(key=seed))
    largest = []
    rows = max(1, _PER_CHUNK // len(share))
    for start in range(0, draws, rows):
        drawn = rng.standard_normal((min(rows, draws - start), len(share))) @ root.T
        largest.append(_largest_difference(drawn, covariance, families))
    return float(np.quantile(np.concatenate(largest), confidence))


def _largest_difference(drawn: Floats, covariance: Floats, families: Codes) -> Floats:
    """Largest standardised difference of two columns of one family, in each row."""
    found = np.zeros(len(drawn))
    variance = np.diag(covariance)
    for first in range(drawn.shape[1] - 1):
        others = first + 1 + np.flatnonzero(families[first + 1 :] == families[first])
        if len(others):
            spread = variance[first] + variance[others] - 2 * covariance[first, others]
            scale = 1 / np.sqrt(np.maximum(spread, 1e-300))
            np.maximum(found, (np.abs(drawn[:, first, None] - drawn[:, others]) * scale).max(1), out=found)
    return found


def all_pairs(found: Rates, *, confidence: float, draws: int, seed: int, families: Codes | None = None) -> Pairs:
    """Intervals of the differences and ratios of all pairs of two or more rates, which hold at once with `confidence`.

    draws: of the joint distribution, for the critical value. families: int64 [G], where only rates of one family are
    pairs (groups, of each of several classes). Raises ValueError for fewer than two rates or one without a unit.
    """
    if len(found.value) < 2 or np.isnan(found.value).any():
        raise ValueError(f"differences need at least two rates with units, got {found.value}")
    families = np.zeros(len(found.value), dtype=np.int64) if families is None else families
    tail = float(ndtr(-critical_value(found, families, confidence=confidence, draws=draws, seed=seed)))
    value = found.value
    low, high = found.limits(tail)
    down, up = value - low, high - value
    correlation = found.correlation
    below = np.square(down)[:, None] + np.square(up) - 2 * correlation * np.outer(down, up)
    above = np.square(up)[:, None] + np.square(down) - 2 * correlation * np.outer(up, down)
    apart = value[:, None] - value
    pairs = [apart - np.sqrt(np.maximum(below, 0)), apart + np.sqrt(np.maximum(above, 0))]
    for one in pairs:
        np.fill_diagonal(one, 0.0)
    pairs = [np.clip(one, -1, 1) for one in pairs]
    strangers = families[:, None] != families
    return Pairs(*(np.where(strangers, np.nan, one) for one in (*pairs, *_ratios(value, low, high, correlation))))


def _ratios(value: Floats, low: Floats, high: Floats, correlation: Floats) -> tuple[Floats, Floats]:
    """MOVER-R limits of rate i / rate j: NaN where rate j is 0 and on the diagonal, inf where it may be 0."""
    over, under = value[:, None], value[None, :]
    product = over * under
    low_i, high_i, low_j, high_j = low[:, None], high[:, None], low[None, :], high[None, :]
    down = product - correlation * (over - low_i) * (high_j - under)
    up = product - correlation * (high_i - over) * (under - low_j)
    with np.errstate(invalid="ignore", divide="ignore"):
        below, above = high_j * (2 * under - high_j), low_j * (2 * under - low_j)
        least, most = low_i * (2 * over - low_i), high_i * (2 * over - high_i)
        found_low = least / (down + np.sqrt(np.maximum(down**2 - least * below, 0)))
        found_high = (up + np.sqrt(np.maximum(up**2 - most * above, 0))) / above
    # There is an upper limit where the denominator's own limits stay away from 0.
    found_high = np.where(above > 0, found_high, np.inf)
    found_low = np.where(np.isfinite(found_low), np.maximum(found_low, 0), 0.0)
    outside = np.broadcast_to(under <= 0, product.shape) | np.eye(len(value), dtype=bool)
    return np.where(outside, np.nan, found_low), np.where(outside, np.nan, found_high)
