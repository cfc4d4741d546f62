"""`dinov2 pack`: images made small once and put into few large files, so that training does not wait for decoding."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options
from dinov2cli.distributed import ALONE, Ranks, join

if TYPE_CHECKING:
    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PackConfig
    from dinov2cli.curation.tables import Curated
    from dinov2cli.data.source import ImageSource

_FORMAT = "parquet (default), webdataset or folder."
_SIZE = "Pixels of the shorter side, at most; default 512."
_SAMPLE = 16


def pack(
    data: options.Data,
    out: options.Out,
    format_: Annotated[str | None, typer.Option("--format", metavar="NAME", help=_FORMAT)] = None,
    size: Annotated[int | None, typer.Option("--size", metavar="PX", help=_SIZE)] = None,
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
    """Make images small once, so that training decodes small JPEGs from few files instead of photos from many.

    Every image is turned upright and scaled down (never up) until its shorter side has `--size` pixels, and stored as
    JPEG of quality 95. Files that are small and upright already (RGB or grey JPEG, PNG and WebP) are copied byte for
    byte. The output is a selection: give it to any command as DATA; it no longer needs the originals. Its folder
    `packed` holds plain Parquet, WebDataset shards or files, for other tools too.

    Examples:

    - `dinov2 pack photos/ -o packed`
    - `dinov2 pack 'photos/?label=folder' -o packed --format webdataset --size 384`
    - `dinov2 pack photos/ -o packed && dinov2 pretrain packed -o run`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PackConfig
    from dinov2cli.recipe import load_config

    flags = {"pack": format_, "pack_size": size, "workers": workers, "device": device, "seed": seed}
    settings = load_config(PackConfig, recipe=config, sets=set_ or [], flags=flags)
    if settings.pack is None:
        settings = settings.model_copy(update={"pack": "parquet"})
    if not dry_run:
        relaunch(processes)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    ranks = join("cpu")  # nothing here is for a GPU, so there may be more processes than GPUs
    data = ranks.first(lambda: options.from_stdin(data))
    run_pack(data, out, settings, talk, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


def run_pack(
    data: str,
    path: Path,
    config: "PackConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Pack into one selection directory, shared among `ranks`."""
    from dinov2cli.artifacts.selection import write_selection
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.cli.packing import files, pack_found
    from dinov2cli.data.source import open_source

    source = ranks.together(lambda: open_source(data))
    place: dict[str, Any] = {
        "config": config.identity(),
        "inputs": [source.fingerprint()],
        "overwrite": overwrite,
    }
    if dry_run:
        state = ranks.first(lambda: check_output(path, "selection", **place))
        facts = {
            "images": len(source),
            "format": config.pack,
            "shorter side": f"at most {config.pack_size} pixels",
            "files": [*files(config), "kept.parquet", "dropped.parquet", "report.html", "manifest.json"],
            "output": f"{path} ({state})",
        }
        talk.plan(f"pack {data}", facts)
        return
    out = open_output(talk, path, "selection", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    with out:
        everything = ranks.together(lambda: _everything(source))
        found, packed = pack_found(out, lambda: source, everything, config, talk, ranks)

        def write() -> "Manifest":
            html = _report(found, packed["packed"], source, title=f"Images packed from {data}")
            return write_selection(out, kept=found.kept, dropped=found.dropped, report=html, **packed)

        manifest = ranks.first(write)
    for line in found.messages:
        talk.say(line)
    talk.result(path, **result_fields(manifest))


def _everything(source: "ImageSource") -> "Curated":
    """The choice of all images of a source."""
    import numpy as np

    from dinov2cli.curation.fingerprints import pool_from_images
    from dinov2cli.curation.tables import Curated, dropped_table

    pool = pool_from_images(source)
    nothing = dropped_table(pool, np.zeros(0, np.int64), reason="")
    return Curated(pool, nothing, np.arange(len(source), dtype=np.int64), summary={})


def _report(found: "Curated", facts: dict[str, Any], images: "ImageSource", *, title: str) -> str:
    """The page of the run: bytes before and after, and a sample of the images."""
    from dinov2cli.cli.packing import readable_bytes
    from dinov2cli.report.grids import samples_per_cluster
    from dinov2cli.report.html import Report, Tile
    from dinov2cli.report.thumbnails import spread, thumbnails

    before, after = facts["bytes_before"], facts["bytes_after"]
    parts = facts["shards"]
    tiles = [
        Tile("images", f"{facts['images']:,}", f"{facts['format']}, in {parts:,} part{'s' * (parts != 1)}"),
        Tile("bytes before", readable_bytes(before)),
        Tile("bytes after", readable_bytes(after), f"{after / max(1, before):.1%} of before"),
    ]
    report = Report(title, lead=f"{facts['images']:,} images with a shorter side of at most {facts['size']} pixels.")
    report.summary(found.messages, tiles=tiles)
    sample = thumbnails(images, spread(found.rows.tolist(), _SAMPLE))
    rows = [("", sample[i : i + 8]) for i in range(0, len(sample), 8)]
    if rows:
        report.section("Images").figure(samples_per_cluster(rows), "An even sample.")
    return report.html()
