import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dinov2cli.evaluation.logreg.basis import make_basis
from dinov2cli.evaluation.logreg.lbfgs import Objective, minimise

CPU = torch.device("cpu")


def clouds(n, dim, classes, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return (rng.normal(size=(classes, dim))[labels] + spread * rng.normal(size=(n, dim)) + 3).astype(np.float32), labels


def loss_by_definition(x, labels, coefficients, intercepts, strength):
    """C * (sum of losses) + |w|^2 / 2 of a softmax, or of logistic losses for labels [n, K], in float64."""
    scores = x.astype(np.float64) @ coefficients.T + intercepts
    if labels.ndim == 2:
        losses = np.logaddexp(0, scores) - labels * scores
    else:
        losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(x)), labels]
    return strength * losses.sum() + 0.5 * (coefficients**2).sum()


def solve(x, targets, outputs, strengths, dtype=torch.float32, **options):
    basis = make_basis(x, scaling="none", device=CPU)
    objective = Objective(basis.apply(x, dtype=dtype), targets, outputs)
    where = torch.tensor(strengths, dtype=torch.float64)
    start = torch.zeros(objective.x.shape[1], outputs, len(strengths), dtype=dtype)
    return basis, minimise(objective, where, start, **options)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_softmax_losses_are_those_of_scikit_learn(dtype, close):
    x, labels = clouds(400, 12, 5)
    strengths = [1e-4, 1e-2, 1.0, 100.0]
    basis, fit = solve(x, torch.from_numpy(labels), 5, strengths, dtype, tolerance=close)
    assert fit.converged.all()
    for column, strength in enumerate(strengths):
        oracle = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), labels)
        expected = loss_by_definition(x, labels, oracle.coef_, oracle.intercept_, strength)
        found = loss_by_definition(x, labels, *basis.weights(fit.weights[..., column]), strength)
        assert found == pytest.approx(expected, rel=10 * close)
        assert fit.loss[column] * strength * len(x) == pytest.approx(expected, rel=10 * close)
        probabilities = oracle.predict_proba(x.astype(np.float64))
        own = torch.softmax(basis.apply(x, dtype=dtype) @ fit.weights[..., column], dim=1)
        assert np.allclose(own, probabilities, atol=0.02 if dtype == torch.float32 else 2e-4)


def test_each_column_of_lists_is_a_regression_of_its_own():
    x, labels = clouds(300, 8, 3)
    table = np.stack([labels == 0, labels != 1, np.arange(300) % 7 < 2], axis=1)
    basis, fit = solve(x, torch.from_numpy(table).double(), 3, [0.01, 3.0], torch.float64, tolerance=1e-10)
    for column, strength in enumerate([0.01, 3.0]):
        coefficients, intercepts = basis.weights(fit.weights[..., column])
        for c in range(3):
            oracle = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), table[:, c])
            assert np.allclose(coefficients[c], oracle.coef_[0], atol=1e-4 * max(1, strength))
            assert intercepts[c] == pytest.approx(oracle.intercept_[0], abs=1e-3 * max(1, strength))


def test_features_of_very_different_scale_converge():
    x, labels = clouds(400, 12, 4)
    scales = np.logspace(-4, 4, 12).astype(np.float32)
    x = x * scales
    _, fit = solve(x, torch.from_numpy(labels), 4, [1e-6, 1.0, 1e4])
    assert fit.converged.all() and fit.iterations.max() < 300
    # At a large C the penalty is nothing, and so is the scale: the loss is that of features of one scale.
    _, even = solve(x / scales, torch.from_numpy(labels), 4, [1e8], torch.float64, tolerance=1e-9)
    _, odd = solve(x, torch.from_numpy(labels), 4, [1e16], torch.float64, tolerance=1e-9)
    assert odd.loss[0] == pytest.approx(even.loss[0], rel=1e-4)


