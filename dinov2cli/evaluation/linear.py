"""Linear probe on frozen features (METHOD §8.16): a grid of heads trained at once, one chosen on held-out train images.

Features are computed once from the centre crop, so there is no train-time augmentation; the rows say so. All heads that
read the same input are one matrix, and every step moves all of them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.intervals import DEFAULT_CONFIDENCE
from dinov2cli.evaluation.scores import accuracy_row, require_finite, true_class_ranks

# The grid of the paper, for 256 images per step (§8.16).
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
LAST_BLOCKS = (1, 4)
_RATE_BATCH = 256
_MOMENTUM = 0.9
_INIT_STD = 0.01
# Ten passes, as the released recipe, but never fewer steps than a small set needs nor more than ImageNet gets.
_EPOCHS, _MIN_STEPS, _MAX_STEPS = 10, 1_000, 12_500
_SCORE_BLOCK = 1024


@dataclass(frozen=True)
class Head:
    """One head of the grid. `id` is unique: it counts the rates, for rates rounded into a name would collide."""

    id: str
    learning_rate: float  # for 256 images per step
    blocks: int
    averaged_patches: bool


@dataclass(frozen=True)
class LinearResult:
    """Outcome of the probe: the chosen head's answers on the test set, and every head's validation accuracy."""

    chosen: Head
    ranks: np.ndarray  # int64 [n]: classes before the true one
    predictions: np.ndarray  # int64 [n]
    validation: dict[str, float]  # head id -> accuracy on images held out of the training set
    heads: tuple[Head, ...]
    n_classes: int
    n_train: int
    n_validation: int
    steps: int
    batch_size: int
    seed: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def correct(self, *, top: int = 1) -> np.ndarray:
        """Return right/wrong per test image, bool [n]."""
        return self.ranks < top

    def rows(self, *, model: str, dataset: str, confidence: float = DEFAULT_CONFIDENCE) -> list[ResultRow]:
        """Return rows `top1` and, where there are more than five classes, `top5`."""
        settings = {
            "head": self.chosen.id,
            "learning_rate": self.chosen.learning_rate,
            "blocks": self.chosen.blocks,
            "averaged_patches": self.chosen.averaged_patches,
            "validation_accuracy": self.validation[self.chosen.id],
            "selection": "validation images held out of the training set",
            "heads": len(self.heads),
            "train_images": self.n_train,
            "validation_images": self.n_validation,
            "classes": self.n_classes,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "augmentation": "none: features of the centre crop, computed once",
            "seed": self.seed,
        }
        if self.notes:
            settings["notes"] = self.notes
        return [
            accuracy_row(
                self.correct(top=top),
                model=model,
                task="linear",
                dataset=dataset,
                metric=f"top{top}",
                settings=settings,
                seconds=self.seconds,
                confidence=confidence,
            )
            for top in ((1, 5) if self.n_classes > 5 else (1,))
        ]


def head_grid(
    available_blocks: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    blocks: Sequence[int] = LAST_BLOCKS,
    averaged_patches: Sequence[bool] = (False, True),
) -> tuple[list[Head], list[str]]:
    """Return the grid rates x last blocks x with or without averaged patches, and notes on what was clipped."""
    if not learning_rates or min(learning_rates) <= 0:
        raise UserError(f"linear learning rates are {list(learning_rates)}, expected one or more positive numbers")
    used = sorted({min(count, available_blocks) for count in blocks})
    too_many = sorted({count for count in blocks if count > available_blocks})
    notes = [f"last {count} blocks clipped to the {available_blocks} there are" for count in too_many]
    heads = [
        Head(f"blocks{count}-{'patches' if patches else 'class'}-rate{index:02d}", rate, count, patches)
        for count in used
        for patches in averaged_patches
        for index, rate in enumerate(learning_rates)
    ]
    return heads, notes


def split_validation(labels: np.ndarray, fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to train on and rows held out, int64, sorted: a fraction of each class, at least one if it has two.

    Raises InputError when nothing can be held out (every class has one image).
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction is {fraction}, expected a number between 0 and 1: use 0.1")
    rng = np.random.Generator(np.random.Philox(key=seed))
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held.append(rows[:count])
    validation = np.sort(np.concatenate(held))
    if not len(validation):
        raise InputError(
            "no training class has two images, so none can be held out to choose the linear head: "
            "give more images per class, or use `dinov2 eval knn`"
        )
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def default_steps(n_train: int, batch_size: int) -> int:
    """Ten passes over the training images, kept within 1,000 and 12,500 steps."""
    return min(max(math.ceil(_EPOCHS * n_train / batch_size), _MIN_STEPS), _MAX_STEPS)


class _Bank:
    """All heads reading one input: weights [d, H, C], one matrix product for all, a learning rate for each."""

    def __init__(
        self, heads: list[Head], columns: slice, n_classes: int, batch_size: int, device: torch.device, seed: int
    ) -> None:
        self.heads = heads
        self.columns = columns
        generator = torch.Generator().manual_seed(seed)
        shape = (columns.stop - columns.start, len(heads), n_classes)
        self.weight_DHC = (torch.randn(shape, generator=generator) * _INIT_STD).to(device)
        self.bias_HC = torch.zeros(shape[1:], device=device)
        self._weight_speed = torch.zeros_like(self.weight_DHC)
        self._bias_speed = torch.zeros_like(self.bias_HC)
        rates = [head.learning_rate * batch_size / _RATE_BATCH for head in heads]
        self._rate_H1 = torch.tensor(rates, device=device)[:, None]

    def logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, H, C] of inputs [B, d]."""
        return (x_BD @ self.weight_DHC.flatten(1)).view(len(x_BD), *self.bias_HC.shape) + self.bias_HC

    def step(self, x_BD: torch.Tensor, y_B: torch.Tensor, cosine: float) -> None:
        """One SGD step with momentum of every head on its own mean cross-entropy (no weight decay).

        The gradient of cross-entropy in the logits is softmax minus one-hot; heads share no parameter, so one head
        running off to infinity leaves the others alone.
        """
        gradient_BHC = self.logits(x_BD).softmax(dim=-1)
        gradient_BHC[torch.arange(len(y_B), device=y_B.device), :, y_B] -= 1
        gradient_BHC /= len(y_B)
        self._weight_speed.flatten(1).addmm_(x_BD.T, gradient_BHC.flatten(1), beta=_MOMENTUM)
        self._bias_speed.mul_(_MOMENTUM).add_(gradient_BHC.sum(dim=0))
        self.weight_DHC.addcmul_(self._weight_speed, self._rate_H1, value=-cosine)
        self.bias_HC.addcmul_(self._bias_speed, self._rate_H1, value=-cosine)


