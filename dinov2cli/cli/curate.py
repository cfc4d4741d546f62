"""`dinov2 curate`: choose images by retrieval with query sets, or balanced over clusters without."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options, packing
from dinov2cli.distributed import ALONE, Ranks, join

if TYPE_CHECKING:
    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.cli.curate_plan import Work
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import CurateConfig
    from dinov2cli.curation.collection import Collection
    from dinov2cli.curation.coverage import Coverage
    from dinov2cli.curation.query_sets import QuerySet
    from dinov2cli.curation.tables import Curated
    from dinov2cli.data.source import ImageSource
    from dinov2cli.report.query_sets import Opened

_QUERY = (
    "Images, embeddings or a selection to look for; may be repeated. A budget of its own goes behind a ?: "
    "'Q?mode=cluster&neighbours=4&per_set=1000000&per_cluster=10000&more_than=3&include=true'."
)
_MODE = (
    "With --query: sample (nearest images) or cluster (images of the queries' clusters). Without: balanced (a tree of "
    "clusters; also hierarchical), balanced-kmeans (clusters of bounded size), semdedup (drop look-alikes) or random."
)
_INCLUDE = "Also keep the images of the query sets themselves."
_TARGET = "Number of images of the pool to keep."
_MODEL = "Embed images with this model where IN or a query has no embeddings."


def curate(
    data: Annotated[
        str, typer.Argument(metavar="IN", help="Images, embeddings or a selection; - reads a path from stdin.")
    ],
    out: options.Out,
    query: Annotated[list[str] | None, typer.Option("--query", metavar="Q", help=_QUERY)] = None,
    target_size: Annotated[int | None, typer.Option("--target-size", metavar="N", help=_TARGET)] = None,
    mode: Annotated[str | None, typer.Option("--mode", metavar="NAME", help=_MODE)] = None,
    include_queries: Annotated[
        bool | None, typer.Option("--include-queries/--no-include-queries", help=_INCLUDE)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL)] = None,
    pack: packing.Pack = None,
    pack_size: packing.PackSize = None,
    config: options.Config = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    device: options.Device = None,
    seed: options.Seed = None,
    memory: options.Memory = None,
    processes: options.Processes = None,
) -> None:
    """Choose the images worth training on.

    With `--query`, keep what resembles curated sets: the nearest neighbours of every query image, or images of the
    clusters where the queries are at home; several sets, each with its own budget, make one union. Without, sample
    `--target-size` images evenly over clusters, or drop look-alikes until so many are left.

    Examples:

    - `dinov2 curate embeddings -o chosen --target-size 100000 --pack parquet`
    - `dinov2 curate unique -o chosen --query 'in1k/?neighbours=32' --query 'flowers/?mode=cluster' --include-queries`
    - `dinov2 curate embeddings -o chosen --mode semdedup --set eps=0.05`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import CurateConfig
    from dinov2cli.recipe import load_config

    flags = {
        "target_size": target_size,
        "mode": mode,
        "include_queries": include_queries,
        "memory": memory,
        "model": model,
        "pack": pack,
        "pack_size": pack_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    settings = load_config(CurateConfig, recipe=config, sets=set_ or [], flags=flags)
    packing.check(settings, pack_size)
    if not dry_run:
        relaunch(processes)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    ranks = join(settings.device)
    data, *queries = ranks.first(lambda: [options.from_stdin(name) for name in (data, *(query or []))])
    run_curate(data, out, settings, talk, query=queries, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


def run_curate(
    data: str,
    path: Path,
    config: "CurateConfig",
    talk: "Talk",
    *,
    query: list[str],
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Curate into one selection directory, shared among `ranks`; also what the demo calls.

    query: query sets as on the command line, which replace those of the config.
    """
    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.artifacts.selection import write_selection
    from dinov2cli.cli.curate_plan import plan_facts
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.cli.query_sets import identity
    from dinov2cli.cli.selecting import pictures
    from dinov2cli.curation.retrieval_tables import table_lines
    from dinov2cli.report.curate import curate_report

    work = ranks.together(lambda: _opened(data, query, config))
    place: dict[str, Any] = {
        "config": {**packing.identity(config), "mode": work.mode, "queries": identity(work.queries)},
        "inputs": work.inputs,
        "overwrite": overwrite,
    }
    if dry_run:
        state = ranks.first(lambda: check_output(path, "selection", **place))
        talk.plan(f"curate {data}", {**plan_facts(work, config), "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "selection", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    parts = Parts(path)
    with out:
        found, coverage, images, opened = ranks.together(lambda: _found(path, work, config, talk, parts, ranks))
        found, packed = packing.pack_found(out, images, found, config, talk, ranks)

        def write() -> "Manifest":
            shown = pictures(images, talk)
            asked = {name: open_ for name, open_ in opened.items() if pictures(open_, talk) is not None}
            html = curate_report(found, shown, title=f"Images chosen from {data}", coverage=coverage, queries=asked)
            return write_selection(
                out,
                kept=found.kept,
                dropped=found.dropped,
                report=html,
                before_finish=parts.remove,
                hits=found.hits,
                summary=found.summary,
                **packed,
            )

        manifest = ranks.first(write)
    for line in [*found.messages, *table_lines(found.summary)]:
        talk.say(line)
    talk.result(path, **result_fields(manifest))


def _opened(data: str, query: list[str], config: "CurateConfig") -> "Work":
    """The mode, the pool, the query sets, and the inputs for the manifest."""
    from dinov2cli.cli.curate_plan import Work, resolved_mode
    from dinov2cli.cli.query_sets import parse_queries
    from dinov2cli.cli.selecting import embedding_model
    from dinov2cli.curation.collection import open_collection

    queries = [config.resolved(each) for each in (parse_queries(query) or config.queries)]
    mode = resolved_mode(config, queries)
    collection = open_collection(data)
    opened = [open_collection(each.data) for each in queries]
    inputs = [c.fingerprint for c in (collection, *opened)]
    return Work(mode, collection, queries, opened, inputs + embedding_model(config, [collection, *opened]))


def _found(
    path: Path, work: "Work", config: "CurateConfig", talk: "Talk", parts: "Parts", ranks: Ranks
) -> "tuple[Curated, Coverage | None, Callable[[], ImageSource], Opened]":
    """What was chosen, how it covers the pool, the images its rows count in, and what opens those of the query sets.

    Images without embeddings are embedded first.
    """
    from dinov2cli.cli.curate_plan import steps
    from dinov2cli.cli.query_sets import naming, query_sets
    from dinov2cli.cli.selecting import with_vectors

    collection = work.collection
    if work.mode != "random" or config.model is not None:
        collection = with_vectors(collection, config, talk, path / "embeddings", ranks=ranks)
    if collection.random and work.mode != "random":
        talk.warn("these embeddings come from random weights: clusters follow colour and brightness, not content")
    opened = []
    for number, (query, each) in enumerate(zip(work.queries, work.opened, strict=True)):
        with naming(query.data):
            place = path / f"query_embeddings_{number}"
            opened.append(with_vectors(each, config, talk, place, like=collection, ranks=ranks))
    if not work.queries and config.target_size is not None and config.target_size > collection.rows:
        talk.warn(f"the pool holds {collection.rows:,} images, --target-size {config.target_size:,}: all are kept")
        config = config.model_copy(update={"target_size": collection.rows})
    sets = query_sets(work.queries, opened)
    with talk.progress("curate", None, unit="rows") as advance:
        means = {"memory": config.memory, "store": parts, "progress": steps(advance), "ranks": ranks}
        found = _choose(work.mode, collection, sets, config, means)
        coverage = None
        if config.coverage_clusters != 0 and collection.vectors is not None:
            found, coverage = _measured(found, collection, sets, config, means)
    joined = [each for each, query in zip(zip(sets, opened, strict=True), work.queries, strict=True) if query.include]
    images, pictures = collection.images, {each.name: c.images for each, c in zip(sets, opened, strict=True)}
    if joined:
        found, images = _with_queries(found, collection, joined, config, ranks)
    return found, coverage, images, pictures


def _measured(
    found: "Curated",
    collection: "Collection",
    sets: "list[QuerySet]",
    config: "CurateConfig",
    means: dict[str, Any],
) -> "tuple[Curated, Coverage]":
    from dataclasses import replace

    from dinov2cli.curation.coverage import coverage_messages, measure

    assert collection.vectors is not None
    coverage = measure(
        collection.table(),
        collection.vectors,
        found.rows,
        clusters=config.coverage_clusters,
        queries=sets,
        iterations=config.iterations,
        seed=config.seed,
        **means,
    )
    summary = {**found.summary, "coverage": coverage.summary()}
    return replace(found, summary=summary, messages=[*found.messages, *coverage_messages(coverage)]), coverage


def _with_queries(
    found: "Curated",
    collection: "Collection",
    joined: "list[tuple[QuerySet, Collection]]",
    config: "CurateConfig",
    ranks: Ranks,
) -> "tuple[Curated, Callable[[], ImageSource]]":
    from dinov2cli.curation.query_images import QueryImages, images_of_all, include_queries

    assert collection.vectors is not None
    found, _ = include_queries(
        found,
        collection.vectors,
        [QueryImages(each.name, opened.table(), each.vectors) for each, opened in joined],
        threshold=config.include_threshold,
        seed=config.seed,
        memory=config.memory,
        ranks=ranks,
    )
    return found, lambda: images_of_all(collection.images(), [opened.images() for _, opened in joined])


def _choose(
    mode: str, collection: "Collection", sets: "list[QuerySet]", config: "CurateConfig", means: dict[str, Any]
) -> "Curated":
    from dinov2cli.curation.pruning import prune_semantic
    from dinov2cli.curation.retrieval import retrieve
    from dinov2cli.curation.sampling import sample_balanced, sample_bounded, sample_random

    pool, vectors, c = collection.table(), collection.vectors, config
    if mode == "random":
        assert c.target_size is not None
        return sample_random(pool, c.target_size, seed=c.seed)
    assert vectors is not None
    common: dict[str, Any] = {"iterations": c.iterations, "seed": c.seed, **means}
    if sets:
        return retrieve(
            pool,
            vectors,
            sets,
            target_size=c.target_size,
            clusters=c.clusters,
            index=c.index,
            nprobe=c.nprobe,
            recall=c.recall,
            **common,
        )
    if mode == "semdedup":
        return prune_semantic(pool, vectors, eps=c.eps, target_size=c.target_size, clusters=c.clusters, **common)
    assert c.target_size is not None
    common |= {"strategy": c.strategy}
    if mode == "balanced-kmeans":
        common = {name: value for name, value in common.items() if name not in ("store", "progress")}
        return sample_bounded(pool, vectors, c.target_size, clusters=c.clusters, slack=c.slack, **common)
    return sample_balanced(pool, vectors, c.target_size, levels=c.levels, resample_steps=c.resample_steps, **common)
