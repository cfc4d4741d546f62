"""Rates of the groups of an axis beside each other: with limits of their own, and with such as hold for all differences
at once (see `evaluation.group_rates`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.evaluation.group_rates import Cells, Pairs, Rates, all_pairs, cells_of, rates
from dinov2cli.fairness.outcomes import Outcome

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
# Draws of the joint distribution for each resample that was asked for: they are a few numbers each.
_DRAWS_PER_RESAMPLE = 10


@dataclass(frozen=True)
class Compared:
    """One outcome in G groups. rows: int64 [n'], the images that are counted and of a known group.

    images, clusters: int64 [G], both counted; rates: of all groups; low, high: float64 [G], limits of each rate by
    itself; enough: int64 [E], the groups that are compared; pairs: of these, in that order, None for fewer than two.
    """

    rows: Codes
    images: Codes
    clusters: Codes
    rates: Rates
    low: Floats
    high: Floats
    enough: Codes
    pairs: Pairs | None


def compare(
    outcome: Outcome,
    codes: Codes,
    groups: int,
    clusters: Codes | None,
    *,
    min_images: int,
    min_clusters: int,
    confidence: float,
    resamples: int,
    seed: int,
) -> Compared:
    """Rates of an outcome in the groups of an axis: codes int64 [n], 0..groups-1 or -1; clusters int64 [n] or None.

    Groups with fewer images, or clusters, than the least are not compared. resamples: a tenth of the draws that the
    critical value of the simultaneous limits comes from.
    """
    rows = np.flatnonzero(outcome.counted & (codes >= 0))
    cells = cells_of(outcome.values[rows], codes[rows], None if clusters is None else clusters[rows], groups)
    found = rates(cells)
    low, high = found.limits((1 - confidence) / 2)
    images = cells.sums(cells.count).astype(np.int64)
    present = np.bincount(cells.group, minlength=groups)
    enough = np.flatnonzero((images >= max(1, min_images)) & (present >= min_clusters))
    draws = resamples * _DRAWS_PER_RESAMPLE
    several = len(enough) > 1
    pairs = all_pairs(found.of(enough), confidence=confidence, draws=draws, seed=seed) if several else None
    return Compared(rows, images, present, found, low, high, enough, pairs)


@dataclass(frozen=True)
class LargestGap:
    """The largest difference between two groups over several outcomes: of which (number), between which groups, with an
    interval that allows for having looked at all of them."""

    outcome: int
    best: int
    worst: int
    gap: float
    low: float
    high: float


def largest_gap(
    outcomes: Sequence[Outcome],
    codes: Codes,
    groups: Sequence[int],
    clusters: Codes | None,
    *,
    min_images: int,
    confidence: float,
    resamples: int,
    seed: int,
) -> LargestGap | None:
    """The largest gap between any two of some groups over all the outcomes, as of the recalls of all classes for
    equalised odds; outcomes with fewer than `min_images` images of one of the groups are left out. None where none, or
    fewer than two groups, are left.

    codes: int64 [n], groups: the codes that are compared. An image, or a cluster, that has a say in several outcomes
    relates their rates.
    """
    place = np.full(int(codes.max(initial=-1)) + 2, -1, dtype=np.int64)  # the last is that of the code -1
    place[list(groups)] = np.arange(len(groups))
    group = place[codes]
    rows = [np.flatnonzero(outcome.counted & (group >= 0)) for outcome in outcomes]
    counts = [np.bincount(group[own], minlength=len(groups)) for own in rows]
    kept = [number for number, count in enumerate(counts) if len(groups) > 1 and count.min() >= max(1, min_images)]
    if not kept:
        return None
    found = rates(_together([outcomes[i] for i in kept], [rows[i] for i in kept], group, len(groups), clusters))
    families = np.repeat(np.arange(len(kept)), len(groups))
    draws = resamples * _DRAWS_PER_RESAMPLE
    low, high = all_pairs(found, confidence=confidence, draws=draws, seed=seed, families=families).gap()
    value = found.value.reshape(len(kept), len(groups))
    at = int(np.argmax(value.max(1) - value.min(1)))
    best, worst = int(value[at].argmax()), int(value[at].argmin())
    gap = float(value[at, best] - value[at, worst])
    return LargestGap(kept[at], groups[best], groups[worst], gap, low, high)


def _together(
    outcomes: Sequence[Outcome], rows: Sequence[Codes], group: Codes, groups: int, clusters: Codes | None
) -> Cells:
    """Cells of all outcomes side by side: group g of outcome k is k * groups + g."""
    owner = np.arange(len(group)) if clusters is None else clusters
    values = np.concatenate([outcome.values[own] for outcome, own in zip(outcomes, rows, strict=True)])
    codes = np.concatenate([group[own] + number * groups for number, own in enumerate(rows)])
    return cells_of(values, codes, np.concatenate([owner[own] for own in rows]), groups * len(outcomes))
