"""One threshold of `calibrate.py`: from scores of pairs to the threshold, its interval and what it finds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.curation.tails import (
    Float64,
    NearPairs,
    bootstrap_scores,
    pairs_to_keep,
    score_for_share,
    share_above,
)
from dinov2cli.search.vectors import Float32

_BINS = 80
_LISTED = 10
_BLOCK = 1024


@dataclass(frozen=True)
class Aim:
    """rate: wanted share of `pool` images joined to a different one; rounds: bootstrap samples, drawn by `seed`."""

    rate: float
    pool: int
    rounds: int
    seed: int

    @property
    def share(self) -> float:
        """Share of random pairs that may be above the threshold, see `tails.py`."""
        return self.rate / max(self.pool - 1, 1)

    def rate_at(self, near: NearPairs, score: float, passing: float = 1.0) -> float:
        """Modelled share of images joined to a different one above a score, where `passing` of such pairs are."""
        return min((self.pool - 1) * passing * share_above(near, score), 1.0)

    def interval(self, near: NearPairs, passing: float = 1.0) -> tuple[float, float]:
        """Of the score that is asked for."""
        return bootstrap_scores(near, self.share / passing, rounds=self.rounds, seed=self.seed)


@dataclass(frozen=True)
class Histogram:
    """Counts [bins] between edges [bins + 1]."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class TierCalibration:
    """One threshold, and what it was chosen by.

    threshold: cosine or score to be exceeded, or bits of 256 that may differ, as `unit` says; interval: 95 % of it.
    false_merge: modelled share of the pool's images joined to a different one at the threshold (nan: too few near
    pairs to tell); observed: the share within the sample. bounded: the threshold is the floor (or the largest radius),
    not the measured value. recall: by kind of edit; mean_recall: over the kinds this tier is made to see.
    negatives: scores (bits) of pairs of different images; positives: of copies with their originals. nearest: ids and
    score of the pairs of different images that are most alike: copies among them raise the threshold for nothing.
    reason: one line.
    """

    tier: str
    unit: str
    threshold: float
    interval: tuple[float, float]
    false_merge: float
    observed: float
    bounded: bool
    recall: dict[str, float]
    mean_recall: float
    negatives: Histogram
    positives: Histogram
    nearest: list[tuple[str, str, float]]
    reason: str


def vector_scores(
    originals: Float32,
    copies: Float32,
    own: npt.NDArray[np.int64],
    bias: Callable[[Float32], npt.NDArray[np.floating]] | None,
    share: float,
) -> tuple[NearPairs, Float64, Histogram]:
    """The nearest pairs of originals, the score of every copy with its `own` original, and all pairs' histogram."""
    first = np.zeros(len(originals)) if bias is None else np.asarray(bias(originals), dtype=np.float64)
    second = np.zeros(len(copies)) if bias is None else np.asarray(bias(copies), dtype=np.float64)
    n = len(originals)
    keep = pairs_to_keep(n, share)
    edges, counts = np.linspace(-1.0, 1.0, _BINS + 1), np.zeros(_BINS, dtype=np.int64)
    kept: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Float64]] = []
    for start in range(0, n, _BLOCK):
        score = originals[start : start + _BLOCK].astype(np.float64) @ originals[start:].T.astype(np.float64)
        score -= (first[start : start + _BLOCK, None] + first[None, start:]) / 2
        a, b = np.triu_indices(len(score), 1, score.shape[1])
        values = score[a, b]
        counts += np.histogram(np.clip(values, -1, 1), edges)[0]
        best = np.argsort(-values, kind="stable")[:keep]
        kept.append((a[best] + start, b[best] + start, values[best]))
    a, b, values = (np.concatenate(part) for part in zip(*kept, strict=True))
    best = np.argsort(-values, kind="stable")[:keep]
    form = "distance" if bias is None else "linear"
    near = NearPairs(a[best], b[best], values[best], n, form)
    positives = np.einsum("nd,nd->n", copies, originals[own], dtype=np.float64) - (second + first[own]) / 2
    return near, positives, Histogram(edges.tolist(), counts.tolist())


def vector_tier(
    near: NearPairs,
    positives: Float64,
    negatives: Histogram,
    names: list[str],
    kinds: npt.NDArray[np.str_],
    aim: Aim,
    *,
    unit: str,
    floor: float,
) -> TierCalibration:
    """The cosine (or score, as `unit` says) for the aim, at least `floor`.

    positives: [M] of copies, of `kinds` [M], with their originals; names: ids of the images of `near`.
    """
    wanted = score_for_share(near, aim.share)
    if wanted is None:  # hardly a pair differs from the rest: all images alike to this model
        wanted = float(near.score[0])
    # Rounded up to a number one can type; also clear of rounding in another order of summation.
    threshold = math.ceil(wanted * 1e4) / 1e4
    threshold = max(floor, min(1.0, threshold) if unit == "cosine" else threshold)
    low, high = aim.interval(near)
    recall = recall_by_kind(positives > threshold, kinds)
    rate = aim.rate_at(near, threshold)
    mean = mean_of(list(recall.values()))
    reason = (
        f"embedding: {unit} above {threshold:.4f} joins {percent(rate)} of {aim.pool} images to a different one "
        f"(target {percent(aim.rate)}; measured on {near.images}) and finds {mean:.0%} of altered copies"
    )
    if threshold >= 1 and unit == "cosine":
        reason += "; no cosine below 1 keeps to the target: use hashes, or a model made for copies"
    return TierCalibration(
        tier="embedding",
        unit=unit,
        threshold=threshold,
        interval=(low, high),
        false_merge=rate,
        observed=joined_share(near, threshold),
        bounded=threshold == floor,
        recall=recall,
        mean_recall=mean,
        negatives=negatives,
        positives=histogram(positives, np.asarray(negatives.edges)),
        nearest=nearest_pairs(near, names),
        reason=reason,
    )


def recall_by_kind(found: npt.NDArray[np.bool_], kinds: npt.NDArray[np.str_]) -> dict[str, float]:
    """Share found [M] of each kind [M], in the order of kinds."""
    return {kind: float(found[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}


def mean_of(values: list[float]) -> float:
    """Mean; nan of nothing."""
    return float(np.mean(values)) if values else math.nan


def joined_share(near: NearPairs, score: float) -> float:
    """Share of the sample's images with a different one above the score, of the pairs kept."""
    above = near.score > score
    return len(np.unique(np.concatenate([near.first[above], near.second[above]]))) / near.images


def histogram(values: Float64, edges: Float64) -> Histogram:
    """Counts between edges; what lies outside counts at the ends."""
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return Histogram(edges.tolist(), counts.tolist())


def percent(share: float) -> str:
    """A share for people: two digits, however small."""
    return f"{100 * share:.2g} %"


def nearest_pairs(near: NearPairs, names: list[str]) -> list[tuple[str, str, float]]:
    """Ids and score of the highest pairs."""
    top = zip(near.first[:_LISTED].tolist(), near.second[:_LISTED].tolist(), near.score[:_LISTED].tolist(), strict=True)
    return [(names[a], names[b], score) for a, b, score in top]
