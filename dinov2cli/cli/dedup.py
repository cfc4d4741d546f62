"""`dinov2 dedup`: remove duplicates within a set, and what another set already holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options, packing
from dinov2cli.distributed import ALONE, Ranks, join

if TYPE_CHECKING:
    import pyarrow as pa

    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DedupConfig
    from dinov2cli.curation.collection import Collection
    from dinov2cli.curation.tables import Curated

_AGAINST = "Also drop images that this set (evaluation images, say) already holds."
_TIERS = "exact, perceptual, embedding: which comparisons to make; default: all that the input allows."
_MODEL = "Embed images with this model for the embedding tier."


def dedup(
    data: Annotated[
        str, typer.Argument(metavar="IN", help="Images, embeddings or a selection; - reads a path from stdin.")
    ],
    out: options.Out,
    against: Annotated[str | None, typer.Option("--against", metavar="REF", help=_AGAINST)] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="COSINE", help="Similarity above which two images are copies."),
    ] = None,
    tiers: Annotated[str | None, typer.Option("--tiers", metavar="LIST", help=_TIERS)] = None,
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
    """Keep one image of every group of duplicates, and say for each other one why it went.

    From images: equal bytes or pixels, then perceptual hashes that see through re-encoding, resizing and flips.
    From embeddings: equal bytes, then cosine similarity.

    Examples:

    - `dinov2 dedup photos/ -o unique`
    - `dinov2 dedup embeddings -o unique --threshold 0.97 --against test_embeddings`
    - `dinov2 embed photos/ -m run -o e | dinov2 dedup - -o unique`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DedupConfig
    from dinov2cli.recipe import load_config

    flags = {
        "threshold": threshold,
        "tiers": None if tiers is None else [name.strip() for name in tiers.split(",")],
        "model": model,
        "pack": pack,
        "pack_size": pack_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    settings = load_config(DedupConfig, recipe=config, sets=set_ or [], flags=flags)
    packing.check(settings, pack_size)
    if not dry_run:
        relaunch(processes)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    ranks = join(settings.device)
    data, against = ranks.first(lambda: (options.from_stdin(data), options.from_stdin(against) if against else None))
    run_dedup(data, out, settings, talk, against=against, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


def run_dedup(
    data: str,
    path: Path,
    config: "DedupConfig",
    talk: "Talk",
    *,
    against: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Deduplicate into one selection directory, shared among `ranks`; also what the demo calls."""
    from dinov2cli.artifacts.selection import write_selection
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.report.dedup import dedup_report

    collection, reference, tiers, inputs = ranks.together(lambda: _opened(data, against, config, talk))
    place: dict[str, Any] = {
        "config": {**packing.identity(config), "tiers": tiers},
        "inputs": inputs,
        "overwrite": overwrite,
    }
    if dry_run:
        state = ranks.first(lambda: check_output(path, "selection", **place))
        facts = {"images": collection.rows, "reference images": reference.rows if reference else 0, "tiers": tiers}
        files = [
            "kept.parquet",
            "dropped.parquet",
            "groups.parquet",
            "report.html",
            "manifest.json",
            *packing.files(config),
        ]
        talk.plan(f"dedup {data}", {**facts, "files": files, "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "selection", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    with out:
        collection, pool, threshold, found = ranks.together(
            lambda: _found(path, collection, reference, tiers, config, talk, ranks)
        )
        found, packed = packing.pack_found(out, collection.images, found, config, talk, ranks)

        def write() -> "Manifest":
            html = dedup_report(found, pool, collection.images(), title=f"Duplicates in {data}", threshold=threshold)
            return write_selection(
                out,
                kept=found.kept,
                dropped=found.dropped,
                groups=found.groups,
                report=html,
                summary=found.summary,
                **packed,
            )

        manifest = ranks.first(write)
    for line in found.messages:
        talk.say(line)
    talk.result(path, **result_fields(manifest))


def _opened(
    data: str, against: str | None, config: "DedupConfig", talk: "Talk"
) -> "tuple[Collection, Collection | None, list[str], list[dict[str, Any]]]":
    """The images, the reference, the tiers to run, and the inputs for the manifest."""
    from dinov2cli.cli.selecting import embedding_model
    from dinov2cli.curation.collection import open_collection

    collection = open_collection(data)
    reference = open_collection(against) if against else None
    tiers = _tiers(config, collection, talk)
    inputs = [c.fingerprint for c in (collection, reference) if c is not None]
    inputs += embedding_model(config, [collection, reference] if "embedding" in tiers else [])
    return collection, reference, tiers, inputs


def _found(
    path: Path,
    collection: "Collection",
    reference: "Collection | None",
    tiers: list[str],
    config: "DedupConfig",
    talk: "Talk",
    ranks: Ranks,
) -> "tuple[Collection, pa.Table, float, Curated]":
    """The collection (embedded, where need be), its pool, the threshold, and which images are duplicates."""
    from dinov2cli.cli.selecting import with_vectors
    from dinov2cli.curation import dedup as core

    if "embedding" in tiers:
        collection = with_vectors(collection, config, talk, path / "embeddings", ranks=ranks)
        if reference is not None:
            place = path / "reference_embeddings"
            reference = with_vectors(reference, config, talk, place, like=collection, ranks=ranks)
    pool, prints = _fingerprinted(collection, tiers, config, talk, ranks, "fingerprint")
    known = None
    if reference is not None:
        ref_pool, ref_prints = _fingerprinted(reference, tiers, config, talk, ranks, "fingerprint reference")
        known = core.Reference(
            ids=ref_pool.column("id").to_pylist(),
            sha256=ref_prints.sha256 if ref_prints else _column(ref_pool, "sha256"),
            pixels=ref_prints.pixels if ref_prints else None,
            hashes=ref_prints.hashes if ref_prints else None,
            vectors=reference.vectors if "embedding" in tiers else None,
        )
    threshold = config.threshold if config.threshold is not None else core.BACKBONE_THRESHOLD
    found = core.dedup(
        pool,
        vectors=collection.vectors if "embedding" in tiers else None,
        fingerprints=prints,
        threshold=threshold,
        k=config.neighbours,
        max_component=config.max_component,
        against=known,
        against_threshold=config.against_threshold if config.against_threshold is not None else threshold,
        against_components=config.against_components,
        index=config.index,
        nprobe=config.nprobe,
        hash_radius=config.hash_radius if config.hash_radius is not None else core.RADIUS,
        seed=config.seed,
        ranks=ranks,
    )
    return collection, pool, threshold, found


def _tiers(config: "DedupConfig", collection: "Collection", talk: "Talk") -> list[str]:
    """The tiers to run: as asked, else those the input allows without decoding images that were decoded before."""
    from dinov2cli.errors import UserError

    embedded = collection.vectors is not None or config.model is not None
    if config.tiers is not None:
        if "embedding" in config.tiers and not embedded:
            raise UserError(
                f"--tiers embedding: {collection.spec} holds no embeddings; "
                "give -m MODEL, or the output of `dinov2 embed`"
            )
        return list(config.tiers)
    if collection.vectors is None and config.model is None:
        talk.say("no model given: copies are found by bytes, pixels and perceptual hash; -m MODEL adds similarity")
        return ["exact", "perceptual"]
    if collection.random:
        talk.warn(
            "these embeddings come from random weights and tell copies from look-alikes badly; using hashes instead"
        )
        return ["exact", "perceptual"]
    return ["exact", "embedding"] if collection.vectors is not None else ["exact", "perceptual", "embedding"]


def _fingerprinted(
    collection: "Collection", tiers: list[str], config: "DedupConfig", talk: "Talk", ranks: Ranks, label: str
) -> tuple[Any, Any]:
    """The pool table and, where the tiers need the pixels, the fingerprints of its images."""
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.cli.talk import absolute
    from dinov2cli.curation.fingerprints import fingerprint_images, pool_from_images
    from dinov2cli.data.bad import BadImages

    if "perceptual" not in tiers and collection.pool is not None:
        return collection.pool, None
    images = collection.images()
    with talk.progress(label, len(images)) as advance:
        prints = fingerprint_images(
            images,
            workers=workers_for(config.workers) + 1,  # threads; the reading one waits most of the time
            bad=BadImages(config.max_bad_fraction),
            progress=absolute(advance),
            ranks=ranks,
        )
    if "perceptual" not in tiers:
        prints = prints.exact_only()
    return pool_from_images(images, prints) if collection.pool is None else collection.pool, prints


def _column(table: Any, name: str) -> list[str] | None:
    return table.column(name).to_pylist() if name in table.column_names else None
