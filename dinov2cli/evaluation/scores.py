"""What every classification benchmark shares: labels that match, ranks of the true class, result rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.intervals import DEFAULT_CONFIDENCE, wilson_interval

_NAMES_SHOWN = 3


def align_labels(
    train: np.ndarray | None,
    train_names: Sequence[str] | None,
    test: np.ndarray | None,
    test_names: Sequence[str] | None,
    *,
    train_spec: str = "the training set",
    test_spec: str = "the test set",
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return both label arrays in one numbering, 0..C-1, and the C class names.

    Two sources number their classes independently, so names decide when both have them; else the numbers do. Classes
    are those of the training set; an unlabelled image (label < 0) stays -1.
    Raises InputError when a set has no labels, or the test set has a class that was never trained on.
    """
    for spec, labels in ((train_spec, train), (test_spec, test)):
        if labels is None or not (np.asarray(labels) >= 0).any():
            raise InputError(
                f"{spec} has no labels and this benchmark needs them: name their column with ?label=COLUMN, "
                "or take them from folders with ?label=folder"
            )
    assert train is not None and test is not None
    named = train_names is not None and test_names is not None

    def name_of(label: int, names: Sequence[str] | None) -> str:
        return str(names[label]) if named and names is not None else str(label)

    present = [int(label) for label in np.unique(train) if label >= 0]
    class_names = [name_of(label, train_names) for label in present]
    number = {name: index for index, name in enumerate(class_names)}
    in_test = {int(label): name_of(int(label), test_names) for label in np.unique(test) if label >= 0}
    unknown = [name for name in in_test.values() if name not in number]
    if unknown:
        shown = ", ".join(unknown[:_NAMES_SHOWN]) + (", ..." if len(unknown) > _NAMES_SHOWN else "")
        raise InputError(
            f"{test_spec} has {len(unknown)} class{'es' if len(unknown) > 1 else ''} that {train_spec} lacks "
            f"({shown}): give both sets the same classes"
        )

    def renumber(labels: np.ndarray, mapping: dict[int, int]) -> np.ndarray:
        # One slot more than the largest label, so that -1 picks the last slot, which stays -1.
        table = np.full(max(mapping) + 2, -1, dtype=np.int64)
        for old, new in mapping.items():
            table[old] = new
        return table[np.maximum(np.asarray(labels, dtype=np.int64), -1)]

    return (
        renumber(train, {old: new for new, old in enumerate(present)}),
        renumber(test, {old: number[name] for old, name in in_test.items()}),
        class_names,
    )


def require_finite(features: torch.Tensor, name: str) -> None:
    """Raise WorkError when features [n, ...] hold NaN or infinity, for every score from them would be void."""
    bad = int((~torch.isfinite(features.flatten(1)).all(dim=1)).sum())
    if bad:
        raise WorkError(
            f"{bad} of {len(features)} feature vectors of {name} hold NaN or infinity: extract them again in float32, "
            "or check the model's training"
        )


def true_class_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many classes come before the true one, int64 [n], from scores [n, C] and labels int64 [n].

    0 is a top-1 hit, below 5 a top-5 hit. Among equal scores the lower class number comes first, so a model that gives
    every class the same score gains nothing.
    """
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    return before.sum(dim=1)


def accuracy_row(
    correct: np.ndarray,
    *,
    model: str,
    task: str,
    dataset: str,
    metric: str,
    settings: dict[str, Any],
    seconds: float,
    confidence: float = DEFAULT_CONFIDENCE,
) -> ResultRow:
    """Return the result row of an accuracy (a fraction) from right/wrong per image [n], with its Wilson interval."""
    hits, n = int(np.sum(correct)), len(correct)
    low, high = wilson_interval(hits, n, confidence=confidence)
    return ResultRow(
        model=model,
        task=task,
        dataset=dataset,
        metric=metric,
        value=hits / n,
        ci_low=low,
        ci_high=high,
        n=n,
        settings={**settings, "confidence": confidence},
        seconds=round(seconds, 3),
    )
