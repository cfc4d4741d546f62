"""Time, memory and disk of the stages of deduplication and curation, before any of them runs.

Every figure is work divided by a rate. The rates of one CPU core are measured ones (`CPU`), those of GPUs estimates
from their peaks (`GPUS`); a prediction is good to a factor of two. Nothing is run here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dinov2cli.errors import UserError
from dinov2cli.search.plan import PROCESS_BYTES, lists_for, plan_index, training_rows


@dataclass(frozen=True)
class Rates:
    """What one core, or one GPU, does in a second.

    flops: multiplications and additions of a large float32 (GPU: float16) matrix product, as many as are achieved.
    codes: dimensions of 4-bit codes looked at. second: dimensions of float16 vectors compared one by one.
    rows: lists of k handled around the search. edges: edges joined by union-find (a core's, whatever the rest).
    images: images through the embedding model. hashes: image files to perceptual hashes. read: bytes per second from
    disk. memory: bytes that one GPU holds (0: the host's).
    """

    name: str
    flops: float
    codes: float
    second: float
    rows: float
    edges: float
    images: float
    hashes: float
    read: float
    memory: float = 0.0


CPU = Rates("CPU core", 9e10, 1.1e10, 1.6e9, 6e4, 4e6, 7.0, 900.0, 5e8)
"""One core of a recent server CPU with AVX-512; `calibrated` replaces the first by what a machine is measured at.
images: ViT-B/14 at 224 pixels; hashes: JPEG files of 110 kB, decoded at a reduced scale."""

GPUS: Mapping[str, Rates] = {
    "V100": Rates("V100", 5e13, 0.0, 2e11, 2e6, 4e6, 200.0, 0.0, 2e9, 32e9),
    "H100": Rates("H100", 4e14, 0.0, 8e11, 8e6, 4e6, 1600.0, 0.0, 3e9, 80e9),
}
"""Estimates: half the peak of the tensor cores, memory traffic at 60 %; images: ViT-H/16 at 224 pixels."""

STAGES = ("hash", "embed", "edges", "components", "kmeans")


@dataclass(frozen=True)
class Cost:
    """One stage: seconds, peak memory of a process in bytes, disk that it writes in bytes, and what was assumed."""

    stage: str
    seconds: float
    memory: float
    disk: float
    assumed: str


@dataclass(frozen=True)
class Machines:
    """What the work is shared by: `cores` CPU cores in all, or `gpus` of a kind, each with cores of the host."""

    cores: int = 2
    gpus: int = 0
    kind: str = "V100"
    cpu: Rates = CPU
    cores_per_gpu: int = 5

    @property
    def rates(self) -> Rates:
        """Rates of the device that multiplies."""
        if not self.gpus:
            return self.cpu
        if self.kind not in GPUS:
            raise UserError(f"cost: no rates for GPU {self.kind!r}; expected one of {', '.join(GPUS)}")
        return GPUS[self.kind]

    @property
    def count(self) -> int:
        """How many of that device."""
        return self.gpus or self.cores

    @property
    def host_cores(self) -> int:
        """CPU cores in all."""
        return self.gpus * self.cores_per_gpu if self.gpus else self.cores


def calibrated(seconds: float = 0.3, cores: int = 1) -> Rates:
    """`CPU` with all rates scaled by what a matrix product is measured at here, per core, in about `seconds`."""
    import time

    import numpy as np

    rng = np.random.Generator(np.random.Philox(0))
    a, b = (rng.standard_normal((1024, 1024), dtype=np.float32) for _ in range(2))
    a @ b  # threads started
    best, spent = math.inf, 0.0
    while spent < seconds:
        started = time.perf_counter()
        a @ b
        once = time.perf_counter() - started
        best, spent = min(best, once), spent + once
    flops = 2 * 1024**3 / best / max(1, cores)
    scale = flops / CPU.flops
    names = ("codes", "second", "rows", "edges", "images", "hashes")
    return replace(CPU, flops=flops, **{name: getattr(CPU, name) * scale for name in names})


def estimate(
    rows: int,
    dim: int,
    *,
    stages: tuple[str, ...] = STAGES,
    machines: Machines | None = None,
    k: int = 64,
    memory: int | None = None,
    purpose: str = "edges",
    clusters: int | None = None,
    iterations: int = 20,
    edges_per_row: float = 2.0,
) -> list[Cost]:
    """Cost of the `stages` for `rows` images with vectors of `dim`.

    k, memory, purpose: of the neighbour search, as for `plan_index`. clusters: of k-means, by default one per 64 rows
    and at most 100,000; it is fitted on 256 rows each. edges_per_row: pairs above the threshold, each found twice.
    Raises UserError for a stage or a GPU that is not known.
    """
    where = machines or Machines()
    makers = {
        "hash": lambda: _hash(rows, where),
        "embed": lambda: _embed(rows, dim, where),
        "edges": lambda: _edges(rows, dim, where, k, memory, purpose, edges_per_row),
        "components": lambda: _components(rows, where, edges_per_row),
        "kmeans": lambda: _kmeans(rows, dim, where, clusters, iterations),
    }
    unknown = [stage for stage in stages if stage not in makers]
    if unknown:
        raise UserError(f"cost: no stage {unknown[0]!r}; expected some of {', '.join(STAGES)}")
    return [makers[stage]() for stage in stages]


def lines(costs: list[Cost]) -> list[str]:
    """A table for a person."""
    head = f"{'stage':<11} {'time':>9} {'memory':>9} {'disk':>9}  assumed"
    return [head] + [
        f"{c.stage:<11} {duration(c.seconds):>9} {amount(c.memory):>9} {amount(c.disk):>9}  {c.assumed}" for c in costs
    ]


def duration(seconds: float) -> str:
    """Seconds in the unit in which they are read."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def amount(size: float) -> str:
    """Bytes in the unit in which they are read."""
    for limit, unit, name in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if size < limit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e12:.3g} TB"


def _hash(rows: int, where: Machines) -> Cost:
    rate = where.cpu.hashes * where.host_cores
    return Cost("hash", rows / rate, PROCESS_BYTES, 100.0 * rows, f"{rate:.3g} images/s, JPEG of 110 kB")


def _embed(rows: int, dim: int, where: Machines) -> Cost:
    rate = where.rates.images * where.count
    model = "ViT-H/16" if where.gpus else "ViT-B/14"
    return Cost("embed", rows / rate, 4e9, rows * (2.0 * dim + 150), f"{model} at 224 pixels, {rate:.3g} images/s")


def _edges(
    rows: int, dim: int, where: Machines, k: int, memory: int | None, purpose: str, edges_per_row: float
) -> Cost:
    rate, count = where.rates, where.count
    disk = 2 * 12.0 * edges_per_row * rows
    host = where.host_cores
    handling = rows / (where.cpu.rows * host)
    if where.gpus:
        return _edges_on_gpus(rows, dim, where, handling, disk)
    plan = plan_index(rows, dim, k=k, memory=memory, purpose=purpose)  # type: ignore[arg-type]
    if plan.kind == "flat":
        seconds = 2.0 * rows * rows * dim / (rate.flops * count) + handling
        return Cost("edges", seconds, plan.peak_bytes, disk, "every pair compared")
    shard, shards = plan.shard_rows, plan.shards
    train = _training(shard, dim, plan.nlist) / (rate.flops * count)
    # Rows into their lists, queries to theirs; through a graph, 200 comparisons of a list's centre stand for all.
    centres = plan.nlist if plan.nlist < 65_536 else 200
    assign = 2.0 * rows * centres * dim * (1 + shards) / (rate.flops * count)
    scanned = rows * shards * plan.nprobe * (shard / plan.nlist)
    candidates = rows * shards * (k + 1.0) * plan.k_factor
    if plan.kind == "ivf_codes":
        search = scanned * dim / (rate.codes * count) + candidates * dim / (rate.second * count)
    else:
        search = scanned * dim / (rate.second * count)
    if plan.rerank == "disk":
        search += candidates * 2.0 * dim * 4 / (rate.read * count)
    sample = 2.0 * 1000 * rows * dim / (rate.flops * count)
    assumed = f"{plan.factory}, {plan.nprobe} lists per query, {shards} shard{'s' * (shards > 1)}"
    return Cost("edges", train + assign + search + sample + handling * shards, plan.peak_bytes, disk, assumed)


def _edges_on_gpus(rows: int, dim: int, where: Machines, handling: float, disk: float) -> Cost:
    """Lists of float16 vectors dealt out over the GPUs, queries routed to the lists they visit, products per list."""
    rate, count = where.rates, where.count
    nlist, nprobe = lists_for(rows), 32
    work = 2.0 * rows * dim * (2 * nlist + nprobe * rows / nlist)
    train = _training(rows, dim, nlist)
    routed = rows * nprobe * 2.0 * dim / (count * 2.5e10)  # all-to-all at 25 GB/s per GPU
    seconds = (work + train) / (rate.flops * count) + routed + handling
    held = rows * (2.0 * dim + 8) / count
    fits = "" if held < 0.8 * rate.memory else f"; {held / 1e9:.0f} GB per GPU do NOT fit in {rate.memory / 1e9:.0f}"
    return Cost("edges", seconds, held, disk, f"float16 in {nlist} lists over {count} GPUs, {nprobe} per query{fits}")


def _training(rows: int, dim: int, nlist: int) -> float:
    return 2.0 * training_rows(rows, dim, nlist) * nlist * dim * 10  # ten passes of k-means, Faiss's own number


def _components(rows: int, where: Machines, edges_per_row: float) -> Cost:
    edges = 2.0 * edges_per_row * rows
    width = 4 if rows < 1 << 32 else 8
    return Cost(
        "components",
        edges / where.cpu.edges + rows / 4e7,
        PROCESS_BYTES + width * rows + (128 << 20),
        0.0,
        f"one process, {edges:.3g} edges streamed",
    )


def _kmeans(rows: int, dim: int, where: Machines, clusters: int | None, iterations: int) -> Cost:
    k = clusters or max(1, min(rows // 64, 100_000))
    sample = min(rows, 256 * k)
    flops = 2.0 * dim * k * (sample * iterations + rows)
    share = 1 if not where.gpus else where.count
    read = 2.0 * dim * rows / (where.rates.read * where.count)
    seconds = flops / (where.rates.flops * where.count) + read
    held = 4.0 * dim * (sample / share + 2 * k) + PROCESS_BYTES
    return Cost("kmeans", seconds, held, 8.0 * rows, f"{k} clusters, {sample} rows x {iterations} iterations, one pass")
