"""`dinov2 bench search`: the neighbour graph by the planner's own choice beside exact Faiss, in one process."""

import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dinov2cli.bench.peak import resident_peak, run_in_child
from dinov2cli.errors import UserError
from dinov2cli.search.components import UnionFind
from dinov2cli.search.cost import Machines, estimate
from dinov2cli.search.edges import Edges, make_edges
from dinov2cli.search.index import SearchIndex, build_index
from dinov2cli.search.neighbours import edge_blocks, neighbour_blocks
from dinov2cli.search.recall import SearchReport
from dinov2cli.search.vectors import Float32, Int64, Vectors, as_vectors

LEVELS = (0.7, 0.8, 0.9)
_TRUTH = 2000
_TURNS = 4


def run(
    *,
    rows: int = 200_000,
    dim: int = 384,
    k: int = 64,
    data: str | None = None,
    memory: int | None = None,
    index: str = "auto",
    nprobe: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Time, recall and memory of the k nearest neighbours of every row, ours against exact Faiss.

    Ours is what the planner chooses: build, measurement of recall and the search of all rows, the lists reduced to
    the pairs above 0.7. The reference is `faiss.knn` (Flat, inner product) for `reference_queries` sampled rows, in
    parts before, between and after ours, extrapolated to all rows (its time is linear in them). The data are those of
    `mixture`, or the embeddings directory `data`. speedup = reference / ours, in all; recall: share of the true k
    nearest that ours lists; edge_recall: of the true pairs above a cosine among them, found from either side.
    memory_ratio: peak memory of the whole job in a process of its own, over that of the exact search in another; the
    vectors count in both. Raises UserError for a device other than the CPU.
    """
    if device not in ("auto", "cpu"):
        raise UserError(f"bench search --device {device}: the search runs on the CPU; expected auto or cpu")
    base = load(data) if data is not None else mixture(rows, dim, seed)
    rows, dim = base.shape
    k = min(k, rows - 1)
    sample = np.sort(np.random.default_rng(seed).choice(rows, size=min(_TRUTH, rows), replace=False))
    reference = _Reference(base, sample, k)
    reference.turn()
    started = time.perf_counter()
    built = build_index(base, index=index, nprobe=nprobe, seed=seed, k=k, memory=memory)
    build_seconds = time.perf_counter() - started
    reference.turn()
    started = time.perf_counter()
    lists, edges = _graph(built, base, k, sample)
    search_seconds = time.perf_counter() - started
    while reference.turn():
        pass
    true_similarity, true_row = reference.lists()
    own, other = build_seconds + search_seconds, reference.seconds * rows / len(sample)
    peaks = {name: run_in_child(_peak, name, data, (rows, dim), k, seed, memory) for name in ("ours", "reference")}
    return {
        "rows": rows,
        "dim": dim,
        "k": k,
        "plan": built.report.lines(),
        "threads": int(faiss.omp_get_max_threads()),
        "seconds": own,
        "build_seconds": build_seconds,
        "search_seconds": search_seconds,
        "reference_seconds": other,
        "reference_queries": len(sample),
        "speedup": other / own,
        "recall": list_recall(lists, true_row),
        "edge_recall": {
            f"{level:g}": _edge_recall(edges, sample, true_similarity, true_row, level) for level in LEVELS
        },
        "edges": {f"{level:g}": int((edges.similarity > level).sum()) for level in LEVELS},
        "index_mb": _held_mb(built),
        "peak_mb": peaks["ours"] / 2**20,
        "reference_peak_mb": peaks["reference"] / 2**20,
        "memory_ratio": peaks["ours"] / peaks["reference"],
        "report": built.report.record(),
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for a person."""
    recall = ", ".join(
        f"{share:.4f} above {level}" if share is not None else f"none above {level}"
        for level, share in figures["edge_recall"].items()
    )
    return [
        f"{figures['rows']} x {figures['dim']}, k {figures['k']}, {figures['threads']} threads",
        *figures["plan"],
        f"ours       {figures['seconds']:8.1f} s  (build and measure {figures['build_seconds']:.1f}, "
        f"search {figures['search_seconds']:.1f})  peak {figures['peak_mb']:.0f} MB, "
        f"index {figures['index_mb']:.0f} MB",
        f"exact      {figures['reference_seconds']:8.1f} s  (from {figures['reference_queries']} queries)  "
        f"peak {figures['reference_peak_mb']:.0f} MB",
        f"speedup    {figures['speedup']:8.1f} x   memory {figures['memory_ratio']:.2f} x",
        f"recall@{figures['k']}  {figures['recall']:.4f}; edges found: {recall}",
    ]


def mixture(rows: int, dim: int, seed: int, *, spread: float = 0.75) -> Float32:
    """Unit vectors [rows, dim] to search in: one Gaussian component per 100 rows, in 48 dimensions turned into `dim`,
    and a near-copy of one row in twenty (10,000 of 200,000) at cosines of about 0.85 to 0.99, in rows of their own.

    spread: standard deviation within a component, that of the centres being 1. Tighter mixtures make inverted lists
    look several times better, wider ones worse; 0.75 is hard for them (see docs). The same for the same seed.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xB5]))
    inner = min(48, dim)
    means = rng.standard_normal((max(1, rows // 100), inner), dtype=np.float32)
    lift = rng.standard_normal((inner, dim), dtype=np.float32)
    result = np.empty((rows, dim), dtype=np.float32)
    for start in range(0, rows, 65_536):
        size = min(65_536, rows - start)
        points = means[rng.integers(0, len(means), size)]
        points += spread * rng.standard_normal((size, inner), dtype=np.float32)
        result[start : start + size] = _unit(points @ lift)
    originals, copies = rng.permutation(rows)[: 2 * (rows // 20)].reshape(2, -1)
    noise = rng.standard_normal((len(copies), dim), dtype=np.float32) / np.sqrt(dim)
    noise *= rng.uniform(0.15, 0.6, (len(copies), 1)).astype(np.float32)
    result[copies] = _unit(result[originals] + noise)
    return result


def load(data: str) -> Float32:
    """The vectors of an embeddings directory as one array of unit rows."""
    from dinov2cli.artifacts.embeddings import open_embeddings

    vectors = as_vectors(open_embeddings(Path(data)))
    return vectors.block(0, vectors.rows)


def exact_lists(queries: Float32, base: Float32, own: Int64, k: int) -> tuple[Float32, Int64]:
    """The k rows most similar to each query, which is row `own` of the base: cosine [n, k], row [n, k]; exact."""
    similarity, row = faiss.knn(queries, base, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    keep = row != own[:, None]
    keep[keep.all(axis=1), -1] = False
    return similarity[keep].reshape(-1, k), row[keep].reshape(-1, k)


def list_recall(lists: Int64, truth: Int64) -> float:
    """Share of the true rows [n, k] that the lists [n, k] hold."""
    hits = [len(np.intersect1d(a, b)) for a, b in zip(lists, truth, strict=True)]
    return float(np.mean(hits) / truth.shape[1])


class _Reference:
    """The exact search of the sampled rows, in turns."""

    def __init__(self, base: Float32, sample: Int64, k: int) -> None:
        self.base, self.k = base, k
        self.parts = np.array_split(sample, _TURNS)
        self.found: list[tuple[Float32, Int64]] = []
        self.seconds = 0.0

    def turn(self) -> bool:
        """Search the next part; False when all are done."""
        if len(self.found) == len(self.parts):
            return False
        part = self.parts[len(self.found)]
        queries = self.base[part]
        started = time.perf_counter()
        self.found.append(exact_lists(queries, self.base, part, self.k))
        self.seconds += time.perf_counter() - started
        return True

    def lists(self) -> tuple[Float32, Int64]:
        similarity, row = (np.concatenate(arrays) for arrays in zip(*self.found, strict=True))
        return similarity, row


def _graph(built: SearchIndex, base: Float32, k: int, sample: Int64) -> tuple[Int64, Edges]:
    """The lists of the sampled rows [n, k], and the pairs above the lowest level in the lists of all rows."""
    kept, src, dst, similarity = [], [], [], []
    for block in neighbour_blocks(built, base, k, exclude_self=True):
        inside = sample[(sample >= block.start) & (sample < block.start + len(block.row))]
        kept.append(block.row[inside - block.start])
        offset, rank = np.nonzero(block.similarity > LEVELS[0])
        src.append(offset + block.start)
        dst.append(block.row[offset, rank])
        similarity.append(block.similarity[offset, rank])
    edges = make_edges(np.concatenate(src), np.concatenate(dst), np.concatenate(similarity))
    return np.concatenate(kept), edges


def _edge_recall(edges: Edges, sample: Int64, similarity: Float32, row: Int64, level: float) -> float | None:
    offset, rank = np.nonzero(similarity > level)
    if not len(offset):
        return None
    a, b = sample[offset], row[offset, rank]
    wanted = np.minimum(a, b) << 32 | np.maximum(a, b)
    # Cosines of a second look in float16 differ in the fourth digit: any pair found counts, whatever its cosine.
    return float(np.isin(wanted, edges.src << 32 | edges.dst).mean())


def _held_mb(built: SearchIndex) -> float:
    size = built.plan.bytes
    return sum(size.get(name, 0) for name in ("codes", "copy", "centroids", "vectors")) / 2**20


def _peak(name: str, data: str | None, shape: tuple[int, int], k: int, seed: int, memory: int | None) -> int:
    """Peak memory of one of the two in this process, bytes."""
    base = load(data) if data is not None else mixture(*shape, seed)
    if name == "ours":
        for _ in edge_blocks(base, LEVELS[0], k=k, seed=seed, memory=memory):
            pass
    else:  # the exact search holds the vectors and a block's lists, however many queries there are
        faiss.knn(base[: min(4096, len(base))], base, k, metric=faiss.METRIC_INNER_PRODUCT)
    return resident_peak()


def _unit(x: Float32) -> Float32:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def measure_scale(
    vectors: Vectors | Float32, threshold: float, *, k: int = 64, memory: int | None = None
) -> dict[str, Any]:
    """Edges above a threshold and their components, streamed, beside what `search.cost` predicts for both.

    seconds; edges (a pair as often as found) and components; peak memory of this process so far.
    """
    source = as_vectors(vectors)
    reports: list[SearchReport] = []
    started = time.perf_counter()
    forest, count = UnionFind(source.rows), 0
    for block in edge_blocks(source, threshold, k=k, memory=memory, tell=reports.append):
        forest.add(block.src, block.dst)
        count += len(block)
    label = forest.labels()
    seconds = time.perf_counter() - started
    costs = estimate(
        source.rows,
        source.dim,
        stages=("edges", "components"),
        machines=Machines(cores=int(faiss.omp_get_max_threads())),
        k=k,
        memory=memory,
        edges_per_row=count / 2 / max(1, source.rows),
    )
    return {
        "rows": source.rows,
        "dim": source.dim,
        "seconds": seconds,
        "edges": count,
        "components": int((label == np.arange(len(label), dtype=label.dtype)).sum()),
        "peak_mb": resident_peak() / 2**20,
        "predicted_seconds": sum(cost.seconds for cost in costs),
        "predicted_peak_mb": max(cost.memory for cost in costs) / 2**20,
        "plan": reports[0].lines(),
        "report": reports[0].record(),
    }