class _Inputs:
    """Cached features laid out so that the input of every head is one slice: the last blocks' class tokens, oldest
    first, then the averaged patches of the last block."""

    def __init__(self, class_tokens: torch.Tensor, averaged_patches: torch.Tensor, name: str) -> None:
        if class_tokens.dim() != 3 or averaged_patches.shape != class_tokens[:, 0].shape:
            raise ValueError(
                f"features of {name} must be [n, blocks, D] and [n, D], got {tuple(class_tokens.shape)} "
                f"and {tuple(averaged_patches.shape)}"
            )
        self.dim = class_tokens.shape[2]
        self.table = torch.cat([class_tokens.flatten(1), averaged_patches], dim=1).float()
        require_finite(self.table, name)

    def columns(self, head: Head) -> slice:
        """Columns of the table that this head reads."""
        tokens_end = self.table.shape[1] - self.dim
        stop = self.table.shape[1] if head.averaged_patches else tokens_end
        return slice(tokens_end - head.blocks * self.dim, stop)


def _train(
    banks: list[_Bank], table: torch.Tensor, labels: torch.Tensor, *, steps: int, batch_size: int, seed: int
) -> None:
    """Move every bank `steps` times; batches walk through shuffled passes over the rows, decided by the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        rows, order = order[:batch_size].to(labels.device), order[batch_size:]
        batch, truth = table[rows], labels[rows]
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for bank in banks:
            bank.step(batch[:, bank.columns], truth, cosine)


def _validate(banks: list[_Bank], table: torch.Tensor, labels: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Head id -> (accuracy, mean cross-entropy) on the given rows; a head that ran off to infinity gets (-1, inf)."""
    outcome: dict[str, tuple[float, float]] = {}
    for bank in banks:
        hits = torch.zeros(len(bank.heads), dtype=torch.float64)
        loss = torch.zeros(len(bank.heads), dtype=torch.float64)
        for start in range(0, len(labels), _SCORE_BLOCK):
            truth = labels[start : start + _SCORE_BLOCK]
            log_probs = bank.logits(table[start : start + _SCORE_BLOCK, bank.columns]).log_softmax(dim=-1)
            hits += (log_probs.argmax(dim=-1) == truth[:, None]).sum(dim=0).cpu()
            picked = log_probs.gather(2, truth[:, None, None].expand(-1, log_probs.shape[1], 1))
            loss -= picked[..., 0].sum(dim=0).double().cpu()
        for index, head in enumerate(bank.heads):
            finite = bool(torch.isfinite(loss[index]))
            outcome[head.id] = (
                (hits[index].item() / len(labels), loss[index].item() / len(labels)) if finite else (-1.0, math.inf)
            )
    return outcome


