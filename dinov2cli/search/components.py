"""Connected components over edges, and a guard against components grown by chaining."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinov2cli.search.vectors import Int64


@dataclass(frozen=True)
class Recut:
    """A component that was larger than allowed: how large, the strength it was cut at, and what came of it."""

    first_row: int
    size: int
    strength: float
    largest_after: int


def component_labels(rows: int, src: Int64, dst: Int64) -> Int64:
    """The component of every row, [rows] int64: its lowest row, whatever the order of the edges.

    A row without an edge is its own component.
    """
    if not len(src):
        return np.arange(rows, dtype=np.int64)
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
    copies stays whole.

    Returns the labels [rows], which edges are left [E], and what was cut.
    """
    label = component_labels(rows, src, dst)
    alive = np.ones(len(src), dtype=bool)
    size = np.bincount(label, minlength=rows)
    start_size = size.copy()
    start_label = label.copy()
    bar, last_bar = 0.0, {}
    while bar < 0.999:
        large = size[label] > max_size
        if not large.any():
            break
        bar += (1.0 - bar) / 4
        inside = large[src] & alive
        for first in np.unique(start_label[large]):
            last_bar[int(first)] = bar
        alive &= ~(inside & (strength < bar))
        label = component_labels(rows, src[alive], dst[alive])
        size = np.bincount(label, minlength=rows)
    recuts = [
        Recut(first, int(start_size[first]), round(cut, 6), int(size[label[start_label == first]].max()))
        for first, cut in sorted(last_bar.items())
    ]
    return label, alive, recuts
