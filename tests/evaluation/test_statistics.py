import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, jaccard_score

from dinov2cli.artifacts.results import Scores
from dinov2cli.errors import InputError
from dinov2cli.evaluation import statistics
from dinov2cli.evaluation.statistics import (
    KINDS,
    Statistic,
    average_precision,
    class_mean,
    drop,
    gap,
    mean,
    micro_average_precision,
    ratio,
    root_mean,
)

N = 60


def example(kind, seed=0):
    rng = np.random.default_rng(seed)
    if kind in ("mean", "root_mean"):
        return getattr(statistics, kind)(rng.random(N))
    if kind == "class_mean":
        return class_mean(rng.random(N), rng.integers(0, 4, N))
    if kind == "ratio":
        unions = rng.integers(0, 9, (N, 4))
        return ratio(rng.integers(0, 9, (N, 4)) % (unions + 1), unions)
    if kind in ("gap", "drop"):
        groups = np.eye(4)[rng.integers(0, 4, N)]
        return getattr(statistics, kind)(groups * (rng.random(N) < 0.7)[:, None], groups)
    if kind in ("gap", "drop"):
        counted = np.eye(3)[rng.integers(0, 3, N)]
        return getattr(statistics, kind)(counted * rng.integers(0, 2, (N, 1)), counted)
    scores = rng.integers(0, 12, (N, 3)) / 4  # many ties
    if kind == "average_precision":
        return average_precision(scores, rng.integers(-1, 2, (N, 3)))
    return micro_average_precision(scores[:, 0], rng.random(N) < 0.5, rng.random(N) < 0.8)


def by_definition(confidences, correct, answerable):
    """By definition, in order of confidence; equal confidences are one step."""
    total = 0.0
    for level in np.unique(confidences):
        taken = confidences >= level
        total += correct[taken].sum() / taken.sum() * correct[confidences == level].sum()
    return total / answerable.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_mean_that_units_are_repeated(kind):
    found = example(kind)
    weights = np.random.default_rng(1).integers(0, 4, (7, N)).astype(float)
    replicates = found.replicates(weights)
    for drawn, replicate in zip(weights.astype(int), replicates, strict=True):
        assert found.at(np.repeat(np.arange(N), drawn)).value() == pytest.approx(replicate, abs=1e-12)
    assert len(set(replicates)) == 7


def test_means_and_roots_are_those_of_numpy():
    values = np.random.default_rng(0).random(101)
    assert mean(values).value() == pytest.approx(values.mean(), abs=1e-14)
    assert root_mean(values**2).value() == pytest.approx(np.sqrt((values**2).mean()), abs=1e-14)


def test_class_mean_is_the_balanced_accuracy_of_scikit_learn():
    rng = np.random.default_rng(1)
    truth, answers = rng.integers(0, 7, 300), rng.integers(0, 7, 300)
    found = class_mean(truth == answers, truth)
    assert found.value() == pytest.approx(balanced_accuracy_score(truth, answers), abs=1e-12)
    drawn = rng.integers(0, 300, 300)  # a resample, in which a class may be missing
    drawn = drawn[truth[drawn] != 3]
    weights = np.bincount(drawn, minlength=300)[None].astype(float)
    expected = balanced_accuracy_score(truth[drawn], answers[drawn])
    assert found.replicates(weights)[0] == pytest.approx(expected, abs=1e-12)
    one_hot = np.eye(7)[truth]
    same = ratio(one_hot * (truth == answers)[:, None], one_hot)
    many = rng.multinomial(300, np.full(300, 1 / 300), size=50).astype(float)
    np.testing.assert_allclose(found.replicates(many), same.replicates(many), atol=1e-12)
    assert np.isnan(class_mean([], []).value())


def test_ratio_is_mean_intersection_over_union_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 30, 200))
    classes = np.arange(5)
    both = ((truth == found)[..., None] & (truth[..., None] == classes)).sum(1)
    either = ((truth[..., None] == classes) | (found[..., None] == classes)).sum(1)
    expected = jaccard_score(truth.ravel(), found.ravel(), average="macro")
    assert ratio(both, either).value() == pytest.approx(expected, abs=1e-12)
    # A class that is nowhere does not count.
    padded = ratio(np.pad(both, ((0, 0), (0, 2))), np.pad(either, ((0, 0), (0, 2))))
    assert padded.value() == pytest.approx(expected, abs=1e-12)
    outside = ratio(np.pad(both, ((0, 9), (0, 0))), np.pad(either, ((0, 9), (0, 0))))  # units that have no part in it
    assert (outside.value(), outside.n, len(outside)) == (pytest.approx(expected, abs=1e-12), 30, 39)


