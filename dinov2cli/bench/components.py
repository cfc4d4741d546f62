"""`dinov2 bench components`: components of a large graph by streamed union-find beside SciPy's, in one process."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinov2cli.bench.peak import resident_peak, run_in_child
from dinov2cli.search.components import UnionFind
from dinov2cli.search.vectors import Int64

_BLOCK = 1 << 20


def run(
    *, rows: int = 20_000_000, edges: int | None = None, rounds: int = 2, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Time and memory of the components of `rows` nodes under as many random edges (or `edges`).

    Ours takes the edges in blocks of 2^20, as a search hands them out; SciPy's `connected_components` gets them whole
    as 32-bit rows of a sparse matrix, the form that takes it least memory. Each runs `rounds` times by turns, the
    best counts. memory_ratio: peak memory of ours over SciPy's, each in a process of its own that makes the edges;
    `same` says whether both find the same components. The work is the CPU's, whatever the device.
    """
    del device
    count = rows if edges is None else edges
    src, dst = random_edges(rows, count, seed)
    best = {"ours": float("inf"), "reference": float("inf")}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, function in (("ours", streamed), ("reference", by_scipy)):
            started = time.perf_counter()
            found[name] = function(rows, src, dst)
            best[name] = min(best[name], time.perf_counter() - started)
    label = found["ours"]
    peaks = {name: run_in_child(_peak, name, rows, count, seed) for name in best}
    return {
        "rows": rows,
        "edges": count,
        "components": int((label == np.arange(rows, dtype=label.dtype)).sum()),
        "same": same_components(label, found["reference"]),
        "seconds": best["ours"],
        "reference_seconds": best["reference"],
        "speedup": best["reference"] / best["ours"],
        "edges_per_s": count / best["ours"],
        "peak_mb": peaks["ours"] / 2**20,
        "reference_peak_mb": peaks["reference"] / 2**20,
        "memory_ratio": peaks["ours"] / peaks["reference"],
    }


def random_edges(rows: int, edges: int, seed: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Both ends [E] of random edges, as int32."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xCC]))
    src, dst = (rng.integers(0, rows, edges, dtype=np.int32) for _ in range(2))
    return src, dst


def streamed(rows: int, src: npt.NDArray[np.int32], dst: npt.NDArray[np.int32]) -> npt.NDArray[np.integer]:
    """The lowest row of every component, [rows], block by block."""
    forest = UnionFind(rows)
    for start in range(0, len(src), _BLOCK):
        forest.add(src[start : start + _BLOCK], dst[start : start + _BLOCK])
    return forest.labels()


def by_scipy(rows: int, src: npt.NDArray[np.int32], dst: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """A number per component, [rows]."""
    graph = coo_array((np.ones(len(src), np.int8), (src, dst)), shape=(rows, rows))
    return connected_components(graph, directed=False)[1]


def same_components(label: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> bool:
    """Whether two labellings cut the rows into the same parts: each label of one goes with one of the other."""
    partner: Int64 = np.full(int(label.max(initial=0)) + 1, -1, dtype=np.int64)
    partner[label] = other
    parts = int((np.bincount(label) > 0).sum()) if len(label) else 0
    return bool((partner[label] == other).all()) and parts == len(np.unique(other))


def _peak(name: str, rows: int, edges: int, seed: int) -> int:
    """Peak memory of one of the two in this process, bytes."""
    src, dst = random_edges(rows, edges, seed)
    (streamed if name == "ours" else by_scipy)(rows, src, dst)
    return resident_peak()
