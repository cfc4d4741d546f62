"""A teacher's projection heads, out of the checkpoint of the run that trained it (METHOD §4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2cli.artifacts.manifest import Manifest, has_manifest, read_manifest
from dinov2cli.artifacts.output import file_sha256
from dinov2cli.errors import InputError
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.checkpoint import latest_checkpoint
from dinov2cli.train.stored import StoredBackbone, StoredTensors, stored_students

_CURE = "train without the teacher's heads (teacher.heads=learned)"
_MODULES = ("dino_head", "ibot_head")


class NoHeads(Exception):
    """There are no heads to take; its text says why."""


@dataclass(frozen=True)
class TrainingRun:
    """The run that a model came from; `student` is which of its students, "" where it trained one model alone."""

    path: Path
    manifest: Manifest
    student: str = ""


@dataclass(frozen=True)
class TeacherHeads:
    """Heads as they were trained, with the sizes to build others like them (the arguments of `network.build_heads`).

    `ibot_head` is None where the heads are tied. `temperature` and `centering` are what made targets of their logits
    at the end of the run, None where its settings do not say. `origin` says where they come from; `fingerprint` tells
    them from those of another checkpoint.
    """

    dino_head: ProjectionHead
    ibot_head: ProjectionHead | None
    sizes: dict[str, Any]
    temperature: float | None
    centering: str | None
    origin: str
    fingerprint: str


def training_run(spec: str) -> TrainingRun | None:
    """The run that the MODEL `spec` is, or is the export of; None for any other.

    Raises InputError for a manifest that cannot be read.
    """
    path = Path(spec).expanduser()
    if not path.is_dir():
        return None
    path = path.resolve()
    for run, student in ((path, ""), (path.parent, ""), (path.parent.parent, path.name)):
        exported = run / "export" / student if student else run / "export"
        if path in (run, exported) and has_manifest(run):
            manifest = read_manifest(run)
            return TrainingRun(run, manifest, student) if manifest.kind == "run" else None
    return None


def run_heads(run: TrainingRun, backbone: VisionTransformer) -> TeacherHeads:
    """The heads of the EMA teacher in the newest checkpoint of `run`, which belong to `backbone`, its export.

    `backbone` may be on the meta device: then it is not compared, and the heads are there as well. Raises NoHeads where
    there are none to take, InputError where the checkpoint is damaged, holds another backbone than the export, or
    heads with tensors missing.
    """
    checkpoint = latest_checkpoint(run.path / "checkpoints")
    if checkpoint is None:
        raise NoHeads(f"{run.path} has no checkpoint any more, and an export holds no heads")
    students = stored_students(checkpoint, cure=_CURE)
    if run.student not in students:
        raise NoHeads(f"{checkpoint} holds no student {run.student!r} (it holds {', '.join(students) or 'none'})")
    stored = {name: StoredTensors(checkpoint, name, name=run.student, cure=_CURE) for name in _MODULES}
    if not stored["dino_head"].shapes:
        raise NoHeads(f"{run.path} was trained without heads")
    _check_backbone(checkpoint, run, backbone)
    dino_head, ibot_head, sizes = _heads(checkpoint, stored, meta=backbone.device.type == "meta")
    _check_place(checkpoint, run, sizes.pop("in_dim"), backbone.embed_dim)
    config = run.manifest.config
    sizes["freeze_gain"] = bool(_setting(config, "heads", "freeze_gain"))
    temperature, centering = (_setting(config, "loss", key) for key in ("teacher_temperature", "centering"))
    which = "tied head" if ibot_head is None else "heads"
    return TeacherHeads(
        dino_head,
        ibot_head,
        sizes,
        float(temperature) if isinstance(temperature, int | float) else None,
        centering if isinstance(centering, str) else None,
        f"the {which} of the moving average in {checkpoint}{_untrained(config)}",
        file_sha256(checkpoint / "state.json")[:16],
    )


def head_sizes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """in_dim, prototypes, hidden, bottleneck and layers of the head whose tensors have these shapes.

    With one layer there is nothing hidden: `hidden` is then the bottleneck. Raises KeyError or ValueError for tensors
    that are not those of a head.
    """
    prototypes, bottleneck = shapes["last_layer.weight_v"]
    layers = sum(name.startswith("mlp.") and name.endswith(".weight") for name in shapes)
    hidden, in_dim = shapes["mlp.0.weight"]
    return {
        "in_dim": in_dim,
        "prototypes": prototypes,
        "hidden": hidden,
        "bottleneck": bottleneck,
        "layers": layers,
    }


def _heads(
    checkpoint: Path, stored: Mapping[str, StoredTensors], *, meta: bool
) -> tuple[ProjectionHead, ProjectionHead | None, dict[str, Any]]:
    """DINO and iBOT head (None: tied), and the sizes of both with the `in_dim`."""
    sizes, dino_head = _head(checkpoint, stored["dino_head"], "dino_head", meta)
    if not stored["ibot_head"].shapes:
        return dino_head, None, sizes | {"ibot_prototypes": None, "ibot_bottleneck": None, "untied": False}
    own, ibot_head = _head(checkpoint, stored["ibot_head"], "ibot_head", meta)
    ibot_sizes = {f"ibot_{name}": own[name] for name in ("prototypes", "bottleneck")}
    return dino_head, ibot_head, sizes | ibot_sizes | {"untied": True}


def _head(checkpoint: Path, stored: StoredTensors, name: str, meta: bool) -> tuple[dict[str, Any], ProjectionHead]:
    """Sizes and weights of one head."""
    try:
        sizes: dict[str, Any] = head_sizes(stored.shapes)
        with torch.device("meta"):
            head = ProjectionHead(**sizes)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{checkpoint}: the {name} is not whole (no {error} in it); {_CURE}") from None
    own = {key: value.shape for key, value in head.state_dict().items()}
    differing = sorted(key for key in own.keys() | stored.shapes.keys() if own.get(key) != stored.shapes.get(key))
    if differing:
        raise InputError(
            f"{checkpoint}: {len(differing)} weights of the {name} are missing or of other shapes than the rest says "
            f"(first {differing[0]}): copy the run again, or {_CURE}"
        )
    if not meta:
        head.load_state_dict(stored.read(list(own)), assign=True)
    return sizes, head


def _check_backbone(checkpoint: Path, run: TrainingRun, backbone: VisionTransformer) -> None:
    """InputError unless some tensors of the checkpoint's backbone, first and last, are those of the export."""
    stored = StoredBackbone(checkpoint, name=run.student, cure=_CURE)
    own: dict[str, Tensor] = backbone.state_dict()
    looked: list[str] = [name for name in ("cls_token", "pos_embed", "norm.weight", "norm.bias") if name in own]
    looked += [name for name in own if name.startswith(f"blocks.{backbone.depth - 1}.attn.proj")]
    same = all(stored.shapes.get(name) == own[name].shape for name in own)
    if same and backbone.device.type != "meta":
        found = stored.read(looked)
        same = all(torch.equal(found[name], own[name].detach().cpu().float()) for name in looked)
    if not same:
        raise InputError(
            f"{checkpoint} holds another backbone than the export of {run.path}, so its heads do not belong to that: "
            f"let the run finish (the same command again continues it), or {_CURE}"
        )


def _check_place(checkpoint: Path, run: TrainingRun, in_dim: int, embed_dim: int) -> None:
    """NoHeads where the heads of a distilled model take tokens that an adapter has mapped to its teacher's space."""
    if in_dim != embed_dim:
        raise NoHeads(
            f"the heads in {checkpoint} take tokens of width {in_dim} behind an adapter, not the model's of {embed_dim}"
        )
    adapter = StoredTensors(checkpoint, "adapter", name=run.student, cure=_CURE)
    if adapter.shapes and _setting(run.manifest.config, "teacher", "heads") != "run":
        raise NoHeads(f"the heads in {checkpoint} sit behind an adapter to the space of its own teacher")


def _untrained(config: Mapping[str, Any]) -> str:
    """What to add where a term had no weight in that run: no head has learned from it."""
    without = [f"loss.{term}_weight" for term in ("dino", "ibot") if _setting(config, "loss", f"{term}_weight") == 0]
    return f" (trained with {' and '.join(without)} 0)" if without else ""


def _setting(config: Mapping[str, Any], section: str, key: str) -> Any:
    held = config.get(section)
    return held.get(key) if isinstance(held, Mapping) else None
