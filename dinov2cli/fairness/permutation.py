"""Whether the rates of groups differ by more than chance: permutation tests, corrected for all pairs and all groups.

What is shuffled decides what is tested (`scheme`):

- "images": no image has to do with another, and outcomes are dealt out anew over all images. Tested is that the outcome
  of an image is independent of its group. For zeros and ones this is exact at any size of the groups.
- "clusters": the group is (nearly) the same within a cluster, as the region of a household is. Whole clusters, with
  all their outcomes, are dealt out anew over the groups. Tested is that clusters of all groups are alike.
- "within": the group varies within clusters, as the lighting of a person's videos does. Outcomes are shuffled within
  each cluster, so that differences between clusters are out of the game. Tested is that within a cluster the outcome is
  independent of the group.

Statistics are standardised, so that a small group does not drown what a large one shows. Standardisation by the
variance that the shuffled groups have themselves keeps the test of clusters right where the groups' clusters differ in
size (Janssen 1997, Statistics & Probability Letters 36; Chung & Romano 2013, Annals of Statistics 41). The largest over
all pairs, or all groups, is compared with its own distribution over the shuffles (Westfall & Young 1993, single step).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dinov2cli.evaluation.group_rates import Cells, cells_of

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Scheme = Literal["images", "clusters", "within"]

# An axis on which this share of the images lies in clusters of one group is one of whole clusters.
_CONSTANT = 0.95
# Outcomes of at most this many distinct values are dealt out value by value.
_MAX_LEVELS = 16
# Numbers that are shuffled at once.
_PER_CHUNK = 2_000_000
# A group's own variance counts for as many clusters as it has less one, that of all groups together for this many.
_PRIOR = 5.0
# Shuffles whose statistic equals the one found, but for rounding, count as reaching it.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Tested:
    """p-values of one outcome on one axis: `gap` of the largest difference of two groups, `groups` [G] of each group
    against all others together; both are corrected for the pairs, or the groups, that there are."""

    gap: float
    groups: Floats
    scheme: Scheme


def scheme(groups: Codes, clusters: Codes | None) -> Scheme:
    """What is to be shuffled: see the module; groups, clusters: int64 [n]."""
    if clusters is None:
        return "images"
    _, cluster, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    if len(sizes) == len(clusters):
        return "images"
    pairs = np.unique(np.stack([cluster, groups]), axis=1)[0]
    constant = np.bincount(pairs, minlength=len(sizes)) == 1
    return "clusters" if sizes[constant].sum() >= _CONSTANT * len(clusters) else "within"


def permutation_test(
    values: Floats, groups: Codes, clusters: Codes | None, *, permutations: int, seed: int | tuple[int, int]
) -> Tested:
    """Test n outcomes of G >= 2 groups; values float64, groups int64 0..G-1, all of which occur, clusters int64 [n].

    p = (1 + shuffles that reach what was found) / (1 + shuffles) (Phipson & Smyth 2010).
    """
    how = scheme(groups, clusters)
    rng = np.random.Generator(np.random.Philox(key=seed))
    count = int(groups.max()) + 1
    cells = cells_of(values, groups, None if how == "images" else clusters, count)
    if how == "within":
        assert clusters is not None
        shuffled = _within(values, groups, clusters, permutations, rng)
        sums = np.concatenate([cells.sums(cells.hits)[None], shuffled])
        gap, single = _largest_fixed(sums, cells.sums(cells.count))
    else:
        own = _moments(cells)
        found = np.stack([cells.sums(column) for column in own.T], axis=-1)[None]
        shuffled = (
            _images(values, groups, permutations, rng) if how == "images" else _clusters(cells, permutations, rng)
        )
        weight = math.inf if how == "images" and cells.binary else _PRIOR
        gap, single = _largest_of_moments(np.concatenate([found, shuffled]), *_components(cells, values), weight)
    reached = single.max(0)[1:, None] >= single[:, 0] * (1 - _TOLERANCE)
    return Tested(
        float(_p_value(gap[1:] >= gap[0] * (1 - _TOLERANCE))), np.asarray(_p_value(reached), dtype=np.float64), how
    )


def holm(p_values: npt.ArrayLike) -> Floats:
    """p-values [m] corrected for being m (S. Holm, Scandinavian Journal of Statistics 1979); NaN counts for none."""
    found = np.array(p_values, dtype=np.float64)
    rows = np.flatnonzero(~np.isnan(found))
    order = rows[np.argsort(found[rows], kind="stable")]
    raised = found[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return found


def _p_value(reached: npt.NDArray[np.bool_]) -> Floats | np.float64:
    found: Floats | np.float64 = (1 + reached.sum(0)) / (1 + len(reached))
    return found


_COLUMNS = 6
"""Of moments: cells, units, sum of values, and the sums over cells of units^2, units x sum, sum^2."""


def _moments(cells: Cells) -> Floats:
    n, hits = cells.count, cells.hits
    return np.stack([np.ones(len(n)), n, hits, n * n, n * hits, hits * hits], axis=1)


def _components(cells: Cells, values: Floats) -> tuple[float, float]:
    """Variance of one value within and between clusters where groups are alike: the part that goes with the units of a
    cluster and the part that goes with their square."""
    n, total = cells.count, cells.count.sum()
    share = cells.hits.sum() / total
    whole = float(((values - share) ** 2).sum()) / total
    squares = float((n * n).sum())
    if squares <= total:
        return whole, 0.0
    between = (float(((cells.hits - share * n) ** 2).sum()) - whole * total) / (squares - total)
    between = min(max(between, 0.0), whole)
    return whole - between, between


def _shares(moments: Floats, within: float, between: float, weight: float) -> tuple[Floats, Floats]:
    """Rate and variance of moments [..., 6]: the variance of the cells, held by `weight` cells to that of all."""
    cells, n, hits, nn, nh, hh = np.moveaxis(moments, -1, 0)
    share = hits / n
    common = (within * n + between * nn) / n**2
    if math.isinf(weight):
        return share, common
    own = np.maximum(hh - 2 * share * nh + share**2 * nn, 0) * cells / n**2  # times the degrees of freedom
    return share, (own + weight * common) / (cells - 1 + weight)


def _largest_of_moments(moments: Floats, within: float, between: float, weight: float) -> tuple[Floats, Floats]:
    """Of moments [r, G, 6]: the largest squared standardised difference of two groups [r], and that of each group from
    all others together [G, r]."""
    share, variance = _shares(moments, within, between, weight)
    gap = np.zeros(len(moments))
    for first in range(share.shape[1] - 1):
        apart = (share[:, first, None] - share[:, first + 1 :]) ** 2
        np.maximum(gap, _scaled(apart, variance[:, first, None] + variance[:, first + 1 :]).max(1), out=gap)
    rest, rest_variance = _shares(moments.sum(1, keepdims=True) - moments, within, between, weight)
    return gap, _scaled((share - rest) ** 2, variance + rest_variance).T


def _largest_fixed(sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """As `_largest_of_moments`, of sums [r, G] of groups whose units [G] stay: over the variance in all rows."""
    share = sums / counts
    gap = np.zeros(len(sums))
    for first in range(len(counts) - 1):
        apart = share[:, first, None] - share[:, first + 1 :]
        np.maximum(gap, _scaled(apart**2, apart.var(0)).max(1), out=gap)
    apart = share - (sums.sum(1, keepdims=True) - sums) / (counts.sum() - counts)
    return gap, _scaled(apart**2, apart.var(0)).T


def _scaled(squares: Floats, variance: Floats) -> Floats:
    """squares / variance, 0 where nothing varies."""
    variance = np.broadcast_to(variance, squares.shape)
    return np.divide(squares, variance, out=np.zeros_like(squares), where=variance > 1e-18)


def _images(values: Floats, groups: Codes, permutations: int, rng: np.random.Generator) -> Floats:
    """Moments [permutations, G, 6] of all outcomes dealt out anew over all images."""
    sizes = np.bincount(groups)
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) <= _MAX_LEVELS:
        dealt = np.stack(list(_deal(sizes[None].repeat(permutations, 0), counts[None], rng)), axis=-1)
        hits, squares = dealt @ levels, dealt @ levels**2
    else:
        hits, squares = (np.empty((permutations, len(sizes))) for _ in range(2))
        starts = np.append(0, np.cumsum(sizes)[:-1])
        for rows, drawn in _orders(len(values), permutations, rng):
            shuffled = values[drawn]
            hits[rows] = np.add.reduceat(shuffled, starts, axis=1)
            squares[rows] = np.add.reduceat(shuffled**2, starts, axis=1)
    n = np.broadcast_to(sizes, hits.shape).astype(np.float64)
    return np.stack([n, n, hits, n, hits, squares], axis=-1)


def _clusters(cells: Cells, permutations: int, rng: np.random.Generator) -> Floats:
    """Moments [permutations, G, 6] of whole cells dealt out anew over the groups, each of which keeps its number."""
    columns = np.ascontiguousarray(_moments(cells).T)
    found = np.empty((permutations, cells.groups, _COLUMNS))
    sizes = np.bincount(cells.group, minlength=cells.groups)
    found[..., 0] = sizes
    starts = np.append(0, np.cumsum(sizes)[:-1])
    for rows, drawn in _orders(len(cells.count), permutations, rng):
        for column in range(1, _COLUMNS):
            found[rows, :, column] = np.add.reduceat(columns[column][drawn], starts, axis=1)
    return found


def _within(values: Floats, groups: Codes, clusters: Codes, permutations: int, rng: np.random.Generator) -> Floats:
    """Sums of the values of each group [permutations, G] with outcomes shuffled within clusters."""
    _, cluster = np.unique(clusters, return_inverse=True)
    count = int(groups.max()) + 1
    slots = np.bincount(cluster * count + groups, minlength=(int(cluster.max()) + 1) * count).reshape(-1, count)
    levels, level = np.unique(values, return_inverse=True)
    if len(levels) > _MAX_LEVELS:
        return _reordered_within(values, groups, cluster, permutations, rng)
    dealt = np.bincount(cluster * len(levels) + level, minlength=len(slots) * len(levels)).reshape(len(slots), -1)
    moves = ((slots > 0).sum(1) > 1) & ((dealt > 0).sum(1) > 1)
    # What cannot move stays where it is.
    still = np.bincount(groups, np.where(moves[cluster], 0.0, values), count).astype(np.float64)
    slots, dealt = slots[moves], dealt[moves]
    found = np.tile(still, (permutations, 1))
    rows = max(1, _PER_CHUNK // max(1, slots.size))
    for start in range(0, permutations if len(slots) else 0, rows):
        stop = min(start + rows, permutations)
        room = np.broadcast_to(slots, (stop - start, *slots.shape))
        for value, drawn in zip(levels, _deal(room, dealt, rng), strict=True):
            found[start:stop] += value * drawn.sum(1)
    return found


def _reordered_within(
    values: Floats, groups: Codes, cluster: Codes, permutations: int, rng: np.random.Generator
) -> Floats:
    """The same for values of many levels: by sorting random keys within clusters."""
    order = np.argsort(cluster, kind="stable")
    values, groups, cluster = values[order], groups[order], cluster[order]
    found = np.empty((permutations, int(groups.max()) + 1))
    for row in found:
        drawn = np.argsort(cluster + rng.random(len(values)))
        row[:] = np.bincount(groups, values[drawn], len(row))
    return found


def _deal(slots: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], rng: np.random.Generator) -> Iterator[Floats]:
    """Deal things of L kinds, counts [..., L], out over the slots [r, ..., G] of groups: how many of each kind come to
    each group, one array [r, ..., G] for each kind. The kinds fill all slots."""
    room = slots.astype(np.int64)
    for kind in range(counts.shape[-1]):
        if kind == counts.shape[-1] - 1:
            yield room.astype(np.float64)
            return
        left = np.broadcast_to(counts[..., kind], room.shape[:-1]).copy()
        others = room.sum(-1)
        drawn = np.empty_like(room)
        for group in range(room.shape[-1] - 1):
            others = others - room[..., group]
            drawn[..., group] = rng.hypergeometric(room[..., group], others, left)
            left -= drawn[..., group]
        drawn[..., -1] = left
        room = room - drawn
        yield drawn.astype(np.float64)


def _orders(n: int, permutations: int, rng: np.random.Generator) -> Iterator[tuple[slice, npt.NDArray[np.int64]]]:
    """Random orders of n things, some rows at a time."""
    rows = max(1, _PER_CHUNK // n)
    for start in range(0, permutations, rows):
        stop = min(start + rows, permutations)
        yield slice(start, stop), rng.permuted(np.tile(np.arange(n), (stop - start, 1)), axis=1)
