"""Matching of labels, restricted answers, corruption errors and the joint list of images, against their definitions."""

import hashlib

import numpy as np
import pytest

from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.robustness.errors import (
    ALEXNET,
    Baseline,
    alexnet,
    corruption_error,
    relative_corruption_error,
)
from dinov2cli.evaluation.robustness.shifts import Labels, Seen, Units, match_labels, predict, training_classes

RANDOM = np.random.default_rng(0)
# Table 1 and the released code of the paper: mean error of AlexNet over the severities, in the paper's order.
PUBLISHED = dict(
    zip(
        ALEXNET,
        [
            *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816),
            *(0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
        ],
        strict=True,
    )
)


def classes_of(names=("cat", "dog", "fox")):
    labels, classes = training_classes(np.array([2, 0, 1, -1, 0]), names, "train")
    return labels, classes


def match(labels: Labels, *, names=("cat", "dog", "fox"), skip=False):
    return match_labels(labels, classes_of(names)[1], spec="shifted", train_spec="train", skip_unknown=skip)


def digests(*names: str) -> np.ndarray:
    return np.array([list(hashlib.sha256(name.encode()).digest()) for name in names], dtype=np.uint8).reshape(-1, 32)


def test_classes_of_training_are_numbered_in_order():
    labels, classes = training_classes(np.array([7, -1, 3, 7]), None, "train")
    assert labels.tolist() == [1, -1, 0, 1]
    assert classes.numbers.tolist() == [3, 7] and classes.shown(1) == "7"
    assert classes_of()[1].shown(2) == "fox"


@pytest.mark.parametrize("labels, names", [([-1, -1], None), ([2, 2, -1], None), ([0, 5], ["a", "b"])])
def test_training_sets_that_cannot_teach_are_refused(labels, names):
    with pytest.raises(InputError, match="train"):
        training_classes(np.array(labels), names, "train")


def test_labels_are_matched_by_name_where_both_have_names():
    answers = match(Labels.single([1, 0, -1, 1], ["fox", "cat"]))
    assert answers.right.tolist() == [0, 2, 0] and answers.owner.tolist() == [0, 1, 3]
    assert answers.present.tolist() == [0, 2] and answers.unlabelled == 1 and answers.unknown == 0
    assert answers.judged.tolist() == [0, 1, 3]


def test_labels_are_matched_by_number_where_one_has_no_names():
    answers = match(Labels.single([2, 1, 1]))
    assert answers.right.tolist() == [2, 1, 1]


def test_unknown_classes_are_named_or_left_out_and_counted():
    labels = Labels.single([0, 1, 2, 2], ["cat", "owl", "eel"])
    with pytest.raises(InputError, match=r"shifted has 2 classes that train lacks \(owl, eel\).*unknown=skip"):
        match(labels)
    answers = match(labels, skip=True)
    assert answers.judged.tolist() == [0] and answers.unknown == 3 and answers.unknown_names == ["owl", "eel"]


@pytest.mark.parametrize("skip", [False, True])
def test_no_common_class_and_no_label_are_errors(skip):
    with pytest.raises(InputError, match="no class in common"):
        match(Labels.single([0, 1], ["owl", "eel"]), skip=skip)
    for labels in (Labels.single([-1, -1]), Labels.several([[], []])):
        with pytest.raises(InputError, match="no labels"):
            match(labels, skip=skip)


def test_any_of_several_labels_is_right_and_images_without_are_left_out():
    answers = match(Labels.several([[0, 2], [], [1], [2, 1, 0]]))
    assert answers.unlabelled == 1 and answers.judged.tolist() == [0, 2, 3]
    assert answers.hits(np.array([2, 0, 0, 1])).tolist() == [True, False, False, True]
    assert answers.hits(np.array([1, 1, 1, 2])).tolist() == [False, False, True, True]


def test_of_several_labels_unknown_ones_do_not_count():
    answers = match(Labels.several([[0, 3], [3], [1]], ["cat", "dog", "fox", "owl"]), skip=True)
    assert answers.judged.tolist() == [0, 2] and answers.unknown == 1
    assert answers.hits(np.array([0, 0, 1])).tolist() == [True, False, True]


def test_predictions_among_some_classes():
    logits = RANDOM.normal(size=(50, 6)).astype(np.float32)
    some = np.array([1, 4, 5])
    expected = [max(some, key=lambda number: row[number]) for row in logits]
    assert predict(logits, some).tolist() == expected
    assert predict(logits).tolist() == logits.argmax(1).tolist()
    assert predict(np.zeros((1, 6), np.float32), some).tolist() == [1]


def seen(logits, labels, index=None) -> Seen:
    index = np.arange(len(logits)) if index is None else np.array(index)
    answers = match(labels)
    names = [f"image {row}" for row in range(answers.n)]
    return Seen(index, names, digests(*(names[row] for row in index)), np.array(logits, np.float32), answers)


