"""Linear probe on frozen features (DINOv2, arXiv 2304.07193, B.3): a grid of heads trained at once, one of them chosen.

The choice is made on images held out of the training set, and the test set is seen by the chosen head alone. All
training is a function of features, labels, settings and seed, and a killed one goes on where it was last kept.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2cli.errors import UserError, WorkError
from dinov2cli.evaluation.linear.grid import (
    EPOCHS,
    LAST_BLOCKS,
    LEARNING_RATES,
    Batches,
    Head,
    default_steps,
    head_grid,
    split_validation,
)
from dinov2cli.evaluation.linear.training import Heads, Inputs
from dinov2cli.search.blocks import Stage, Store
from dinov2cli.train.schedules import warmup_cosine

KEEP_EVERY = 500
"""Steps between two savings of the state of all heads."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class LinearClassifier:
    """A trained head: weight float32 [d, C] and bias [C], on the CPU.

    It reads the class tokens of the last `blocks` blocks, oldest first, and then, with `averaged_patches`, the averaged
    patches of the last block.
    """

    weight: Tensor
    bias: Tensor
    blocks: int
    averaged_patches: bool

    def logits(
        self,
        class_tokens: np.ndarray | Tensor,
        averaged_patches: np.ndarray | Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        block: int = 1024,
    ) -> Tensor:
        """Logits float32 [n, C], on the CPU, of class tokens [n, L, D] and averaged patches [n, D].

        `block` images are on the device at once. Raises ValueError for features of other shapes than it was trained on.
        """
        tokens = torch.as_tensor(class_tokens)
        patches = torch.as_tensor(averaged_patches) if self.averaged_patches and averaged_patches is not None else None
        width = min(self.blocks, tokens.shape[1]) * tokens.shape[2] + (0 if patches is None else patches.shape[1])
        if width != len(self.weight):
            raise ValueError(
                f"features of width {width} ({tuple(tokens.shape)} and patches: {patches is not None}), "
                f"the head was trained on {len(self.weight)}"
            )
        weight, bias = self.weight.to(device), self.bias.to(device)
        found = torch.empty(len(tokens), len(bias))
        for start in range(0, len(tokens), block):
            rows = slice(start, start + block)
            inputs = tokens[rows, -self.blocks :].flatten(1).to(device, torch.float32)
            if patches is not None:
                inputs = torch.cat([inputs, patches[rows].to(device, torch.float32)], dim=1)
            found[rows] = torch.addmm(bias, inputs, weight).cpu()
        return found


@dataclass(frozen=True)
class TrainedLinear:
    """The chosen head of the grid, and how all of them did on the images held out of the training set."""

    classifier: LinearClassifier
    chosen: Head
    validation: dict[str, float]  # head id -> accuracy on the held-out images, -1 for a head that diverged
    heads: tuple[Head, ...]
    n_classes: int
    n_train: int
    n_validation: int
    steps: int
    batch_size: int
    seconds: float  # of this process, training and choice
    notes: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """What was chosen and how, as plain values for a result."""
        return {
            "head": self.chosen.id,
            "learning_rate": self.chosen.learning_rate,
            "blocks": self.chosen.blocks,
            "averaged_patches": self.chosen.averaged_patches,
            "validation_accuracy": self.validation[self.chosen.id],
            "selection": "validation images held out of the training set",
            "heads": len(self.heads),
            "diverged_heads": sum(accuracy < 0 for accuracy in self.validation.values()),
            "train_images": self.n_train,
            "validation_images": self.n_validation,
            "classes": self.n_classes,
            "steps": self.steps,
            "batch_size": self.batch_size,
        }


