"""`dinov2 pretrain`: train a backbone by self-distillation, from a recipe."""

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options
from dinov2cli.distributed import ALONE

if TYPE_CHECKING:
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.parallel import Parallel

_BUDGET = "Length of the run: 100 epochs, 20000 images, 300 steps, 30m."


def pretrain(
    data: options.Data,
    out: options.Out,
    config: options.Config = None,
    arch: Annotated[str | None, typer.Option("--arch", metavar="NAME", help="Architecture, as vits14.")] = None,
    init: Annotated[
        str | None, typer.Option("--init", metavar="MODEL", help="Continue from the weights of any MODEL.")
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", metavar="AMOUNT", help=_BUDGET)] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Images per step and rank.")
    ] = None,
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
    """Train a backbone on images with the DINOv2 objective (DINO + iBOT + KoLeo).

    The run directory holds checkpoints, metrics.jsonl and, at the end, `export/`, which
    `transformers.AutoModel.from_pretrained` loads. The same command continues a stopped run.

    Examples:

    - `dinov2 pretrain photos/ -o run --config tiny-cpu`
    - `dinov2 pretrain curated/ -o run --budget "100 epochs" --set optim.lr=0.002`
    - `dinov2 pretrain photos/ -o run --init facebook/dinov2-small --set optim.lr=2e-4`
    - `dinov2 pretrain photos/ -o run -n 8` (8 GPUs; `accelerate launch` and `torchrun` for more machines)
    - `dinov2 pretrain photos/ -o run --dry-run`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig
    from dinov2cli.recipe import load_config

    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    flags = {
        "model.arch": arch,
        "model.init_from": init,
        "train.budget": budget,
        "data.batch_size": batch_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    settings = load_config(PretrainConfig, recipe=config, sets=set_ or [], flags=flags)
    if not dry_run:
        relaunch(processes)
    train_run(options.from_stdin(data), out, settings, talk, dry_run=dry_run, overwrite=overwrite, planned=processes)


def train_run(
    data: str,
    path: Path,
    config: "PretrainConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    planned: int | None = None,
) -> None:
    """Train one run directory from a resolved config; also what the demo calls. A dry run plans for `planned` ranks."""
    from dinov2cli.cli.assembly import parallel_of, with_batch_of_all
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.cli.watch import CONFIG_FILE, Follower, RunWatch, require_tensorboard
    from dinov2cli.recipe import to_yaml
    from dinov2cli.train.loop import train

    if config.log.tensorboard:
        require_tensorboard()
    given = config.data.global_batch_size is not None
    parallel = parallel_of(config, dry_run=dry_run, planned=planned)
    ranks = parallel.ranks if not dry_run else ALONE
    if not ranks.main:  # unreadable images are named by the process that met them
        logging.getLogger("dinov2cli.data.bad").setLevel(logging.ERROR if talk.silenced else logging.WARNING)
    data = ranks.first(lambda: options.from_stdin(data))
    overwrite = overwrite and not _restarted(talk)
    before = ranks.first(lambda: _before(path, overwrite=overwrite))
    config, chosen, source, parts, start, place = ranks.together(
        lambda: _prepare(data, config, parallel, before, dry_run=dry_run)
    )
    ranks.same([place["config"], _sample(source.ids)], "settings or images")
    if dry_run:
        state = check_output(path, "run", config=place["config"], inputs=place["inputs"], overwrite=overwrite)
        talk.plan(f"pretrain {data}", {**_plan(config, source, parts), **chosen, "output": f"{path} ({state})"})
        return
    if not start and config.model.init == "structured":
        parallel.same_start(parts["model"])
    out = open_output(talk, path, "run", **place, overwrite=overwrite, ranks=ranks)
    if out is None:
        return
    with out:
        whole = with_batch_of_all(config, ranks.world_size) if given else config
        out.write_text(CONFIG_FILE, to_yaml(whole))
        _announce(talk, config, source, parts)
        for name, why in chosen.items():
            talk.say(f"  {name} {why}")
        shape = {"patch_size": parts["model"].student.backbone.patch_size, "precision": parallel.precision}
        watch = RunWatch(out, talk, config, source, **shape, start=start) if ranks.main else Follower()
        with watch:
            result = train(path, **parts, **watch.callbacks(ranks))
        if result.teacher is None:  # the main process has the whole model, and writes it
            return
        batch = config.data.batch_size * ranks.world_size
        _export(result.teacher, path, config, source, result.step, result.images, batch)
        watch.write_report()
        manifest = out.finish(rows=result.images, steps=result.step, metrics=_finite(result.metrics))
    talk.say(
        f"{path}: {result.step} steps, {result.images:,} images in {result.seconds:.0f} s; model in {path / 'export'}"
    )
    talk.result(path, **result_fields(manifest))


def _before(path: Path, *, overwrite: bool) -> tuple[dict[str, Any] | None, int]:
    """What the run at `path` was begun with, and the step of its newest checkpoint; (None, 0) for a new one."""
    from dinov2cli.artifacts.manifest import recorded_config
    from dinov2cli.train.checkpoint import steps_done

    return (None, 0) if overwrite else (recorded_config(path), steps_done(path / "checkpoints"))


def _sample(ids: Any) -> list[Any]:
    """How many images there are and the names of some: enough to tell the copies of a set on two machines apart."""
    return [len(ids), *(ids[row] for row in range(0, len(ids), max(1, len(ids) // 1000)))]


def _restarted(talk: "Talk") -> bool:
    """Whether a launcher or scheduler has started this command again, so that what is there is its own work."""
    if not any(int(os.environ.get(f"{name}_RESTART_COUNT", "0")) for name in ("TORCHELASTIC", "SLURM")):
        return False
    talk.say("started again: --overwrite has been done, the run goes on")
    return True


def _prepare(
    data: str, config: "PretrainConfig", parallel: "Parallel", before: tuple[Any, int], *, dry_run: bool
) -> tuple[Any, ...]:
    """What one rank can do by itself: images, resolved settings with the reasons of what was chosen, the arguments of
    `train`, the step to go on from, and what names the run in its manifest."""
    from dinov2cli.cli.assembly import assemble, batch_per_rank, identity_of, resolve_automatic
    from dinov2cli.data.source import open_source
    from dinov2cli.kernels.dispatch import choices

    choices(parallel.device)  # a back end that was asked for and is not there is told before anything is done
    recorded, start = before
    source = open_source(data)
    config = batch_per_rank(config, parallel.world_size)
    config, chosen = resolve_automatic(config, len(source), parallel.world_size, recorded)
    parts = assemble(config, source, parallel, dry_run=dry_run, fresh=not start)
    inputs = [source.fingerprint(), *parts.pop("model_inputs")]
    identity = identity_of(config, parallel.world_size, recorded)
    return config, chosen, source, parts, start, {"config": identity, "seed": config.seed, "inputs": inputs}


def _export(
    backbone: Any, path: Path, config: "PretrainConfig", source: "ImageSource", steps: int, images: int, batch: int
) -> None:
    from dinov2cli.cli.assembly import final_size, preprocess_of
    from dinov2cli.models.export import save_hf

    size = final_size(config)
    card = (
        f"Trained by `dinov2 pretrain` for {steps:,} steps ({images:,} images) on `{source.spec}` "
        f"({len(source):,} images), at {size} pixels with batch {batch}. "
        "These are the weights of the EMA teacher."
    )
    prepared = preprocess_of(config)
    save_hf(backbone, path / "export", resize=prepared.resize, crop=prepared.crop, card=card)


def _plan(config: "PretrainConfig", source: "ImageSource", parts: dict[str, Any]) -> dict[str, Any]:
    from dinov2cli.cli.assembly import total_steps
    from dinov2cli.cli.watch import files_of
    from dinov2cli.models.flops import step_flops

    c, student = config, parts["model"].student
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in student.named_children()}
    patches = (c.crops.global_size // student.backbone.patch_size) ** 2
    heads = c.heads.model_dump(exclude={"untied", "freeze_gain"})
    crops = c.crops.model_dump(include={"global_size", "local_size", "local_number"})
    masked = 2 * patches * c.masks.probability * (c.masks.ratio_min + c.masks.ratio_max) / 2
    flops = step_flops(student.backbone, **heads, **crops, masked=masked, drop_path=c.model.drop_path)["total"]
    steps, total, world = total_steps(parts), sum(counts.values()), parts["parallel"].world_size
    images = None if steps is None else sum(phase.length.total * phase.batch_size for phase in parts["phases"]) * world
    return {
        "images": len(source),
        "parameters": total,
        **{f"parameters of {name}": count for name, count in counts.items()},
        "GFLOP per image": round(flops / 1e9, 2),
        "device": str(parts["parallel"].device),
        "precision": f"{parts['parallel'].precision} ({parts['parallel'].reason})",
        "ranks": parts["parallel"].world_size,
        "batch size": c.data.batch_size * parts["parallel"].world_size,
        "steps": steps if steps is not None else c.train.budget,
        "epochs": None if images is None else round(images / max(len(source), 1), 2),
        **_footprint(c, parts, masked),
        "files": files_of(c),
    }


def _footprint(config: "PretrainConfig", parts: dict[str, Any], masked: float) -> dict[str, float]:
    """Modelled memory of a rank, and what it sends in a step, for the run's own phase."""
    from dinov2cli.kernels.attention import PLAIN_TOKENS
    from dinov2cli.train.footprint import footprint
    from dinov2cli.train.sizes import Batch, Layout, sizes_of

    c, parallel, student = config, parts["parallel"], parts["model"].student
    sharding = parallel.sharding
    per_node = sharding.shard_ranks if sharding.kind == "hybrid" else parallel.ranks_per_node
    return footprint(
        sizes_of(student.backbone, student.dino_head, student.ibot_head),
        Batch(
            images=c.data.batch_size,
            **c.crops.model_dump(include={"global_size", "local_size", "local_number"}),
            masked=masked,
            precision=parallel.precision,
            accumulate=c.train.accumulate,
            checkpointing=student.backbone.activation_checkpointing,
            plain_tokens=PLAIN_TOKENS if parallel.device.type == "cpu" and parallel.precision == "bf16" else 0,
        ),
        Layout(
            sharding="ddp" if sharding.kind == "none" else sharding.kind,
            ranks=parallel.world_size,
            per_node=per_node,
            reshard=sharding.reshard_after_forward,
        ),
        iterations=c.loss.sinkhorn_iterations,
        koleo_global=c.koleo.scope == "global",
    )


