"""What `dinov2 curate` is about to do: its mode, what it reads, and its plan for --dry-run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dinov2cli.cli import packing

if TYPE_CHECKING:
    from dinov2cli.config import CurateConfig
    from dinov2cli.config.curate import QueryConfig
    from dinov2cli.curation.collection import Collection
    from dinov2cli.search.cost import Cost, Machines


@dataclass(frozen=True)
class Work:
    """One run: its mode, the pool, the query sets with their settings and what they opened to, and the inputs for the
    manifest."""

    mode: str
    collection: "Collection"
    queries: "list[QueryConfig]"
    opened: "list[Collection]"
    inputs: list[dict[str, Any]]


def resolved_mode(config: "CurateConfig", queries: "Sequence[QueryConfig]") -> str:
    """The mode in which to run. Raises UserError where mode, query sets, eps and target size do not fit together."""
    from dinov2cli.errors import UserError

    retrieval = config.mode in ("sample", "cluster")
    if queries:
        if not retrieval and config.mode != "auto":
            raise UserError(f"--mode {config.mode} takes no --query; expected --mode sample or cluster with it")
        return "+".join(dict.fromkeys(str(query.mode) for query in queries))
    if retrieval:
        raise UserError(f"--mode {config.mode} needs --query, the images to look for")
    if config.include_queries:
        raise UserError("--include-queries needs --query, the images to include")
    mode = "balanced" if config.mode in ("auto", "hierarchical") else config.mode
    if mode == "semdedup":
        if (config.eps is None) == (config.target_size is None):
            found = "neither" if config.eps is None else "both"
            raise UserError(
                f"--mode semdedup: found {found} of eps and --target-size; expected one: --set eps=0.05 drops images "
                "with a cosine above 0.95 to a kept one, --target-size finds the eps that leaves so many"
            )
    elif config.target_size is None:
        raise UserError("curate without --query needs --target-size, the number of images to keep")
    return mode


def steps(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """Adapt `advance` to stages that each count (units done, units in all) from the start."""
    seen = 0

    def update(done: int, _total: int) -> None:
        nonlocal seen
        advance(done - seen if done > seen else done)
        seen = done

    return update


def _expected(work: Work, config: "CurateConfig") -> dict[str, Any]:
    """The index and the clusters of the run, and about what time and memory they take."""
    from dinov2cli.cli.costs import cost_facts, machines
    from dinov2cli.curation import pruning, query_sets
    from dinov2cli.search.cost import Cost, estimate
    from dinov2cli.search.hierarchy import default_levels

    rows, vectors = config.plan.images or work.collection.rows, work.collection.vectors
    where = machines(config.plan)
    asked = [query.mode for query in work.queries]
    facts: dict[str, Any] = {}
    costs: list[Cost] = []
    if vectors is None and (work.mode != "random" or config.model is not None):
        costs += estimate(rows + sum(c.rows for c in work.opened), 768, stages=("embed",), machines=where)
    elif vectors is not None and "sample" in asked:
        index, cost = _search_cost(work, config, where)
        facts["index"] = index
        costs.append(cost)
    clusters = {
        "balanced": (config.levels or default_levels(rows, target=config.target_size))[0],
        "balanced-kmeans": config.clusters or default_levels(rows)[0],
        "semdedup": config.clusters or pruning.default_clusters(rows),
    }.get(work.mode, (config.clusters or query_sets.default_clusters(rows)) if "cluster" in asked else 0)
    if clusters:
        facts["clusters"] = clusters
        dim = 768 if vectors is None else vectors.dim
        fits = 1 + config.resample_steps if work.mode == "balanced" else 1
        asks: dict[str, Any] = {"clusters": clusters, "iterations": config.iterations, "machines": where}
        costs += fits * estimate(rows, dim, stages=("kmeans",), **asks)
    return facts | cost_facts(costs, config.plan, rows)


def _search_cost(work: Work, config: "CurateConfig", where: "Machines") -> "tuple[str, Cost]":
    """The index that sample-based sets would search, with its reason, and its cost."""
    from dinov2cli.search.cost import Cost
    from dinov2cli.search.plan import plan_index

    vectors = work.collection.vectors
    assert vectors is not None
    searched = [(query, c.rows) for query, c in zip(work.queries, work.opened, strict=True) if query.mode == "sample"]
    number = sum(rows for _, rows in searched)
    plan = plan_index(
        vectors.rows,
        vectors.dim,
        queries=number,
        k=max(query.neighbours or 1 for query, _ in searched),
        memory=config.memory,
        recall=config.recall,
        purpose="lists",
        index=config.index,
        nprobe=config.nprobe,
    )
    # A query visits nprobe of nlist inverted lists; filling them is a pass of all rows over the lists' centroids.
    exact = plan.kind == "flat"
    share = 1.0 if exact or not plan.nlist else plan.nprobe / plan.nlist
    work_done = 2.0 * number * vectors.rows * vectors.dim * share + 2.0 * vectors.rows * plan.nlist * vectors.dim
    seconds = work_done / (where.rates.flops * where.count)
    how = "every pair compared" if exact else f"{plan.nprobe} of {plan.nlist} lists per query"
    return f"{plan.factory}: {plan.reason}", Cost("search", seconds, float(plan.peak_bytes), 0.0, how)


def plan_facts(work: Work, config: "CurateConfig") -> dict[str, Any]:
    """What the run would read, choose and write."""
    from dinov2cli.cli.query_sets import budgets

    facts: dict[str, Any] = {"images": work.collection.rows, "mode": work.mode}
    if work.queries:
        facts["query images"] = sum(c.rows for c in work.opened)
        for number, (query, opened) in enumerate(zip(work.queries, work.opened, strict=True), start=1):
            facts[f"query set {number}"] = budgets(query, opened.rows)
    facts.update(_expected(work, config))
    facts["to keep"] = config.target_size or "as many as are found"
    files = ["kept.parquet", "dropped.parquet", *(["hits.parquet"] if work.queries else [])]
    facts["files"] = [*files, "report.html", "manifest.json", *packing.files(config)]
    return facts
