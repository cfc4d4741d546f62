"""From the settings of a pretraining recipe to the objects that `train` takes, and what to say of them."""

from typing import TYPE_CHECKING, Any, ClassVar

from dinov2cli.cli.training import Assembly, Place, place_of, say_initial

if TYPE_CHECKING:
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.parallel import Parallel


def assemble(config: Any, source: "ImageSource", parallel: "Parallel", place: Place) -> "PretrainAssembly":
    """The assembly of a pretraining run."""
    from dinov2cli.cli.assembly import initial_backbone, recomputes, resolve_automatic, steps_of, training_arguments
    from dinov2cli.train.automatic import automatic
    from dinov2cli.train.graphs import compile_blocks
    from dinov2cli.train.method import SelfDistillation
    from dinov2cli.train.network import build_ssl_model

    images, world_size = len(source), parallel.world_size
    own = None if config.heads.prototypes == "auto" else config.heads.prototypes
    values = automatic(config.data.batch_size * world_size, images, steps_of(config, images, world_size), own)
    c, chosen = resolve_automatic(config, values, place.recorded)
    recompute = recomputes(c, parallel)
    backbone, inputs = initial_backbone(c, source, look=not (place.resumed or place.dry_run))
    model = build_ssl_model(backbone, **c.heads.model_dump(), centering=c.loss.centering, seed=c.seed)
    model.student.backbone.activation_checkpointing = recompute
    if c.train.compile:
        compile_blocks([model.student.backbone, model.teacher.backbone])
    arguments = training_arguments(c, source, parallel, dry_run=place.dry_run, depth_scope=c.drop_path.scope)
    ratio = (c.masks.ratio_min, c.masks.ratio_max)
    method = SelfDistillation(_objective(c), mask_probability=c.masks.probability, mask_ratio=ratio)
    arguments |= {"models": {"": model}, "method": method}
    return PretrainAssembly(c, source, parallel, chosen, arguments, inputs)


def _objective(config: "PretrainConfig") -> Any:
    from dinov2cli.train.ssl import Objective

    loss = config.loss
    return Objective(
        dino_weight=loss.dino_weight,
        ibot_weight=loss.ibot_weight,
        koleo_weight=loss.koleo_weight,
        student_temperature=loss.student_temperature,
        sinkhorn_iterations=loss.sinkhorn_iterations,
        koleo_scope=config.koleo.scope,
    )


class PretrainAssembly(Assembly):
    """A pretraining run."""

    label: ClassVar[str] = "pretrain"

    @property
    def student(self) -> Any:
        """Backbone and heads."""
        return self.arguments["models"][""].student

    def plan(self) -> dict[str, Any]:
        """Parameters, operations, length, memory and files."""
        from dinov2cli.cli.watch import files_of
        from dinov2cli.models.flops import step_flops

        c, student = self.config, self.student
        counts = {name: sum(p.numel() for p in child.parameters()) for name, child in student.named_children()}
        patches = (c.crops.global_size // student.backbone.patch_size) ** 2
        heads = c.heads.model_dump(exclude={"untied", "freeze_gain"})
        crops = c.crops.model_dump(include={"global_size", "local_size", "local_number"})
        masked = 2 * patches * c.masks.probability * (c.masks.ratio_min + c.masks.ratio_max) / 2
        flops = step_flops(student.backbone, **heads, **crops, masked=masked, drop_path=c.model.drop_path)["total"]
        return {
            "images": len(self.source),
            "parameters": sum(counts.values()),
            **{f"parameters of {name}": count for name, count in counts.items()},
            "GFLOP per image": round(flops / 1e9, 2),
            **self.length(),
            **self._footprint(masked),
            "files": files_of(c),
        }

    def announce(self, talk: "Talk") -> None:
        """Model, images, place and kernels."""
        from dinov2cli.kernels.dispatch import summary

        c, parallel, student = self.config, self.parallel, self.student
        millions = sum(p.numel() for p in student.parameters()) / 1e6
        talk.say(
            f"pretrain {c.model.arch} ({millions:.1f} M parameters with heads) on {len(self.source):,} images, "
            f"{place_of(parallel)}, {parallel.precision} ({parallel.reason})"
        )
        talk.say(f"  kernels: {summary(parallel.device)}")
        say_initial(talk, student.backbone, c.model)
        if parallel.device.type == "cpu" and student.backbone.embed_dim >= 384 and c.crops.global_size >= 200:
            talk.warn("no GPU is used: a step takes many seconds at this size; `--config tiny-cpu` is made for CPUs")

    def card(self, training: str) -> tuple[str, dict[str, Any]]:
        """As of every pretraining run."""
        return f"Trained by `dinov2 pretrain` for {training}. These are the weights of the EMA teacher.", {}

    def _footprint(self, masked: float) -> dict[str, float]:
        """Modelled memory of a rank, and what it sends in a step, for the run's own phase."""
        from dinov2cli.cli.assembly_sizes import batch_of, layout_of
        from dinov2cli.train.footprint import footprint
        from dinov2cli.train.sizes import sizes_of

        c, student = self.config, self.student
        checkpointing = student.backbone.activation_checkpointing
        return footprint(
            sizes_of(student.backbone, student.dino_head, student.ibot_head),
            batch_of(c, self.parallel, masked=masked, checkpointing=checkpointing),
            layout_of(self.parallel),
            iterations=c.loss.sinkhorn_iterations,
            koleo_global=c.koleo.scope == "global",
        )
