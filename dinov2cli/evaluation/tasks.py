"""The benchmarks on the features of two sources: labels brought into one numbering, unlabelled images left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch

from dinov2cli.data.source import ImageSource
from dinov2cli.evaluation.features import Features
from dinov2cli.evaluation.knn import DEFAULT_KS, DEFAULT_TEMPERATURE, KnnResult, knn_classify
from dinov2cli.evaluation.linear import LAST_BLOCKS, LEARNING_RATES, LinearResult, linear_probe
from dinov2cli.evaluation.scores import align_labels

R = TypeVar("R", KnnResult, LinearResult)
_STORED_NEIGHBOURS = 5


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """A benchmark's result with what its numbers mean.

    Row i of the result is row `test_index[i]` of the test source; row j among its neighbours is row `train_index[j]` of
    the training source; label c is `class_names[c]`.
    """

    result: R
    train_index: np.ndarray
    test_index: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]

    def table(self, train: ImageSource, test: ImageSource) -> pa.Table:
        """One row per labelled test image: id, label, prediction and correct, and for k-NN its nearest training images
        (`neighbours`: ids, `neighbour_labels`, `similarities`), at the k that is quoted."""
        result, names = self.result, np.asarray(self.class_names)
        if isinstance(result, KnnResult):
            answers = result.predictions[result.headline_k]
        else:
            answers = result.predictions
        columns = {
            "id": pa.array([test.ids[row] for row in self.test_index], pa.string()),
            "label": pa.array(names[self.test_labels], pa.string()),
            "prediction": pa.array(names[answers], pa.string()),
            "correct": pa.array(result.correct(), pa.bool_()),
        }
        if isinstance(result, KnnResult):
            near = result.neighbours[:, :_STORED_NEIGHBOURS]
            columns |= {
                "neighbours": pa.array([[train.ids[self.train_index[j]] for j in row] for row in near]),
                "neighbour_labels": pa.array([names[self.train_labels[row]].tolist() for row in near]),
                "similarities": pa.array(list(result.similarities[:, :_STORED_NEIGHBOURS])),
            }
        return pa.table(columns)


@dataclass(frozen=True)
class _Pair:
    train_rows: np.ndarray  # rows of the features that carry a label
    test_rows: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]


def _labelled(train: Features, test: Features, train_spec: str, test_spec: str) -> _Pair:
    train_labels, test_labels, names = align_labels(
        train.labels, train.label_names, test.labels, test.label_names, train_spec=train_spec, test_spec=test_spec
    )
    train_rows, test_rows = np.flatnonzero(train_labels >= 0), np.flatnonzero(test_labels >= 0)
    return _Pair(train_rows, test_rows, train_labels[train_rows], test_labels[test_rows], names)


def knn(
    train: Features,
    test: Features | None,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = DEFAULT_TEMPERATURE,
    device: str | torch.device = "cpu",
    train_spec: str = "the training set",
    test_spec: str = "the test set",
) -> Outcome[KnnResult]:
    """k-NN accuracy of the pooled features; `test=None` leaves each training image out in turn.

    Raises InputError for missing or unknown labels, else what `knn_classify` raises.
    """
    alone = test is None
    test = train if test is None else test
    pair = _labelled(train, test, train_spec, train_spec if alone else test_spec)
    result = knn_classify(
        train.pooled[pair.train_rows],
        pair.train_labels,
        test.pooled[pair.test_rows],
        pair.test_labels,
        ks=ks,
        temperature=temperature,
        leave_one_out=alone,
        device=device,
    )
    return Outcome(
        result,
        train.index[pair.train_rows],
        test.index[pair.test_rows],
        pair.train_labels,
        pair.test_labels,
        pair.class_names,
    )


def linear(
    train: Features,
    test: Features,
    *,
    seed: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    blocks: Sequence[int] = LAST_BLOCKS,
    batch_size: int = 128,
    steps: int | None = None,
    validation_fraction: float = 0.1,
    device: str | torch.device = "cpu",
    train_spec: str = "the training set",
    test_spec: str = "the test set",
) -> Outcome[LinearResult]:
    """Linear-probe accuracy; both features must have been extracted with `last_blocks` (4 for the paper's grid).

    Raises InputError for missing or unknown labels, else what `linear_probe` raises.
    """
    if train.class_tokens is None or train.averaged_patches is None:
        raise ValueError("the linear probe needs features extracted with last_blocks > 0 (training set)")
    if test.class_tokens is None or test.averaged_patches is None:
        raise ValueError("the linear probe needs features extracted with last_blocks > 0 (test set)")
    pair = _labelled(train, test, train_spec, test_spec)
    result = linear_probe(
        train.class_tokens[pair.train_rows],
        train.averaged_patches[pair.train_rows],
        pair.train_labels,
        test.class_tokens[pair.test_rows],
        test.averaged_patches[pair.test_rows],
        pair.test_labels,
        seed=seed,
        learning_rates=learning_rates,
        blocks=blocks,
        batch_size=batch_size,
        steps=steps,
        validation_fraction=validation_fraction,
        device=device,
    )
    return Outcome(
        result,
        train.index[pair.train_rows],
        test.index[pair.test_rows],
        pair.train_labels,
        pair.test_labels,
        pair.class_names,
    )
