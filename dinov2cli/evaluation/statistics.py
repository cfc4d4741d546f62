"""Metrics as functions of what was found for each test image, so that any of them can be resampled.

A bootstrap draws the images again with replacement, which is the same as giving each a whole-number weight. Every
metric here takes such weights, for all resamples at once, and two models are compared under the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dinov2cli.artifacts.results import Scores
from dinov2cli.errors import InputError
from dinov2cli.evaluation.clustered import cluster_sums

Floats = npt.NDArray[np.float64]
Kind = Literal[
    "mean", "class_mean", "ratio", "root_mean", "average_precision", "micro_average_precision", "gap", "drop"
]
KINDS: tuple[Kind, ...] = (
    *("mean", "class_mean", "ratio", "root_mean", "average_precision", "micro_average_precision"),
    *("gap", "drop"),
)


@dataclass(frozen=True)
class Statistic:
    """A metric over n units (images, queries). Make one with a function of this module named as its kind.

    values: float64 [n, width]; what the columns are depends on the kind.
    """

    kind: Kind
    values: Floats

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n(self) -> int:
        """How many units the metric looks at: of ratios those with a denominator that is not zero."""
        if self.kind not in ("ratio", "gap", "drop"):
            return len(self)
        return int((self.values[:, self.values.shape[1] // 2 :] != 0).any(axis=1).sum())

    @classmethod
    def of(cls, scores: Scores) -> "Statistic":
        """The metric whose scores were kept on disk. Raises InputError for a kind that this program does not know."""
        if scores.statistic not in KINDS:
            raise InputError(
                f"scores of a metric of kind {scores.statistic!r}, expected one of {', '.join(KINDS)}: they were "
                "written by a newer dinov2cli, upgrade with `pip install -U dinov2cli`"
            )
        return cls(scores.statistic, np.asarray(scores.values, dtype=np.float64))

    def scores(self, units: Sequence[str], clusters: Sequence[str | None] | None = None) -> Scores:
        """What is kept on disk of this metric; units: name of each row, clusters: of what it is one of several.

        Raises ValueError if there are not n names.
        """
        for names in (units, clusters):
            if names is not None and len(names) != len(self):
                raise ValueError(f"a metric over {len(self)} units needs as many names, got {len(names)}")
        return Scores(self.kind, units, self.values, clusters)

    def as_ratio(self) -> "Statistic":
        """A mean as the ratio that it is; a ratio itself."""
        return ratio(self.values[:, 0], np.ones(len(self))) if self.kind == "mean" else self

    def pooled(self, clusters: npt.NDArray[np.int64]) -> "Statistic | None":
        """The same metric over clusters [n] in place of units; None where it cannot be had from sums over clusters."""
        if self.kind not in ("mean", "ratio", "gap", "drop"):
            return None
        found = self.as_ratio()
        return Statistic(found.kind, cluster_sums(found.values, clusters))

    def at(self, rows: npt.NDArray[np.int64]) -> "Statistic":
        """The same metric over some of the units, in the order given."""
        return Statistic(self.kind, self.values[rows])

    def value(self) -> float:
        """The metric over all units, each counted once; NaN where it has none (no unit, no class with a positive)."""
        return float(self.replicates(np.ones((1, len(self))))[0])

    def replicates(self, weights: Floats) -> Floats:
        """The metric under each row of `weights` [r, n] (how often each unit is drawn), float64 [r]."""
        if self.kind == "mean":
            return _over(weights @ self.values[:, 0], weights.sum(1))
        if self.kind == "root_mean":
            return np.sqrt(_over(weights @ self.values[:, 0], weights.sum(1)))
        if self.kind == "micro_average_precision":
            confidence, correct, answerable = self.values.T
            every, by_unit = np.arange(len(self)), np.ascontiguousarray(weights.T)
            return _over(_area(confidence, correct > 0, every, by_unit)[0], weights @ answerable)
        if self.kind == "class_mean":
            return _class_means(self.values[:, 0], self.values[:, 1], weights)
        half = self.values.shape[1] // 2
        first, second = self.values[:, :half], self.values[:, half:]
        if self.kind in ("ratio", "gap", "drop"):
            ratios = _over(weights @ first, weights @ second)
            return _mean_of_present(ratios) if self.kind == "ratio" else _range(ratios, relative=self.kind == "drop")
        return _mean_of_present(_average_precisions(first, second, weights))


def mean(values: npt.ArrayLike) -> Statistic:
    """Mean of one number per unit [n], as accuracy (0 or 1) or average precision of a query."""
    return Statistic("mean", _single(values))


def root_mean(squares: npt.ArrayLike) -> Statistic:
    """Square root of the mean of one number per unit [n]."""
    return Statistic("root_mean", _single(squares))


def class_mean(values: npt.ArrayLike, classes: npt.ArrayLike) -> Statistic:
    """Mean over classes of the mean of `values` [n] in each class [n]: mean per-class accuracy, of hits."""
    return Statistic("class_mean", np.concatenate([_single(classes), _single(values)], axis=1))


def ratio(numerators: npt.ArrayLike, denominators: npt.ArrayLike) -> Statistic:
    """Mean over classes of (sum of numerators) / (sum of denominators), both [n, C] or [n].

    Classes whose denominators sum to zero do not count. IoU: intersections over unions. A mean over some of the units
    only: value x counts, over counts (0 or 1).
    """
    return Statistic("ratio", _pair(numerators, denominators))


def gap(hits: npt.ArrayLike, counted: npt.ArrayLike) -> Statistic:
    """Largest minus least of the shares hits / counted of G groups, both [n, G]: row i is zero but in the group of
    unit i. Groups without a counted unit do not count; fewer than two have no gap."""
    return Statistic("gap", _pair(hits, counted))


def drop(hits: npt.ArrayLike, counted: npt.ArrayLike) -> Statistic:
    """The gap of `gap` as a share of the largest: (best - least) / best. No value where the largest is 0."""
    return Statistic("drop", _pair(hits, counted))


def average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> Statistic:
    """Mean over classes of the average precision of scores [n, C] for targets [n, C]: 1 yes, 0 no, -1 not counted.

    The step-wise definition of scikit-learn (sum of precision times gain in recall at distinct scores). Classes without
    a positive do not count.
    """
    return Statistic("average_precision", _pair(scores, targets))


def micro_average_precision(confidences: npt.ArrayLike, correct: npt.ArrayLike, answerable: npt.ArrayLike) -> Statistic:
    """Average precision of the answers of all units [n] in one list, most confident first: GAP of instance recognition.

    Recall is out of the `answerable` units [n] (1, or 0 for a distractor, which has no right answer), so answers that
    are wrong and answers to distractors lower it, the more the surer they are (Perronnin et al. 2009; Weyand et al.
    2020, section 5.2). Equal confidences are one step.
    """
    columns = [_single(values) for values in (confidences, correct, answerable)]
    return Statistic("micro_average_precision", np.concatenate(columns, axis=1))


def _columns(values: npt.ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    return found[:, None] if found.ndim == 1 else found


def _single(values: npt.ArrayLike) -> Floats:
    found = _columns(values)
    if found.ndim != 2 or found.shape[1] != 1:
        raise ValueError(f"expected one number for each unit, got an array of shape {np.shape(values)}")
    return found


def _pair(first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    left, right = _columns(first), _columns(second)
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(f"expected two arrays of one shape [n, C], got {np.shape(first)} and {np.shape(second)}")
    return np.concatenate([left, right], axis=1)


def _over(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, NaN where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)


def _mean_of_present(by_class: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    present = ~np.isnan(by_class)
    return _over(np.where(present, by_class, 0).sum(-1), present.sum(-1))


def _range(ratios: Floats, *, relative: bool) -> Floats:
    """Largest minus least of each row [r, G], over the largest if `relative`; NaN with fewer than two that exist."""
    present = ~np.isnan(ratios)
    high = np.max(ratios, axis=1, initial=-np.inf, where=present)
    low = np.min(ratios, axis=1, initial=np.inf, where=present)
    found = np.where(present.sum(1) > 1, high - low, np.nan)
    return _over(found, high) if relative else found


def _class_means(classes: Floats, values: Floats, weights: Floats) -> Floats:
    """Mean over classes of the mean in each, under each row of weights, float64 [r]; classes not drawn do not count."""
    if not len(values):
        return np.full(len(weights), np.nan)
    order = np.argsort(classes, kind="stable")
    starts = np.flatnonzero(np.diff(classes[order], prepend=np.nan) != 0)
    drawn = weights[:, order]
    return _mean_of_present(
        _over(np.add.reduceat(drawn * values[order], starts, axis=1), np.add.reduceat(drawn, starts, axis=1))
    )


def _average_precisions(scores: Floats, targets: Floats, weights: Floats) -> Floats:
    """Average precision of each class under each row of weights, float64 [r, C]."""
    found = np.full((len(weights), scores.shape[1]), np.nan)
    by_unit = np.ascontiguousarray(weights.T)
    for column in range(scores.shape[1]):
        rows = np.flatnonzero(targets[:, column] >= 0)
        area, positives = _area(scores[rows, column], targets[rows, column] > 0, rows, by_unit)
        found[:, column] = _over(area, positives)
    return found


def _area(
    scores: Floats, positive: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64], weights: Floats
) -> tuple[Floats, Floats]:
    """Sum over the steps of the ranking by `scores` [m] of precision times new positives, and all positives, float64
    [r] each; weights [n, r], of which `rows` [m] belong to the scores."""
    if not positive.any():
        return np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    # Equal scores are one step. Only steps with a positive add to the area, so the rest is summed up between them.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    gains = np.add.reduceat(positive, np.append(0, ends[:-1] + 1), dtype=np.int64) > 0
    ends = ends[gains]
    starts = np.append(0, ends[:-1] + 1)
    drawn = weights[rows[order[: ends[-1] + 1]]]
    seen = np.cumsum(np.add.reduceat(drawn, starts, axis=0), axis=0)
    hits = np.flatnonzero(positive)
    step = np.searchsorted(ends, hits)
    gained = np.add.reduceat(drawn[hits], np.searchsorted(step, np.arange(len(ends))), axis=0)
    precision = np.divide(np.cumsum(gained, axis=0), seen, out=np.zeros_like(seen), where=seen > 0)
    return (precision * gained).sum(axis=0), gained.sum(axis=0)
