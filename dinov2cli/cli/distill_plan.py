"""What a distillation costs and what one should know of it, for --dry-run and the first lines of a run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.config import DistillConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.open_teacher import OpenedTeacher
    from dinov2cli.train.parallel import Parallel


def parameters(module: Any) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())


def facts(
    config: "DistillConfig",
    source: "ImageSource",
    parallel: "Parallel",
    opened: "OpenedTeacher",
    students: Mapping[str, Any],
    objective: Any,
) -> dict[str, Any]:
    """Teacher, students (by name) and their operations per image of a step; bytes of a cache of tokens."""
    teacher, whole = opened.teacher, parameters(opened.teacher.network)
    chosen = _chosen_patches(config, students)
    looking = _teacher_flops(config, opened, max(chosen.values(), default=0) if objective.needs_prototypes else 0)
    learning = {name: _student_flops(config, student, opened, chosen[name]) for name, student in students.items()}
    said: dict[str, Any] = {
        "images": len(source),
        "teacher": f"{opened.name} (width {teacher.embed_dim}, patch {teacher.network.patch_size})",
        "parameters of the teacher": whole,
        "GFLOP of the teacher per image": _giga(looking),
        "teacher's heads": opened.reason,
    }
    for name, student in students.items():
        of, own = (f" of {name}" if name else ""), parameters(student.backbone)
        model = config.learners()[name]
        said |= {
            f"student{of and ' ' + name}": f"{model.arch} (width {student.backbone.embed_dim}, "
            f"depth {student.backbone.depth}, patch {student.backbone.patch_size})",
            f"parameters{of}": own,
            f"share of the teacher's parameters{of}": round(own / max(whole, 1), 4),
            f"parameters with heads{of}": parameters(student),
            f"GFLOP per image{of}": _giga(learning[name]),
        }
    said |= _memory(config, parallel, opened, students, chosen)
    said["teacher's share of the operations"] = round(looking / (looking + sum(learning.values())), 4)
    if config.teacher.cache:
        from dinov2cli.cli.assembly_distill import cache_shape
        from dinov2cli.train.teacher_cache import bytes_needed

        said["teacher's share after all views are kept"] = 0.0
        said["bytes of the cache"] = bytes_needed(**cache_shape(config, source, opened))
    if found := notes(config, opened, students):
        said["note"] = "; ".join(found)
    return said


def notes(config: "DistillConfig", opened: "OpenedTeacher", students: Mapping[str, Any]) -> list[str]:
    """What is allowed but probably not meant."""
    found = []
    whole = parameters(opened.teacher.network)
    for name, student in students.items():
        if (own := parameters(student.backbone)) > whole:
            found.append(
                f"the student{' ' + name if name else ''} is larger than its teacher ({own:,} and {whole:,} "
                "parameters): it can hardly become better than that"
            )
    if opened.heads is not None and opened.centering not in (None, config.loss.centering):
        found.append(
            f"loss.centering is {config.loss.centering}, the teacher's heads were trained with {opened.centering}"
        )
    return found


def _memory(
    config: "DistillConfig",
    parallel: "Parallel",
    opened: "OpenedTeacher",
    students: Mapping[str, Any],
    chosen: Mapping[str, int],
) -> dict[str, float]:
    """Modelled memory of a rank, for the run's own phase."""
    from dinov2cli.cli.assembly import recomputes
    from dinov2cli.cli.assembly_sizes import batch_of, layout_of
    from dinov2cli.models.vit import VisionTransformer
    from dinov2cli.train.footprint import memory_facts
    from dinov2cli.train.memory import distillation_memory
    from dinov2cli.train.sizes import sizes_of

    teacher = opened.teacher
    size = teacher.image_size or config.crops.global_size
    narrow = isinstance(teacher.network, VisionTransformer) and config.teacher.precision != "fp32"
    parts = distillation_memory(
        [sizes_of(student.backbone, student.dino_head, student.ibot_head) for student in students.values()],
        [
            replace(
                batch_of(config, parallel, masked=chosen[name], checkpointing=recomputes(config, parallel)),
                local_number=config.crops.local_number if config.loss.dino_weight else 0,
            )
            for name in students
        ],
        layout_of(parallel),
        teacher=parameters(teacher),
        teacher_tokens=2 * teacher.embed_dim * (1 + (size // teacher.network.patch_size) ** 2),
        teacher_bytes=2 if narrow and parallel.precision != "fp32" and not parallel.sharding.sharded else 4,
    )
    return memory_facts(parts)


def _chosen_patches(config: "DistillConfig", students: Mapping[str, Any]) -> dict[str, int]:
    """Patches of both global crops that count in the iBOT term, for each student."""
    loss, size = config.loss, config.crops.global_size
    if not loss.ibot_weight:
        return dict.fromkeys(students, 0)
    grids = {name: (size // student.backbone.patch_size) ** 2 for name, student in students.items()}
    return {name: 2 * max(1, round(loss.ibot_share * grid)) for name, grid in grids.items()}


def _teacher_flops(config: "DistillConfig", opened: "OpenedTeacher", chosen: int) -> float:
    """Of the teacher's forward pass over both global crops of an image, with its own heads."""
    from dinov2cli.models.flops import backbone_flops, frozen_teacher_flops, heads_flops
    from dinov2cli.models.vit import VisionTransformer

    teacher = opened.teacher
    size = teacher.image_size or config.crops.global_size
    if isinstance(teacher.network, VisionTransformer):
        look = float(backbone_flops(teacher.network, size))
    else:  # of an architecture that is not known here: every weight meets every token
        look = 2.0 * parameters(teacher.network) * (1 + (size // teacher.network.patch_size) ** 2)
    heads = None if opened.heads is None else heads_flops(teacher.embed_dim, **_sizes(opened.heads))
    return sum(frozen_teacher_flops(look, heads, chosen).values())


def _student_flops(config: "DistillConfig", student: Any, opened: "OpenedTeacher", chosen: int) -> float:
    """Of a student per image, its heads' learned targets included."""
    from dinov2cli.cli.distill_checks import head_options
    from dinov2cli.models.flops import distilled_student_flops, heads_flops

    crops, classes = config.crops, config.loss.dino_weight > 0
    heads = None
    if student.dino_head is not None:
        width = opened.teacher.embed_dim if student.adapted_heads else student.backbone.embed_dim
        heads = heads_flops(width, **_sizes(head_options(config, opened)))
    parts = distilled_student_flops(
        student.backbone,
        global_size=crops.global_size,
        local_size=crops.local_size,
        local_number=crops.local_number if classes else 0,
        heads=heads,
        classes=classes,
        patches=chosen,
        learned=student.adapted_heads,
    )
    return sum(parts.values())


def _sizes(heads: Mapping[str, Any]) -> dict[str, Any]:
    """What operations depend on."""
    return {name: size for name, size in heads.items() if name not in ("untied", "freeze_gain")}


def _giga(operations: float) -> float:
    return float(f"{operations / 1e9:.4g}")
