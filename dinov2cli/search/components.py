"""Connected components over edges, streamed or in memory, and guards against components grown by chaining."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinov2cli.search.edges import Edges
from dinov2cli.search.vectors import Int64

Labels = npt.NDArray[np.integer]

_CHUNK = 1 << 20
_ROUNDS = 8


@dataclass(frozen=True)
class Recut:
    """A component that was larger than allowed: how large, the strength it was cut at, and what came of it."""

    first_row: int
    size: int
    strength: float
    largest_after: int


class UnionFind:
    """Components of `rows` nodes from edges that come in pieces, in any order; 4 bytes a node below 2^32 of them.

    Every node points to a lower node of its component or to itself, so the root of a component is its lowest row,
    whatever the order of the edges and however they are cut into pieces.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._parent: Labels = np.arange(rows, dtype=np.uint32 if rows < 1 << 32 else np.int64)

    def add(self, src: Labels, dst: Labels) -> None:
        """Join the ends of the edges src, dst [E]; memory grows with E alone."""
        for start in range(0, len(src), _CHUNK):
            self._join(src[start : start + _CHUNK], dst[start : start + _CHUNK])

    def labels(self) -> Labels:
        """The lowest row of every row's component, [rows]; edges may still be added afterwards.

        The array is this object's own: copy it before adding more.
        """
        for start in range(0, self.rows, _CHUNK):
            part = self._parent[start : start + _CHUNK]
            # Parents of this part are lower rows: final already, or in this part.
            while True:
                above = self._parent.take(part)
                if np.array_equal(above, part):
                    break
                part[:] = above
        return self._parent

    def _join(self, src: Labels, dst: Labels) -> None:
        parent = self._parent
        a, b = self._roots(src.astype(np.int64)), self._roots(dst.astype(np.int64))
        for _ in range(_ROUNDS):
            different = np.flatnonzero(a != b)
            if not len(different):
                return
            a, b = a[different], b[different]
            high, low = np.maximum(a, b), np.minimum(a, b)
            # Every root goes below the lowest it is joined to: parents stay lower than their children.
            np.minimum.at(parent, high, low.astype(parent.dtype))
            self._shorten(high)
            a, b = parent.take(high).astype(np.int64), parent.take(low).astype(np.int64)
        self._join_rest(a, b)

    def _shorten(self, nodes: Int64) -> None:
        """Point all `nodes` to their roots; whatever lies on their ways up must be among them, or a root."""
        parent = self._parent
        while len(nodes):
            now = parent.take(nodes)
            above = parent.take(now)
            left = np.flatnonzero(above != now)
            nodes = nodes[left]
            parent[nodes] = above[left]

    def _roots(self, nodes: Int64) -> Int64:
        """The root of every node; nodes are pointed to it."""
        parent = self._parent
        root = parent.take(nodes).astype(np.int64)
        walked = left = np.flatnonzero(parent.take(root) != root)
        while len(left):
            here = root[left]
            above = parent.take(here).astype(np.int64)
            root[left] = above
            left = left[above != here]
        parent[nodes[walked]] = root[walked]
        return root

    def _join_rest(self, a: Labels, b: Labels) -> None:
        """What a few rounds left over, in one pass of SciPy over the nodes concerned."""
        nodes, place = np.unique(np.concatenate([a, b]), return_inverse=True)
        label = _scipy_labels(len(nodes), place[: len(a)], place[len(a) :])
        self._parent[nodes] = nodes[label]


def component_labels(rows: int, src: Labels, dst: Labels) -> Int64:
    """The component of every row, [rows] int64: its lowest row, whatever the order of the edges.

    A row without an edge is its own component.
    """
    forest = UnionFind(rows)
    forest.add(np.asarray(src), np.asarray(dst))
    return forest.labels().astype(np.int64)


def streamed_labels(rows: int, blocks: Iterable[Edges]) -> Labels:
    """As `component_labels`, from edges that come in blocks (as `edge_blocks` gives them) and are not held: [rows]
    uint32 below 2^32 rows. Memory: 4 bytes a row and one block."""
    forest = UnionFind(rows)
    for block in blocks:
        forest.add(block.src, block.dst)
    return forest.labels()


def _scipy_labels(rows: int, src: Labels, dst: Labels) -> Int64:
    """Components by SciPy; the label of a row is the lowest row of its component."""
    graph = coo_array((np.ones(len(src), np.int8), (src, dst)), shape=(rows, rows))
    count, label = connected_components(graph, directed=False)
    lowest = np.full(count, rows, dtype=np.int64)
    np.minimum.at(lowest, label, np.arange(rows, dtype=np.int64))
    return lowest[label]


