"""What cannot work in a distillation, found before anything begins."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.errors import UserError

if TYPE_CHECKING:
    from dinov2cli.config import DistillConfig
    from dinov2cli.train.open_teacher import OpenedTeacher
    from dinov2cli.train.parallel import Parallel


def base_model(spec: str) -> dict[str, Any]:
    """What the header of a model card says of the teacher `spec`: its name on the hub. Nothing of a teacher on disk,
    for a directory's name there would be a link to nowhere; the card's text names it."""
    from dinov2cli.models.hub import parse_hub

    name = spec.removeprefix("transformers:")
    hub = None if Path(name).expanduser().exists() else parse_hub(name)
    return {} if hub is None else {"base_model": hub[0]}


def check_place(spec: str, out: Path) -> None:
    """Raise UserError where the run at `out` and the teacher `spec` would lie in each other."""
    from dinov2cli.train.teacher_heads import training_run

    given = Path(spec.removeprefix("transformers:")).expanduser()
    if not given.exists():
        return
    run = training_run(str(given))
    teacher, here = given.resolve() if run is None else run.path, out.expanduser().resolve()
    if here == teacher or teacher in here.parents or here in teacher.parents:
        how = "is" if here == teacher else "is inside" if teacher in here.parents else "holds"
        raise UserError(f"-o {out} {how} the teacher {spec}; choose another place for the student")


def check_cache(config: "DistillConfig", parallel: "Parallel") -> None:
    """Raise UserError where the teacher's tokens cannot be kept."""
    if config.teacher.cache and parallel.world_size > 1:
        raise UserError(
            f"teacher.cache: found {parallel.world_size} ranks, expected one process, which alone writes the tokens; "
            "set teacher.cache=false"
        )


def check_fit(config: "DistillConfig", opened: "OpenedTeacher", backbone: Any) -> None:
    """Raise UserError unless the student `backbone` can be trained on the teacher's tokens."""
    from dinov2cli.cli.assembly import crop_sizes

    loss, teacher = config.loss, opened.teacher
    for name, size in crop_sizes(config, local=False).items():
        teacher.check(size, backbone.patch_size)
        grids = {
            "student": size // backbone.patch_size,
            "teacher": (teacher.image_size or size) // teacher.network.patch_size,
        }
        for whose, side in grids.items():
            if loss.gram_weight and side < 2:
                raise UserError(
                    f"loss.gram_weight: {name} {size} gives the {whose} 1 patch, expected 4 or more, "
                    "for it compares patches with each other; use larger crops or loss.gram_weight=0"
                )
    learned = loss.needs_prototypes and opened.heads is None
    compared = "loss.feature_weight" if loss.feature_weight else "teacher.heads=learned" if learned else ""
    if compared and config.teacher.adapter == "none" and backbone.embed_dim != teacher.embed_dim:
        raise UserError(
            f"teacher.adapter=none: the student's tokens are {backbone.embed_dim} wide, the teacher's "
            f"{teacher.embed_dim}, and {compared} compares them; use teacher.adapter=linear"
        )


def head_options(config: "DistillConfig", opened: "OpenedTeacher") -> dict[str, Any]:
    """Sizes of the students' heads: as set, with the teacher's numbers of prototypes where its heads are taken.

    Raises UserError where they are set to others.
    """
    own = config.heads.model_dump()
    if opened.heads is None:
        return own
    dino = opened.heads["prototypes"]
    ibot = opened.heads.get("ibot_prototypes") or dino
    cure = "leave it out, or set teacher.heads=learned"
    if own["prototypes"] != dino:
        raise UserError(f"heads.prototypes: found {own['prototypes']}, the teacher's head has {dino}; {cure}")
    if own["ibot_prototypes"] not in (None, ibot):
        raise UserError(f"heads.ibot_prototypes: found {own['ibot_prototypes']}, the teacher's head has {ibot}; {cure}")
    if not own["untied"] and ibot != dino:
        raise UserError(
            f"heads.untied=false: the teacher has {dino} prototypes for class tokens and {ibot} for patches, which one "
            "head cannot match; set heads.untied=true, or teacher.heads=learned"
        )
    return own | {"ibot_prototypes": ibot if own["untied"] else None}
