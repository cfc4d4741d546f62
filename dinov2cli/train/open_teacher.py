"""Opens any MODEL as the frozen teacher of a distillation, with the heads of its training run where they are wanted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dinov2cli.errors import InputError, UserError
from dinov2cli.models.baselines import Baseline
from dinov2cli.models.descriptors import Descriptor, parse_descriptor
from dinov2cli.models.load import LoadedModel, load_model
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.teacher import FrozenTeacher
from dinov2cli.train.teacher_heads import NoHeads, TeacherHeads, TrainingRun, run_heads, training_run

HeadChoice = Literal["auto", "run", "learned", "none"]
HEAD_CHOICES: tuple[HeadChoice, ...] = ("auto", "run", "learned", "none")
_EXPECTED = "expected a backbone: a run, a Hugging Face or timm directory, a hub name, a .pth file, or transformers:DIR"


@dataclass(frozen=True)
class OpenedTeacher:
    """A teacher in float32 and what goes with it.

    `name` and `fingerprint` are those of the model (`models.load.LoadedModel`), the fingerprint with the checkpoint of
    the heads. `heads` are the sizes of its heads, as `network.build_heads` takes them, None where it has none here;
    `temperature` and `centering` are what made targets of their logits at the end of their run, where that is known.
    `reason` says in words where the heads come from, or why there are none.
    """

    teacher: FrozenTeacher
    name: str
    fingerprint: dict[str, Any]
    heads: dict[str, Any] | None
    temperature: float | None
    centering: str | None
    reason: str


def open_teacher(
    spec: str | Path, *, heads: HeadChoice = "auto", image_size: int | None = None, device: torch.device | str = "cpu"
) -> OpenedTeacher:
    """Open the MODEL `spec` as a teacher.

    `heads`: "run" takes those of the EMA teacher in the newest checkpoint of its training run; "auto" does where they
    are there; "learned" and "none" leave them. `image_size`: see `FrozenTeacher`. On the device "meta" no weights are
    read, only what tells their shapes.

    Raises InputError for a model that is missing or damaged (weights that are not finite), a checkpoint that is not
    that of the export, and heads "run" where there are none; UserError for what is no teacher, or which of several, and
    for an unknown choice.
    """
    spec = str(spec)
    if heads not in HEAD_CHOICES:
        raise UserError(f"teacher.heads: found {heads!r}; expected one of {', '.join(HEAD_CHOICES)}")
    run = training_run(spec)
    if run is not None:
        _check_single(run, spec)
    loaded = _loaded(spec, device)
    network = loaded.encoder
    _check_finite(network, spec)
    found, reason = _heads(spec, loaded, run, heads)
    fingerprint = {**loaded.fingerprint, **({"config": loaded.config} if loaded.config else {})}
    if found is not None:
        fingerprint["heads"] = found.fingerprint
    teacher = FrozenTeacher(
        network,
        mean=loaded.preprocess.mean,
        std=loaded.preprocess.std,
        image_size=image_size,
        dino_head=None if found is None else found.dino_head,
        ibot_head=None if found is None else found.ibot_head,
    )
    return OpenedTeacher(
        teacher,
        loaded.name,
        fingerprint,
        None if found is None else found.sizes,
        None if found is None else found.temperature,
        None if found is None else found.centering,
        reason,
    )


def _loaded(spec: str, device: torch.device | str) -> LoadedModel:
    """The model, if it is one to learn from."""
    if parse_descriptor(spec) is not None:
        raise UserError(f"teacher {spec}: a descriptor gives one vector per image and no tokens; {_EXPECTED}")
    loaded = load_model(spec, device=device)
    if isinstance(loaded.network, Descriptor):
        raise UserError(f"teacher {spec}: found a descriptor, which has no tokens; {_EXPECTED}")
    if isinstance(loaded.network, Baseline):
        raise UserError(f"teacher {spec}: nobody trained it, there is nothing to learn from it; {_EXPECTED}")
    return loaded


def _check_finite(network: nn.Module, spec: str) -> None:
    """InputError for weights from which nothing can be learned: every step would be skipped, and nobody know why."""
    for name, parameter in network.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise InputError(f"teacher {spec}: {name} holds numbers that are not finite; fetch or train it again")


def _check_single(run: TrainingRun, spec: str) -> None:
    """UserError for a run of several students of which none is named."""
    export = run.path / "export"
    if run.student or (export / "config.json").is_file() or not export.is_dir():
        return
    students = sorted(path.name for path in export.iterdir() if (path / "config.json").is_file())
    if students:
        raise UserError(
            f"teacher {spec}: found a run of several students ({', '.join(students)}), expected one of them: "
            f"{export / students[0]}"
        )


def _heads(spec: str, loaded: LoadedModel, run: TrainingRun | None, choice: str) -> tuple[TeacherHeads | None, str]:
    """The heads, if they are wanted and there, and the reason in words."""
    if choice == "none":
        return None, "none are taken: no term of the loss needs prototypes"
    if choice == "learned":
        return None, "none are taken (teacher.heads=learned)"
    network = loaded.network
    try:
        if run is None:
            raise NoHeads(f"{spec} is a backbone alone, not a run with its checkpoints")
        if not isinstance(network, VisionTransformer):
            raise NoHeads(f"{spec} was not opened as a run")
        found = run_heads(run, network)
        return found, found.origin
    except NoHeads as reason:
        if choice == "run":
            raise InputError(
                f"teacher.heads=run: {reason}; give the run that trained the teacher, or set teacher.heads=learned"
            ) from None
        return None, str(reason)
