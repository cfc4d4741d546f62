"""`dinov2 pretrain`: train a backbone by self-distillation, from a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options

if TYPE_CHECKING:
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.schedules import RunLength

_SMALL = 128  # pixels
_BUDGET = "Length of the run: 100 epochs, 20000 images, 300 steps, 30m."


def pretrain(
    data: options.Data,
    out: options.Out,
    config: options.Config = None,
    arch: Annotated[str | None, typer.Option("--arch", metavar="NAME", help="Architecture, as vits14.")] = None,
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
) -> None:
    """Train a backbone on images with the DINOv2 objective (DINO + iBOT + KoLeo).

    The run directory holds checkpoints, metrics.jsonl and, at the end, `export/`, which
    `transformers.AutoModel.from_pretrained` loads. The same command continues a stopped run.

    Examples:

    - `dinov2 pretrain photos/ -o run --config tiny-cpu`
    - `dinov2 pretrain curated/ -o run --budget "100 epochs" --set optim.lr=0.002`
    - `dinov2 pretrain photos/ -o run --dry-run`
    """
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig
    from dinov2cli.recipe import load_config

    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    flags = {
        "model.arch": arch,
        "train.budget": budget,
        "data.batch_size": batch_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    settings = load_config(PretrainConfig, recipe=config, sets=set_ or [], flags=flags)
    train_run(options.from_stdin(data), out, settings, talk, dry_run=dry_run, overwrite=overwrite)


def train_run(
    data: str,
    path: Path,
    config: "PretrainConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
) -> None:
    """Train one run directory from a resolved config; also what the demo calls."""
    from dinov2cli.artifacts.run import read_metrics
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.data.source import open_source
    from dinov2cli.recipe import to_yaml
    from dinov2cli.report.run import run_report
    from dinov2cli.train.checkpoint import steps_done
    from dinov2cli.train.loop import train

    source = open_source(data)
    parts = _assemble(config, source, dry_run=dry_run)
    inputs = [source.fingerprint(), *parts.pop("model_inputs")]
    identity = config.identity()
    if dry_run:
        state = check_output(path, "run", config=identity, inputs=inputs, overwrite=overwrite)
        talk.plan(f"pretrain {data}", {**_plan(config, source, parts), "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "run", config=identity, seed=config.seed, inputs=inputs, overwrite=overwrite)
    if out is None:
        return
    with out:
        out.write_text("config.yaml", to_yaml(config))
        total = parts["length"].total
        _announce(talk, config, source, parts)
        seen = steps_done(path / "checkpoints")
        with talk.progress("pretrain", total and total - seen, "steps") as advance:

            def on_metrics(line: Any, _total: int) -> None:
                nonlocal seen
                advance(int(line["step"]) - seen)
                seen = int(line["step"])

            result = train(path, **parts, on_metrics=on_metrics, on_message=talk.say)
        backbone = parts["model"].teacher.backbone
        _export(backbone, path, config, source, result.step, result.images)
        out.write_text("report.html", run_report(read_metrics(path), title=path.name))
        manifest = out.finish(rows=result.images, steps=result.step, metrics=_finite(result.metrics))
    talk.say(
        f"{path}: {result.step} steps, {result.images:,} images in {result.seconds:.0f} s; model in {path / 'export'}"
    )
    talk.result(path, **result_fields(manifest))


def _assemble(config: "PretrainConfig", source: "ImageSource", *, dry_run: bool) -> dict[str, Any]:
    """Build what `train` takes, from the settings."""
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.data.augment import Augment
    from dinov2cli.data.bad import BadImages
    from dinov2cli.data.crops import MultiCrop
    from dinov2cli.data.loader import CropLoader
    from dinov2cli.train.optim import build_optimizer
    from dinov2cli.train.parallel import setup
    from dinov2cli.train.schedules import Schedules, scaled_lr
    from dinov2cli.train.ssl import Objective, build_ssl_model

    c, optim, loss = config, config.optim, config.loss
    parallel = setup(c.device, c.train.precision)
    backbone, model_inputs = initial_backbone(c)
    heads = c.heads.model_dump()
    model = build_ssl_model(backbone, **heads, centering=loss.centering, seed=c.seed).to(parallel.device)
    total_batch = c.data.batch_size * parallel.world_size
    crops = MultiCrop(**c.crops.model_dump())
    loader = None
    if not dry_run:
        loader = CropLoader(
            source,
            crop=crops,
            batch_size=c.data.batch_size,
            seed=c.seed,
            workers=workers_for(c.workers),
            bad=BadImages(c.data.max_bad_fraction),
        )
    return {
        "model": model,
        "model_inputs": model_inputs,
        "objective": Objective(
            dino_weight=loss.dino_weight,
            ibot_weight=loss.ibot_weight,
            koleo_weight=loss.koleo_weight,
            student_temperature=loss.student_temperature,
            sinkhorn_iterations=loss.sinkhorn_iterations,
        ),
        "optimizer": build_optimizer(
            model.student,
            depth=backbone.depth,
            layerwise_decay=optim.layerwise_decay,
            patch_embed_lr=optim.patch_embed_lr,
            beta1=optim.beta1,
            beta2=optim.beta2,
        ),
        "schedules": Schedules(
            lr=scaled_lr(optim.lr, total_batch, optim.reference_batch),
            min_lr=optim.min_lr,
            warmup=optim.warmup,
            freeze_last_layer=optim.freeze_last_layer,
            weight_decay=optim.weight_decay,
            weight_decay_end=optim.weight_decay_end,
            momentum=c.teacher.momentum,
            momentum_end=c.teacher.momentum_end,
            teacher_temperature_start=loss.teacher_temperature_start,
            teacher_temperature=loss.teacher_temperature,
            teacher_temperature_warmup=loss.teacher_temperature_warmup,
        ),
        "length": _length(c, len(source), total_batch),
        "loader": loader,
        "augment": Augment(**c.augment.model_dump()),
        "batch_size": c.data.batch_size,
        "global_size": c.crops.global_size,
        "parallel": parallel,
        "seed": c.seed,
        "mask_probability": c.masks.probability,
        "mask_ratio": (c.masks.ratio_min, c.masks.ratio_max),
        "clip": optim.clip or None,
        "checkpoint_every": c.checkpoint.every,
        "keep": c.checkpoint.keep,
        "log_every": c.log.every,
        "eval_every": c.eval.every,
        "evaluate": _online_knn(c, source, parallel.precision) if c.eval.every and not dry_run else None,
    }


def _overrides(config: "PretrainConfig") -> dict[str, Any]:
    """Arguments of the backbone that the recipe sets over those of the architecture."""
    m = config.model
    asked = {"patch_size": m.patch_size, "num_register_tokens": m.registers, "ffn": m.ffn}
    own = {} if m.layerscale is None else {"layerscale": m.layerscale or None}
    return {key: value for key, value in asked.items() if value is not None} | {
        **own,
        "img_size": config.crops.global_size,
        "drop_path": m.drop_path,
        "drop_path_uniform": m.drop_path_uniform,
    }


def initial_backbone(config: "PretrainConfig") -> tuple[Any, list[dict[str, Any]]]:
    """The backbone that training starts from, and the manifest's entry of the model it continues, if any."""
    from dinov2cli.cli.frame import model_input
    from dinov2cli.errors import UserError
    from dinov2cli.models.load import load_model
    from dinov2cli.models.registry import architecture, build
    from dinov2cli.models.vit import patch_advice

    m, crops = config.model, config.crops
    loaded = None if m.init_from is None else load_model(m.init_from)
    patch = loaded.backbone.patch_size if loaded else m.patch_size or architecture(m.arch)["patch_size"]
    sizes = {"global_size": crops.global_size} | ({"local_size": crops.local_size} if crops.local_number else {})
    for name, size in sizes.items():
        if size % patch:
            raise UserError(f"crops.{name} {size} {patch_advice(size, patch)}")
    if loaded is None:
        return build(m.arch, seed=config.seed, **_overrides(config)), []
    backbone = loaded.backbone.train()
    backbone.set_drop_path(m.drop_path, uniform=m.drop_path_uniform)
    return backbone, [model_input(str(m.init_from), loaded.fingerprint)]