def test_unreadable_and_unlabelled_images_are_not_judged():
    # Of five images the second cannot be read and the fourth has no label.
    found = seen([[9, 0, 0], [0, 9, 0], [0, 0, 9], [0, 9, 0]], Labels.single([0, 1, 1, -1, 0]), index=[0, 2, 3, 4])
    assert found.ids == ["image 0", "image 2", "image 4"]
    assert found.right().tolist() == [True, True, False]
    table = found.table(classes_of()[1]).to_pydict()
    assert table["label"] == ["cat", "dog", "cat"] and table["prediction"] == ["cat", "dog", "dog"]
    assert table["correct"] == [True, True, False] and table["confidence"][0] == pytest.approx(0.99975, abs=1e-4)
    assert found.right_of(np.array([1, 1, 0, 0])).tolist() == [False, True, True]
    assert found.shared_with(digests("image 2", "image 3", "other")) == 1 and found.shared_with(None) == 0


def test_a_subset_judges_images_of_its_classes_only():
    found = seen([[9, 8, 0], [0, 9, 0], [0, 8, 9]], Labels.single([1, 1, 2]))
    part = found.of(np.array([1]))
    assert part.rows.tolist() == [0, 1]
    assert part.right(np.array([1, 2])).tolist() == [True, True] and part.right().tolist() == [False, True]


def test_alexnet_errors_are_the_published_ones():
    found = alexnet(list(ALEXNET), [1, 2, 3, 4, 5])
    assert found.errors == pytest.approx(PUBLISHED, abs=1e-6)
    assert alexnet(["fog"], [5]).errors == {"fog": 0.945}
    found.check(list(ALEXNET))


def test_corruption_errors_are_sums_over_severities_in_relation_to_the_baseline():
    wrong, clean = RANDOM.random((40, 3, 5)) < 0.6, RANDOM.random(40) < 0.2
    baseline = {"snow": 0.8, "frost": 0.7, "fog": 0.6}
    ce, relative = [], []
    for number, error in enumerate(baseline.values()):
        by_severity = wrong[:, number].mean(axis=0)
        ce.append(by_severity.sum() / (5 * error))
        relative.append((by_severity - clean.mean()).sum() / (5 * (error - 0.3)))
    errors = list(baseline.values())
    assert corruption_error(wrong, errors).mean() == pytest.approx(np.mean(ce))
    assert relative_corruption_error(wrong, clean, errors, 0.3).mean() == pytest.approx(np.mean(relative))
    assert corruption_error(wrong).mean() == pytest.approx(wrong.mean())
    assert relative_corruption_error(wrong, clean).mean() == pytest.approx(wrong.mean() - clean.mean())


def test_the_baseline_itself_has_an_error_of_one():
    wrong = np.zeros((100, 2, 2), bool)
    wrong[:80, 0], wrong[:50, 1] = True, True
    clean = np.arange(100) < 40
    assert corruption_error(wrong, [0.8, 0.5]).mean() == pytest.approx(1)
    assert relative_corruption_error(wrong, clean, [0.8, 0.5], 0.4).mean() == pytest.approx(1)


def test_baselines_that_lack_a_corruption_or_make_no_error_are_refused():
    with pytest.raises(UserError, match="no errors under snow"):
        Baseline("other", {"fog": 0.5}, 0.2).check(["fog", "snow"])
    with pytest.raises(UserError, match="no errors under fog"):
        Baseline("other", {"fog": 0.0}, 0.2).check(["fog"])
    assert Baseline("other", {"fog": 0.2, "snow": 0.3}, 0.2).unharmed(["fog", "snow"]) == ["fog"]


def test_one_set_alone_gives_a_plain_mean():
    units = Units(["a", "b", "c"], digests("a", "b", "c"))
    share = units.share(units.test, [1, 0, 1])
    assert share.kind == "mean" and share.value() == pytest.approx(2 / 3)


def test_figures_of_several_sets_stand_over_all_images_each_once():
    units = Units(["a", "b", "c"], digests("a", "b", "c"))
    other, third = units.add(["s:x", "s:b"], digests("x", "b")), units.add(["t:c"], digests("c"))
    assert units.names == ["a", "b", "c", "s:x"]
    assert other.tolist() == [3, 1] and third.tolist() == [2]
    assert units.share(units.test, [1, 0, 1]).value() == pytest.approx(2 / 3)
    assert units.share(other, [1, 0]).value() == pytest.approx(0.5)
    assert units.difference(units.test, [1, 0, 1], other, [0, 0]).value() == pytest.approx(2 / 3)


def test_the_difference_on_the_same_images_is_paired():
    """What both share cancels under every resampling."""
    names = [str(number) for number in range(60)]
    units = Units(names, digests(*names))
    right = RANDOM.random(60) < 0.5
    same = units.add([f"s:{name}" for name in names], digests(*names))
    weights = RANDOM.integers(0, 3, (20, 60)).astype(float)
    assert np.abs(units.difference(units.test, right, same, right).replicates(weights)).max() < 1e-12
    apart = Units(names, digests(*names))
    others = apart.add([f"s:{name}" for name in names], digests(*(f"other {name}" for name in names)))
    weights = RANDOM.integers(0, 3, (20, 120)).astype(float)
    found = apart.difference(apart.test, right, others, right).replicates(weights)
    first, second = weights[:, :60], weights[:, 60:]
    assert found == pytest.approx(first @ right / first.sum(1) - second @ right / second.sum(1))
    assert np.abs(found).max() > 0.01


def test_copies_within_the_test_set_stay_two_images():
    units = Units(["a", "b"], digests("same", "same"))
    assert units.test.tolist() == [0, 1] and units.share(units.test, [1, 0]).value() == 0.5
    assert units.add(["s:c"], digests("same")).tolist() == [0]
