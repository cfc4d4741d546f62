"""`dinov2 bench kmeans`: our k-means beside `faiss.Kmeans`, in memory and streamed, and hierarchical k-means."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from dinov2cli.artifacts.embeddings import open_embeddings
from dinov2cli.bench.knn import PeakMemory
from dinov2cli.bench.peak import resident_peak
from dinov2cli.bench.search import mixture
from dinov2cli.device import choose_device
from dinov2cli.search.assignment import KMeans, assign
from dinov2cli.search.hierarchy import Hierarchy, fit_hierarchy
from dinov2cli.search.kmeans import fit_kmeans
from dinov2cli.search.lloyd import least_memory
from dinov2cli.search.vectors import Float32, as_vectors

PUBLISHED_HIERARCHY_S = 38.0
"""Seconds of the published reference for 20,000 x 384, 1,000 and 100 clusters, 3 resamples of 50 iterations, on two
cores of this class (measured there once, CURATION.md section 2b; it cannot be run here)."""

_BLOCKS = 200 << 20  # bytes that the streamed run has beyond the least; 200,000 rows are 310 MB


def run(
    *,
    rows: int = 200_000,
    dim: int = 384,
    clusters: int = 1000,
    iterations: int = 10,
    data: str | None = None,
    rounds: int = 3,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Time, memory and inertia of k-means over all rows, by turns in one process; medians of `rounds` count.

    data: an embeddings directory, of which the first `rows` are taken; by default a mixture of Gaussians. The
    reference is faiss.Kmeans over all points with the same number of iterations. `seconds` is ours with nested
    samples (the default), `plain_seconds` ours with every iteration over all rows (once), `streamed_seconds` ours
    from a float16 file in too little memory to keep the rows. All inertias are mean squared distances of all rows
    to their nearest centroid at the end, computed by the same exact assignment, the time for which is in none of
    the figures. The processor's seconds (cpu) are there for a machine that does something else besides. `hierarchy`
    is two levels over the first tenth of the rows, with the published reference's settings.
    """
    where = choose_device(device)
    x = _rows(data, rows, dim, seed)
    rows, dim = x.shape
    clusters = min(clusters, rows // 4)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, x.astype(np.float16))
        stored = np.load(file, mmap_mode="r")
        allowed = least_memory(rows, dim, clusters, threads=torch.get_num_threads()) + _BLOCKS
        common: dict[str, Any] = {"iterations": iterations, "fit": "full", "seed": seed, "device": str(where)}
        runs: dict[str, Callable[[], Float32]] = {
            "ours": lambda: fit_kmeans(x, clusters, **common).centroids,
            "reference": lambda: _faiss(x, clusters, iterations, seed),
            "streamed": lambda: fit_kmeans(stored, clusters, memory=allowed, **common).centroids,
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        busy: dict[str, list[float]] = {name: [] for name in runs}
        memory: dict[str, list[int]] = {name: [] for name in runs}
        found: dict[str, Float32] = {}
        fit_kmeans(x[: 2 * clusters], clusters, iterations=1, device=str(where))  # threads started, libraries loaded
        for _ in range(rounds):
            for name, function in runs.items():
                with PeakMemory() as peak:
                    started, worked = time.perf_counter(), time.process_time()
                    found[name] = function()
                    seconds[name].append(time.perf_counter() - started)
                    busy[name].append(time.process_time() - worked)
                memory[name].append(peak.bytes)

    started = time.perf_counter()
    found["plain"] = fit_kmeans(x, clusters, nested=False, **common).centroids
    plain = time.perf_counter() - started
    inertia = {name: _inertia(x, centroids, str(where)) for name, centroids in found.items()}
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    cpu = {name: float(np.median(times)) for name, times in busy.items()}
    peaks = {name: max(values) for name, values in memory.items()}
    return {
        "rows": rows,
        "dim": dim,
        "clusters": clusters,
        "iterations": iterations,
        "device": str(where),
        "threads": int(faiss.omp_get_max_threads()),
        "seconds": median["ours"],
        "reference_seconds": median["reference"],
        "speedup": median["reference"] / median["ours"],
        "cpu_seconds": cpu["ours"],
        "reference_cpu_seconds": cpu["reference"],
        "streamed_cpu_seconds": cpu["streamed"],
        "plain_seconds": plain,
        "plain_speedup": median["reference"] / plain,
        "streamed_seconds": median["streamed"],
        "streamed_over_memory": median["streamed"] / median["ours"],
        "inertia": inertia["ours"],
        "reference_inertia": inertia["reference"],
        "inertia_ratio": inertia["ours"] / inertia["reference"],
        "plain_inertia_ratio": inertia["plain"] / inertia["reference"],
        "streamed_inertia_ratio": inertia["streamed"] / inertia["reference"],
        "memory_mb": peaks["ours"] / 2**20,
        "streamed_memory_mb": peaks["streamed"] / 2**20,
        "memory_ratio": peaks["ours"] / peaks["reference"] if peaks["reference"] else None,
        **_hierarchy(x[: rows // 10], clusters, seed, str(where)),
        "peak_rss_mb": resident_peak() / 2**20,
    }


def _rows(data: str | None, rows: int, dim: int, seed: int) -> Float32:
    if data is None:
        return mixture(rows, dim, seed)
    source = as_vectors(open_embeddings(data))
    return source.block(0, min(rows, source.rows))


def _faiss(x: Float32, clusters: int, iterations: int, seed: int) -> Float32:
    clustering = faiss.Kmeans(
        x.shape[1],
        clusters,
        niter=iterations,
        seed=seed + 1,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=10**9,
    )
    clustering.train(x)
    return np.asarray(clustering.centroids, dtype=np.float32).copy()


def _inertia(x: Float32, centroids: Float32, device: str) -> float:
    return float(assign(x, KMeans(centroids, True, 0.0, 0), device=device).distance.mean(dtype=np.float64))


def _hierarchy(x: Float32, clusters: int, seed: int, device: str) -> dict[str, Any]:
    """Two levels with 3 resamples, at 50 iterations a fit (fewer where no centroid moves any more), and at 10."""
    levels = [clusters, max(1, clusters // 10)]
    figures: dict[str, Any] = {"hierarchy_rows": len(x), "hierarchy_levels": levels}
    for name, iterations, nested in (("hierarchy", 50, False), ("hierarchy_10_iterations", 10, True)):
        started, worked = time.perf_counter(), time.process_time()
        tree = fit_hierarchy(
            x, levels, resample_steps=3, iterations=iterations, nested=nested, seed=seed, device=device
        )
        figures[f"{name}_seconds"] = time.perf_counter() - started
        figures[f"{name}_cpu_seconds"] = time.process_time() - worked
        figures[f"{name}_inertia"] = float(tree.levels[0].assignment.distance.mean(dtype=np.float64))
        figures[f"{name}_evenness"] = _evenness(tree)
    if len(x) == 20_000 and x.shape[1] == 384 and levels == [1000, 100]:
        figures["hierarchy_speedup"] = PUBLISHED_HIERARCHY_S / figures["hierarchy_seconds"]
    return figures


def _evenness(tree: Hierarchy) -> float:
    """Entropy of the coarsest clusters' sizes over its maximum; 1 where all hold equally many rows."""
    sizes = np.bincount(tree.labels()[-1], minlength=tree.levels[-1].kmeans.k)
    share = sizes[sizes > 0] / sizes.sum()
    return float(-(share * np.log(share)).sum() / np.log(max(2, len(sizes))))


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures as lines to read."""
    width = max(map(len, figures))
    return [
        f"{name.ljust(width)}  {value:.4g}" if isinstance(value, float) else f"{name.ljust(width)}  {value}"
        for name, value in figures.items()
    ]
