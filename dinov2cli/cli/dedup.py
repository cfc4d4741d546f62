"""`dinov2 dedup`: remove duplicates within a set, and what another set already holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options, packing
from dinov2cli.distributed import ALONE, Ranks, join

if TYPE_CHECKING:
    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DedupConfig

_AGAINST = "Also drop images that this set (evaluation images, say) already holds; may be repeated."
_COMPONENTS = "With --against: drop all that is joined to a match, as the paper does."
_TIERS = "exact, perceptual, geometric, embedding: which comparisons to make; default: all that the input allows."
_MODEL = "Embed images with this model for the embedding tier; sscd:FILE and onnx:FILE too."
_VERIFY = "none, or geometric: look at local features; finds crops and pages, vetoes look-alikes within IN."
_CALIBRATE = "Measure the thresholds on altered copies of a sample of your own images."
_BACKGROUND = "Unrelated images: similarity to them is subtracted (score normalisation)."


def dedup(
    data: Annotated[
        str, typer.Argument(metavar="IN", help="Images, embeddings or a selection; - reads a path from stdin.")
    ],
    out: options.Out,
    against: Annotated[list[str] | None, typer.Option("--against", metavar="REF", help=_AGAINST)] = None,
    against_components: Annotated[bool | None, typer.Option("--against-components", help=_COMPONENTS)] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="COSINE", help="Similarity above which two images are copies."),
    ] = None,
    tiers: Annotated[str | None, typer.Option("--tiers", metavar="LIST", help=_TIERS)] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL)] = None,
    verify: Annotated[str | None, typer.Option("--verify", metavar="NAME", help=_VERIFY)] = None,
    calibrate: Annotated[bool | None, typer.Option("--calibrate", help=_CALIBRATE)] = None,
    background: Annotated[str | None, typer.Option("--background", metavar="DATA", help=_BACKGROUND)] = None,
    memory: options.Memory = None,
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
    From embeddings: equal bytes, then cosine similarity. What was done is kept, so that a stopped run continues.

    Examples:

    - `dinov2 dedup photos/ -o unique`
    - `dinov2 dedup photos/ -o unique --verify geometric`
    - `dinov2 dedup photos/ -o unique -m sscd:sscd_disc_mixup.torchscript.pt --against test/`
    - `dinov2 dedup embeddings -o unique --calibrate --memory 8GB`
    - `dinov2 embed photos/ -m run -o e | dinov2 dedup - -o unique`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DedupConfig
    from dinov2cli.recipe import load_config

    flags = {
        "against_components": against_components,
        "threshold": threshold,
        "tiers": None if tiers is None else [name.strip() for name in tiers.split(",")],
        "model": model,
        "verify": verify,
        "calibrate": calibrate,
        "background": background,
        "memory": memory,
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
    data, *references = ranks.first(lambda: [options.from_stdin(name) for name in (data, *(against or []))])
    run_dedup(data, out, settings, talk, against=references, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


def run_dedup(
    data: str,
    path: Path,
    config: "DedupConfig",
    talk: "Talk",
    *,
    against: Sequence[str] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Deduplicate into one selection directory, shared among `ranks`; also what the demo calls."""
    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.artifacts.selection import write_selection
    from dinov2cli.cli.dedup_inputs import opened, plan
    from dinov2cli.cli.dedup_stages import found
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.cli.selecting import pictures
    from dinov2cli.report.dedup import dedup_report

    work = ranks.together(lambda: opened(data, list(against), config, talk))
    place: dict[str, Any] = {
        "config": {**packing.identity(config), "tiers": work.tiers},
        "inputs": work.inputs,
        "overwrite": overwrite,
    }
    if dry_run:
        state = ranks.first(lambda: check_output(path, "selection", **place))
        files = ["kept.parquet", "dropped.parquet", "groups.parquet", "report.html", "manifest.json"]
        files += packing.files(config)
        talk.plan(f"dedup {data}", {**plan(work, config), "files": files, "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "selection", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    parts = Parts(path)
    with out:
        result = ranks.together(lambda: found(work, path, parts, config, talk, ranks))
        images = result.collection.images
        chosen, packed = packing.pack_found(out, images, result.found, config, talk, ranks)

        def write() -> "Manifest":
            html = dedup_report(
                chosen,
                result.pool,
                pictures(result.collection.images, talk),
                title=f"Duplicates in {data}",
                references={one.spec: pictures(one.images, talk) for one in result.references},
                profile=result.profile,
                calibration=result.calibration,
            )
            return write_selection(
                out,
                kept=chosen.kept,
                dropped=chosen.dropped,
                groups=chosen.groups,
                report=html,
                before_finish=parts.remove,
                summary=chosen.summary,
                **result.facts,
                **packed,
            )

        manifest = ranks.first(write)
    for line in chosen.messages:
        talk.say(line)
    talk.result(path, **result_fields(manifest))
