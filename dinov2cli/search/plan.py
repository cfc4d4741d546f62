"""Which index a search uses, and with what effort, from the number of vectors, their length, memory and a target."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from dinov2cli.errors import UserError

EXACT_ROWS = 10_000
"""Below this every pair is compared, whatever the number of queries: an index would cost more than it saves."""

EXACT_WORK = 4e12
"""Multiplications and additions up to which every pair is compared: about 20 s on two cores."""

CODES_RECALL = 0.98
"""Targets above this are beyond what 4-bit codes with a second look reach at a reasonable number of candidates."""

POINTS_PER_LIST = 64
"""Rows per inverted list that its centroids are trained on."""

PROCESS_BYTES = 512 << 20
"""What the interpreter and its libraries (torch and pyarrow among them) take before any vector is read."""

FILL_ROWS = 16_384
QUERY_ROWS = 4096
_LIST_BYTES = 256 << 20

Purpose = Literal["edges", "lists"]
_NPROBE = {"edges": 16, "lists": 32}
_LEAST_ROWS = 1000  # fewer do not train the 16 codes of every part and a list beside


@dataclass(frozen=True)
class IndexPlan:
    """An index and how it is searched.

    kind: `flat` (exact), `ivf_flat` (inverted lists of float16 vectors), `ivf_codes` (inverted lists of 4-bit product
    codes, the best candidates compared again) or `custom` (a Faiss factory string of the user's). factory: the Faiss
    string. rerank: where the second look takes the vectors from, `memory` (a float16 copy), `disk` (the vectors as
    given) or `none`. nlist, nprobe: inverted lists, and how many a query visits at first; k_factor: candidates per
    neighbour asked for. shards: pieces of the set that are indexed one after the other. fixed: nprobe was given and
    is not raised. bytes: memory by part; `training` is held before `codes` and `copy` are filled. target: the recall
    to reach. reason: why, in words.
    """

    kind: str
    factory: str
    rows: int
    dim: int
    k: int
    purpose: str
    target: float
    nlist: int
    nprobe: int
    k_factor: int
    rerank: str
    shards: int
    fixed: bool
    bytes: dict[str, int]
    reason: str

    @property
    def shard_rows(self) -> int:
        """Rows of every shard but the last."""
        return max(1, -(-self.rows // self.shards))

    @property
    def peak_bytes(self) -> int:
        """Most memory held at a time: training is over before the index fills."""
        held = {name: size for name, size in self.bytes.items() if name != "training"}
        filled = sum(held.values())
        empty = filled - held.get("codes", 0) - held.get("copy", 0)
        return max(filled, empty + self.bytes.get("training", 0))

    @property
    def key(self) -> dict[str, Any]:
        """What the results depend on, for the key of a stage."""
        names = ("factory", "rows", "dim", "k", "purpose", "target", "nprobe", "k_factor", "rerank", "shards", "fixed")
        return {name: getattr(self, name) for name in names}

    def record(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {**self.key, "kind": self.kind, "nlist": self.nlist, "bytes": dict(self.bytes), "reason": self.reason}


def plan_index(
    rows: int,
    dim: int,
    *,
    queries: int | None = None,
    k: int = 64,
    memory: int | None = None,
    recall: float = 0.95,
    purpose: Purpose = "edges",
    gpus: int = 0,
    index: str = "auto",
    nprobe: int | None = None,
) -> IndexPlan:
    """Choose the index for `queries` searches (all rows by default) of the k nearest among `rows` vectors.

    Exact where few pairs are to be compared (`EXACT_ROWS`, `EXACT_WORK`). Else inverted lists, the largest power of
    two below 4 sqrt(N) of them (8 sqrt(N) from ten million rows), searched through a graph from 65,536 lists on;
    in them 4-bit codes of 4 dimensions each (Andre et al. 2017) with the best 4 k candidates compared again in
    float16. Vectors that cannot be cut into parts of 4, and recall targets above 0.98, get float16 vectors in the
    lists instead, and so do GPUs, for which Faiss has no 4-bit codes.

    memory: bytes that all of this may take (None: no limit). Where the float16 copy does not fit, candidates are read
    from the vectors on disk; where the codes do not fit either, the set is indexed in shards one after the other.
    purpose: `edges` begins at 16 lists per query, `lists` at 32: close pairs are found in fewer lists than the rest
    of the neighbours. index: `auto`, `flat`, `ivf` or a Faiss factory string. nprobe: lists per query, fixed.
    Raises UserError where the memory does not hold even one small shard.
    """
    queries = rows if queries is None else queries
    work = 2.0 * queries * rows * dim
    asked = f"{rows} x {dim}, {queries} queries"
    common: dict[str, Any] = {
        "rows": rows,
        "dim": dim,
        "k": k,
        "purpose": purpose,
        "target": recall,
        "fixed": nprobe is not None,
    }
    small = rows == 0 or (index == "ivf" and rows < _LEAST_ROWS)
    small |= index == "auto" and (rows < EXACT_ROWS or work <= EXACT_WORK)
    if index.lower() == "flat" or small:
        why = "asked for" if index.lower() == "flat" else "few enough pairs to compare every one"
        return _flat(common, memory, f"{asked}: {why}")
    if index not in ("auto", "ivf"):
        return _custom(common, index, nprobe, purpose, f"{asked}: {index} was asked for")
    codes = dim % 4 == 0 and dim >= 16 and recall <= CODES_RECALL and not gpus
    kind, why = ("ivf_codes", "too many pairs for an exact search") if codes else ("ivf_flat", _why_flat(dim, gpus))
    plan = IndexPlan(
        kind=kind,
        factory="",
        nlist=0,
        nprobe=nprobe or _NPROBE[purpose],
        k_factor=4 if codes else 1,
        rerank="memory" if codes else "none",
        shards=1,
        bytes={},
        reason=f"{asked}: {why}",
        **common,
    )
    return _fitted(plan, memory)


def without_codes(plan: IndexPlan, memory: int | None) -> IndexPlan:
    """The plan for vectors that 4-bit codes cannot tell apart, as rows that are all the same: float16 in the lists."""
    plain = replace(plan, kind="ivf_flat", k_factor=1, rerank="none", shards=1, bytes={})
    return _fitted(replace(plain, reason=f"{plan.reason}; 4-bit codes found nearly nothing, so none are used"), memory)


def _why_flat(dim: int, gpus: int) -> str:
    if gpus:
        return f"{gpus} GPUs hold float16 vectors in inverted lists"
    return f"vectors of {dim} have no 4-bit codes" if dim % 4 or dim < 16 else "the recall target is beyond codes"


def _flat(common: dict[str, Any], memory: int | None, reason: str) -> IndexPlan:
    rows, dim = common["rows"], common["dim"]
    room = 2 << 30 if memory is None else min(2 << 30, memory - PROCESS_BYTES - _scratch(dim, 0, common["k"], 1))
    whole = 4 * rows * dim
    # Filling the copy takes a block of scratch; past the room the rows pass by in blocks for every block of queries.
    size = {"process": PROCESS_BYTES, "vectors": whole if whole <= room else min(whole, 4 * FILL_ROWS * dim)}
    size["search"] = _scratch(dim, 0, common["k"], 1)
    if memory is not None and sum(size.values()) > memory:
        raise UserError(
            f"memory: found {memory / 1e9:.2g} GB; expected at least {sum(size.values()) / 1e9:.2g} GB for vectors of "
            f"{dim}; raise the limit"
        )
    more = "" if whole <= room else "; read in blocks, for they do not fit in memory"
    return IndexPlan(
        kind="flat",
        factory="Flat",
        nlist=0,
        nprobe=0,
        k_factor=1,
        rerank="none" if whole <= room else "disk",
        shards=1,
        bytes=size,
        reason=reason + more,
        **common,
    )


def _custom(common: dict[str, Any], index: str, nprobe: int | None, purpose: Purpose, reason: str) -> IndexPlan:
    return IndexPlan(
        kind="custom",
        factory=index,
        nlist=0,
        nprobe=nprobe or _NPROBE[purpose],
        k_factor=4,
        rerank="none",
        shards=1,
        bytes={},
        reason=reason,
        **common,
    )


def _fitted(plan: IndexPlan, memory: int | None) -> IndexPlan:
    """The plan with as much in memory as fits: the copy for the second look, the codes, or shards of them."""
    whole = _sized(plan, 1, plan.rerank)
    if memory is None or whole.peak_bytes <= memory:
        return whole
    rerank = plan.rerank
    if rerank == "memory":
        rerank = "disk"
        lean = _sized(plan, 1, rerank)
        if lean.peak_bytes <= memory:
            return replace(lean, reason=f"{lean.reason}; the float16 copy does not fit, so candidates come from disk")
    shards = 2
    while True:
        cut = _sized(plan, shards, rerank)
        if cut.peak_bytes <= memory:
            return replace(cut, reason=f"{cut.reason}; {shards} shards, for the index does not fit in memory whole")
        if cut.shard_rows <= EXACT_ROWS:
            raise UserError(
                f"memory: found {memory / 1e9:.2g} GB; expected at least {cut.peak_bytes / 1e9:.2g} GB for vectors of "
                f"{plan.dim}; raise the limit"
            )
        shards = math.ceil(shards * 1.25)


def _sized(plan: IndexPlan, shards: int, rerank: str) -> IndexPlan:
    rows, dim = -(-plan.rows // shards), plan.dim
    nlist = lists_for(rows)
    size = {"process": PROCESS_BYTES, "centroids": 4 * nlist * dim}
    size["training"] = 4 * dim * training_rows(rows, dim, nlist)
    if plan.kind == "ivf_codes":
        size["codes"] = int(1.3 * rows * (dim / 8 + 8))  # lists grow by doubling, in blocks of 32
        if rerank == "memory":
            size["copy"] = 2 * rows * dim
    else:
        size["codes"] = int(1.5 * rows * (2 * dim + 8))
    size["search"] = _scratch(dim, nlist, plan.k, plan.k_factor)
    if rerank == "disk":
        size["rerank"] = 12 * dim * rerank_rows(dim)
    if shards > 1 and plan.purpose == "lists":
        size["lists"] = _LIST_BYTES
    return replace(
        plan,
        shards=shards,
        rerank=rerank,
        nlist=nlist,
        nprobe=min(plan.nprobe, nlist),
        factory=ivf_factory(rows, dim, rerank=rerank),
        bytes=size,
    )


def _scratch(dim: int, nlist: int, k: int, k_factor: int) -> int:
    """Bytes of one block at a time: rows on their way into the index, or queries with tables and candidates."""
    fill = FILL_ROWS * (12 * dim + 64)
    search = QUERY_ROWS * (12 * dim + 20 * dim + 4 * min(nlist, 4096) + 40 * (k + 1) * k_factor)
    return max(fill, search) + (32 << 20)


def lists_for(rows: int) -> int:
    """Inverted lists for `rows` vectors: a power of two, at least 39 rows each (what Faiss asks to train one)."""
    per_root = 4 if rows < 10_000_000 else 8
    lists = 1 << max(0, math.floor(math.log2(max(1.0, per_root * math.sqrt(rows)))))
    return max(1, min(lists, rows // 39))


def training_rows(rows: int, dim: int, nlist: int) -> int:
    """Rows that the lists and codes are trained on."""
    return min(rows, POINTS_PER_LIST * max(nlist, 256), max(1024, (2 << 30) // (4 * dim)))


def rerank_rows(dim: int) -> int:
    """Candidate rows that are read from disk at a time: 16 MB of float32."""
    return max(1024, (16 << 20) // (4 * dim))


def list_rows(k: int) -> int:
    """Queries whose lists are held while the shards of a set pass by."""
    return max(QUERY_ROWS, _LIST_BYTES // (24 * (k + 1)) // QUERY_ROWS * QUERY_ROWS)


def ivf_factory(rows: int, dim: int, *, rerank: str = "memory") -> str:
    """The Faiss factory string for inverted lists over `rows` vectors: codes of one byte per 8 dimensions, with
    float16 for the second look; float16 vectors alone where the length has no parts of 4 or `rerank` is `none`."""
    lists = lists_for(rows)
    coarse = f"IVF{lists}" + ("_HNSW32" if lists >= 65_536 else "")
    if dim % 4 or rerank == "none":
        return f"{coarse},SQfp16"
    return f"{coarse},PQ{dim // 4}x4fs" + (",Refine(SQfp16)" if rerank == "memory" else "")
