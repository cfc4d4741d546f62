"""`dinov2 embed`: features of images, in shards that other tools read as they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options
from dinov2cli.distributed import ALONE, Ranks, join

if TYPE_CHECKING:
    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.artifacts.output import Output
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import EmbedConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.models.load import LoadedModel

_MODEL = (
    "A run, a Hugging Face or timm directory, an official .pth, an architecture (random weights), or a descriptor: "
    "sscd:FILE, onnx:FILE."
)
_POOL = "cls (class token), mean (of the patch tokens) or cls+mean."


def embed(
    data: options.Data,
    out: options.Out,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL)] = None,
    pool: Annotated[str | None, typer.Option("--pool", metavar="NAME", help=_POOL)] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", metavar="PX", help="Crop in pixels; default: the model's own.")
    ] = None,
    patch: Annotated[bool | None, typer.Option("--patch", help="Also store the patch tokens (large).")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Images per forward pass.")
    ] = None,
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
    """Compute one feature vector per image.

    Writes `img_emb/*.npy` (float16, L2-normalised) and `metadata/*.parquet`, row to row: NumPy, DuckDB and autofaiss
    read them as they are. A stopped run continues at the shard where it stopped.

    Examples:

    - `dinov2 embed photos/ -m run -o embeddings`
    - `dinov2 embed 'shards-{000..015}.tar' -m facebook/dinov2-small -o embeddings`
    - `dinov2 embed photos.parquet -m run -o embeddings --pool mean --json`
    - `dinov2 embed photos/ -m sscd:sscd_disc_mixup.torchvision.pt -o embeddings`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import EmbedConfig
    from dinov2cli.recipe import load_config

    flags = {
        "model": model,
        "pool": pool,
        "image_size": image_size,
        "patch": patch,
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    settings = load_config(EmbedConfig, recipe=config, sets=set_ or [], flags=flags)
    if not dry_run:
        relaunch(processes)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    ranks = join(settings.device)
    data = ranks.first(lambda: options.from_stdin(data))
    run_embed(data, out, settings, talk, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


def run_embed(
    data: str,
    path: Path,
    config: "EmbedConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Embed into one directory, shared among `ranks`; also what other commands call.

    When it returns, on any rank, the directory is whole.
    """
    from dinov2cli.cli.frame import check_output, model_input, open_output, result_fields

    config, source, loaded = ranks.together(lambda: _opened(data, config))
    assert config.model is not None
    inputs = [source.fingerprint(), model_input(config.model, loaded.fingerprint)]
    identity = config.identity()
    identity.pop("batch_size")
    place: dict[str, Any] = {"config": identity, "inputs": inputs, "overwrite": overwrite}
    if dry_run:
        state = ranks.first(lambda: check_output(path, "embeddings", **place))
        talk.plan(f"embed {data}", {**_plan(config, source, loaded), "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "embeddings", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    with out:
        manifest = _write(out, source, loaded, config, talk, ranks)
    talk.say(f"{path}: {manifest.rows:,} images embedded, dimension {manifest.extra['dim']}")
    talk.result(path, **result_fields(manifest))


def _opened(data: str, config: "EmbedConfig") -> "tuple[EmbedConfig, ImageSource, LoadedModel]":
    from dinov2cli.cli.frame import canonical_model
    from dinov2cli.data.source import open_source
    from dinov2cli.errors import UserError
    from dinov2cli.evaluation.features import check_wanted
    from dinov2cli.models.load import load_model

    if config.model is None:
        raise UserError(
            "embed needs a model; give -m MODEL: a run, a Hugging Face directory or name, a .pth, sscd:FILE, or vits14"
        )
    model = canonical_model(config.model)
    source = open_source(data)
    loaded = load_model(model, img_size=config.image_size, seed=config.seed)
    check_wanted(loaded.network, config.pool, patches=config.patch)
    return config.model_copy(update={"model": model}), source, loaded


def _write(
    out: "Output", source: "ImageSource", loaded: "LoadedModel", config: "EmbedConfig", talk: "Talk", ranks: Ranks
) -> "Manifest":
    from dinov2cli.artifacts.embeddings import EmbeddingsWriter
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.data.bad import BadImages
    from dinov2cli.data.loader import row_ranges
    from dinov2cli.evaluation.embedding import first_missing_shard, shard_count, write_shards
    from dinov2cli.evaluation.features import pooled_dim, stream_features

    precision = ranks.together(lambda: _to_device(loaded, config, ranks))
    rows, size = len(source), config.shard_size
    writer = EmbeddingsWriter(out, pooled_dim(loaded.network.embed_dim, config.pool), normalized=config.normalize)
    start = ranks.first(lambda: first_missing_shard(writer, rows, size) * size)
    bad = BadImages(config.max_bad_fraction)
    with (
        talk.progress("embed", rows - min(start, rows)) as advance,
        stream_features(
            loaded.network,
            source,
            row_ranges(start, rows, config.batch_size, within=size),
            preprocess=loaded.preprocess,
            workers=workers_for(config.workers),
            bad=bad,
            ranks=ranks,
            pool=config.pool,
            patches=config.patch,
            precision=precision,
        ) as features,
    ):
        write_shards(features, source, writer, shard_size=size, start=start, advance=advance)

    def finish() -> "Manifest":
        written = sum(writer.shard_rows(shard) for shard in range(shard_count(rows, size)))
        facts: dict[str, Any] = {"random": loaded.random, "images": rows, "unreadable": rows - written}
        if loaded.copy_detection:  # similarities of such a model have thresholds of their own
            facts["copy_detection"] = True
        return writer.finish(written, **facts, bad=dict(bad.reasons))

    return ranks.first(finish)


def _to_device(loaded: "LoadedModel", config: "EmbedConfig", ranks: Ranks) -> str:
    """Bring the model to this rank's device; return the precision to compute in."""
    from dinov2cli.device import choose_device, choose_precision

    device = choose_device(config.device, local_rank=ranks.local_rank)
    loaded.network.to(device)
    return choose_precision(config.precision, device)[0]


def _plan(config: "EmbedConfig", source: "ImageSource", loaded: "LoadedModel") -> dict[str, Any]:
    from dinov2cli.evaluation.features import pooled_dim

    network, preprocess = loaded.network, loaded.preprocess
    dim = pooled_dim(network.embed_dim, config.pool)
    return {
        "images": len(source),
        "model": loaded.name + (" (random weights)" if loaded.random else ""),
        "kind of model": _kind(loaded),
        "parameters": sum(p.numel() for p in network.parameters()),
        "resize, crop": f"square of {preprocess.crop}" if preprocess.square else [preprocess.resize, preprocess.crop],
        "dimension": dim,
        "shards": -(-len(source) // config.shard_size),
        "bytes": len(source) * dim * 2,
        "files": ["img_emb/img_emb_0000.npy", "metadata/metadata_0000.parquet", "manifest.json"],
    }


def _kind(loaded: "LoadedModel") -> str:
    from dinov2cli.models.descriptors import Descriptor

    if loaded.copy_detection:
        return "copy-detection descriptor"
    return "descriptor" if isinstance(loaded.network, Descriptor) else "backbone"