@pytest.mark.parametrize("levels", [3, 20, 10_000])
def test_average_precision_is_that_of_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    targets = rng.integers(-1, 2, (300, 4))
    scores = np.round(rng.random((300, 4)) * levels) + targets * levels // 3
    expected = [
        average_precision_score(targets[rows, c], scores[rows, c])
        for c, rows in enumerate((targets >= 0).T)
    ]  # fmt: skip
    found = average_precision(scores, targets)
    assert found.value() == pytest.approx(np.mean(expected), abs=1e-12)
    weights = rng.integers(0, 3, 300).astype(float)
    expected = [
        average_precision_score(targets[rows, c], scores[rows, c], sample_weight=weights[rows])
        for c, rows in enumerate((targets >= 0).T)
    ]
    assert found.replicates(weights[None])[0] == pytest.approx(np.mean(expected), abs=1e-12)


def test_classes_without_a_positive_do_not_count():
    scores, targets = np.array([[3.0, 1], [2, 5], [1, 4]]), np.array([[1, 0], [0, -1], [1, 0]])
    assert average_precision(scores, targets).value() == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(scores[:, 1:], targets[:, 1:]).value())
    # A resample may lose the only positive of a class.
    assert np.isnan(average_precision(scores, targets).replicates(np.array([[0.0, 3, 0]]))[0])


def test_micro_average_precision_is_its_definition():
    found = example("micro_average_precision")
    assert found.value() == pytest.approx(by_definition(*found.values.T), abs=1e-12)
    # Weyand et al.: 1 / M times the sum of precision where an answer is right.
    known = micro_average_precision([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0], [1, 1, 1, 0])
    assert known.value() == pytest.approx((1 + 2 / 3) / 3)
    # A distractor answered with the highest confidence costs, one with the lowest does not.
    assert micro_average_precision([0.5, 0.4, 0.9], [1, 1, 0], [1, 1, 0]).value() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert micro_average_precision([0.5, 0.4, 0.1], [1, 1, 0], [1, 1, 0]).value() == 1.0


def test_gaps_and_drops_are_of_the_rates_of_groups():
    rng = np.random.default_rng(0)
    codes, hits = rng.integers(0, 5, N), rng.random(N) < 0.6
    codes[codes == 3] = 2  # a group without images
    groups = np.eye(5)[codes]
    groups[:7] = 0  # images of no group
    rates = [hits[7:][codes[7:] == group].mean() for group in (0, 1, 2, 4)]
    apart, relative = gap(groups * hits[:, None], groups), drop(groups * hits[:, None], groups)
    assert apart.value() == pytest.approx(max(rates) - min(rates), abs=1e-12)
    assert relative.value() == pytest.approx(1 - min(rates) / max(rates), abs=1e-12)
    assert (apart.n, len(apart)) == (N - 7, N)
    only = np.eye(5)[np.zeros(N, dtype=int)]
    assert np.isnan(gap(only, only).value())  # one group has no gap
    assert np.isnan(drop(0 * groups, groups).value()) and gap(0 * groups, groups).value() == 0
    clusters = rng.integers(0, 20, N)
    assert apart.pooled(clusters).value() == pytest.approx(apart.value(), abs=1e-12)
    assert len(apart.pooled(clusters)) == len(set(clusters)) and root_mean(hits).pooled(clusters) is None
    assert mean(hits).pooled(clusters).value() == pytest.approx(hits.mean(), abs=1e-12)


def test_nothing_has_no_value():
    assert np.isnan(mean([]).value())
    assert np.isnan(ratio(np.zeros((3, 2)), np.zeros((3, 2))).value())
    assert np.isnan(micro_average_precision([1.0], [0], [0]).value())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_all_that_is_needed_to_have_the_metric_again(kind):
    found = example(kind)
    names = [str(i) for i in range(N)]
    again = Statistic.of(found.scores(names))
    assert again.kind == kind
    assert again.value() == found.value()
    assert found.scores(names).clusters is None and found.scores(names, names[::-1]).clusters == names[::-1]


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a metric over 3 units needs as many names, got 2"):
        mean([1, 2, 3]).scores(["a", "b"])
    with pytest.raises(ValueError, match="a metric over 3 units needs as many names, got 1"):
        mean([1, 2, 3]).scores(["a", "b", "c"], ["x"])
    with pytest.raises(InputError, match="kind 'median', expected one of mean, class_mean, ratio"):
        Statistic.of(Scores("median", ["a"], np.zeros((1, 1))))
    with pytest.raises(ValueError, match="one shape"):
        ratio(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="one number for each unit"):
        mean(np.zeros((3, 2)))