class LinearTraining:
    """The training of a grid of heads, a stretch of steps at a time: `run` it to `steps`, then `finish`.

    labels: int64 [n], 0..C-1, of all training images; a part of each class is held out to choose the head. `stage`
    keeps the state of all heads every `keep_every` steps and at the end of each `run`; what is found there is gone on
    from (`step`). Raises what `head_grid`, `split_validation` and `default_steps` raise, and UserError for impossible
    settings.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        available_blocks: int,
        dim: int,
        has_patches: bool = True,
        n_classes: int | None = None,
        seed: int,
        learning_rates: Sequence[float] = LEARNING_RATES,
        blocks: Sequence[int] = LAST_BLOCKS,
        batch_size: int = 128,
        epochs: int = EPOCHS,
        steps: int | None = None,
        validation_fraction: float = 0.1,
        device: torch.device | str = "cpu",
        stage: Stage | None = None,
        keep_every: int = KEEP_EVERY,
    ) -> None:
        if batch_size < 1 or epochs < 1 or (steps is not None and steps < 1):
            raise UserError(
                f"linear batch size, epochs and steps are {batch_size}, {epochs} and {steps}, "
                "expected whole numbers from 1"
            )
        self.device = torch.device(device)
        labels = np.ascontiguousarray(labels, dtype=np.int64)
        heads, self.notes = head_grid(
            available_blocks, learning_rates=learning_rates, blocks=blocks, has_patches=has_patches
        )
        self.order = tuple(heads)
        fit, held = split_validation(labels, validation_fraction, seed=seed)
        self._fit, self._held = (torch.from_numpy(rows).to(self.device) for rows in (fit, held))
        self._labels = torch.from_numpy(labels).to(self.device)
        self.batch_size = min(batch_size, len(fit))
        self.steps = default_steps(len(fit), self.batch_size, epochs) if steps is None else steps
        self.step = 0
        self._batches = Batches(len(fit), self.batch_size, seed)
        self._stage, self._keep_every = stage, keep_every
        self._heads = Heads(
            heads,
            available_blocks=available_blocks,
            dim=dim,
            n_classes=int(labels.max()) + 1 if n_classes is None else n_classes,
            device=self.device,
            seed=seed,
        )
        self.seconds = 0.0
        if stage is not None and (state := stage.load(0)) is not None and self._heads.load(state):
            self.step = int(state["step"])

    def run(self, inputs: Inputs, *, until: int | None = None, advance: Advance | None = None) -> None:
        """Train to step `until` (not included; None: to the end) on features of all training images, in row order.

        `advance` is called with the number of steps done since the last call.
        """
        started = time.perf_counter()
        until = self.steps if until is None else min(until, self.steps)
        with torch.inference_mode():
            while self.step < until:
                rows = self._fit[torch.from_numpy(self._batches.at(self.step)).to(self.device)]
                cosine = warmup_cosine(self.step, self.steps, base=1.0, final=0.0, warmup=0.0)
                self._heads.step(inputs.take(rows), self._labels[rows], cosine)
                self.step += 1
                if self.step % self._keep_every == 0 or self.step == until:
                    self._keep()
                if advance is not None:
                    advance(1)
        self.seconds += time.perf_counter() - started

    def _keep(self) -> None:
        if self._stage is not None:
            # Always block 0: the state before is replaced, not added to.
            self._stage.save(0, {"step": np.array(self.step), **self._heads.state()})

    def finish(self, inputs: Inputs) -> TrainedLinear:
        """Choose the head that is best on the held-out rows of these features (equal accuracies: the lower loss).

        Raises WorkError when all heads diverged.
        """
        started = time.perf_counter()
        with torch.inference_mode():
            scores = self._heads.judge(inputs, self._held, self._labels[self._held])
            chosen = max(self.order, key=lambda head: (scores[head.id][0], -scores[head.id][1]))
            if scores[chosen.id][0] < 0:
                raise WorkError(
                    f"all {len(self.order)} linear heads diverged: the features are too large for these learning "
                    "rates; lower them, or check the model's training"
                )
            weight, bias = self._heads.weights(chosen)
        return TrainedLinear(
            classifier=LinearClassifier(weight, bias, chosen.blocks, chosen.averaged_patches),
            chosen=chosen,
            validation={name: accuracy for name, (accuracy, _) in scores.items()},
            heads=self.order,
            n_classes=self._heads.n_classes,
            n_train=len(self._fit),
            n_validation=len(self._held),
            steps=self.steps,
            batch_size=self.batch_size,
            seconds=self.seconds + time.perf_counter() - started,
            notes=self.notes,
        )


def linear_stage(store: Store | None, labels: np.ndarray, features: Mapping[str, Any], **settings: Any) -> Stage | None:
    """Where a training with these settings keeps its state.

    features: what tells the features from all others (as `cache.features_key`), plain values; labels [n] of the rows
    that are used. Settings that the result does not depend on must be left out.
    """
    if store is None:
        return None
    digest = hashlib.sha256(np.ascontiguousarray(labels, dtype=np.int64).tobytes()).hexdigest()
    return store.stage("linear", {"features": features, "labels": digest, **settings})


def train_linear(
    class_tokens: np.ndarray | Tensor,
    averaged_patches: np.ndarray | Tensor | None,
    labels: np.ndarray,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    store: Store | None = None,
    features: Mapping[str, Any] | None = None,
    keep_every: int = KEEP_EVERY,
    advance: Advance | None = None,
    name: str = "the training set",
    **settings: Any,
) -> TrainedLinear:
    """Train the grid of heads on features computed once, and choose the one that is best on held-out rows.

    Class tokens of the last L blocks after the final norm are [n, L, D], oldest block first; averaged patches of the
    last block are [n, D] (None: there are none); labels [n] are 0..C-1. SGD with momentum 0.9, the rate (scaled by
    batch_size / 256) falling to zero by a cosine.

    Args:
        store, features: where the state is kept, and what tells these features from all others; both or neither.
        advance: called with 1 after every step.
        name: of the set, for errors.
        settings: n_classes, learning_rates, blocks, batch_size, epochs, steps, validation_fraction: of LinearTraining.

    Raises what `LinearTraining`, `Inputs.of` and `LinearTraining.finish` raise.
    """
    inputs = Inputs.of(class_tokens, averaged_patches, name, device)
    stage = None
    if features is not None:
        stage = linear_stage(store, labels, features, seed=seed, device=str(device), **settings)
    training = LinearTraining(
        labels,
        available_blocks=inputs.blocks,
        dim=inputs.dim,
        has_patches=inputs.patches is not None,
        seed=seed,
        device=device,
        stage=stage,
        keep_every=keep_every,
        **settings,
    )
    training.run(inputs, advance=advance)
    return training.finish(inputs)