def linear_probe(
    train_class_tokens: np.ndarray | torch.Tensor,
    train_averaged_patches: np.ndarray | torch.Tensor,
    train_labels: np.ndarray,
    test_class_tokens: np.ndarray | torch.Tensor,
    test_averaged_patches: np.ndarray | torch.Tensor,
    test_labels: np.ndarray,
    *,
    seed: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    blocks: Sequence[int] = LAST_BLOCKS,
    batch_size: int = 128,
    steps: int | None = None,
    validation_fraction: float = 0.1,
    device: str | torch.device = "cpu",
) -> LinearResult:
    """Train the grid of heads on cached features and score the one that is best on held-out training images.

    Class tokens of the last blocks after the final norm are [n, blocks, D], oldest block first; averaged patches of the
    last block are [n, D]; labels are 0..C-1. Weights start as N(0, 0.01); SGD with momentum 0.9 and a cosine to zero; a
    rate is scaled by batch_size / 256. The test set is read only by the chosen head. Equal accuracies are decided by
    the lower validation loss. `steps=None` means `default_steps`.
    Raises UserError for impossible settings, InputError when nothing can be held out, WorkError when all heads diverge.
    """
    started = time.perf_counter()
    device = torch.device(device)
    if batch_size < 1 or (steps is not None and steps < 1):
        raise UserError(f"linear batch size and steps are {batch_size} and {steps}, expected whole numbers from 1")
    train = _Inputs(torch.as_tensor(train_class_tokens), torch.as_tensor(train_averaged_patches), "the training set")
    test = _Inputs(torch.as_tensor(test_class_tokens), torch.as_tensor(test_averaged_patches), "the test set")
    labels = np.asarray(train_labels, dtype=np.int64)
    heads, notes = head_grid(train.table.shape[1] // train.dim - 1, learning_rates=learning_rates, blocks=blocks)
    fit_rows, held_rows = split_validation(labels, validation_fraction, seed=seed)
    batch_size = min(batch_size, len(fit_rows))
    steps = default_steps(len(fit_rows), batch_size) if steps is None else steps
    n_classes = int(max(labels.max(), np.max(test_labels))) + 1

    by_input: dict[tuple[int, bool], list[Head]] = {}
    for head in heads:
        by_input.setdefault((head.blocks, head.averaged_patches), []).append(head)
    banks = [
        _Bank(group, train.columns(group[0]), n_classes, batch_size, device, seed=seed + index)
        for index, group in enumerate(by_input.values())
    ]

    truth = torch.as_tensor(labels)
    with torch.inference_mode():
        fit_table, fit_truth = train.table[fit_rows].to(device), truth[fit_rows].to(device)
        _train(banks, fit_table, fit_truth, steps=steps, batch_size=batch_size, seed=seed)
        scores = _validate(banks, train.table[held_rows].to(device), truth[held_rows].to(device))
        chosen = max(heads, key=lambda head: (scores[head.id][0], -scores[head.id][1]))
        if scores[chosen.id][0] < 0:
            raise WorkError(
                f"all {len(heads)} linear heads diverged: the features are too large for these learning rates; "
                "lower them, or check the model's training"
            )
        ranks, predictions = _score(banks, chosen, test, torch.as_tensor(np.asarray(test_labels, np.int64)), device)
    return LinearResult(
        chosen=chosen,
        ranks=ranks,
        predictions=predictions,
        validation={head: accuracy for head, (accuracy, _) in scores.items()},
        heads=tuple(heads),
        n_classes=n_classes,
        n_train=len(fit_rows),
        n_validation=len(held_rows),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def _score(
    banks: list[_Bank], chosen: Head, test: _Inputs, labels: torch.Tensor, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the true class and predictions, int64 [n], of the chosen head on the test set."""
    bank = next(bank for bank in banks if chosen in bank.heads)
    weight_DC = bank.weight_DHC[:, bank.heads.index(chosen)]
    bias_C = bank.bias_HC[bank.heads.index(chosen)]
    ranks, predictions = [], []
    for start in range(0, len(labels), _SCORE_BLOCK):
        logits = test.table[start : start + _SCORE_BLOCK, bank.columns].to(device) @ weight_DC + bias_C
        ranks.append(true_class_ranks(logits, labels[start : start + _SCORE_BLOCK].to(device)).cpu())
        predictions.append(logits.argmax(dim=1).cpu())
    return torch.cat(ranks).numpy(), torch.cat(predictions).numpy()
