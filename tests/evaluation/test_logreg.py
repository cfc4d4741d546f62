import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from dinov2cli.artifacts.parts import Parts
from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.linear.grid import split_validation
from dinov2cli.evaluation.logreg.protocol import STRENGTHS, _schedule, _split_lists, logistic_regression, measure

GRID = tuple(np.logspace(-5, 3, 9))


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32)
    return images[:500], labels[:500], images[1000:], labels[1000:]


@pytest.fixture(scope="module")
def fitted(digits):
    train, train_y, test, _ = digits
    return logistic_regression(train, train_y, test, n_classes=10, seed=3, strengths=GRID)


def sklearn_loss(model, x, labels):
    scores = x.astype(np.float64) @ model.coef_.T + model.intercept_
    if scores.shape[1] == 1:
        losses = np.logaddexp(0, scores[:, 0]) - labels * scores[:, 0]
    else:
        losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(x)), labels]
    return model.C * losses.sum() + 0.5 * (model.coef_**2).sum()


def test_the_whole_protocol_as_with_scikit_learn(digits, fitted):
    train, train_y, test, test_y = digits
    fit_rows, held = split_validation(train_y, 0.1, seed=3)
    accuracies = []
    for strength in GRID:
        model = LogisticRegression(C=strength, max_iter=3000, tol=1e-6).fit(
            train[fit_rows].astype(np.float64), train_y[fit_rows]
        )
        accuracies.append(model.score(train[held].astype(np.float64), train_y[held]))
    assert np.allclose(fitted.validation, accuracies, atol=1.5 / len(held))
    assert fitted.validation[3:6] == pytest.approx(accuracies[3:6])
    assert fitted.strength == GRID[int(np.argmax(fitted.validation))]
    final = LogisticRegression(C=fitted.strength, max_iter=10_000, tol=1e-8).fit(train.astype(np.float64), train_y)
    accuracy = (fitted.scores.argmax(axis=1) == test_y).mean()
    assert accuracy == pytest.approx(final.score(test.astype(np.float64), test_y), abs=1e-3)
    assert fitted.loss == pytest.approx(sklearn_loss(final, train, train_y), rel=1e-5)
    assert np.allclose(fitted.coefficients, final.coef_, atol=0.01 * np.abs(final.coef_).max())
    assert np.allclose(test @ fitted.coefficients.T + fitted.intercepts, fitted.scores, atol=1e-3)
    assert not fitted.notes and fitted.n_validation == len(held) and fitted.n_train == 500


def test_two_classes_are_one_regression(digits):
    train, train_y, test, test_y = digits
    train, train_y, test, test_y = train[train_y < 2], train_y[train_y < 2], test[test_y < 2], test_y[test_y < 2]
    train = train + np.random.default_rng(0).normal(0, 8, train.shape).astype(np.float32)
    found = logistic_regression(train, train_y, test, n_classes=2, seed=0, strengths=[0.003])
    final = LogisticRegression(C=0.003, max_iter=10_000, tol=1e-8).fit(train.astype(np.float64), train_y)
    assert found.coefficients.shape == (1, 64) and found.scores.shape == (len(test), 2)
    assert np.allclose(found.coefficients, final.coef_, atol=1e-4)
    assert found.loss == pytest.approx(sklearn_loss(final, train, train_y), rel=1e-5)
    assert np.array_equal(found.scores.argmax(axis=1), final.predict(test.astype(np.float64)))


def test_lists_of_labels_as_with_scikit_learn(digits):
    train, train_y, test, test_y = digits
    classes = [lambda y: y % 2 == 0, lambda y: y < 3, lambda y: (y == 8) | (y == 0)]
    table, truth = (np.stack([one(y) for one in classes], axis=1) for y in (train_y, test_y))
    found = logistic_regression(train, table, test, n_classes=3, seed=0, strengths=[1e-4, 1e-3], metric="map")
    expected = np.stack(
        [
            LogisticRegression(C=found.strength, max_iter=5000, tol=1e-8)
            .fit(train.astype(np.float64), column)
            .decision_function(test.astype(np.float64))
            for column in table.T
        ],
        axis=1,
    )
    assert np.allclose(found.scores, expected, atol=0.01)
    own = measure(found.scores, truth, "map").value()
    assert own == pytest.approx(average_precision_score(truth, expected, average="macro"), abs=1e-3)
    assert own > 0.8


def test_the_choice_follows_the_metric():
    # One class has nearly all images: a strong penalty gets these right, only a weak one finds the others.
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [380, 20])
    x = rng.normal(size=(400, 5)).astype(np.float32)
    x[labels == 1, 0] += 2
    found = {
        metric: logistic_regression(
            x, labels, x, n_classes=2, seed=1, strengths=[1e-4, 1e-2, 1e2], metric=metric, validation_fraction=0.5
        )
        for metric in ("top1", "mean_per_class")
    }
    for metric, result in found.items():
        assert result.validation[result.chosen] == result.validation.max() and result.metric == metric
    assert found["mean_per_class"].validation[0] == pytest.approx(0.5)
    assert found["top1"].validation[0] == pytest.approx(0.95)


