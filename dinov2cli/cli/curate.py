"""`dinov2 curate`: choose images by retrieval with query sets, or balanced over clusters without."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options, packing
from dinov2cli.distributed import ALONE, Ranks, join

if TYPE_CHECKING:
    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import CurateConfig
    from dinov2cli.curation.collection import Collection
    from dinov2cli.curation.tables import Curated
    from dinov2cli.data.source import ImageSource

_QUERY = "Images, embeddings or a selection to look for; may be repeated."
_MODE = "sample (nearest images), cluster (images of the queries' clusters) or balanced; default by --query."
_TARGET = "Number of images to keep."
_MODEL = "Embed images with this model where IN or a query has no embeddings."


def curate(
    data: Annotated[
        str, typer.Argument(metavar="IN", help="Images, embeddings or a selection; - reads a path from stdin.")
    ],
    out: options.Out,
    query: Annotated[list[str] | None, typer.Option("--query", metavar="Q", help=_QUERY)] = None,
    target_size: Annotated[int | None, typer.Option("--target-size", metavar="N", help=_TARGET)] = None,
    mode: Annotated[str | None, typer.Option("--mode", metavar="NAME", help=_MODE)] = None,
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
    processes: options.Processes = None,
) -> None:
    """Choose the images worth training on.

    With `--query`, keep what resembles curated sets: the nearest neighbours of every query image, or images of the
    clusters where the queries are at home. Without, sample `--target-size` images evenly over a tree of clusters.

    Examples:

    - `dinov2 curate embeddings -o chosen --target-size 100000 --pack parquet`
    - `dinov2 curate unique -o chosen --query flowers/ --set neighbours=32`
    - `dinov2 curate embeddings -o chosen --query landmarks/ --mode cluster`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import CurateConfig
    from dinov2cli.recipe import load_config

    flags = {
        "target_size": target_size,
        "mode": mode,
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
    """Curate into one selection directory, shared among `ranks`; also what the demo calls."""
    from dinov2cli.artifacts.selection import write_selection
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.report.curate import curate_report

    mode, collection, queries, inputs = ranks.together(lambda: _opened(data, query, config))
    place: dict[str, Any] = {
        "config": {**packing.identity(config), "mode": mode},
        "inputs": inputs,
        "overwrite": overwrite,
    }
    if dry_run:
        state = ranks.first(lambda: check_output(path, "selection", **place))
        facts = {
            "images": collection.rows,
            "mode": mode,
            "query images": sum(c.rows for c in queries),
            "to keep": config.target_size or "as many as are found",
        }
        files = ["kept.parquet", "dropped.parquet", "report.html", "manifest.json", *packing.files(config)]
        talk.plan(f"curate {data}", {**facts, "files": files, "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "selection", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    with out:
        found, images = ranks.together(lambda: _found(path, mode, collection, queries, config, talk, ranks))
        found, packed = packing.pack_found(out, images, found, config, talk, ranks)

        def write() -> "Manifest":
            html = curate_report(found, images(), title=f"Images chosen from {data}")
            return write_selection(
                out,
                kept=found.kept,
                dropped=found.dropped,
                report=html,
                hits=found.hits,
                summary=found.summary,
                **packed,
            )

        manifest = ranks.first(write)
    for line in found.messages:
        talk.say(line)
    talk.result(path, **result_fields(manifest))


def _opened(
    data: str, query: list[str], config: "CurateConfig"
) -> "tuple[str, Collection, list[Collection], list[dict[str, Any]]]":
    """The mode, the pool, the query sets, and the inputs for the manifest."""
    from dinov2cli.cli.selecting import embedding_model
    from dinov2cli.curation.collection import open_collection

    mode = _mode(config, query)
    collection = open_collection(data)
    queries = [open_collection(name) for name in query]
    inputs = [c.fingerprint for c in (collection, *queries)]
    return mode, collection, queries, inputs + embedding_model(config, [collection, *queries])


def _found(
    path: Path,
    mode: str,
    collection: "Collection",
    queries: "list[Collection]",
    config: "CurateConfig",
    talk: "Talk",
    ranks: Ranks,
) -> "tuple[Curated, Callable[[], ImageSource]]":
    """What was chosen, and the images of the pool; images without embeddings are embedded first."""
    from dinov2cli.cli.selecting import with_vectors

    collection = with_vectors(collection, config, talk, path / "embeddings", ranks=ranks)
    if collection.random:
        talk.warn("these embeddings come from random weights: clusters follow colour and brightness, not content")
    queries = [
        with_vectors(c, config, talk, path / f"query_embeddings_{i}", like=collection, ranks=ranks)
        for i, c in enumerate(queries)
    ]
    if mode == "balanced" and config.target_size is not None and config.target_size > collection.rows:
        talk.warn(f"the pool holds {collection.rows:,} images, --target-size {config.target_size:,}: all are kept")
        config = config.model_copy(update={"target_size": collection.rows})
    return _choose(mode, collection, queries, config, ranks), collection.images


def _mode(config: "CurateConfig", query: list[str]) -> str:
    from dinov2cli.errors import UserError

    mode = config.mode if config.mode != "auto" else "sample" if query else "balanced"
    if mode == "balanced" and query:
        raise UserError("--mode balanced takes no --query; expected --mode sample or cluster with it")
    if mode != "balanced" and not query:
        raise UserError(f"--mode {mode} needs --query, the images to look for")
    if mode == "balanced" and config.target_size is None:
        raise UserError("curate without --query needs --target-size, the number of images to keep")
    return mode


def _choose(
    mode: str, collection: "Collection", queries: "list[Collection]", config: "CurateConfig", ranks: Ranks
) -> "Curated":
    from dinov2cli.curation.retrieval import QuerySet, retrieve_clusters, retrieve_samples
    from dinov2cli.curation.sampling import sample_balanced

    assert collection.vectors is not None
    pool, vectors, c = collection.table(), collection.vectors, config
    if mode == "balanced":
        assert c.target_size is not None
        return sample_balanced(
            pool,
            vectors,
            c.target_size,
            levels=c.levels,
            resample_steps=c.resample_steps,
            iterations=c.iterations,
            strategy=c.strategy,
            seed=c.seed,
            ranks=ranks,
        )
    sets = [QuerySet(q.spec, q.vectors, q.table().column("id").to_pylist()) for q in queries if q.vectors is not None]
    if mode == "sample":
        return retrieve_samples(
            pool,
            vectors,
            sets,
            k=c.neighbours,
            target_size=c.target_size,
            index=c.index,
            nprobe=c.nprobe,
            seed=c.seed,
            ranks=ranks,
        )
    return retrieve_clusters(
        pool,
        vectors,
        sets,
        clusters=c.clusters,
        more_than=c.more_than,
        per_cluster=c.per_cluster,
        per_set=c.per_set,
        target_size=c.target_size,
        iterations=c.iterations,
        seed=c.seed,
        ranks=ranks,
    )
