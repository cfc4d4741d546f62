"""What every classification benchmark shares: labels that match, ranks of the true class, what to warn of."""

from collections import Counter
from collections.abc import Container, Iterable, Sequence

import numpy as np
import torch

from dinov2cli.data.source import LabelLists
from dinov2cli.errors import InputError, WorkError

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
    Raises InputError for a set without labels, labels without a name, two classes of one name, a test class that was
    never trained on, and a training set of a single class.
    """
    for spec, labels, known in ((train_spec, train, train_names), (test_spec, test, test_names)):
        _check_labels(labels, known, spec)
    assert train is not None and test is not None
    named = train_names is not None and test_names is not None

    def name_of(label: int, names: Sequence[str] | None) -> str:
        return str(names[label]) if named and names is not None else str(label)

    present = [int(label) for label in np.unique(train) if label >= 0]
    class_names = [name_of(label, train_names) for label in present]
    number = {name: index for index, name in enumerate(class_names)}
    in_test = {int(label): name_of(int(label), test_names) for label in np.unique(test) if label >= 0}
    for spec, names in ((train_spec, class_names), (test_spec, list(in_test.values()))):
        _check_unique(names, spec)
    _check_known(in_test.values(), number, train_spec, test_spec)
    _check_several(class_names, train_spec)

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


def align_label_lists(
    train: LabelLists | None,
    test: LabelLists | None,
    *,
    train_spec: str = "the training set",
    test_spec: str = "the test set",
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """As `align_labels` for images with several classes: bool [n, C] for both sets, and the C class names.

    Classes are those that a training image has. Where an image is not labelled at all (`LabelLists.given`) its row is
    False throughout. Raises what `align_labels` raises.
    """
    for spec, labels in ((train_spec, train), (test_spec, test)):
        if labels is None or not any(labels.lists):
            raise InputError(
                f"{spec} has no lists of labels and mean average precision needs them: name their column with "
                "?label=COLUMN"
            )
        _check_range(max((max(some) for some in labels.lists if some), default=-1), labels.names, spec)
    assert train is not None and test is not None
    named = train.names is not None and test.names is not None

    def in_words(labels: LabelLists) -> dict[int, str]:
        names = labels.names if named else None
        numbers = sorted({label for some in labels.lists for label in some or ()})
        return {label: str(label) if names is None else str(names[label]) for label in numbers}

    words, test_words = in_words(train), in_words(test)
    for spec, found in ((train_spec, words), (test_spec, test_words)):
        _check_unique(list(found.values()), spec)
    number = {name: index for index, name in enumerate(words.values())}
    _check_known(test_words.values(), number, train_spec, test_spec)
    _check_several(list(number), train_spec)

    def table(labels: LabelLists, known: dict[int, str]) -> np.ndarray:
        found = np.zeros((len(labels.lists), len(number)), dtype=bool)
        for row, some in enumerate(labels.lists):
            found[row, [number[known[label]] for label in some or ()]] = True
        return found

    train_table = table(train, words)
    always = np.flatnonzero(train_table[train.given].all(axis=0))
    if len(always):
        raise InputError(
            f"{train_spec}: class {list(number)[always[0]]} is in every image, so there is nothing to tell it from; "
            "leave it out"
        )
    return train_table, table(test, test_words), list(number)


def absent_note(test_labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """A warning where no test image has some of the classes, [] where all are there; labels int64 [n] are 0..C-1.

    They are no error: an image can still be taken for one of them.
    """
    absent = sorted(set(range(len(class_names))) - set(np.unique(test_labels).tolist()))
    if not absent:
        return []
    shown = _shown([class_names[label] for label in absent])
    return [
        f"{len(absent)} of {len(class_names)} classes have no test image ({shown}): "
        "figures are of the others, and answers naming these count as wrong"
    ]


def _check_labels(labels: np.ndarray | None, names: Sequence[str] | None, spec: str) -> None:
    if labels is not None and len(labels) and not (np.asarray(labels) >= 0).any():
        raise InputError(f"{spec}: none of its {len(labels):,} images has a label; expected a column with labels")
    if labels is None or not len(labels):
        raise InputError(
            f"{spec} has no labels and this benchmark needs them: name their column with ?label=COLUMN, "
            "or take them from folders with ?label=folder"
        )
    _check_range(int(np.max(labels)), names, spec)


def _check_range(largest: int, names: Sequence[str] | None, spec: str) -> None:
    if names is not None and largest >= len(names):
        raise InputError(
            f"{spec} has label {largest}, but names for {len(names)} classes only: expected labels from 0 to "
            f"{len(names) - 1}; correct the labels or the names"
        )


def _check_unique(names: Sequence[str], spec: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{spec} has several classes of one name ({_shown(twice)}): give each its own")


def _check_known(names: Iterable[str], known: Container[str], train_spec: str, test_spec: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"{test_spec} has {len(unknown)} class{'es' if len(unknown) > 1 else ''} that {train_spec} lacks "
            f"({_shown(unknown)}): give both sets the same classes"
        )


def _check_several(class_names: Sequence[str], spec: str) -> None:
    if len(class_names) < 2:
        raise InputError(
            f"{spec} has one class ({class_names[0]}), so there is nothing to tell apart; expected two or more"
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


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
