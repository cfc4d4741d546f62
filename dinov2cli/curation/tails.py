"""How often a random pair of different images is alike beyond a threshold, also where a sample is too small to show it.

Model. Let p(t) be the share of random pairs of different images whose score is above t. In a pool of N images an image
has (N - 1) p(t) such partners on average, so that at most this share of images has any (Markov's inequality: no
independence of pairs is assumed, only that the sample is a random one of the pool). For a wanted share r of images
joined to a different one, p(t) must be r / (N - 1): far beyond what the n (n - 1) / 2 pairs of a sample show. Beyond
the k-th highest score u of the sample the tail is therefore modelled as exponential in x = g(score),

    p(x) = p(u) exp(-(x - u) / sigma),   sigma = mean of x - u over the pairs above u  (maximum likelihood),

with g of one of two forms. "distance", for cosines c: x = -log d with d = sqrt(2 - 2 c), the distance of unit vectors;
this is p ~ d^m, m = 1 / sigma being the local intrinsic dimension of the data, and sigma is Hill's estimator (Hill
1975; Levina & Bickel 2004). It never asks for more than a cosine of 1. "linear": x = score, for hashes (minus the bits
that differ) and for normalised scores, whose largest value is unknown.

Where at least `_COUNTED` pairs of the sample are allowed, they are counted instead. The interval comes from a bootstrap
over images (Efron & Tibshirani 1993), for pairs that share an image are not independent.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.search.vectors import Int64

Float64 = npt.NDArray[np.float64]

FEWEST_PAIRS = 20
"""Pairs above u that a fit needs."""

_COUNTED = 10
_LEAST_DISTANCE = 1e-6


@dataclass(frozen=True)
class NearPairs:
    """The pairs of highest score of a sample: first, second int64 [K] (rows), score [K] falling; images, how many
    images the sample has (all pairs of them were looked at); form, "distance" or "linear", see the module."""

    first: Int64
    second: Int64
    score: Float64
    images: int
    form: str

    @property
    def pairs(self) -> float:
        """Pairs that were looked at."""
        return self.images * (self.images - 1) / 2


@dataclass(frozen=True)
class Tail:
    """The fitted tail: share of pairs above `start` (a score), `scale` (sigma) in units of x, `fitted` pairs used."""

    start: float
    share: float
    scale: float
    fitted: int
    form: str

    def share_above(self, score: float) -> float:
        """Modelled share p of random pairs with a score above this one; only from `start` on does the model hold."""
        beyond = float(_x(np.array(score), self.form) - _x(np.array(self.start), self.form))
        return self.share * math.exp(-max(beyond, 0.0) / self.scale)

    def score_at(self, share: float) -> float:
        """The score that a share p of random pairs exceeds; `start` for shares above that one's."""
        x = float(_x(np.array(self.start), self.form)) + self.scale * max(math.log(self.share / share), 0.0)
        return 1 - math.exp(-2 * x) / 2 if self.form == "distance" else x


def pairs_to_keep(images: int, share: float) -> int:
    """How many of the highest pairs a fit for this share of all pairs wants: n of n images, at least 100, at most a
    tenth of all pairs; more where the share itself covers more."""
    pairs = images * (images - 1) // 2
    usual = min(max(100, images), max(pairs // 10, 1))
    return min(pairs, max(usual, math.ceil(share * pairs) + 1))


def fit_tail(near: NearPairs, weight: Float64 | None = None) -> Tail | None:
    """The tail above the lowest of the pairs; None with fewer than `FEWEST_PAIRS` above it.

    weight: how many times each image [images] counts.
    """
    if len(near.score) <= FEWEST_PAIRS:
        return None
    start = near.score[-1]
    above = near.score > start
    excess = _x(near.score[above], near.form) - _x(np.array(start), near.form)
    each, pairs = np.ones(len(excess)), near.pairs
    if weight is not None:
        each = weight[near.first[above]] * weight[near.second[above]]
        pairs = (weight.sum() ** 2 - (weight**2).sum()) / 2
    if above.sum() < FEWEST_PAIRS or each.sum() <= 0 or pairs <= 0:
        return None
    scale = max(float((each * excess).sum() / each.sum()), 1e-9)
    return Tail(float(start), float(each.sum() / pairs), scale, int(above.sum()), near.form)


def score_for_share(near: NearPairs, share: float, weight: Float64 | None = None) -> float | None:
    """The lowest score that at most a share p of random pairs exceeds: counted where the sample shows it, else
    modelled. None where there are too few pairs for either."""
    each, pairs = np.ones(len(near.score)), near.pairs
    if weight is not None:
        each = weight[near.first] * weight[near.second]
        pairs = (weight.sum() ** 2 - (weight**2).sum()) / 2
    allowed = share * pairs
    if allowed >= _COUNTED and each.sum() > allowed:
        # The first pair that would be one too many is not to be exceeded.
        return float(near.score[np.searchsorted(np.cumsum(each), allowed, side="right")])
    tail = fit_tail(near, weight)
    return None if tail is None else tail.score_at(share)


def share_above(near: NearPairs, score: float) -> float:
    """Share of random pairs above a score, counted or modelled as in `score_for_share`; nan where neither can be."""
    count = int((near.score > score).sum())
    if count >= _COUNTED:
        return count / near.pairs
    tail = fit_tail(near)
    return math.nan if tail is None else tail.share_above(score)


def bootstrap_scores(near: NearPairs, share: float, *, rounds: int, seed: int) -> tuple[float, float]:
    """2.5 and 97.5 % of `score_for_share` over samples of images drawn anew; (nan, nan) where none can be had."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xB007]))
    found = []
    for _ in range(rounds):
        weight = rng.multinomial(near.images, np.full(near.images, 1 / near.images)).astype(np.float64)
        score = score_for_share(near, share, weight)
        if score is not None:
            found.append(score)
    if not found:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _x(score: npt.NDArray[np.floating], form: str) -> Float64:
    values = np.asarray(score, dtype=np.float64)
    if form == "linear":
        return values
    return -0.5 * np.log(np.maximum(2 - 2 * values, _LEAST_DISTANCE**2))
