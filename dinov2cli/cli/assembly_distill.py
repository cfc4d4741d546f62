"""From the settings of a distillation recipe to the objects that `train` takes: teacher, students, method."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dinov2cli.cli.training import Assembly, Place, place_of, say_initial

if TYPE_CHECKING:
    from dinov2cli.artifacts.output import Output
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DistillConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.open_teacher import HeadChoice, OpenedTeacher
    from dinov2cli.train.parallel import Parallel
    from dinov2cli.train.teacher_cache import TokenCache

CACHE_FOLDER = "teacher-tokens"


def assemble(config: Any, source: "ImageSource", parallel: "Parallel", place: Place) -> "DistillAssembly":
    """The assembly of a distillation. Raises UserError and InputError for what cannot work, before anything begins."""
    from dinov2cli.cli.assembly import initial_backbone, recomputes, training_arguments
    from dinov2cli.cli.distill_checks import check_cache, check_fit, check_place, head_options
    from dinov2cli.cli.distill_report import check_comparison
    from dinov2cli.cli.frame import model_input
    from dinov2cli.train.distill import build_distill_model
    from dinov2cli.train.distillation import Distillation
    from dinov2cli.train.graphs import compile_blocks
    from dinov2cli.train.open_teacher import open_teacher

    section = config.teacher
    check_place(section.model, place.path)
    check_cache(config, parallel)
    heads: HeadChoice = section.heads if config.loss.needs_prototypes else "none"
    opened = open_teacher(section.model, heads=heads, image_size=section.image_size)
    c, chosen = _resolve(config, source, parallel, opened, place)
    if c.report.images:
        check_comparison(source, c.report.test)
    recompute, objective = recomputes(c, parallel), _objective(c)
    models, inputs = {}, [model_input(c.teacher.model, opened.fingerprint)]
    for name, model in c.learners().items():
        backbone, own = initial_backbone(c, source, model=model, look=not (place.resumed or place.dry_run))
        check_fit(c, opened, backbone)
        models[name] = build_distill_model(
            backbone,
            opened.teacher.embed_dim,
            objective,
            teacher_has_heads=opened.heads is not None,
            adapter=c.teacher.adapter != "none",
            heads=head_options(c, opened),
            centering=c.loss.centering,
            seed=c.seed,
        )
        backbone.activation_checkpointing = recompute
        inputs += own
    if c.train.compile:
        compile_blocks([model.student.backbone for model in models.values()])
    _compile_teacher(c, opened)
    method = Distillation(
        opened.teacher,
        objective,
        precision=_precision(c, parallel),
        shared=len(models) > 1,
        graphs=c.train.compile == "graphs",
    )
    arguments = training_arguments(c, source, parallel, dry_run=place.dry_run)
    arguments |= {"models": models, "method": method}
    return DistillAssembly(c, source, parallel, chosen, arguments, inputs, opened, place.path)


def _resolve(
    config: "DistillConfig", source: "ImageSource", parallel: "Parallel", opened: "OpenedTeacher", place: Place
) -> tuple[Any, dict[str, str]]:
    """Settings without `auto`: what the teacher decides, the rest as in pretraining."""
    from dinov2cli.cli.assembly import resolve_automatic, steps_of
    from dinov2cli.cli.frame import canonical_model
    from dinov2cli.train.automatic import automatic

    images, world_size = len(source), parallel.world_size
    asked = config.heads.prototypes
    own = opened.heads["prototypes"] if opened.heads else None if asked == "auto" else asked
    steps = steps_of(config, images, world_size)
    values: dict[str, tuple[float, str]] = dict(automatic(config.data.batch_size * world_size, images, steps, own))
    values["average.momentum"] = values.pop("teacher.momentum")
    if opened.heads is not None:
        values["heads.prototypes"] = (opened.heads["prototypes"], "as many as the teacher's heads have")
        if opened.temperature is not None:
            values["loss.teacher_temperature"] = (opened.temperature, "as the teacher's own training ended")
    name = "loss.teacher_temperature"
    end = values[name][0] if config.loss.teacher_temperature == "auto" else float(config.loss.teacher_temperature)
    start = (end, "the teacher is trained") if opened.heads else (min(end, 0.04), "no head is trained yet")
    values["loss.teacher_temperature_start"] = start
    content = config.model_dump()
    content["teacher"]["model"] = canonical_model(str(config.teacher.model))
    if config.loss.needs_prototypes:  # what "auto" came to: it tells the heads of this run from those of another
        content["teacher"]["heads"] = "run" if opened.heads else "learned"
    resolved, chosen = resolve_automatic(type(config).model_validate(content), values, place.recorded)
    if not config.loss.needs_prototypes:  # nothing follows from these
        chosen = {key: why for key, why in chosen.items() if not key.startswith(("heads.", "loss.teacher_"))}
    return resolved, chosen


def _objective(config: "DistillConfig") -> Any:
    from dinov2cli.train.distill import DistillObjective

    loss = config.loss
    names = ["dino_weight", "ibot_weight", "koleo_weight", "feature_weight", "gram_weight", "feature", "ibot_share"]
    names += ["student_temperature", "sinkhorn_iterations"]
    return DistillObjective(**{name: getattr(loss, name) for name in names}, koleo_scope=config.koleo.scope)


def _precision(config: "DistillConfig", parallel: "Parallel") -> str:
    """What the teacher computes in; that of the run unless asked."""
    from dinov2cli.device import choose_precision

    asked = config.teacher.precision
    return parallel.precision if asked == "auto" else choose_precision(asked, parallel.device, training=True)[0]


def _compile_teacher(config: "DistillConfig", opened: "OpenedTeacher") -> None:
    from dinov2cli.models.vit import VisionTransformer
    from dinov2cli.train.graphs import compile_blocks

    network = opened.teacher.network
    if config.teacher.compile and isinstance(network, VisionTransformer):
        compile_blocks([network])
    elif config.teacher.compile:
        network.compile()


def cache_shape(config: "DistillConfig", source: "ImageSource", opened: "OpenedTeacher") -> dict[str, int]:
    """Numbers that decide how large the cache is, see `TokenCache`."""
    grid = (opened.teacher.image_size or config.crops.global_size) // opened.teacher.network.patch_size
    width, views = opened.teacher.embed_dim, config.data.views or 1
    return {"images": len(source), "views": views, "crops": 2, "tokens": 1 + grid**2, "width": width}


class DistillAssembly(Assembly):
    """A distillation."""

    label: ClassVar[str] = "distill"

    def __init__(
        self,
        config: Any,
        source: "ImageSource",
        parallel: "Parallel",
        chosen: dict[str, str],
        arguments: dict[str, Any],
        inputs: list[dict[str, Any]],
        opened: "OpenedTeacher",
        path: Path,
    ) -> None:
        super().__init__(config, source, parallel, chosen, arguments, inputs)
        self._opened, self._path = opened, path
        self._cache: TokenCache | None = None

    def plan(self) -> dict[str, Any]:
        """Teacher, students, operations, length, cache and files."""
        from dinov2cli.cli.distill_plan import facts
        from dinov2cli.cli.watch import files_of

        models = {name: model.student for name, model in self.arguments["models"].items()}
        said = facts(self.config, self.source, self.parallel, self._opened, models, self.arguments["method"].objective)
        teacher = f"{_precision(self.config, self.parallel)}, {self.config.teacher.precision}"
        return {
            **said,
            "teacher's precision": teacher.removesuffix(", auto"),
            **self.length(),
            "files": [*files_of(self.config), *self._own_files()],
        }

    def announce(self, talk: "Talk") -> None:
        """Teacher, students, place, kernels, and what one should know."""
        from dinov2cli.cli.distill_plan import notes, parameters
        from dinov2cli.kernels.dispatch import summary

        c, parallel, opened = self.config, self.parallel, self._opened
        students = {name: model.student for name, model in self.arguments["models"].items()}
        sizes = [
            f"{name or model.arch} ({parameters(students[name].backbone) / 1e6:.2f} M parameters)"
            for name, model in c.learners().items()
        ]
        talk.say(
            f"distill {opened.name} ({parameters(opened.teacher.network) / 1e6:.2f} M parameters) into "
            f"{', '.join(sizes)} on {len(self.source):,} images, {place_of(parallel)}, {parallel.precision} "
            f"({parallel.reason})"
        )
        talk.say(f"  teacher's heads: {opened.reason}")
        talk.say(f"  kernels: {summary(parallel.device)}")
        for name, model in c.learners().items():
            say_initial(talk, students[name].backbone, model)
        for note in notes(c, opened, students):
            talk.warn(note)

    def begin(self, talk: "Talk") -> None:
        """The teacher's tokens on disk, where they are wanted."""
        from dinov2cli.train.teacher_cache import TokenCache

        c, opened = self.config, self._opened
        if not c.teacher.cache:
            return
        key = {
            "teacher": {name: value for name, value in opened.fingerprint.items() if name not in ("file", "heads")},
            "precision": _precision(c, self.parallel),
            "images": self.source.fingerprint(),
            "image_size": opened.teacher.image_size,
            "crops": c.crops.model_dump(),
            "augment": c.augment.model_dump(),
            "scaled": c.data.scaled_decode,
            "seed": c.seed,
        }
        self._cache = TokenCache(self._path / CACHE_FOLDER, **cache_shape(c, self.source, opened), key=key)
        if self._cache.restarted:
            talk.say("  the teacher's tokens that were kept are of other settings or damaged: they are made again")
        self.arguments["method"].cache = self._cache

    def card(self, training: str) -> tuple[str, dict[str, Any]]:
        """What it was distilled from."""
        from dinov2cli.cli.distill_checks import base_model

        text = (
            f"Distilled by `dinov2 distill` from `{self.config.teacher.model}` for {training}. "
            "These are the weights of the student's moving average."
        )
        return text, base_model(self.config.teacher.model)

    def compare(self, out: "Output", talk: "Talk", exports: Mapping[str, Path]) -> dict[str, float]:
        """Teacher and students side by side. What was kept of the teacher's tokens goes: nobody needs it any more."""
        import shutil

        from dinov2cli.cli.distill_report import write_side_by_side
        from dinov2cli.cli.frame import workers_for

        c = self.config
        if self._cache is not None:
            self._cache.close()
            shutil.rmtree(self._path / CACHE_FOLDER, ignore_errors=True)
        if not c.report.images:
            return {}
        del self._opened  # it is opened again, as anybody would
        return write_side_by_side(
            out,
            talk,
            c.teacher.model,
            exports,
            self.source,
            images=c.report.images,
            test=c.report.test,
            seed=c.seed,
            precision=self.parallel.precision,
            device=self.parallel.device,
            teacher_size=c.teacher.image_size,
            workers=workers_for(c.workers),
        )

    def _own_files(self) -> list[str]:
        from dinov2cli.cli.distill_report import COMPARISON_FILE, COMPARISON_MAPS

        files = [COMPARISON_FILE, COMPARISON_MAPS] if self.config.report.images else []
        return [*files, f"{CACHE_FOLDER}/ (until the end)"] if self.config.teacher.cache else files
