"""What classes are taken for what, group by group: recall and false positives of each class, and equalised odds.

With several classes each is told against the rest. Equalised odds (Hardt, Price and Srebro 2016, arXiv 1610.02413) asks
that a class be recognised, and mistaken, equally often in all groups; its measure is the larger of the largest
differences in the two, as fairlearn's `equalized_odds_difference`.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.fairness.outcomes import Outcome
from dinov2cli.fairness.simultaneous import LargestGap, largest_gap

if TYPE_CHECKING:
    from dinov2cli.fairness.groups import Axis

Int64 = npt.NDArray[np.int64]

ODDS = pa.schema(
    [(name, pa.string()) for name in ("axis", "measure", "class", "best", "worst")]
    + [(name, pa.float64()) for name in ("gap", "gap_low", "gap_high")]
)
"""Differences between groups of an axis. class: null for the largest over all classes."""

TRUE, FALSE, BOTH = "true positives", "false positives", "equalised odds"
_DETAILED = 12  # classes up to which each has rows of its own
_MOST = 50  # classes that are looked at, those with the most images


class _Limits(NamedTuple):
    min_images: int
    confidence: float
    resamples: int
    seed: int


def class_outcomes(
    labels: Int64, predictions: Int64, class_names: Sequence[str], *, classes: Collection[int] | None = None
) -> list[Outcome]:
    """Recall of each class (of its images, how many are taken for it; high is good) and its false positives (of the
    other images, how many are taken for it; low is good).

    labels: int64 [n], -1 where unknown (such images do not count); predictions: int64 [n], -1 for none of the classes.
    classes: which of them, default all. Two outcomes each, the recalls of a class before its false positives; what no
    image can tell of (the recall of a class without an image) is left out.
    """
    known = labels >= 0
    found = []
    for number in range(len(class_names)) if classes is None else sorted(classes):
        taken, own = (predictions == number).astype(np.float64), labels == number
        if own.any():
            found.append(Outcome(f"recall of {class_names[number]}", taken, own))
        if (known & ~own).any():
            found.append(Outcome(f"false positives of {class_names[number]}", taken, known & ~own, "low"))
    return found


def equalised_odds(
    labels: Int64,
    predictions: Int64,
    class_names: Sequence[str],
    axes: "Sequence[Axis]",
    clusters: Int64 | None,
    *,
    min_images: int,
    min_clusters: int = 1,
    confidence: float,
    resamples: int,
    seed: int,
) -> pa.Table:
    """How far groups differ in true and in false positives, a table of schema ODDS; labels and predictions int64 [n] as
    in `class_outcomes`, clusters int64 [n] or None where each image stands for itself.

    Groups are compared that have so many images of known label and so many clusters; of these classes, those with
    `min_images` images in every compared group (the 50 with the most, if there are more). For each axis with two such
    groups: the largest difference in true positives, in false positives and in either (equalised odds) over all
    classes, whose intervals allow for having looked at all of them and at all pairs of groups; then rows of single
    classes, whose intervals are of that class alone: of every class where there are no more than 12 (gap null for one
    with too few images), else of those whose gaps are the largest. Best is the group with most true or least false
    positives. Gaps are of shares, 0..1.
    """
    limits = _Limits(min_images, confidence, resamples, seed)
    found: list[tuple[str | float | None, ...]] = []
    for axis in axes:
        groups = _compared(axis, labels, clusters, min_images, min_clusters)
        if len(groups) < 2:
            continue
        rows = _rows(labels, predictions, class_names, axis.codes, groups, clusters, limits)
        for measure, name, gap in rows:
            if gap is None:
                found.append((axis.name, measure, name, *[None] * 5))
            else:
                best, worst = axis.names[gap.best], axis.names[gap.worst]
                found.append((axis.name, measure, name, best, worst, gap.gap, gap.low, gap.high))
    columns = zip(*found, strict=True) if found else [()] * len(ODDS)
    return pa.table([list(column) for column in columns], schema=ODDS)


def _rows(
    labels: Int64,
    predictions: Int64,
    class_names: Sequence[str],
    codes: Int64,
    groups: list[int],
    clusters: Int64 | None,
    limits: _Limits,
) -> Iterator[tuple[str, str | None, LargestGap | None]]:
    """(measure, class or None, gap) of one axis; best and worst in terms of what is good."""
    counts = np.stack([np.bincount(labels[(codes == g) & (labels >= 0)], minlength=len(class_names)) for g in groups])
    ample = np.flatnonzero(counts.min(axis=0) >= limits.min_images)
    used = np.sort(ample[np.argsort(-counts[:, ample].sum(axis=0), kind="stable")][:_MOST])
    outcomes = {
        (TRUE if outcome.better == "high" else FALSE, int(number)): outcome
        for number in used
        for outcome in class_outcomes(labels, predictions, class_names, classes=[int(number)])
    }

    def largest(*of: tuple[str, int]) -> tuple[tuple[str, int], LargestGap] | None:
        gap = largest_gap([outcomes[key] for key in of], codes, groups, clusters, **limits._asdict())
        if gap is None:
            return None
        key = of[gap.outcome]
        return key, gap if key[0] == TRUE else replace(gap, best=gap.worst, worst=gap.best)

    at = set()
    for measure in (BOTH, TRUE, FALSE):
        found = largest(*[key for key in outcomes if measure in (BOTH, key[0])])
        yield measure, None, None if found is None else found[1]
        if found is not None:
            at.add(found[0][1])
    several = len(class_names) <= _DETAILED
    for number in range(len(class_names)) if several else sorted(at):
        for measure in (TRUE, FALSE):
            alone = largest((measure, number)) if (measure, number) in outcomes else None
            yield measure, class_names[number], None if alone is None else alone[1]


def _compared(axis: "Axis", labels: Int64, clusters: Int64 | None, min_images: int, min_clusters: int) -> list[int]:
    """Codes of the groups that have enough labelled images and clusters."""
    known = (labels >= 0) & (axis.codes >= 0)
    codes = axis.codes[known]
    images = np.bincount(codes, minlength=len(axis.names))
    owners = images
    if clusters is not None:
        owners = np.bincount(np.unique(np.stack([codes, clusters[known]]), axis=1)[0], minlength=len(axis.names))
    return np.flatnonzero((images >= max(1, min_images)) & (owners >= min_clusters)).tolist()