def _length(config: "PretrainConfig", images: int, total_batch: int) -> "RunLength":
    from dinov2cli.train.schedules import Budget, RunLength, parse_budget

    budget = (
        Budget(steps=config.train.steps) if config.train.steps else parse_budget(config.train.budget or "100 epochs")
    )
    return RunLength.of(budget, total_batch, images)


def _online_knn(config: "PretrainConfig", source: "ImageSource", precision: str) -> Any:
    from dinov2cli.evaluation.online import OnlineKnn

    return OnlineKnn(source, preprocess=preprocess_of(config), seed=config.seed, precision=precision)


def preprocess_of(config: "PretrainConfig") -> Any:
    """How images are prepared for the trained model: the crop it was trained at, with the paper's margin around it.

    Small images (digits, tiles) fill their frame, so models of small crops see them whole.
    """
    from dinov2cli.models.preprocess import Preprocess

    size = config.crops.global_size
    return Preprocess(resize=size if size < _SMALL else round(size * 256 / 224), crop=size)


def _export(
    backbone: Any, path: Path, config: "PretrainConfig", source: "ImageSource", steps: int, images: int
) -> None:
    from dinov2cli.models.export import save_hf

    size = config.crops.global_size
    card = (
        f"Trained by `dinov2 pretrain` for {steps:,} steps ({images:,} images) on `{source.spec}` "
        f"({len(source):,} images), at {size} pixels with batch {config.data.batch_size}. "
        "These are the weights of the EMA teacher."
    )
    prepared = preprocess_of(config)
    save_hf(backbone, path / "export", resize=prepared.resize, crop=prepared.crop, card=card)


