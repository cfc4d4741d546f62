"""The index a search runs on: exact for small sets, inverted lists with a second look for large ones (see `plan`)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Store
from dinov2cli.search.plan import FILL_ROWS, IndexPlan, Purpose, plan_index, training_rows, without_codes
from dinov2cli.search.recall import SAMPLE, SearchReport, Trial, exact_report, tune
from dinov2cli.search.rerank import rerank
from dinov2cli.search.vectors import Float32, Int64, RangeVectors, Vectors, as_vectors, iterate, sample_rows

_HOPELESS = 0.5
"""Recall below which codes are taken not to fit the vectors at all."""

Tell = Callable[[SearchReport], None]
"""Called once with the plan of a search and what it was measured to find."""


@dataclass
class SearchIndex:
    """Something to search: `search(queries, k)` gives the k most similar rows by cosine.

    A set that is too large for memory is held one shard at a time: `search_shard` fills the shard it is asked for and
    lets go of the one before, so that searches should run shard by shard.
    """

    plan: IndexPlan
    vectors: Vectors
    report: SearchReport
    _cached: Float32 | None = None
    _trained: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    _held: tuple[int, Any] | None = None

    @property
    def rows(self) -> int:
        """Vectors in the index."""
        return self.plan.rows

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.plan.dim

    @property
    def description(self) -> str:
        """The Faiss factory string ("Flat" for the exact search)."""
        return self.plan.factory

    @property
    def exact(self) -> bool:
        """Whether every pair is compared."""
        return self.plan.kind == "flat"

    @property
    def shards(self) -> int:
        """How many pieces of the set are searched one after the other."""
        return self.plan.shards

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64]:
        """The k rows most similar to each query.

        queries: [n, D] float32 of unit length. Returns cosine [n, k] and row [n, k], most similar first, equal
        ones by row; where fewer than k rows were found the row is -1 and the cosine -inf.
        """
        found = self.search_shard(0, queries, k)
        for shard in range(1, self.shards):
            found = merge_lists(found, self.search_shard(shard, queries, k), k)
        return found

    def search_shard(self, shard: int, queries: Float32, k: int) -> tuple[Float32, Int64]:
        """As `search`, among the rows of one shard only (rows are those of the whole set)."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.exact:
            return _tidy(*self._search_exact(queries, k))
        similarity, row = self._search_lists(self._filled(shard), queries, k)
        first = shard * self.plan.shard_rows
        row = np.where(row < 0, -1, row + first) if first else row
        if self.plan.rerank == "disk":
            similarity, row = rerank(self.vectors, queries, row, k)
        return _tidy(similarity, row)

    def _search_lists(self, index: "faiss.Index", queries: Float32, k: int) -> tuple[Float32, Int64]:
        candidates = k * self.report.k_factor if self.plan.rerank == "disk" else k
        return index.search(queries, min(candidates, max(k, int(index.ntotal))))

    def _search_exact(self, queries: Float32, k: int) -> tuple[Float32, Int64]:
        take = min(k, self.rows)
        if self._cached is not None:
            return faiss.knn(queries, self._cached, take, metric=faiss.METRIC_INNER_PRODUCT)
        # More rows than fit: the rows pass by in blocks, a heap per query keeps the best so far.
        heap = faiss.ResultHeap(len(queries), take, keep_max=True)
        for start, block in iterate(self.vectors, FILL_ROWS):
            similarity, found = faiss.knn(queries, block, min(take, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result(similarity, found + start)
        heap.finalize()
        return heap.D, heap.I

    def _filled(self, shard: int) -> "faiss.Index":
        """The Faiss index of a shard, holding its rows."""
        if self._held is None or self._held[0] != shard:
            self._held = None  # the shard before goes first
            index = faiss.deserialize_index(self._trained)
            size = self.plan.shard_rows
            rows = RangeVectors(self.vectors, shard * size, min((shard + 1) * size, self.rows))
            _reserve(index, rows)
            for _, block in iterate(rows, FILL_ROWS):
                index.add(block)
            self._held = shard, on_gpus(index, self.plan)
        index = self._held[1]
        set_effort(index, self.report.nprobe, self.report.k_factor)
        return index


def build_index(
    vectors: Vectors | npt.NDArray[np.floating],
    *,
    index: str = "auto",
    nprobe: int | None = None,
    seed: int = 0,
    k: int = 64,
    queries: Vectors | npt.NDArray[np.floating] | None = None,
    threshold: float | None = None,
    purpose: Purpose = "lists",
    recall: float = 0.95,
    memory: int | None = None,
    ranks: Ranks = ALONE,
    store: Store | None = None,
) -> SearchIndex:
    """An index over `vectors` for cosine similarity, planned by `plan_index`, its recall measured and raised.

    index: `flat` is exact in bounded memory; `ivf` is inverted lists of 4-bit product codes whose best candidates
    are compared again in float16 (Johnson et al. 2017; Andre et al. 2017 for the codes); `auto` picks; anything else
    is given to Faiss as a factory string. nprobe: lists visited per query; by default planned, and doubled until
    `recall` of the k nearest is reached on a sample of `queries` (default: the vectors themselves, each without
    itself), or with `purpose` edges the matching recall of pairs above `threshold` (see `tune`). What came of it is
    in `report`. The result depends on the seed through the samples alone.

    Under a launch the main process trains and measures; every rank fills its own copy. store: keeps the trained
    index and the measurement, so that a stopped run continues with the same; rows are filled in again.
    Raises UserError for a string that Faiss does not know, or memory too small for anything.
    """
    source = as_vectors(vectors)
    asked = None if queries is None else as_vectors(queries)
    plan = plan_index(
        source.rows,
        source.dim,
        queries=None if asked is None else asked.rows,
        k=k,
        memory=memory,
        recall=recall,
        purpose=purpose,
        gpus=gpu_count(),
        index=index,
        nprobe=nprobe,
    )
    if plan.kind == "flat":
        cached = source.block(0, source.rows) if plan.rerank == "none" else None
        return SearchIndex(plan, source, exact_report(plan), _cached=cached)
    own: list[SearchIndex] = []

    def prepare() -> tuple[npt.NDArray[np.uint8], SearchReport]:
        stage = None if store is None else store.stage("recall", {**plan.key, "seed": seed, "threshold": threshold})
        found = None if stage is None else stage.load(0)
        if found is not None:
            report = _report_from(found, plan, memory)
            return _kept_trained(report.plan, source, seed, store), report
        built = _tuned(plan, source, asked, threshold, seed, store)
        if (
            plan.kind == "ivf_codes"
            and not plan.fixed
            and built.report.reached is False
            and built.report.recall < _HOPELESS
        ):
            built._held = None  # one index at a time
            built = _tuned(without_codes(plan, memory), source, asked, threshold, seed, store)
        if stage is not None:
            stage.save(0, {"report": _as_bytes(built.report)})
        own.append(built)
        return built._trained, built.report

    trained, report = ranks.first(prepare)
    return own[0] if own else SearchIndex(report.plan, source, report, _trained=trained)


def merge_lists(a: tuple[Float32, Int64], b: tuple[Float32, Int64], k: int) -> tuple[Float32, Int64]:
    """The k most similar of two lists for every query: cosine [n, k] and row [n, k]; equal ones by row."""
    similarity, row = _tidy(np.concatenate([a[0], b[0]], axis=1), np.concatenate([a[1], b[1]], axis=1))
    return np.ascontiguousarray(similarity[:, :k]), np.ascontiguousarray(row[:, :k])


def gpu_count() -> int:
    """GPUs that this build of Faiss can use; 0 for the CPU build."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "index_cpu_to_all_gpus") else 0


def on_gpus(index: "faiss.Index", plan: IndexPlan) -> "faiss.Index":
    """The index moved to all GPUs, its lists dealt out among them; as it is without GPUs or for 4-bit codes, which
    Faiss searches on the CPU only."""
    if plan.kind != "ivf_flat" or gpu_count() == 0:
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = True
    return faiss.index_cpu_to_all_gpus(index, co=options)


def set_effort(index: "faiss.Index", nprobe: int, k_factor: int) -> "faiss.IndexIVF | None":
    """Say how many lists and candidates a search visits; returns the inverted lists of the index, if it has any."""
    if hasattr(index, "k_factor"):
        index.k_factor = float(k_factor)
    if hasattr(faiss, "GpuIndex") and isinstance(index, (faiss.GpuIndex, faiss.IndexShards, faiss.IndexReplicas)):
        faiss.GpuParameterSpace().set_index_parameter(index, "nprobe", nprobe)
        return None
    try:
        ivf = faiss.extract_index_ivf(index)
    except RuntimeError:
        return None
    ivf.nprobe = min(nprobe, ivf.nlist)
    return ivf


def _kept_trained(plan: IndexPlan, source: Vectors, seed: int, store: Store | None) -> npt.NDArray[np.uint8]:
    """The index trained but empty, as bytes: from the store, or trained and put there."""
    stage = None if store is None else store.stage("index", {"factory": plan.factory, "rows": plan.rows, "seed": seed})
    found = None if stage is None else stage.load(0)
    if found is not None:
        return np.asarray(found["index"], dtype=np.uint8)
    trained = np.asarray(faiss.serialize_index(_train(plan, source, seed)))
    if stage is not None:
        stage.save(0, {"index": trained})
    return trained


def _train(plan: IndexPlan, source: Vectors, seed: int) -> "faiss.Index":
    try:
        index = faiss.index_factory(source.dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"--index {plan.factory}: Faiss cannot build this for {source.dim} dimensions; "
            "use auto, flat, ivf or a Faiss factory string such as IVF1024,PQ96x4fs,Refine(SQfp16)"
        ) from error
    ivf = set_effort(index, plan.nprobe, plan.k_factor)
    if ivf is not None:
        ivf.cp.seed = seed + 1
    if not index.is_trained:
        size = training_rows(source.rows, source.dim, 256 if ivf is None else ivf.nlist)
        index.train(_sample(source, size, seed))
    return index


def _sample(source: Vectors, size: int, seed: int) -> Float32:
    """`size` rows, gathered in blocks: what is read is never held twice."""
    wanted = sample_rows(source.rows, size, seed)
    rows = np.empty((len(wanted), source.dim), dtype=np.float32)
    for start in range(0, len(wanted), FILL_ROWS):
        rows[start : start + FILL_ROWS] = source.gather(wanted[start : start + FILL_ROWS])
    return rows


def _reserve(index: "faiss.Index", rows: Vectors) -> None:
    """Claim room for the copy of the second look at once: growing by doubling, it would be held twice."""
    if hasattr(index, "refine_index"):
        copy: Any = faiss.downcast_index(index.refine_index)
        if hasattr(copy, "codes"):
            size = copy.codes.size()
            copy.codes.resize(size + rows.rows * copy.code_size)
            copy.codes.resize(size)


def _tuned(
    plan: IndexPlan, source: Vectors, queries: Vectors | None, threshold: float | None, seed: int, store: Store | None
) -> SearchIndex:
    """The index trained and filled, its effort measured on a sample of queries; in shards, within the first."""
    start = SearchReport(plan, 0, 0.0, None, 0, threshold, plan.nprobe, plan.k_factor, None)
    built = SearchIndex(plan, source, start, _trained=_kept_trained(plan, source, seed, store))
    shard = RangeVectors(built.vectors, 0, min(plan.shard_rows, built.rows))
    rows = sample_rows(shard.rows if queries is None else queries.rows, SAMPLE, seed + 1)
    sample = shard.gather(rows) if queries is None else queries.gather(rows)

    def find(block: Float32, k: int, nprobe: int, k_factor: int) -> Int64:
        built.report = SearchReport(plan, 0, 0.0, None, 0, threshold, nprobe, k_factor, None)
        return built.search_shard(0, block, k)[1]

    built.report = tune(find, shard, sample, plan, threshold=threshold, skip=rows if queries is None else None)
    return built


def _as_bytes(report: SearchReport) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(report.record()).encode(), dtype=np.uint8)


def _report_from(arrays: Mapping[str, npt.NDArray[np.generic]], plan: IndexPlan, memory: int | None) -> SearchReport:
    record = json.loads(arrays["report"].tobytes())
    if record["plan"]["kind"] != plan.kind:
        plan = without_codes(plan, memory)
    tried = tuple(Trial(**trial) for trial in record["tried"])
    return SearchReport(**{**record, "plan": plan, "tried": tried})


def _tidy(similarity: Float32, found: Int64) -> tuple[Float32, Int64]:
    """Equal cosines in the order of their rows, so that the same input gives the same lists; nothing above 1.

    Lists come sorted but for ties, so only those with something out of order are sorted.
    """
    similarity = np.asarray(similarity, dtype=np.float32)
    found = np.asarray(found, dtype=np.int64)
    similarity = np.minimum(similarity, np.float32(1.0))
    similarity[found < 0] = -np.inf
    left, right = similarity[:, :-1], similarity[:, 1:]
    odd = ((left < right) | ((left == right) & (found[:, :-1] > found[:, 1:]))).any(axis=1)
    if odd.any():
        order = np.lexsort((found[odd], -similarity[odd]), axis=-1)
        similarity[odd] = np.take_along_axis(similarity[odd], order, -1)
        found[odd] = np.take_along_axis(found[odd], order, -1)
    return similarity, found
