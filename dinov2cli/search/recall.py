"""How much of the truth an approximate search finds: measured on a sample of queries, and raised where it is short."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np

from dinov2cli.search.plan import FILL_ROWS, IndexPlan
from dinov2cli.search.vectors import Float32, Int64, Vectors, iterate

SAMPLE = 1000
"""Queries that recall is measured on."""

FEW_EDGES = 100
"""Below so many true edges in the sample their recall says nothing, and effort stays as planned."""

_TRIES = 6
_SAME = 1e-6

Find = Callable[[Float32, int, int, int], Int64]
"""(queries [n, D], k, nprobe, k_factor) -> rows [n, k], -1 where there are fewer."""


@dataclass(frozen=True)
class Trial:
    """One measurement: effort, recall@k, and the share of the true edges above the threshold that was found."""

    nprobe: int
    k_factor: int
    recall: float
    edge_recall: float | None


@dataclass(frozen=True)
class SearchReport:
    """The plan of a search and what it was measured to find.

    recall: share of the k nearest rows found, over `queries` sampled ones (rows as near as the k-th count); 1 for an
    exact search. edge_recall: share of the pairs above `threshold` (None without a threshold or any such pair);
    edges: how many such pairs the sample has. tried: the efforts measured, the last one is used. reached: whether the
    target was met (None where nothing was asked or could be judged).
    """

    plan: IndexPlan
    queries: int
    recall: float
    edge_recall: float | None
    edges: int
    threshold: float | None
    nprobe: int
    k_factor: int
    reached: bool | None
    tried: tuple[Trial, ...] = ()

    def record(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {**asdict(self), "plan": self.plan.record(), "tried": [asdict(trial) for trial in self.tried]}

    def lines(self) -> list[str]:
        """The plan with its reason, and what was measured, for a person."""
        plan = self.plan
        held = f", {plan.peak_bytes / 1e9:.2f} GB" if plan.bytes else ""
        lines = [f"index {plan.factory}{held}: {plan.reason}"]
        if plan.kind == "flat":
            return lines
        effort = f"{self.nprobe} lists per query"
        found = f"recall@{plan.k} {self.recall:.3f} on {self.queries} queries"
        if self.edge_recall is not None:
            found += f", {self.edge_recall:.4f} of {self.edges} pairs above {self.threshold:g}"
        judged = {True: "reached", False: "NOT reached: raise nprobe, or use the index flat", None: "not judged"}
        target = edge_target(plan.target) if plan.purpose == "edges" else plan.target
        return [*lines, f"{effort}: {found}; target {target:g} {judged[self.reached]}"]


def edge_target(recall: float) -> float:
    """The recall of edges that goes with a recall of lists: a tenth of what may be missing, 0.995 for 0.95."""
    return 1 - (1 - recall) / 10


def exact_report(plan: IndexPlan) -> SearchReport:
    """The report of a search that compares every pair."""
    return SearchReport(plan, 0, 1.0, None, 0, None, 0, 1, True)


def exact_similarities(vectors: Vectors, queries: Float32, k: int, skip: Int64 | None = None) -> Float32:
    """The k largest cosines of every query [n, D] with the rows, [n, k], reading the rows by blocks.

    skip: the row [n] that each query is, left out of its own list.
    """
    take = min(k + (skip is not None), vectors.rows)
    heap = faiss.ResultHeap(len(queries), take, keep_max=True)
    for start, block in iterate(vectors, FILL_ROWS):
        similarity, found = faiss.knn(queries, block, min(take, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(similarity, found + start)
    heap.finalize()
    return heap.D if skip is None else _without(heap.D, heap.I, skip)


def tune(
    find: Find,
    vectors: Vectors,
    queries: Float32,
    plan: IndexPlan,
    *,
    threshold: float | None = None,
    skip: Int64 | None = None,
) -> SearchReport:
    """Measure a search on `queries` and double its effort until the plan's target is reached, or gains nothing.

    The target is recall@k for lists, `edge_target` of the pairs above the threshold for edges. Lists per query are
    doubled first, until the target is met with two standard errors to spare, or a quarter of what may be missing; where
    that brings less than a tenth of what is missing, the candidates of the second look are.
    An effort that the user gave (`plan.fixed`) is measured and kept.
    """
    k = min(plan.k, vectors.rows - (skip is not None))
    trials: list[Trial] = []
    nprobe, k_factor = plan.nprobe, plan.k_factor
    if k < 1 or not len(queries):
        return SearchReport(plan, 0, 1.0, None, 0, threshold, nprobe, k_factor, None)
    truth = exact_similarities(vectors, queries, k, skip)
    level = None if threshold is None else threshold
    edges = 0 if level is None else int((truth > level).sum())
    by_edges = plan.purpose == "edges" and level is not None
    goal = edge_target(plan.target) if by_edges else plan.target
    while True:
        rows = find(queries, k + (skip is not None), nprobe, k_factor)
        found = _similarities_of(vectors, queries, rows, skip)[:, :k]
        share = (found >= truth[:, -1:] - _SAME).mean(axis=1)
        hits = 0 if level is None else int((found > level).sum())
        edge_recall = min(1.0, hits / edges) if edges else None
        trials.append(Trial(nprobe, k_factor, float(share.mean()), edge_recall))
        if by_edges:
            got, spread = edge_recall or 0.0, np.sqrt(goal * (1 - goal) / max(1, edges))
        else:
            got, spread = float(share.mean()), float(share.std()) / np.sqrt(len(share))
        judged = not by_edges or edges >= FEW_EDGES
        reached = bool(got >= goal + min(2 * spread, 0.25 * (1 - goal)))
        if reached or plan.fixed or not judged or len(trials) == _TRIES:
            break
        wider = _next_effort(trials, by_edges, goal, plan)
        if wider == (nprobe, k_factor):
            break
        nprobe, k_factor = wider
    last = trials[-1]
    return SearchReport(
        plan=plan,
        queries=len(queries),
        recall=last.recall,
        edge_recall=last.edge_recall,
        edges=edges,
        threshold=threshold,
        nprobe=last.nprobe,
        k_factor=last.k_factor,
        # A margin is asked of what may still grow; a target just met is met.
        reached=(got >= goal) if judged else None,
        tried=tuple(trials),
    )


def _next_effort(trials: list[Trial], by_edges: bool, goal: float, plan: IndexPlan) -> tuple[int, int]:
    last = trials[-1]
    got = [(t.edge_recall or 0.0) if by_edges else t.recall for t in trials]
    wide = plan.nlist == 0 or last.nprobe < plan.nlist
    stuck = len(trials) > 1 and last.nprobe > trials[-2].nprobe and got[-1] - got[-2] < 0.1 * max(0.0, goal - got[-2])
    if plan.kind == "ivf_codes" and (stuck or not wide):
        return last.nprobe, last.k_factor * 2
    if not wide:
        return last.nprobe, last.k_factor
    return (min(2 * last.nprobe, plan.nlist) if plan.nlist else 2 * last.nprobe), last.k_factor


def _similarities_of(vectors: Vectors, queries: Float32, rows: Int64, skip: Int64 | None) -> Float32:
    """Cosines [n, k] of queries with the rows found, most similar first; -inf where there is none."""
    result = np.full(rows.shape, -np.inf, dtype=np.float32)
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        there = part.reshape(-1)
        found = vectors.gather(np.maximum(there, 0)).reshape(*part.shape, -1)
        values = np.einsum("nkd,nd->nk", found, queries[start : start + 64], optimize=True)
        result[start : start + 64] = np.where(part < 0, -np.inf, values)
    if skip is not None:
        result = _without(result, rows, skip)
    return -np.sort(-result, axis=1)


def _without(similarity: Float32, row: Int64, skip: Int64) -> Float32:
    """Lists of k + 1 without the row `skip` of each, or without the last where it is not listed: [n, k]."""
    keep = row != skip[:, None]
    keep[keep.all(axis=1), -1] = False
    return similarity[keep].reshape(len(row), -1)
