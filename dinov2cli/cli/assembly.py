"""From the settings of a pretraining recipe to the objects that `train` takes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.config import PretrainConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.schedules import RunLength

_SMALL = 128  # pixels


def assemble(config: "PretrainConfig", source: "ImageSource", *, dry_run: bool) -> dict[str, Any]:
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
