"""What a distillation costs and what one should know of it, for --dry-run and the first lines of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.config import DistillConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.open_teacher import OpenedTeacher


def parameters(module: Any) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())


def facts(
    config: "DistillConfig", source: "ImageSource", opened: "OpenedTeacher", students: Mapping[str, Any], objective: Any
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


def _chosen_patches(config: "DistillConfig", students: Mapping[str, Any]) -> dict[str, int]:
    """Patches of both global crops that count in the iBOT term, for each student."""
    loss, size = config.loss, config.crops.global_size
    if not loss.ibot_weight:
        return dict.fromkeys(students, 0)
    grids = {name: (size // student.backbone.patch_size) ** 2 for name, student in students.items()}
    return {name: 2 * max(1, round(loss.ibot_share * grid)) for name, grid in grids.items()}


def _teacher_flops(config: "DistillConfig", opened: "OpenedTeacher", chosen: int) -> float:
    """Of the teacher's forward pass over both global crops of an image, with its own heads."""
    from dinov2cli.models.flops import backbone_flops, head_flops
    from dinov2cli.models.vit import VisionTransformer

    teacher = opened.teacher
    size = teacher.image_size or config.crops.global_size
    if isinstance(teacher.network, VisionTransformer):
        looking = 2.0 * backbone_flops(teacher.network, size)
    else:  # of an architecture that is not known here: every weight meets every token
        looking = 2.0 * 2 * parameters(teacher.network) * (1 + (size // teacher.network.patch_size) ** 2)
    if opened.heads is None:
        return looking
    h = opened.heads
    sizes = (h["hidden"], h["bottleneck"], h["layers"])
    ibot = head_flops(
        teacher.embed_dim,
        h.get("ibot_prototypes") or h["prototypes"],
        h["hidden"],
        h.get("ibot_bottleneck") or h["bottleneck"],
        h["layers"],
    )
    return looking + 2 * head_flops(teacher.embed_dim, h["prototypes"], *sizes) + chosen * ibot


def _student_flops(config: "DistillConfig", student: Any, opened: "OpenedTeacher", chosen: int) -> float:
    """Forward and backward (three passes' worth) of a student per image; with learned heads also the targets by their
    moving average."""
    from dinov2cli.models.flops import backbone_flops, head_flops

    crops, heads, loss = config.crops, config.heads, config.loss
    local = crops.local_number if loss.dino_weight else 0
    backbone = 2 * backbone_flops(student.backbone, crops.global_size)
    if local:
        backbone += local * backbone_flops(student.backbone, crops.local_size)
    if student.dino_head is None:
        return 3.0 * backbone
    width = opened.teacher.embed_dim if student.adapted_heads else student.backbone.embed_dim
    prototypes, ibot = int(heads.prototypes), heads.ibot_prototypes
    if opened.heads is not None:
        ibot = opened.heads.get("ibot_prototypes")
    dino_head = head_flops(width, prototypes, heads.hidden, heads.bottleneck, heads.layers)
    ibot_head = head_flops(
        width, ibot or prototypes, heads.hidden, heads.ibot_bottleneck or heads.bottleneck, heads.layers
    )
    passes = 4 if student.adapted_heads else 3
    dino = (3 * local + 2 * passes) * dino_head if loss.dino_weight else 0
    return 3.0 * backbone + dino + passes * chosen * ibot_head


def _giga(operations: float) -> float:
    return float(f"{operations / 1e9:.4g}")
