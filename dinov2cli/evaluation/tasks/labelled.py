"""Features with labels of two sources, brought into one numbering; unlabelled images left out."""

from dataclasses import dataclass

import numpy as np

from dinov2cli.evaluation.features import Features
from dinov2cli.evaluation.scores import align_labels


@dataclass(frozen=True)
class LabelledPair:
    """Rows of the features of two sources that carry a label, and these labels, 0..C-1; class c is `class_names[c]`."""

    train_rows: np.ndarray
    test_rows: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]


def labelled_pair(train: Features, test: Features, train_spec: str, test_spec: str) -> LabelledPair:
    """Raises InputError for a set without labels, and for classes of the test set that the training set lacks."""
    train_labels, test_labels, names = align_labels(
        train.labels, train.label_names, test.labels, test.label_names, train_spec=train_spec, test_spec=test_spec
    )
    train_rows, test_rows = np.flatnonzero(train_labels >= 0), np.flatnonzero(test_labels >= 0)
    return LabelledPair(train_rows, test_rows, train_labels[train_rows], test_labels[test_rows], names)
