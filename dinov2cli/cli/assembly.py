"""From the settings of a training run to the objects that `train` takes: what pretraining and distillation share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.config import TrainingConfig
    from dinov2cli.config.training import ModelSection
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.parallel import Parallel
    from dinov2cli.train.schedules import RunLength

_SMALL = 128  # pixels
_LOOK = 500  # images


def batch_per_rank(config: "TrainingConfig", world_size: int) -> "TrainingConfig":
    """The settings with a batch given for all ranks together divided among them."""
    from dinov2cli.errors import UserError

    total = config.data.global_batch_size
    if total is None:
        return config
    batches = {"data.global_batch_size": total}
    batches |= {f"phases[{i}].batch_size": p.batch_size for i, p in enumerate(config.phases) if p.batch_size}
    for name, batch in batches.items():
        if batch % world_size:
            raise UserError(f"{name}: found {batch} images for {world_size} ranks, expected a multiple of {world_size}")
    content = config.model_dump()
    content["data"] |= {"batch_size": total // world_size, "global_batch_size": None}
    for phase in content["phases"]:
        phase["batch_size"] = phase["batch_size"] and phase["batch_size"] // world_size
    return type(config).model_validate(content)


def with_batch_of_all(config: "TrainingConfig", world_size: int) -> "TrainingConfig":
    """The opposite of `batch_per_rank`: settings that mean the same over any number of ranks, for config.yaml."""
    content = config.model_dump()
    content["data"] |= {"global_batch_size": config.data.batch_size * world_size}
    for phase in content["phases"]:
        phase["batch_size"] = phase["batch_size"] and phase["batch_size"] * world_size
    return type(config).model_validate(content)


def identity_of(config: "TrainingConfig", world_size: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """What makes this run the run it is, to be compared with `before`, what made the one that is at its place.

    The same command may go on over another number of ranks, and the same batch may be divided among them otherwise.
    """
    identity = config.identity()
    identity["data"]["ranks"] = world_size
    data = (before or {}).get("data")
    if isinstance(data, dict) and "batch_size" in data:
        batch, ranks = data["batch_size"], data.get("ranks", 1)
        if batch == config.data.batch_size or batch * ranks == config.data.batch_size * world_size:
            identity["data"] |= {"batch_size": batch, "ranks": ranks}
    if identity["data"]["ranks"] == 1:
        del identity["data"]["ranks"]
    return identity


def resolve_automatic(
    config: Any, values: Mapping[str, tuple[float, str]], before: dict[str, Any] | None = None
) -> tuple[Any, dict[str, str]]:
    """The settings with every `auto` replaced by its (value, reason) in `values`, by dotted name, and the initial
    models' paths made absolute; and for each `auto` what was chosen and why.

    A run that goes on keeps what was chosen `before`, as its identity has it.
    """
    from dinov2cli.cli.frame import canonical_model

    content, chosen = config.model_dump(), {}
    for model in (content["model"], *content.get("students", [])):
        if model["init_from"] is not None:
            model["init_from"] = canonical_model(model["init_from"])
    for name, (value, reason) in values.items():
        section, key = name.split(".")
        if content[section][key] == "auto":
            if before is not None and (kept := before.get(section, {}).get(key)) is not None:
                value, reason = kept, "as this run began"
            content[section][key] = value
            chosen[name] = f"auto, {value:,g}: {reason}"
    return type(config).model_validate(content), chosen


def steps_of(config: "TrainingConfig", images: int, world_size: int) -> int | None:
    """Steps of the run's own phase; None while a budget in time leaves them open."""
    return _length(config.train.steps, config.train.budget, images, config.data.batch_size * world_size).total


def parallel_of(config: "TrainingConfig", *, dry_run: bool = False, planned: int | None = None) -> "Parallel":
    """Meet the ranks of the launch as the settings say; for a dry run only plan for them, or for `planned` ones."""
    import os

    from dinov2cli.train.parallel import setup

    if dry_run and planned is None:
        planned = int(os.environ.get("WORLD_SIZE", "1"))
    settings = config.parallel.model_dump()
    return setup(config.device, config.train.precision, **settings, planned=planned if dry_run else None)