def _plan(config: "PretrainConfig", source: "ImageSource", parts: dict[str, Any]) -> dict[str, Any]:
    from dinov2cli.models.flops import backbone_flops, head_flops

    c, student = config, parts["model"].student
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in student.named_children()}
    big, small = (backbone_flops(student.backbone, s) for s in (c.crops.global_size, c.crops.local_size))
    head = head_flops(
        student.backbone.embed_dim, c.heads.prototypes, c.heads.hidden, c.heads.bottleneck, c.heads.layers
    )
    patches = (c.crops.global_size // student.backbone.patch_size) ** 2
    masked = 2 * patches * c.masks.probability * (c.masks.ratio_min + c.masks.ratio_max) / 2
    # The student runs forward and backward (3 forwards' worth), the teacher forward on the global crops.
    flops = 3 * (2 * big + c.crops.local_number * small + (2 + c.crops.local_number + masked) * head)
    flops += 2 * big + (2 + masked) * head
    steps, total = parts["length"].total, sum(counts.values())
    images = None if steps is None else steps * c.data.batch_size
    return {
        "images": len(source),
        "parameters": total,
        **{f"parameters of {name}": count for name, count in counts.items()},
        "GFLOP per image": round(flops / 1e9, 2),
        "state memory (MiB)": round(total * 4 * 5 / 2**20, 1),
        "device": str(parts["parallel"].device),
        "precision": f"{parts['parallel'].precision} ({parts['parallel'].reason})",
        "batch size": c.data.batch_size,
        "steps": steps if steps is not None else c.train.budget,
        "epochs": None if images is None else round(images / max(len(source), 1), 2),
        "files": ["config.yaml", "metrics.jsonl", "log.txt", "checkpoints/", "export/", "report.html", "manifest.json"],
    }


def _announce(talk: "Talk", config: "PretrainConfig", source: "ImageSource", parts: dict[str, Any]) -> None:
    parallel, student = parts["parallel"], parts["model"].student
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    talk.say(
        f"pretrain {config.model.arch} ({millions:.1f} M parameters with heads) on {len(source):,} images, "
        f"{parallel.device}, {parallel.precision} ({parallel.reason})"
    )
    if parallel.device.type == "cpu" and student.backbone.embed_dim >= 384 and config.crops.global_size >= 200:
        talk.warn("no GPU is used: a step takes many seconds at this size; `--config tiny-cpu` is made for CPUs")


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in metrics.items() if isinstance(value, int | float)}
