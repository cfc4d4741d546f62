"""What fine-tuning will work on, with everything that can be wrong with it found before the first image is read."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from dinov2cli.data.source import ImageSource
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.finetuning.loop import fitting_batch
from dinov2cli.evaluation.finetuning.views import Rows
from dinov2cli.evaluation.linear.grid import split_validation
from dinov2cli.evaluation.scores import align_labels
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer


@dataclass(frozen=True)
class Plan:
    """The network to start from; labelled images to train on, held out of them (None: none) and of the test set, with
    labels in 0..C-1; how test images are shown; images per step; and notes for the user."""

    network: VisionTransformer | Encoder
    train: ImageSource
    train_labels: np.ndarray
    test: ImageSource
    test_labels: np.ndarray
    class_names: list[str]
    preprocess: Preprocess
    batch: int
    held: ImageSource | None = None
    held_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    notes: list[str] = field(default_factory=list)

    def labels_digest(self) -> str:
        """Hash of which rows are trained on, with which labels."""
        rows = self.train.rows if isinstance(self.train, Rows) else np.arange(len(self.train))
        return hashlib.sha256(rows.tobytes() + self.train_labels.tobytes()).hexdigest()


def make_plan(
    model: LoadedModel,
    train: ImageSource,
    test: ImageSource,
    *,
    batch: int,
    held_out: float,
    averaged_patches: bool,
    drop_path: float,
    checkpointing: bool,
    has_average: bool,
    precision: str,
    seed: int,
    world_size: int,
    same_images: bool,
) -> Plan:
    """`held_out`: share of each class kept from training, 0: none. `has_average`: whether the weights asked for exist.

    Raises UserError for a model or a setting that cannot be trained with, InputError for labels that do not fit.
    """
    network = _trainable(model, averaged_patches=averaged_patches, checkpointing=checkpointing)
    if precision == "fp16":
        raise UserError("precision: fp16 found, whose gradients underflow; expected bf16 or fp32 for fine-tuning")
    if not has_average:
        raise UserError("weights: ema found with ema 0; expected a decay above 0 for the average to exist, as 0.9999")
    preprocess = model.preprocess
    if isinstance(network, VisionTransformer):
        preprocess.with_crop(preprocess.crop, network.patch_size)  # which says what is wrong with the size
    else:
        network.check_size(preprocess.crop)
    train_labels, test_labels, names = align_labels(
        train.labels, train.label_names, test.labels, test.label_names, train_spec=train.spec, test_spec=test.spec
    )
    if len(names) < 2:
        raise InputError(
            f"{train.spec} has one class ({names[0]}), so there is nothing to tell apart; expected two or more"
        )
    rows, held_rows = np.flatnonzero(train_labels >= 0), np.zeros(0, np.int64)
    if held_out > 0:
        fit, held = split_validation(train_labels[rows], held_out, seed=seed)
        rows, held_rows = rows[fit], rows[held]
    notes: list[str] = []
    fitted = fitting_batch(batch, len(rows), world_size)
    if fitted < batch:
        notes.append(f"batch {batch} is more than the {len(rows)} training images: {fitted} images per step are taken")
    if drop_path and not isinstance(network, VisionTransformer):
        notes.append("drop_path is left to this encoder's own settings: only DINOv2 backbones take it from here")
    if same_images:
        notes.append("train and test are the same images: the figures say how well they are remembered, not recognised")
    test_rows = np.flatnonzero(test_labels >= 0)
    return Plan(
        network=network,
        train=_part(train, rows),
        train_labels=train_labels[rows],
        test=_part(test, test_rows),
        test_labels=test_labels[test_rows],
        class_names=names,
        preprocess=preprocess,
        batch=fitted,
        held=_part(train, held_rows) if len(held_rows) else None,
        held_labels=train_labels[held_rows],
        notes=notes,
    )


def _trainable(model: LoadedModel, *, averaged_patches: bool, checkpointing: bool) -> VisionTransformer | Encoder:
    """The network of a model, if it can be trained as asked; else UserError."""
    network = model.network
    if isinstance(network, Descriptor):
        raise UserError(
            f"model {model.name} is a descriptor and has no gradient; expected a backbone to fine-tune: "
            "a run, a model directory or an architecture name"
        )
    if not any(True for _ in network.parameters()):
        raise UserError(f"model {model.name} has no weights to fine-tune; expected a backbone")
    if not isinstance(network, VisionTransformer) and (averaged_patches or checkpointing):
        asked = "averaged_patches" if averaged_patches else "checkpointing"
        raise UserError(
            f"{asked}: found for model {model.name}, which is no DINOv2 backbone; its head reads the vector "
            "that this kind of model is used by: leave this setting out"
        )
    return network


def _part(source: ImageSource, rows: np.ndarray) -> ImageSource:
    return source if len(rows) == len(source) else Rows(source, rows)