def _announce(talk: "Talk", config: "PretrainConfig", source: "ImageSource", parts: dict[str, Any]) -> None:
    from dinov2cli.kernels.dispatch import summary

    parallel, student = parts["parallel"], parts["model"].student
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    talk.say(
        f"pretrain {config.model.arch} ({millions:.1f} M parameters with heads) on {len(source):,} images, "
        f"{_place(parallel)}, {parallel.precision} ({parallel.reason})"
    )
    talk.say(f"  kernels: {summary(parallel.device)}")
    if config.model.init_from is not None:
        names = len(student.backbone.state_dict())
        talk.say(
            f"weights of {config.model.init_from}: all {names} of the backbone taken, none missing or unexpected; "
            "heads start afresh"
        )
    if parallel.device.type == "cpu" and student.backbone.embed_dim >= 384 and config.crops.global_size >= 200:
        talk.warn("no GPU is used: a step takes many seconds at this size; `--config tiny-cpu` is made for CPUs")


def _place(parallel: Any) -> str:
    """Where a run computes, in words: 'cpu', or '8 ranks of cuda, fsdp'."""
    if parallel.world_size == 1 and not parallel.sharding.sharded:
        return str(parallel.device)
    kind = parallel.sharding.kind
    over = f" over {parallel.sharding.shard_ranks} each" if kind == "hybrid" else ""
    return f"{parallel.world_size} rank{'s' * (parallel.world_size > 1)} of {parallel.device.type}, {kind}{over}"


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {
        key: round(value, 6)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