def training_arguments(
    config: "TrainingConfig", source: "ImageSource", parallel: "Parallel", *, dry_run: bool, **settings: Any
) -> dict[str, Any]:
    """What `train` takes beside models and method. `settings` are further ones of `train.step.Settings`."""
    from dinov2cli.data.augment import Augment
    from dinov2cli.train.step import Settings

    c = config
    return {
        "make_optimizer": _optimizer_maker(c),
        "phases": phases(c, source, parallel, dry_run=dry_run),
        "settings": Settings(
            seed=c.seed,
            clip=c.optim.clip or None,
            accumulate=c.train.accumulate,
            graphs=c.train.compile == "graphs",
            **settings,
        ),
        "augment": Augment(**c.augment.model_dump()),
        "parallel": parallel,
        "checkpoint_every": c.checkpoint.every,
        "keep": c.checkpoint.keep,
        "keep_every": c.checkpoint.keep_every,
        "save_in_background": c.checkpoint.background,
        "log_every": c.log.every,
        "eval_every": c.eval.every,
        "max_bad_steps": c.train.max_bad_steps,
    }


def recomputes(config: "TrainingConfig", parallel: "Parallel") -> bool:
    """Whether activations are computed again in the backward pass. Raises UserError where CUDA graphs cannot work."""
    from dinov2cli.train.graphs import check_graphs

    recompute = config.train.activation_checkpointing or parallel.activation_checkpointing
    if config.train.compile == "graphs":
        check_graphs(
            parallel.device,
            world_size=parallel.world_size,
            sharded=parallel.sharding.sharded,
            accumulate=config.train.accumulate,
            recompute=recompute,
        )
    return recompute


def _optimizer_maker(config: "TrainingConfig") -> Any:
    from dinov2cli.train.optim import build_optimizer

    names = ("layerwise_decay", "patch_embed_lr", "beta1", "beta2")
    options = {name: getattr(config.optim, name) for name in names}
    return lambda student: build_optimizer(student, depth=student.backbone.depth, **options)


def phases(config: "TrainingConfig", source: "ImageSource", parallel: "Parallel", *, dry_run: bool) -> list[Any]:
    """The run's own phase, then those of `phases:`; sizes they leave out are those of the phase before."""
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.data.bad import BadImages
    from dinov2cli.data.crops import MultiCrop
    from dinov2cli.data.loader import CropLoader
    from dinov2cli.train.phase import Phase

    c, crops, batch, world_size = config, config.crops.model_dump(), config.data.batch_size, parallel.world_size
    made: list[Phase] = []
    for index, section in enumerate([None, *c.phases]):
        if section is not None:
            batch = section.batch_size or batch
            crops |= {k: v for k in ("global_size", "local_size") if (v := getattr(section, k)) is not None}
        seed = c.seed + index * 0x9E3779B1  # other crops and another order than in the phase before
        steps, budget = (c.train.steps, c.train.budget) if section is None else (section.steps, section.budget)
        loader: Any = None  # a dry run iterates nothing
        if not dry_run:
            loader = CropLoader(
                source,
                crop=MultiCrop(**crops),
                batch_size=batch,
                seed=seed,
                workers=workers_for(c.workers),
                rank=parallel.rank,
                world_size=world_size,
                bad=BadImages(c.data.max_bad_fraction),
                scaled_decode=c.data.scaled_decode,
                shuffle=c.data.shuffle,
                window=c.data.window,
                max_deaths=c.data.max_worker_deaths,
                pin=parallel.device.type == "cuda",
                views=getattr(c.data, "views", None),
            )
        made.append(
            Phase(
                schedules=_schedules(c, batch * world_size, 1.0 if section is None else section.lr_scale),
                length=_length(steps, budget, len(source), batch * world_size),
                loader=loader,
                batch_size=batch,
                global_size=crops["global_size"],
                seed=seed,
            )
        )
    return made


def _schedules(config: Any, total_batch: int, scale: float) -> Any:
    from dinov2cli.train.schedules import Schedules, scaled_lr

    optim, loss, average = config.optim, config.loss, config.moving_average
    return Schedules(
        lr=scaled_lr(optim.lr, total_batch, optim.reference_batch) * scale,
        min_lr=min(optim.min_lr, optim.lr),
        warmup=float(optim.warmup),
        freeze_last_layer=optim.freeze_last_layer,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        momentum=float(average.momentum),
        momentum_end=average.momentum_end,
        teacher_temperature_start=float(loss.teacher_temperature_start),
        teacher_temperature=float(loss.teacher_temperature),
        teacher_temperature_warmup=loss.teacher_temperature_warmup,
    )


