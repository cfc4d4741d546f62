from typing import NamedTuple

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score

from dinov2cli.fairness import confusion
from dinov2cli.fairness.confusion import BOTH, FALSE, ODDS, TRUE, class_outcomes, equalised_odds

NAMES = ["cat", "dog", "eel"]
LIMITS = {"min_images": 10, "confidence": 0.95, "resamples": 50, "seed": 0}


class Groups(NamedTuple):
    """What is asked of an axis."""

    name: str
    names: tuple[str, ...]
    codes: np.ndarray


def drawn(n=600, classes=3, groups=3, seed=0, unknown=0.1):
    """Labels, predictions right in half of the images, and an axis; some labels and groups unknown."""
    rng = np.random.default_rng(seed)
    labels, codes = rng.integers(0, classes, n), rng.integers(0, groups, n)
    predictions = np.where(rng.random(n) < 0.4 + 0.1 * codes, labels, rng.integers(0, classes, n))
    labels[rng.random(n) < unknown] = -1
    codes[rng.random(n) < unknown] = -1
    return labels, predictions, Groups("site", tuple("ABCDEF"[:groups]), codes)


def odds_by_loop(labels, predictions, classes, codes, groups):
    """True and false positive rates of every class in every group, counted one image at a time."""
    found = {}
    for number in range(classes):
        for group in groups:
            true = [
                p == number for y, p, g in zip(labels, predictions, codes, strict=True) if y == number and g == group
            ]
            false = [
                p == number
                for y, p, g in zip(labels, predictions, codes, strict=True)
                if y not in (number, -1) and g == group
            ]
            found[number, group] = np.mean(true), np.mean(false)
    return found


def rows(table, **wanted):
    return [row for row in table.to_pylist() if all(row[key] == value for key, value in wanted.items())]


def test_recall_and_false_positives_are_those_of_scikit_learn_in_every_group():
    labels, predictions, axis = drawn()
    outcomes = class_outcomes(labels, predictions, NAMES)
    assert [(one.metric, one.better) for one in outcomes[:2]] == [
        ("recall of cat", "high"),
        ("false positives of cat", "low"),
    ]
    for group in range(3):
        own = (axis.codes == group) & (labels >= 0)
        recalls = recall_score(labels[own], predictions[own], average=None, labels=[0, 1, 2])
        matrix = confusion_matrix(labels[own], predictions[own], labels=[0, 1, 2])
        for number in range(3):
            recall, false = outcomes[2 * number : 2 * number + 2]
            there = recall.counted & (axis.codes == group)
            assert recall.values[there].mean() == pytest.approx(recalls[number])
            there = false.counted & (axis.codes == group)
            others = np.arange(3) != number
            assert false.values[there].mean() == pytest.approx(matrix[others, number].sum() / matrix[others].sum())


