"""`dinov2 embed`: features of images, in shards that other tools read as they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options

if TYPE_CHECKING:
    from dinov2cli.artifacts.output import Output
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import EmbedConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.models.load import LoadedModel

_MODEL = "A run, a Hugging Face or timm directory, an official .pth, or an architecture (random weights)."
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
) -> None:
    """Compute one feature vector per image.

    Writes `img_emb/*.npy` (float16, L2-normalised) and `metadata/*.parquet`, row to row: NumPy, DuckDB and autofaiss
    read them as they are. A stopped run continues at the shard where it stopped.

    Examples:

    - `dinov2 embed photos/ -m run -o embeddings`
    - `dinov2 embed 'shards-{000..015}.tar' -m facebook/dinov2-small -o embeddings`
    - `dinov2 embed photos.parquet -m run -o embeddings --pool mean --json`
    """
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
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    run_embed(options.from_stdin(data), out, settings, talk, dry_run=dry_run, overwrite=overwrite)


def run_embed(
    data: str,
    path: Path,
    config: "EmbedConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
) -> None:
    """Embed into one directory; also what other commands call."""
    from dinov2cli.cli.frame import canonical_model, check_output, model_input, open_output, result_fields
    from dinov2cli.data.source import open_source
    from dinov2cli.errors import UserError
    from dinov2cli.models.load import load_model

    if config.model is None:
        raise UserError(
            "embed needs a model; give -m MODEL: a run, a Hugging Face directory or name, a .pth, or vits14"
        )
    config = config.model_copy(update={"model": canonical_model(config.model)})
    assert config.model is not None
    source = open_source(data)
    loaded = load_model(config.model, img_size=config.image_size, seed=config.seed)
    inputs = [source.fingerprint(), model_input(config.model, loaded.fingerprint)]
    identity = config.identity()
    identity.pop("batch_size")
    if dry_run:
        state = check_output(path, "embeddings", config=identity, inputs=inputs, overwrite=overwrite)
        talk.plan(f"embed {data}", {**_plan(config, source, loaded), "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "embeddings", config=identity, seed=config.seed, inputs=inputs, overwrite=overwrite)
    if out is None:
        return
    with out:
        manifest = _write(out, source, loaded, config, talk)
    talk.say(f"{path}: {manifest.rows:,} images embedded, dimension {manifest.extra['dim']}")
    talk.result(path, **result_fields(manifest))


def _write(out: "Output", source: "ImageSource", loaded: "LoadedModel", config: "EmbedConfig", talk: "Talk") -> Any:
    from dinov2cli.artifacts.embeddings import EmbeddingsWriter
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.data.bad import BadImages
    from dinov2cli.data.loader import iterate_images
    from dinov2cli.device import choose_device, choose_precision
    from dinov2cli.evaluation.embedding import first_missing_shard, shard_count, write_shards
    from dinov2cli.evaluation.features import extract, pooled_dim

    device = choose_device(config.device)
    precision, _ = choose_precision(config.precision, device)
    loaded.backbone.to(device)
    writer = EmbeddingsWriter(out, pooled_dim(loaded.backbone.embed_dim, config.pool), normalized=config.normalize)
    start = first_missing_shard(writer, len(source), config.shard_size) * config.shard_size
    bad = BadImages(config.max_bad_fraction)
    images = iterate_images(
        source,
        resize=loaded.preprocess.resize,
        crop=loaded.preprocess.crop,
        batch_size=config.batch_size,
        workers=workers_for(config.workers),
        bad=bad,
        start=start,
    )
    with talk.progress("embed", len(source) - min(start, len(source))) as advance:
        features = extract(
            loaded.backbone,
            images,
            preprocess=loaded.preprocess,
            pool=config.pool,
            patches=config.patch,
            precision=precision,
        )
        write_shards(features, source, writer, shard_size=config.shard_size, start=start, advance=advance)
    rows = sum(writer.shard_rows(shard) for shard in range(shard_count(len(source), config.shard_size)))
    return writer.finish(
        rows, random=loaded.random, images=len(source), unreadable=len(source) - rows, bad=dict(bad.reasons)
    )


def _plan(config: "EmbedConfig", source: "ImageSource", loaded: "LoadedModel") -> dict[str, Any]:
    backbone = loaded.backbone
    dim = backbone.embed_dim * (2 if config.pool == "cls+mean" else 1)
    return {
        "images": len(source),
        "model": loaded.name + (" (random weights)" if loaded.random else ""),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "resize, crop": [loaded.preprocess.resize, loaded.preprocess.crop],
        "dimension": dim,
        "shards": -(-len(source) // config.shard_size),
        "bytes": len(source) * dim * 2,
        "files": ["img_emb/img_emb_0000.npy", "metadata/metadata_0000.parquet", "manifest.json"],
    }