def cut_components(
    rows: int,
    src: Int64,
    dst: Int64,
    strength: npt.NDArray[np.floating],
    *,
    max_size: int,
) -> tuple[Int64, npt.NDArray[np.bool_], list[Recut]]:
    """Components of at most `max_size` rows where raising the threshold can achieve it.

    Transitive closure chains look-alikes: A resembles B, B resembles C, until a component holds thousands of
    different images (CURATION.md section 4). Components above `max_size` lose their weakest edges: the bar rises by
    a quarter of what is left to 1 until they are small enough. strength: [E] in 0 .. 1, how far an edge lies
    above its own threshold; edges of strength 1 (identical images) are never cut, so a large group of true
    copies stays whole. A rise of the bar costs as much as there are rows and edges in components that are too large.

    Returns the labels [rows], which edges are left [E], and what was cut.
    """
    label = component_labels(rows, src, dst)
    alive = np.ones(len(src), dtype=bool)
    size = np.bincount(label, minlength=rows)
    big = np.flatnonzero(size > max_size)
    if not len(big):
        return label, alive, []
    was_label, was_size = label.copy(), size[big]
    last_bar = np.zeros(rows)
    bar = 0.0
    nodes = np.flatnonzero(np.isin(label, big))  # rows of components that are too large
    inside = np.flatnonzero(np.isin(label[src], big))  # and their edges
    place = np.zeros(rows, dtype=np.int64)
    while len(nodes) and bar < 0.999:
        bar += (1.0 - bar) / 4
        last_bar[was_label[nodes]] = bar
        weak = strength[inside] < bar
        alive[inside[weak]] = False
        inside = inside[~weak]
        place[nodes] = np.arange(len(nodes))
        inner = component_labels(len(nodes), place[src[inside]], place[dst[inside]])
        label[nodes] = nodes[inner]
        still = (np.bincount(inner, minlength=len(nodes)) > max_size)[inner]
        large = np.zeros(rows, dtype=bool)
        large[nodes[still]] = True
        nodes, inside = nodes[still], inside[large[src[inside]]]
    # The largest piece of every component as it was: the most rows of one label under one label before.
    pieces = np.bincount(label, minlength=rows)
    largest = np.zeros(rows, dtype=np.int64)
    np.maximum.at(largest, was_label, pieces[label])
    recuts = [
        Recut(int(first), int(before), round(float(last_bar[first]), 6), int(largest[first]))
        for first, before in zip(big, was_size, strict=True)
        if largest[first] < before  # many true copies are no chain, and nothing was cut
    ]
    return label, alive, recuts


Similarity = Callable[[Int64, Int64], npt.NDArray[np.floating]]
"""(rows a [n], rows b [n]) -> their similarity [n]; NaN where it is not known."""


def leave_unlike(
    label: Int64,
    representative: Int64,
    similarity: Similarity,
    src: Int64,
    dst: Int64,
    *,
    floor: float,
    block: int = 1 << 16,
) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Rows that only a chain ties to the representative of their component leave it, by a second opinion.

    A row leaves when it has no edge to the representative and its own similarity to it is known and below `floor`.
    The rows that leave form components among themselves by the edges between them, as before; the others stay, also
    where their only tie was a row that left, since they do resemble the representative. The rule is applied once:
    the new components have representatives of their own, for the caller to choose and, if wanted, to ask again.

    label: [N] component of every row (its lowest row, or any row of it); representative: [N] the row that stands for
    the component of every row; src, dst: the edges [E] that made the components; similarity: of pairs of rows, asked
    for `block` pairs at a time. Returns the labels [N], each the lowest row of its component, and who left [N].
    """
    rows = len(label)
    tied = np.zeros(rows, dtype=bool)
    tied[src[representative[src] == dst]] = True
    tied[dst[representative[dst] == src]] = True
    doubtful = np.flatnonzero((representative != np.arange(rows)) & ~tied)
    left = np.zeros(rows, dtype=bool)
    for start in range(0, len(doubtful), block):
        part = doubtful[start : start + block]
        left[part] = np.asarray(similarity(part, representative[part])) < floor
    lowest = np.full(rows, rows, dtype=np.int64)
    stays = np.flatnonzero(~left)
    np.minimum.at(lowest, label[stays], stays)
    among = left[src] & left[dst] & (label[src] == label[dst])
    apart = component_labels(rows, src[among], dst[among])
    return np.where(left, apart, lowest[label]), left
