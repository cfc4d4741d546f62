"""`dinov2 bench search`: our neighbour search beside a plain torch matrix product with top-k, in one process."""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from dinov2cli.bench.peak import resident_peak
from dinov2cli.errors import UserError
from dinov2cli.search.index import build_index
from dinov2cli.search.neighbours import neighbour_blocks
from dinov2cli.search.vectors import Float32, Int64


def run(
    *,
    rows: int = 50_000,
    dim: int = 384,
    k: int = 64,
    queries: int = 4096,
    index: str = "auto",
    nprobe: int = 32,
    rounds: int = 3,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Time and memory of the k nearest rows for some queries, ours against brute force in torch.

    The data are a mixture of Gaussians in 48 dimensions lifted to `dim` (real features differ: tighter clusters make
    inverted lists better, wider ones worse). Both run `rounds` times by turns with the threads of the process; the
    median counts. `seconds` is our search, `build_seconds` the index (once); speedup = reference over ours;
    memory_ratio = our extra memory over the reference's, as far as the arrays can be counted (see `memory`).
    recall: share of the true k nearest that ours returns. Raises UserError for a device other than the CPU, where
    the search runs.
    """
    if device not in ("auto", "cpu"):
        raise UserError(f"bench search --device {device}: the search runs on the CPU; expected auto or cpu")
    base = mixture(rows, dim, seed)
    wanted = base[np.random.default_rng(seed).choice(rows, size=min(queries, rows), replace=False)]
    start = time.perf_counter()
    built = build_index(base, index=index, nprobe=nprobe, seed=seed)
    build_seconds = time.perf_counter() - start
    k = min(k, rows)

    def ours() -> Int64:
        return np.concatenate([block.row for block in neighbour_blocks(built, wanted, k)])

    def reference() -> Int64:
        return torch_top_k(wanted, base, k)

    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    found: dict[str, Int64] = {}
    for _ in range(rounds):
        for name, function in (("ours", ours), ("reference", reference)):
            start = time.perf_counter()
            found[name] = function()
            seconds[name].append(time.perf_counter() - start)
    own, other = float(np.median(seconds["ours"])), float(np.median(seconds["reference"]))
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found["ours"], found["reference"], strict=True)]
    memory = {
        # Ours: the index that outlives the call (codes, or the vectors themselves) and the scratch of one block.
        "ours": _index_bytes(built.description, rows, dim) + _traced(ours),
        # The reference: the vectors, and one block's similarities to every row (torch is not traced, but known).
        "reference": 4 * rows * dim + _traced(reference) + 4 * rows * min(_BLOCK, len(wanted)),
    }
    return {
        "rows": rows,
        "dim": dim,
        "k": k,
        "queries": len(wanted),
        "index": built.description,
        "threads": int(faiss.omp_get_max_threads()),
        "seconds": own,
        "build_seconds": build_seconds,
        "reference_seconds": other,
        "queries_per_s": len(wanted) / own,
        "speedup": other / own,
        # What a job over all rows would gain, the index built once (extrapolated from the queries timed).
        "speedup_all_rows": other / (own + build_seconds * len(wanted) / rows),
        "recall": float(np.mean(hits) / k),
        "memory": memory,
        "memory_ratio": memory["ours"] / memory["reference"],
        "peak_rss_mb": resident_peak() / 2**20,
    }


_BLOCK = 4096


def mixture(rows: int, dim: int, seed: int) -> Float32:
    """Unit vectors [rows, dim]: one Gaussian component per 100 rows, in 48 dimensions turned into `dim`."""
    rng = np.random.default_rng(seed)
    inner = min(48, dim)
    means = rng.normal(size=(max(1, rows // 100), inner)).astype(np.float32)
    points = means[rng.integers(0, len(means), rows)]
    points = points + 0.5 * rng.standard_normal((rows, inner), dtype=np.float32)
    lifted = points @ rng.normal(size=(inner, dim)).astype(np.float32)
    return np.ascontiguousarray(lifted / np.linalg.norm(lifted, axis=1, keepdims=True))


def torch_top_k(queries: Float32, base: Float32, k: int) -> Int64:
    """The k rows of the largest inner product by torch.matmul and topk, 4096 queries at a time: row [n, k]."""
    everything = torch.from_numpy(base)
    blocks = torch.from_numpy(queries).split(_BLOCK)
    return np.concatenate([(block @ everything.T).topk(k, dim=1).indices.numpy() for block in blocks])


def _index_bytes(description: str, rows: int, dim: int) -> int:
    if "PQ" in description:
        return rows * (dim // 8 + 8 + 2 * dim)  # codes, ids, float16 for the second look
    if "SQfp16" in description:
        return rows * (2 * dim + 8)
    return rows * dim * 4


def _traced(function: Callable[[], object]) -> int:
    """Peak of numpy allocations during one call, in bytes."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
