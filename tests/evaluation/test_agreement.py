"""Agreement of tokens against scikit-learn's ridge regression and definitions in float64."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.agreement import PENALTIES, agreement, cosines, fit_map, halves, linear_cka

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 12)) * np.linspace(0.2, 3, 12) + 1.5
Y = X[:, :5] @ RNG.normal(size=(5, 7)) + 0.3 * RNG.normal(size=(300, 7)) - 2


def rotation(width, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def ridge(x, y, share):
    centred = x - x.mean(0)
    return Ridge(alpha=share * (centred**2).sum() / x.shape[1]).fit(x, y)


@pytest.mark.parametrize("share", [1e-6, 1e-2, 1.0])
def test_the_map_is_the_ridge_regression_of_scikit_learn(share):
    found = fit_map(X, Y, penalties=(share,))
    expected = ridge(X, Y, share)
    np.testing.assert_allclose(found.weight, expected.coef_.T, atol=1e-9)
    np.testing.assert_allclose(found.bias, expected.intercept_, atol=1e-9)
    np.testing.assert_allclose(found(X[:4].astype(np.float32)), expected.predict(X[:4]), atol=1e-5)


def test_the_map_does_not_depend_on_the_chunks_it_is_summed_in(monkeypatch):
    whole = fit_map(X, Y)
    monkeypatch.setattr("dinov2cli.evaluation.agreement._CHUNK", 7)
    np.testing.assert_allclose(fit_map(X, Y).weight, whole.weight, atol=1e-10)


def test_the_penalty_is_that_of_the_least_error_on_held_rows_and_all_rows_are_fitted():
    x, y = X[:40], Y[:40] + 4 * RNG.normal(size=(40, 7))
    held = np.zeros(40, bool)
    held[[1, 5, 8, 13, 30, 31]] = True
    errors = []
    for share in PENALTIES:
        # The share is of the variance of the rows that are fitted.
        errors.append(((ridge(x[~held], y[~held], share).predict(x[held]) - y[held]) ** 2).sum())
    best = PENALTIES[int(np.argmin(errors))]
    found = fit_map(x, y, held=held)
    assert found.penalty == best and PENALTIES[0] < best
    np.testing.assert_allclose(found.weight, ridge(x, y, best).coef_.T, atol=1e-9)


def test_agreement_is_the_cosine_on_the_half_that_was_not_fitted():
    found = agreement(X, Y, seed=3)
    fit, test = halves(300, seed=3)
    assert len(fit) == 150 and not set(fit) & set(test) and sorted([*fit, *test]) == list(range(300))
    guess = ridge(X[fit], Y[fit], found.penalty).predict(X[test])
    lengths = np.linalg.norm(guess, axis=1) * np.linalg.norm(Y[test], axis=1)
    np.testing.assert_allclose(found.mapped, (guess * Y[test]).sum(1) / lengths, atol=1e-9)
    np.testing.assert_allclose(found.constant, cosines(np.tile(Y[fit].mean(0), (150, 1)), Y[test]), atol=1e-12)
    assert found.plain is None and found.fitted == 150
    assert found.mapped.mean() > found.constant.mean() + 0.05


def test_agreement_of_patches_is_a_mean_over_each_image():
    x, y = X.reshape(50, 6, 12), Y.reshape(50, 6, 7)
    found = agreement(x, y, seed=0)
    fit, test = halves(50, seed=0)
    model = ridge(x[fit].reshape(-1, 12), y[fit].reshape(-1, 7), found.penalty)
    guess = model.predict(x[test].reshape(-1, 12)).reshape(25, 6, 7)
    np.testing.assert_allclose(found.mapped, cosines(guess, y[test]).mean(1), atol=1e-9)
    assert found.mapped.shape == found.constant.shape == (25,)


def test_whole_images_choose_the_penalty_of_a_map_of_patches():
    """Patches of one image are alike: were they on both sides, a map that remembers the image would seem best."""
    generator = np.random.default_rng(5)
    x = np.repeat(generator.normal(size=(40, 1, 30)), 8, axis=1) + 0.01 * generator.normal(size=(40, 8, 30))
    y = np.repeat(generator.normal(size=(40, 1, 6)), 8, axis=1)
    assert agreement(x, y, seed=0).penalty >= 1.0


def test_a_student_that_is_the_teacher_agrees_fully():
    found = agreement(Y, Y, seed=0)
    assert found.mapped.min() > 1 - 1e-6
    np.testing.assert_allclose(found.plain, 1, atol=1e-12)
    assert linear_cka(Y, Y)[0] == pytest.approx(1, abs=1e-12)


def test_a_rotation_shift_and_scale_of_the_student_change_nothing():
    turned = 3 * X @ rotation(12) + 5
    np.testing.assert_allclose(agreement(turned, Y, seed=0).mapped, agreement(X, Y, seed=0).mapped, atol=1e-8)
    assert linear_cka(turned, Y) == pytest.approx(linear_cka(X, Y), abs=1e-10)
    same = agreement(Y @ rotation(7) + 1, Y, seed=0)
    assert same.mapped.min() > 1 - 1e-6 and same.plain.mean() < 0.9


def test_a_student_that_says_nothing_gets_the_cosine_of_the_mean():
    constant = np.full((300, 4), [0.1, 0.7, -1.3, 3.3])
    for collapsed in (constant, constant + 1e-8 * RNG.normal(size=(300, 4))):  # what varies is rounding
        found = agreement(collapsed, Y, seed=0)
        np.testing.assert_allclose(found.mapped, found.constant, atol=1e-9)
    noise = agreement(RNG.normal(size=(300, 40)), Y, seed=0)
    assert abs(noise.mapped.mean() - noise.constant.mean()) < 0.02


def test_cka_is_the_ratio_of_centred_gram_matrices():
    """Kornblith et al. 2019, eq. 3 and 4: HSIC of K = X X' and L = Y Y' with the centring matrix H."""
    n = len(X)
    centring = np.eye(n) - np.ones((n, n)) / n

    def hsic(k, m):
        return np.trace(k @ centring @ m @ centring)

    k, m = X @ X.T, Y @ Y.T
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert linear_cka(X, Y)[0] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(linear_cka(np.ones((9, 3)), Y[:9])).all()


def test_the_interval_of_cka_is_as_wide_as_a_bootstrap_says():
    value, low, high = linear_cka(X, Y)
    draws = np.random.default_rng(2).integers(0, 300, (600, 300))
    spread = np.std([linear_cka(X[rows], Y[rows])[0] for rows in draws])
    assert low < value < high
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.15)


def test_cosines_of_zero_vectors_are_zero():
    assert cosines(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0.0]


def test_what_cannot_be_compared_is_said():
    with pytest.raises(InputError, match="9 images are too few to compare tokens"):
        agreement(X[:9], Y[:9], seed=0)
    with pytest.raises(ValueError, match=r"tokens must be \[n, D\]"):
        agreement(X, Y[:5], seed=0)
    with pytest.raises(ValueError, match="of the same images"):
        linear_cka(X, Y[:5])
    with pytest.raises(WorkError, match="tokens of the teacher hold NaN"):
        linear_cka(X, np.full_like(Y, np.nan))
    broken = X.copy()
    broken[:, 0] = np.inf
    with pytest.raises(WorkError, match="tokens of the student hold NaN or infinity: check"):
        agreement(broken, Y, seed=0)