def overrides(config: "TrainingConfig", model: "ModelSection | None" = None) -> dict[str, Any]:
    """Arguments of the backbone that `model` (default: the recipe's) sets over those of the architecture."""
    m = model or config.model
    asked = {"patch_size": m.patch_size, "num_register_tokens": m.registers, "ffn": m.ffn}
    asked |= {"embed_dim": m.embed_dim, "depth": m.depth, "num_heads": m.num_heads}
    own = {} if m.layerscale is None else {"layerscale": m.layerscale or None}
    return {key: value for key, value in asked.items() if value is not None} | {
        **own,
        "img_size": config.crops.global_size,
        "drop_path": m.drop_path,
        "drop_path_uniform": m.drop_path_uniform,
    }


def initial_backbone(
    config: "TrainingConfig", source: "ImageSource", *, model: "ModelSection | None" = None, look: bool = True
) -> tuple[Any, list[dict[str, Any]]]:
    """The backbone that training starts from, and the manifest's entry of the model it continues, if any.

    `model` says which (default: the recipe's). Without `look` no image is read, and a structured start left out: enough
    for a plan or a checkpoint to be loaded.
    """
    import torch

    from dinov2cli.cli.frame import model_input
    from dinov2cli.errors import UserError
    from dinov2cli.models.initial import structured_init
    from dinov2cli.models.load import load_model
    from dinov2cli.models.registry import architecture, build
    from dinov2cli.models.vit import patch_advice

    m = model or config.model
    loaded = None if m.init_from is None else load_model(m.init_from)
    patch = loaded.backbone.patch_size if loaded else m.patch_size or architecture(m.arch)["patch_size"]
    for name, size in crop_sizes(config).items():
        if size % patch:
            raise UserError(f"{name} {size} {patch_advice(size, patch)}")
    if loaded is None:
        backbone = build(m.arch, seed=config.seed, **overrides(config, m))
        if m.init == "structured" and look:
            structured_init(backbone, _first_look(config, source), torch.Generator().manual_seed(config.seed))
        return backbone, []
    backbone = loaded.backbone.train()
    backbone.set_drop_path(m.drop_path, uniform=m.drop_path_uniform)
    return backbone, [model_input(str(m.init_from), loaded.fingerprint)]


def crop_sizes(config: "TrainingConfig", *, local: bool = True) -> dict[str, int]:
    """Sides in pixels of all crops of a run, by the name of their setting; without `local`, of the global ones."""
    crops = config.crops
    names = ("global_size", "local_size") if local and crops.local_number else ("global_size",)
    sizes: dict[str, int] = {f"crops.{name}": getattr(crops, name) for name in names}
    for index, phase in enumerate(config.phases):
        own = {f"phases[{index}].{name}": getattr(phase, name) for name in names}
        sizes |= {name: size for name, size in own.items() if size is not None}
    return sizes


def _first_look(config: "TrainingConfig", source: "ImageSource") -> Any:
    """Normalised float images [n, 3, S, S], spread over the source, from which the patch projection starts."""
    import torch

    from dinov2cli.data.bad import BadImage
    from dinov2cli.data.decode import decode_image, resize_center_crop
    from dinov2cli.errors import InputError

    size, step = config.crops.global_size, max(1, -(-len(source) // _LOOK))
    crops = []
    for row in range(0, len(source), step):
        try:
            crops.append(resize_center_crop(decode_image(source.read(row), name=source.name(row)), size, size))
        except BadImage:  # the training loader counts and names it
            continue
    if not crops:
        raise InputError(f"{source.spec}: none of the images looked at can be read")
    return preprocess_of(config).normalize(torch.stack(crops))


def _length(steps: int | None, budget: str | None, images: int, total_batch: int) -> "RunLength":
    from dinov2cli.train.schedules import Budget, RunLength, parse_budget

    return RunLength.of(Budget(steps=steps) if steps else parse_budget(budget or "100 epochs"), total_batch, images)


def final_size(config: "TrainingConfig") -> int:
    """Pixels of the global crops that training ends with."""
    sizes = [phase.global_size for phase in config.phases if phase.global_size is not None]
    return sizes[-1] if sizes else config.crops.global_size


def preprocess_of(config: "TrainingConfig", size: int | None = None) -> Any:
    """How images are prepared for the trained model: the crop it was trained at, with the paper's margin around it.

    `size` in pixels, by default what training ends with.

    Small images (digits, tiles) fill their frame, so models of small crops see them whole.
    """
    from dinov2cli.models.preprocess import Preprocess

    size = size or final_size(config)
    return Preprocess(resize=size if size < _SMALL else round(size * 256 / 224), crop=size)
