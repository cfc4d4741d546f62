"""The radius of the perceptual hash for `calibrate.py`.

Two pictures whose hashes are near are joined only if their thumbnails agree as well (search/hamming.py), and of
different photographs hardly a pair passes both: too few to tell a rate. So the two are measured apart: how often the
hashes of a random pair differ in at most r bits (modelled as in `tails.py`, score = -bits), and which share of the
nearest such pairs passes the second look; of the latter the upper end is taken, (passed + 3) / looked at, which is
95 % sure where none passed. Pairs that the usual radius joins already are left out: nobody can say which are copies.
"""

import math

import numpy as np
import numpy.typing as npt

from dinov2cli.curation.calibrate_tiers import (
    Aim,
    TierCalibration,
    histogram,
    joined_share,
    mean_of,
    nearest_pairs,
    percent,
    recall_by_kind,
)
from dinov2cli.curation.tails import Float64, NearPairs, pairs_to_keep, score_for_share
from dinov2cli.search.edges import Edges
from dinov2cli.search.hamming import BITS, RADIUS, HashTable, hash_edges
from dinov2cli.search.hashing import ORIENTATIONS, Uint8, turn_bits

HASH_BLIND = ("crop80", "crop50", "rotate", "overlay", "screenshot", "chain")
"""Edits that a hash of the whole picture is not made to see: not part of the mean recall of this tier."""

FURTHEST = 96
"""Bits up to which copies are looked for."""

_BLOCK = 256


def hash_pairs(table: HashTable, share: float) -> tuple[NearPairs, float]:
    """The nearest pairs of different images by bits alone, and the share of such pairs that passes the second look.

    share: of random pairs that may be joined; it decides how many pairs are kept.
    """
    images = len(table)
    keep = pairs_to_keep(images, share)
    first, second, bits = nearest_bits(table, keep + images)
    copies = hash_edges(table, radius=RADIUS)
    alike = _keys(first, second, images)
    different = ~np.isin(alike, _edge_keys(copies, images))
    first, second, bits, alike = (x[different][:keep] for x in (first, second, bits, alike))
    reach = int(bits[-1]) if len(bits) else RADIUS
    passed = np.isin(alike, _edge_keys(hash_edges(table, radius=reach), images)).sum()
    passing = min((int(passed) + 3) / max(len(bits), 1), 1.0)
    return NearPairs(first, second, -bits.astype(np.float64), images, "linear"), passing


def nearest_bits(
    table: HashTable, keep: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The `keep` pairs of images of which two views in some orientation differ in the fewest bits: first < second,
    bits, nearest first. All pairs are looked at: 8 V^2 comparisons of V views."""
    words = [_words(turn_bits(table.bits, o)) for o in range(ORIENTATIONS)] if len(table.bits) else []
    found = [np.zeros((0, 3), dtype=np.int64)]
    for start in range(0, len(table.bits), _BLOCK):
        here = slice(start, start + _BLOCK)
        bits = np.full((len(table.bits[here]), len(table.bits)), BITS + 1, dtype=np.int64)
        for turned in words:
            differ = np.bitwise_count(turned[here, None, :] ^ words[0][None]).sum(axis=2, dtype=np.int64)
            np.minimum(bits, differ, out=bits)
        pair = table.owner[here, None] < table.owner[None]
        # The same pair may come once per view: twice as many are kept until each is counted once.
        limit = (
            np.partition(bits[pair], min(2 * keep, pair.sum() - 1))[min(2 * keep, pair.sum() - 1)] if pair.any() else -1
        )
        a, b = np.nonzero(pair & (bits <= limit))
        found.append(np.stack([table.owner[a + start], table.owner[b], bits[a, b]], axis=1))
        found = [_nearest_of(np.concatenate(found), keep)]
    return found[0][:, 0], found[0][:, 1], found[0][:, 2]


def hash_tier(
    near: NearPairs,
    passing: float,
    bits: Float64,
    names: list[str],
    kinds: npt.NDArray[np.str_],
    aim: Aim,
) -> TierCalibration:
    """The radius for the aim, at most the usual one, which stays where too few pairs have hashes to tell.

    near, passing: see `hash_pairs`; bits: [M] between copies, of `kinds` [M], and originals (inf: none is near).
    """
    wanted = score_for_share(near, aim.share / passing)
    # A pair is joined at up to `radius` bits: all scores above -(radius + 1).
    radius = RADIUS if wanted is None else math.ceil(-wanted) - 1
    threshold = int(np.clip(radius, 0, RADIUS))
    low, high = aim.interval(near, passing)
    recall = recall_by_kind(bits <= threshold, kinds)
    rate = aim.rate_at(near, -(threshold + 1.0), passing)
    mean = mean_of([value for kind, value in recall.items() if kind not in HASH_BLIND])
    reason = f"perceptual: up to {threshold} of {BITS} bits"
    if wanted is None:
        reason += ", as usual: too few pairs have hashes to tell a rate of false merges,"
    else:
        reason += f" joins at most {percent(rate)} of {aim.pool} images to a different one (target {percent(aim.rate)})"
    edges = np.arange(0, 2 * FURTHEST + 5, 4, dtype=np.float64)
    return TierCalibration(
        tier="perceptual",
        unit="bits",
        threshold=threshold,
        interval=(_radius(high), _radius(low)),
        false_merge=rate,
        observed=joined_share(near, -(threshold + 1.0)),
        bounded=threshold != radius or wanted is None,
        recall=recall,
        mean_recall=mean,
        negatives=histogram(-near.score, edges),
        positives=histogram(bits[np.isfinite(bits)], edges),
        nearest=[(a, b, -score) for a, b, score in nearest_pairs(near, names)],
        reason=f"{reason} and finds {mean:.0%} of altered copies that hashes are made to see",
    )


def _nearest_of(rows: npt.NDArray[np.int64], keep: int) -> npt.NDArray[np.int64]:
    """Of (first, second, bits) [M, 3] each pair once, with its fewest bits, the nearest `keep`."""
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    once = np.ones(len(rows), dtype=np.bool_)
    once[1:] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
    rows = rows[once]
    return rows[np.lexsort((rows[:, 1], rows[:, 0], rows[:, 2]))][:keep]


def _words(bits: Uint8) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(bits).view(np.uint64)


def _keys(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], images: int) -> npt.NDArray[np.int64]:
    return first * images + second


def _edge_keys(edges: Edges, images: int) -> npt.NDArray[np.int64]:
    return _keys(np.asarray(edges.src, np.int64), np.asarray(edges.dst, np.int64), images)


def _radius(score: float) -> float:
    return math.nan if math.isnan(score) else float(max(math.ceil(-score) - 1, 0))