def test_what_no_image_can_tell_of_is_left_out():
    labels, predictions = np.array([0, 0, 2, -1]), np.array([0, 2, 2, -1])
    metrics = [one.metric for one in class_outcomes(labels, predictions, NAMES)]
    assert "recall of dog" not in metrics and "false positives of dog" in metrics and len(metrics) == 5
    assert [one.metric for one in class_outcomes(np.zeros(4, np.int64), predictions, NAMES, classes=[0])] == [
        "recall of cat"
    ]
    assert [one.metric for one in class_outcomes(labels, predictions, NAMES, classes={2})] == [
        "recall of eel", "false positives of eel"
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes, groups", [(2, 2), (2, 4), (3, 3)])
def test_equalised_odds_by_their_definition(classes, groups, seed):
    """Hardt et al. 2016: differences of the two rates between groups; one class against the rest."""
    labels, predictions, axis = drawn(classes=classes, groups=groups, seed=seed)
    table = equalised_odds(labels, predictions, NAMES[:classes], [axis], None, **LIMITS)
    assert table.schema == ODDS
    rate = odds_by_loop(labels, predictions, classes, axis.codes, range(groups))
    gaps = {}
    for kind, measure in enumerate((TRUE, FALSE)):
        for number in range(classes):
            values = [rate[number, group][kind] for group in range(groups)]
            gaps[measure, NAMES[number]] = max(values) - min(values)
            (row,) = rows(table, measure=measure, **{"class": NAMES[number]})
            good, bad = (max, min) if measure == TRUE else (min, max)
            assert row["gap"] == pytest.approx(gaps[measure, NAMES[number]])
            assert row["best"] == axis.names[values.index(good(values))]
            assert row["worst"] == axis.names[values.index(bad(values))]
            assert 0 <= row["gap_low"] <= row["gap"] <= row["gap_high"] <= 1
    for measure in (TRUE, FALSE):
        (row,) = rows(table, measure=measure, **{"class": None})
        assert row["gap"] == pytest.approx(max(gap for (kind, _), gap in gaps.items() if kind == measure))
    (row,) = rows(table, measure=BOTH)
    assert row["class"] is None and row["gap"] == pytest.approx(max(gaps.values()))
    for measure in (TRUE, FALSE):  # what looks at all classes allows for more than the one does (500 draws: about)
        overall, *single = sorted(rows(table, measure=measure), key=lambda row: row["class"] is not None)
        assert overall["gap_high"] >= max(row["gap_high"] for row in single) - 0.01


def test_two_classes_have_the_odds_of_fairlearn():
    """Its equalized_odds_difference: the larger of the gaps in the true and in the false positives of class 1."""
    labels, predictions, axis = drawn(classes=2, groups=3, seed=5, unknown=0)
    true = [predictions[(labels == 1) & (axis.codes == g)].mean() for g in range(3)]
    false = [predictions[(labels == 0) & (axis.codes == g)].mean() for g in range(3)]
    (row,) = rows(equalised_odds(labels, predictions, NAMES[:2], [axis], None, **LIMITS), measure=BOTH)
    assert row["gap"] == pytest.approx(max(np.ptp(true), np.ptp(false)))


def test_small_groups_and_classes_are_not_compared():
    labels, predictions, axis = drawn(unknown=0)
    labels[(axis.codes == 2) & (labels >= 0)] = -1  # a group without a label
    labels[np.flatnonzero((axis.codes == 1) & (labels == 2))[9:]] = -1  # a class with nine images in one group
    table = equalised_odds(labels, predictions, NAMES, [axis], None, **LIMITS)
    assert {row["best"] for row in table.to_pylist()} | {row["worst"] for row in table.to_pylist()} == {"A", "B", None}
    for measure in (TRUE, FALSE):
        (left_out,) = rows(table, measure=measure, **{"class": "eel"})
        assert [left_out[key] for key in ("best", "worst", "gap", "gap_low", "gap_high")] == [None] * 5
        assert rows(table, measure=measure, **{"class": "cat"})[0]["gap"] is not None
    rate = odds_by_loop(labels, predictions, 3, axis.codes, [0, 1])
    gaps = [abs(rate[number, 0][kind] - rate[number, 1][kind]) for number in (0, 1) for kind in (0, 1)]
    assert rows(table, measure=BOTH)[0]["gap"] == pytest.approx(max(gaps))


def test_fewer_than_two_groups_give_no_rows_and_no_class_gives_empty_ones():
    labels, predictions, axis = drawn()
    assert equalised_odds(labels, predictions, NAMES, [axis], None, **{**LIMITS, "min_images": 10_000}).num_rows == 0
    assert equalised_odds(labels, predictions, NAMES, [], None, **LIMITS).schema == ODDS
    clusters = np.where(axis.codes == 0, 0, np.arange(600))  # all of group A is one person
    table = equalised_odds(labels, predictions, NAMES, [axis], clusters, **LIMITS, min_clusters=5)
    assert "A" not in {row["best"] for row in table.to_pylist()} | {row["worst"] for row in table.to_pylist()}
    lonely = equalised_odds(labels, predictions, NAMES, [axis], None, **{**LIMITS, "min_images": 100})
    assert lonely.num_rows == 9 and all(row["gap"] is None for row in lonely.to_pylist())


def test_of_many_classes_those_with_the_largest_gaps_are_shown(monkeypatch):
    monkeypatch.setattr(confusion, "_DETAILED", 2)
    labels, predictions, axis = drawn()
    table = equalised_odds(labels, predictions, NAMES, [axis, axis._replace(name="other")], None, **LIMITS)
    for name in ("site", "other"):
        own = rows(table, axis=name)
        overall = {row["measure"]: row["gap"] for row in own if row["class"] is None}
        shown = {(row["measure"], row["class"]): row["gap"] for row in own if row["class"] is not None}
        assert 2 <= len(shown) < 6
        assert overall[TRUE] == max(gap for (measure, _), gap in shown.items() if measure == TRUE)
        assert overall[FALSE] == max(gap for (measure, _), gap in shown.items() if measure == FALSE)
    monkeypatch.setattr(confusion, "_MOST", 1)
    most = NAMES[np.bincount(labels[(labels >= 0) & (axis.codes >= 0)]).argmax()]
    table = equalised_odds(labels, predictions, NAMES, [axis], None, **LIMITS)
    assert {row["class"] for row in table.to_pylist()} == {None, most}


@pytest.mark.parametrize("copies", [1, 6])
def test_the_interval_of_equalised_odds_holds_the_true_value(copies):
    """Images of a person alike, persons in one group each; odds known: 0.9 - 0.6 and 0.4 - 0.2."""
    rng, held, runs = np.random.default_rng(copies), 0, 150
    for _ in range(runs):
        person = np.repeat(np.arange(160), copies)
        codes = (np.arange(160) % 2)[person]
        labels = (np.arange(160) // 2 % 2)[person]
        share = np.array([[0.2, 0.9], [0.4, 0.6]])[codes, labels]
        predictions = (rng.random(160)[person] < share).astype(np.int64)
        axis = Groups("sex", ("f", "m"), codes)
        table = equalised_odds(labels, predictions, NAMES[:2], [axis], person, **LIMITS)
        (row,) = rows(table, measure=BOTH)
        held += row["gap_low"] <= 0.3 <= row["gap_high"]
    assert held >= 0.92 * runs


def test_the_same_seed_gives_the_same_table():
    labels, predictions, axis = drawn()
    first, second = (equalised_odds(labels, predictions, NAMES, [axis], None, **LIMITS) for _ in range(2))
    assert first.equals(second)