def test_gradients_are_those_of_autograd_also_where_all_is_certain():
    x, labels = clouds(50, 6, 4)
    z = torch.cat([torch.from_numpy(x).double(), torch.ones(50, 1, dtype=torch.float64)], dim=1)
    y = torch.from_numpy(labels)
    strengths = torch.tensor([0.1, 10.0], dtype=torch.float64)
    for targets, outputs in ((y, 4), (torch.eye(4, dtype=torch.float64)[y], 4)):
        objective = Objective(z, targets, outputs)
        penalties = objective.penalties(strengths)
        for scale in (0.1, 30.0):
            weights = scale * torch.randn(
                7, outputs, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            weights.requires_grad_()
            scores = torch.einsum("nr,rkh->nkh", z, weights)
            if targets.dim() == 1:
                losses = torch.stack([torch.nn.functional.cross_entropy(scores[..., h], y) for h in range(2)])
            else:
                losses = torch.stack(
                    [
                        torch.nn.functional.binary_cross_entropy_with_logits(scores[..., h], targets) * outputs
                        for h in range(2)
                    ]
                )
            expected = losses + 0.5 * (penalties * weights**2).sum((0, 1))
            expected.sum().backward()
            loss, gradient = objective(weights.detach(), penalties)
            assert torch.allclose(loss, expected.detach(), rtol=1e-12)
            assert torch.allclose(gradient, weights.grad, atol=1e-10)


def test_tiny_losses_keep_their_digits_in_float32():
    z = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    objective = Objective(z, torch.tensor([0, 1]), 2)
    weights = torch.tensor([[12.0, -12.0], [0.0, 0.0]])[..., None]
    loss, gradient = objective(weights, torch.zeros(2, 1, 1))
    assert loss.item() == pytest.approx(np.exp(-24.0), rel=1e-5)
    assert gradient[0, 0, 0].item() == pytest.approx(-np.exp(-24.0), rel=1e-5)


def test_blocks_of_rows_add_up(monkeypatch):
    x, labels = clouds(300, 6, 3)
    z = torch.cat([torch.from_numpy(x).double(), torch.ones(300, 1, dtype=torch.float64)], dim=1)
    objective = Objective(z, torch.from_numpy(labels), 3)
    weights = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    penalties = objective.penalties(torch.tensor([1.0, 2.0]))
    whole = objective(weights, penalties)
    monkeypatch.setattr("dinov2cli.evaluation.logreg.lbfgs._SCORES_CPU", 1)
    parts = objective(weights, penalties)
    assert torch.allclose(whole[0], parts[0], rtol=1e-12) and torch.allclose(whole[1], parts[1], atol=1e-12)


def test_steps_run_out_and_it_is_said():
    x, labels = clouds(200, 6, 3)
    _, fit = solve(x, torch.from_numpy(labels), 3, [1e-6, 1e3], max_iterations=3)
    assert not fit.converged[1] and fit.iterations[1] == 3 and np.isfinite(fit.loss).all()


@pytest.mark.parametrize("scaling", ["none", "unit", "standard"])
def test_the_basis_keeps_products_and_gives_weights_back(scaling):
    x, _ = clouds(60, 9, 3)
    x[:, 4] = 2.5
    basis = make_basis(x, scaling=scaling, device=CPU)
    z = basis.apply(x, dtype=torch.float64).numpy()
    plain = x.astype(np.float64)
    plain = plain / np.linalg.norm(plain, axis=1, keepdims=True) if scaling == "unit" else plain
    centred = plain - plain.mean(0)
    if scaling == "standard":
        centred = centred / np.where(centred.std(0) > 0, centred.std(0), 1)
    assert np.allclose(z[:, :-1] @ z[:, :-1].T, centred @ centred.T)
    assert (z[:, -1] == 1).all()
    gram = z[:, :-1].T @ z[:, :-1]
    assert np.allclose(gram, np.diag(np.diag(gram)), atol=1e-9)
    weights = torch.randn(z.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefficients, intercepts = basis.weights(weights)
    assert np.allclose(plain @ coefficients.T + intercepts, z @ weights.numpy())


def test_fewer_images_than_features_leave_fewer_directions():
    x, _ = clouds(5, 20, 2)
    basis = make_basis(x, scaling="none", device=CPU)
    assert basis.rotation.shape == (20, 5)
    z = basis.apply(x, dtype=torch.float64).numpy()[:, :-1]
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    assert np.allclose(z @ z.T, centred @ centred.T)


def test_no_step_makes_the_loss_larger():
    images, labels = load_digits(return_X_y=True)
    x, targets = images[:300].astype(np.float32), torch.from_numpy(labels[:300])
    # A problem whose data can be told apart with certainty: full steps are too long now and then.
    losses = [solve(x, targets, 10, [100.0], torch.float64, max_iterations=steps)[1].loss[0] for steps in range(40)]
    assert losses[0] == pytest.approx(np.log(10))
    assert (np.diff(losses) <= 1e-12).all() and losses[-1] < 0.01
