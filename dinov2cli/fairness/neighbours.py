"""Same-attribute retrieval: how many of an image's nearest neighbours share its value of an attribute.

Goyal et al. 2022 (arXiv 2202.07603, indicator 3) search a second set of faces; here queries and database are one set,
and an image never finds its own cluster (subject, household), of which it would find little else.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2cli.search.index import build_index
from dinov2cli.search.neighbours import neighbour_blocks
from dinov2cli.search.plan import QUERY_ROWS
from dinov2cli.search.vectors import SubsetVectors, as_vectors

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_LARGE = 256  # images of a cluster from which on the others are searched by themselves
_LISTED = 16 << 20  # neighbours of one block of queries


class Precision(NamedTuple):
    """Precision at one k for n images: values float64 [n], the share of the k nearest that have the image's value;
    counted bool [n]; expected float64 [n], the share of all images of other clusters that have it. 0 if not counted."""

    values: Floats
    counted: npt.NDArray[np.bool_]
    expected: Floats


def same_attribute_precision(
    vectors: npt.NDArray[np.floating],
    codes: Int64,
    clusters: Int64 | None,
    ks: Sequence[int],
    *,
    neighbours: Int64 | None = None,
) -> dict[int, Precision]:
    """Precision at each k of the exact cosine neighbours among images of other clusters whose value is known.

    vectors: [n, D]; codes: int64 [n], -1 where the value is unknown; clusters: int64 [n], None where each image stands
    for itself. Not counted are images of unknown value and those with fewer than k such others. neighbours: what
    `outside_neighbours(vectors, codes >= 0, clusters, k)` found for the largest k, where several attributes are known
    of the same images.
    Raises ValueError for a k below 1, InputError for vectors that are not finite.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected whole numbers from 1, found {list(ks)}")
    known = codes >= 0
    clusters = np.arange(len(codes)) if clusters is None else clusters
    rows = outside_neighbours(vectors, known, clusters, max(ks)) if neighbours is None else neighbours
    same = (codes[rows] == codes[:, None]) & (rows >= 0)
    expected, others = _by_chance(codes, clusters)
    found: dict[int, Precision] = {}
    for k in ks:
        counted = known & (others >= k)
        found[int(k)] = Precision(
            np.where(counted, same[:, :k].mean(axis=1), 0.0), counted, np.where(counted, expected, 0.0)
        )
    return found


def outside_neighbours(
    vectors: npt.NDArray[np.floating], known: npt.NDArray[np.bool_], clusters: Int64 | None, k: int
) -> Int64:
    """The k nearest by cosine of every known image among the known images of other clusters, exact: rows int64 [n, k].

    Most similar first; -1 where there are no more, and throughout for images that are not known. Needs the vectors
    once more in memory, and time as n²: every pair is compared.
    """
    found = np.full((len(vectors), k), -1, np.int64)
    places = np.flatnonzero(known)
    clusters = np.arange(len(vectors)) if clusters is None else clusters
    _, group, sizes = np.unique(clusters[places], return_inverse=True, return_counts=True)
    source = SubsetVectors(as_vectors(vectors), places)
    for asked, among, wanted in _searches(group, sizes, k):
        if not len(among):
            continue
        index = build_index(SubsetVectors(source, among), index="flat", k=wanted)
        queries = SubsetVectors(source, asked)
        block = max(1, min(QUERY_ROWS, _LISTED // wanted))
        for part in neighbour_blocks(index, queries, wanted, block=block):
            own = asked[part.start : part.start + len(part.row)]
            rows = np.where(part.row < 0, -1, among[part.row])
            found[places[own]] = _places(places, _outside(rows, group, group[own], k))
    return found


def _searches(group: Int64, sizes: Int64, k: int) -> Iterator[tuple[Int64, Int64, int]]:
    """(queries, rows to search, neighbours to ask for) that together cover all rows.

    A row's own cluster cannot take more places than it has images: so many more neighbours are asked for, alike for
    clusters of about one size. The rows outside of a large cluster are searched for its queries alone.
    """
    everything = np.arange(len(group))
    large = np.flatnonzero(sizes > _LARGE)
    size = sizes[group]
    least = 0
    while least < _LARGE:
        most = max(1, 2 * least)
        asked = np.flatnonzero((size > least) & (size <= most))
        if len(asked):
            yield asked, everything, min(k + most, len(group))
        least = most
    for cluster in large:
        outside = np.flatnonzero(group != cluster)
        yield np.flatnonzero(group == cluster), outside, max(1, min(k, len(outside)))


def _outside(rows: Int64, group: Int64, own: Int64, k: int) -> Int64:
    """The first k of the rows [m, wanted] that are of another group than `own` [m], in order; -1 where there are no
    more."""
    kept = (rows >= 0) & (group[rows] != own[:, None])
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
    chosen = np.where(np.take_along_axis(kept, order, 1), np.take_along_axis(rows, order, 1), -1)
    return np.pad(chosen, ((0, 0), (0, k - chosen.shape[1])), constant_values=-1)


def _places(places: Int64, rows: Int64) -> Int64:
    """`places` of these rows, and -1 where a row is -1."""
    return np.where(rows < 0, -1, places[rows])


def _by_chance(codes: Int64, clusters: Int64) -> tuple[Floats, Int64]:
    """Share of the known images of other clusters that have an image's value, and the number of these images, [n]."""
    known = codes >= 0
    _, group = np.unique(clusters, return_inverse=True)
    kinds = int(codes.max(initial=0)) + 1
    of_value = np.bincount(codes[known], minlength=kinds)
    in_group = np.bincount(group[known], minlength=int(group.max(initial=0)) + 1)
    cell = group * kinds + np.maximum(codes, 0)
    _, which, counts = np.unique(cell[known], return_inverse=True, return_counts=True)
    own = np.zeros(len(codes), np.int64)
    own[known] = counts[which]
    others = np.where(known, known.sum() - in_group[group], 0)
    alike = np.where(known, of_value[np.maximum(codes, 0)] - own, 0)
    return alike / np.maximum(others, 1), others