def test_mean_per_class_is_the_mean_of_recalls():
    scores = np.array([[2.0, 1, 0], [2, 1, 0], [0, 1, 2], [0, 1, 0]])
    assert measure(scores, np.array([0, 0, 0, 1]), "mean_per_class").value() == pytest.approx((2 / 3 + 1) / 2)


def test_equal_values_are_decided_for_the_smaller_strength():
    x = np.array([[-1.0], [1.0]] * 20, np.float32)
    found = logistic_regression(x, np.array([0, 1] * 20), x, n_classes=2, seed=0, strengths=[10.0, 0.1, 1.0])
    assert found.strengths == (0.1, 1.0, 10.0) and found.chosen == 0
    assert found.notes == ["the chosen C = 0.1 is the smallest of the grid: a wider one may be better"]


def test_a_class_held_out_entirely_does_no_harm(digits):
    train, train_y, test, _ = digits
    table = np.zeros((500, 2), dtype=bool)
    table[:, 0] = train_y < 5
    table[7, 1] = True
    assert any(7 in _split_lists(500, 0.5, seed)[1] for seed in range(6))
    for seed in range(6):  # in some of these the one image of the second class is held out
        found = logistic_regression(
            train, table, test, n_classes=2, seed=seed, strengths=[1e-3, 1.0], metric="map", validation_fraction=0.5
        )
        assert np.isfinite(found.scores).all() and not any("stopped" in note for note in found.notes)


def test_the_schedule_visits_every_strength_once():
    for count in (1, 2, 5, 16, 17, 45):
        for width in (1, 7, 100):
            parts = _schedule(count, width)
            assert sorted(place for part in parts for place in part) == list(range(count))
            assert all(0 < len(part) <= width for part in parts)
    assert len(STRENGTHS) == 45 and STRENGTHS[0] == 1e-6 and STRENGTHS[-1] == pytest.approx(1e5)


def test_few_strengths_at_once_give_the_same(digits, fitted, monkeypatch):
    monkeypatch.setattr("dinov2cli.evaluation.logreg.protocol._WIDTH", 20)
    train, train_y, test, _ = digits
    found = logistic_regression(train, train_y, test, n_classes=10, seed=3, strengths=GRID)
    assert found.strength == fitted.strength
    assert np.allclose(found.scores, fitted.scores, atol=0.02)


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("dinov2cli.evaluation.logreg.protocol._WIDTH", 20)
    train, train_y, test, _ = digits
    train, train_y = train[:200], train_y[:200]
    options = {"n_classes": 10, "seed": 3, "strengths": GRID[:6]}
    whole = logistic_regression(train, train_y, test, **options)
    seen = []

    def die(count):
        seen.append(count)
        if len(seen) == 2:
            raise Killed

    with pytest.raises(Killed):
        logistic_regression(train, train_y, test, store=Parts(tmp_path), advance=die, **options)
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    solved = []
    from dinov2cli.evaluation.logreg import protocol as logreg

    once = logreg.minimise
    monkeypatch.setattr(logreg, "minimise", lambda *a, **k: solved.append(len(a[1])) or once(*a, **k))
    resumed = logistic_regression(train, train_y, test, store=Parts(tmp_path), **options)
    assert sum(solved) == 6 - sum(seen) + 1
    assert np.array_equal(resumed.scores, whole.scores) and np.array_equal(resumed.iterations, whole.iterations)
    # Other labels or settings find nothing of these parts.
    for changed in ({"seed": 4}, {"validation_fraction": 0.2}, {"scaling": "unit"}):
        solved.clear()
        logistic_regression(train, train_y, test, store=Parts(tmp_path), **{**options, **changed})
        assert sum(solved) == 7


def test_impossible_requests_say_what_to_use(digits):
    train, train_y, test, _ = digits
    options = {"n_classes": 10, "seed": 0}
    for strengths in ([], [1.0, -1.0], [np.nan]):
        with pytest.raises(UserError, match=r"^C is \[.*\], expected one or more positive numbers"):
            logistic_regression(train, train_y, test, strengths=strengths, **options)
    with pytest.raises(UserError, match="metric 'f1' is not known"):
        logistic_regression(train, train_y, test, metric="f1", **options)
    with pytest.raises(UserError, match="scaling 'pca' is not known: expected one of none, unit, standard"):
        logistic_regression(train, train_y, test, scaling="pca", **options)
    with pytest.raises(InputError, match="no training class has two images"):
        logistic_regression(train[:10], np.arange(10), test, **options)
    for which in (0, 1):
        sets = [train.copy(), test.copy()]
        sets[which][3, 5] = np.nan
        with pytest.raises(
            WorkError, match=rf"^1 of \d+ feature vectors of the {('training', 'test')[which]} set hold"
        ):
            logistic_regression(sets[0], train_y, sets[1], **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_agree(digits, fitted):
    train, train_y, test, _ = digits
    found = logistic_regression(train, train_y, test, n_classes=10, seed=3, strengths=GRID, device="cuda")
    assert (found.scores.argmax(1) == fitted.scores.argmax(1)).mean() > 0.998
    assert found.loss == pytest.approx(fitted.loss, rel=1e-3) or found.strength != fitted.strength
