import numpy as np
import pytest
import torch

from dinov2cli.data.source import LabelLists
from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.scores import absent_note, align_label_lists, align_labels, require_finite, true_class_ranks


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


def test_a_set_without_labels_names_the_cure():
    with pytest.raises(InputError, match=r"^photos/: none of its 2 images has a label; expected a column with labels"):
        align_labels(np.array([0]), None, np.array([-1, -1]), None, test_spec="photos/")
    with pytest.raises(InputError) as caught:
        align_labels(np.array([0]), None, None, None, test_spec="photos/")
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


def test_labels_beyond_the_names_are_refused():
    with pytest.raises(InputError) as caught:
        align_labels(np.array([0, 1]), ["cat", "dog"], np.array([0, 2]), ["cat", "dog"], test_spec="b")
    assert str(caught.value) == (
        "b has label 2, but names for 2 classes only: expected labels from 0 to 1; correct the labels or the names"
    )


def test_a_single_class_cannot_be_told_apart():
    with pytest.raises(InputError) as caught:
        align_labels(np.array([1, 1]), ["cat", "dog"], np.array([1]), ["cat", "dog"], train_spec="a")
    assert str(caught.value) == "a has one class (dog), so there is nothing to tell apart; expected two or more"


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"^a has several classes of one name \(crane\): give each its own$"):
        align_labels(np.array([0, 1, 2]), ["crane", "crane", "owl"], np.array([2]), ["a", "b", "owl"], train_spec="a")


def test_classes_without_a_test_image_are_a_note():
    names = ["cat", "dog", "eel", "fox", "gnu"]
    assert absent_note(np.array([0, 1, 2, 3, 4, 0]), names) == []
    (note,) = absent_note(np.array([1, 1]), names)
    assert note.startswith("4 of 5 classes have no test image (cat, eel, fox, ...): figures are of the others")


def test_lists_become_tables_in_one_numbering():
    train = LabelLists([[0, 2], [], None, [1]], ["cat", "dog", "eel"])
    test = LabelLists([[0], [1, 0]], ["eel", "cat"])
    first, second, names = align_label_lists(train, test)
    assert names == ["cat", "dog", "eel"]
    assert first.tolist() == [[True, False, True], [False] * 3, [False] * 3, [False, True, False]]
    assert second.tolist() == [[False, False, True], [True, False, True]]
    by_number = align_label_lists(LabelLists([[5], [9, 5], []], None), LabelLists([[9]], None))
    assert by_number[2] == ["5", "9"] and by_number[1].tolist() == [[False, True]]


@pytest.mark.parametrize(
    "train, test, message",
    [
        (None, LabelLists([[0]], None), "a has no lists of labels and mean average precision needs them"),
        (LabelLists([[0], [1]], None), LabelLists([[], None], None), "b has no lists of labels"),
        (LabelLists([[0], [1]], None), LabelLists([[0, 7]], None), "b has 1 class that a lacks (7): give both"),
        (LabelLists([[0], [3]], ["x", "y"]), LabelLists([[0]], ["x", "y"]), "a has label 3, but names for 2 classes"),
        (LabelLists([[4], [4], None], None), LabelLists([[4]], None), "a has one class (4), so there is nothing"),
        (LabelLists([[4, 5], [4], None], None), LabelLists([[4]], None), "a: class 4 is in every image, so there"),
    ],
)
def test_unfit_lists_are_named(train, test, message):
    with pytest.raises(InputError) as caught:
        align_label_lists(train, test, train_spec="a", test_spec="b")
    assert str(caught.value).startswith(message)
