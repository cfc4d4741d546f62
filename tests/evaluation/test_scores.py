import numpy as np
import pytest
import torch

from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.scores import accuracy_row, align_labels, require_finite, true_class_ranks


def test_names_decide_when_both_sets_have_them():
    train, test, names = align_labels(np.array([0, 1, 2]), ["cat", "dog", "eel"], np.array([1, 0, -1]), ["dog", "cat"])
    assert names == ["cat", "dog", "eel"]
    assert train.tolist() == [0, 1, 2]
    assert test.tolist() == [0, 1, -1]


def test_numbers_decide_without_names_and_gaps_close():
    train, test, names = align_labels(np.array([5, 9, 5, -1, -2]), None, np.array([9, 5]), ["x"] * 10)
    assert names == ["5", "9"]
    assert train.tolist() == [0, 1, 0, -1, -1]
    assert test.tolist() == [1, 0]


def test_a_class_never_trained_on_is_named():
    with pytest.raises(InputError) as caught:
        align_labels(np.array([0]), ["cat"], np.array([0, 1, 2]), ["cat", "dog", "eel"], train_spec="a", test_spec="b")
    assert str(caught.value) == "b has 2 classes that a lacks (dog, eel): give both sets the same classes"


@pytest.mark.parametrize("labels", [None, np.array([-1, -1])])
def test_a_set_without_labels_names_the_cure(labels):
    with pytest.raises(InputError) as caught:
        align_labels(np.array([0]), None, labels, None, test_spec="photos/")
    assert str(caught.value) == (
        "photos/ has no labels and this benchmark needs them: name their column with ?label=COLUMN, "
        "or take them from folders with ?label=folder"
    )


def test_nan_features_are_counted():
    features = torch.ones(4, 3)
    features[1, 2] = torch.nan
    with pytest.raises(WorkError, match=r"^1 of 4 feature vectors of the test set hold NaN or infinity: extract"):
        require_finite(features, "the test set")


def test_ranks_count_better_classes_and_ties_gain_nothing():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    assert true_class_ranks(scores, torch.tensor([2, 0, 2])).tolist() == [1, 0, 2]


def test_row_holds_accuracy_and_interval():
    row = accuracy_row(
        np.array([True] * 3 + [False]),
        model="m",
        task="knn",
        dataset="d",
        metric="top1_k10",
        settings={"k": 10},
        seconds=1.23456,
    )
    assert (row.value, row.n, row.seconds) == (0.75, 4, 1.235)
    assert 0.3 < row.ci_low < 0.31 and 0.95 < row.ci_high < 0.96
    assert row.settings == {"k": 10, "confidence": 0.95}
