"""Logistic regression on frozen features over a grid of regularisation strengths, one chosen on held-out train images.

The protocol of the paper and its code: 45 values of C from 1e-6 to 1e5, the best on a tenth of the training images,
then all training images at that C. The objective is scikit-learn's, C * (sum of losses) + |w|^2 / 2 without a penalty
on intercepts; two classes are one logistic regression, more are a softmax, lists of labels one regression per class.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation import statistics
from dinov2cli.evaluation.linear.grid import split_validation
from dinov2cli.evaluation.logreg.basis import Basis, make_basis
from dinov2cli.evaluation.logreg.lbfgs import MAX_ITERATIONS, TOLERANCE, Fit, Objective, minimise
from dinov2cli.evaluation.scores import require_finite
from dinov2cli.search.blocks import Arrays, Stage, Store, kept

STRENGTHS = tuple(float(value) for value in np.logspace(-6, 5, 45))
METRICS = ("top1", "mean_per_class", "map")
SCALINGS = ("none", "unit", "standard")
# The first solutions are this far apart on the grid, and the last, to which others are interpolated, next to another.
_STRIDE = 16
_INTERPOLATED_FROM = 4
# Scores of one image held at once, over all classes and strengths.
_WIDTH = 2048
_FINAL_TOLERANCE = 1e-7
_SCORE_BLOCK = 4096


@dataclass(frozen=True)
class LogregResult:
    """The classifier at the chosen C, and how each C did on held-out training images.

    scores: float64 [n, C] of the test images: logits of a softmax, or of each class alone for lists of labels;
    validation: float64 [H], of `metric`; coefficients [K, D] and intercepts [K] on the features as they came (after
    the division by their length for scaling `unit`), K = 1 for two classes; loss: C * (sum of losses) + |w|^2 / 2.
    """

    scores: np.ndarray
    strengths: tuple[float, ...]
    validation: np.ndarray
    chosen: int
    metric: str
    coefficients: np.ndarray
    intercepts: np.ndarray
    loss: float
    iterations: np.ndarray
    n_train: int
    n_validation: int
    notes: list[str] = field(default_factory=list)

    @property
    def strength(self) -> float:
        """The chosen C."""
        return self.strengths[self.chosen]


@dataclass
class _Problem:
    """Training rows in their basis x [n, R + 1] and targets: int64 [n], or float [n, K] of 0 and 1."""

    x: Tensor
    targets: Tensor
    n_outputs: int

    def rows(self, rows: np.ndarray) -> Objective:
        """The objective of some of the rows."""
        where = torch.from_numpy(rows).to(self.x.device)
        return Objective(self.x[where], self.targets[where], self.n_outputs)


def logistic_regression(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    n_classes: int,
    seed: int,
    strengths: Sequence[float] = STRENGTHS,
    metric: str = "top1",
    validation_fraction: float = 0.1,
    scaling: str = "none",
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    store: Store | None = None,
    advance: Callable[[int], None] | None = None,
) -> LogregResult:
    """Fit train features [n, D] for every C, choose by `metric` on held-out rows, fit all rows, score test features.

    train_labels: int64 [n] of 0..C-1, or bool [n, C] for images of several classes, which `metric` map is for. Equal
    values of the metric are decided for the smaller C, the simpler classifier. store keeps solved parts of the grid;
    what depends on them is the same to the bit. advance is told of every C that is solved.
    Raises UserError for impossible settings, InputError when nothing can be held out WorkError for features
    that are not finite.
    """
    device = torch.device(device)
    grid = _checked(strengths, metric, scaling, train_labels)
    train, test = (np.ascontiguousarray(f, dtype=np.float32) for f in (train_features, test_features))
    require_finite(torch.from_numpy(train), "the training set")
    require_finite(torch.from_numpy(test), "the test set")
    if train_labels.ndim == 2:
        fit_rows, held_rows = _split_lists(len(train), validation_fraction, seed)
    else:
        fit_rows, held_rows = split_validation(train_labels, validation_fraction, seed=seed)
    basis = make_basis(train, scaling=scaling, device=device)
    problem = _problem(basis.apply(train, dtype=dtype), train_labels, n_classes)
    identity = {
        "features": _digest(train),
        "labels": _digest(train_labels),
        "settings": [grid, validation_fraction, scaling, max_iterations, tolerance, str(dtype), seed, device.type],
    }
    stage = None if store is None else store.stage("logreg", identity)
    path = solve_path(
        problem.rows(fit_rows), grid, tolerance=tolerance, max_iterations=max_iterations, stage=stage, advance=advance
    )
    held_x = problem.x[torch.from_numpy(held_rows).to(device)]
    values = _validation(path.weights, held_x, train_labels[held_rows], n_classes, metric)
    chosen = int(np.argmax(values))
    final = _final(
        problem, path.weights[..., chosen : chosen + 1], grid[chosen], stage, len(grid) + chosen, max_iterations
    )
    slopes, intercepts = basis.weights(final.weights[..., 0])
    many = len(train) * grid[chosen]
    return LogregResult(
        scores=_class_scores(_logits(basis, test, final.weights[..., 0]), train_labels.ndim == 2, n_classes),
        strengths=tuple(grid),
        validation=values,
        chosen=chosen,
        metric=metric,
        coefficients=slopes,
        intercepts=intercepts,
        loss=float(final.loss[0] * many),
        iterations=path.iterations,
        n_train=len(train),
        n_validation=len(held_rows),
        notes=_notes(grid, chosen, path, final, max_iterations),
    )


def solve_path(
    objective: Objective,
    strengths: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    stage: Stage | None = None,
    advance: Callable[[int], None] | None = None,
) -> Fit:
    """Solve for every C of ascending `strengths`: a few from zero, then those between, from where these lead to.

    A solution is a smooth function of log C, so that a cubic through four of them is all but the solution between.
    """
    shape = objective.x.shape[1], objective.n_outputs
    weights = torch.zeros(*shape, len(strengths), dtype=objective.x.dtype, device=objective.x.device)
    loss, iterations = np.zeros(len(strengths)), np.zeros(len(strengths), np.int64)
    converged = np.zeros(len(strengths), bool)
    logs = np.log(np.asarray(strengths, dtype=np.float64))
    solved: list[int] = []
    for number, places in enumerate(_schedule(len(strengths), max(1, _WIDTH // objective.n_outputs))):

        def solve(_start: int, places: list[int] = places, solved: list[int] = solved) -> Arrays:
            start = _between(weights, solved, places, logs)
            where = torch.tensor([strengths[place] for place in places], dtype=torch.float64, device=weights.device)
            found = minimise(objective, where, start, tolerance=tolerance, max_iterations=max_iterations)
            return _arrays(found)

        found = _fit(kept(solve, stage)(number), weights)
        weights[..., places] = found.weights
        loss[places], iterations[places], converged[places] = found.loss, found.iterations, found.converged
        solved = sorted([*solved, *places])
        if advance is not None:
            advance(len(places))
    return Fit(weights, loss, iterations, converged)


def _schedule(count: int, width: int) -> list[list[int]]:
    """Places of the grid in the order they are solved, in parts of at most `width` that are solved together."""
    levels, done, stride = [sorted({*range(0, count, _STRIDE), count - 1})], set(), _STRIDE
    while stride > 1:
        done |= set(levels[-1])
        stride //= 2
        levels.append([place for place in range(0, count, stride) if place not in done])
    return [level[low : low + width] for level in levels for low in range(0, len(level), width)]


def _between(weights: Tensor, solved: list[int], places: list[int], logs: np.ndarray) -> Tensor:
    """Weights [r, K, p] to start from: the polynomial in log C through the nearest solutions (Lagrange's form)."""
    start = torch.zeros(*weights.shape[:2], len(places), dtype=weights.dtype, device=weights.device)
    for column, place in enumerate(places):
        near = sorted(solved, key=lambda other: (abs(logs[other] - logs[place]), other))[:_INTERPOLATED_FROM]
        # Beyond the last solution a polynomial runs away: the nearest solution is the better guess there.
        if near and not min(near) < place < max(near):
            near = near[:1]
        for one in near:
            share = np.prod([(logs[place] - logs[o]) / (logs[one] - logs[o]) for o in near if o != one])
            start[..., column] += float(share) * weights[..., one]
    return start


def _final(
    problem: _Problem, start: Tensor, strength: float, stage: Stage | None, grid: int, max_iterations: int
) -> Fit:
    """The solution for all training rows at the chosen C, from that for the rows not held out."""

    def solve(_start: int) -> Arrays:
        objective = problem.rows(np.arange(len(problem.x)))
        where = torch.tensor([strength], dtype=torch.float64, device=start.device)
        return _arrays(minimise(objective, where, start, tolerance=_FINAL_TOLERANCE, max_iterations=max_iterations))

    # Behind all parts of the grid, of which there are at most as many as values of C.
    return _fit(kept(solve, stage)(grid), start)


def _arrays(fit: Fit) -> Arrays:
    weights = fit.weights.cpu().numpy()
    return {"weights": weights, "loss": fit.loss, "iterations": fit.iterations, "converged": fit.converged}


def _fit(arrays: Arrays, like: Tensor) -> Fit:
    weights = torch.from_numpy(np.asarray(arrays["weights"])).to(like)
    values: Mapping[str, Any] = arrays
    return Fit(weights, values["loss"], values["iterations"], values["converged"])


def _problem(x: Tensor, labels: np.ndarray, n_classes: int) -> _Problem:
    if labels.ndim == 2:
        return _Problem(x, torch.from_numpy(labels).to(x), labels.shape[1])
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(x.device)
    # Two classes are one regression, as everywhere: two columns would halve the penalty.
    return _Problem(x, targets[:, None].to(x), 1) if n_classes == 2 else _Problem(x, targets, n_classes)


def _split_lists(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `split_validation`, without regard to the classes."""
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction is {fraction}, expected a number between 0 and 1: use 0.1")
    if n < 2:
        raise InputError(f"{n} labelled training image, so none can be held out to choose C: give more")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(n)
    count = min(max(1, round(fraction * n)), n - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def _logits(basis: Basis, features: np.ndarray, weights: Tensor) -> np.ndarray:
    """Scores float64 [n, K] of features [n, D] under weights [R + 1, K]."""
    parts = [
        basis.apply(features[start : start + _SCORE_BLOCK], dtype=weights.dtype) @ weights
        for start in range(0, len(features), _SCORE_BLOCK)
    ]
    return torch.cat(parts).double().cpu().numpy() if parts else np.zeros((0, weights.shape[1]))


def _class_scores(logits: np.ndarray, lists: bool, n_classes: int) -> np.ndarray:
    """Scores [n, C] of logits [n, K]: the same, but for two classes, whose one logit is that of the second."""
    if lists or n_classes != 2:
        return logits
    return np.concatenate([-logits / 2, logits / 2], axis=1)


def _validation(weights: Tensor, x: Tensor, labels: np.ndarray, n_classes: int, metric: str) -> np.ndarray:
    """The metric of every C on held-out rows x [n, R + 1], float64 [H]; where it is void for all (map), zeros."""
    lists = labels.ndim == 2
    values = np.zeros(weights.shape[2])
    for column in range(weights.shape[2]):
        scores = _class_scores((x @ weights[..., column]).double().cpu().numpy(), lists, n_classes)
        values[column] = measure(scores, labels, metric).value()
    return np.nan_to_num(values)


def measure(scores: np.ndarray, labels: np.ndarray, metric: str) -> statistics.Statistic:
    """The statistic of `metric` (one of METRICS) for scores [n, C] and labels int64 [n], for map bool [n, C]."""
    if metric == "map":
        return statistics.average_precision(scores, labels)
    correct = scores.argmax(axis=1) == labels
    if metric == "top1":
        return statistics.mean(correct)
    return statistics.class_mean(correct, labels)


def _notes(grid: list[float], chosen: int, path: Fit, final: Fit, max_iterations: int) -> list[str]:
    notes = []
    if len(grid) > 1 and chosen in (0, len(grid) - 1):
        side = "smallest" if chosen == 0 else "largest"
        notes.append(f"the chosen C = {grid[chosen]:.3g} is the {side} of the grid: a wider one may be better")
    unfinished = int((~path.converged).sum() + (~final.converged).sum())
    if unfinished:
        notes.append(f"{unfinished} fits were stopped after {max_iterations} steps before they had converged")
    return notes


def _checked(strengths: Sequence[float], metric: str, scaling: str, labels: np.ndarray) -> list[float]:
    """The grid, ascending and unique. Raises UserError for impossible settings."""
    if not len(strengths) or not all(np.isfinite(value) and value > 0 for value in strengths):
        raise UserError(f"C is {list(strengths)}, expected one or more positive numbers: use --set strengths=0.1,1,10")
    if metric not in METRICS:
        raise UserError(f"metric {metric!r} is not known: expected one of {', '.join(METRICS)}")
    if scaling not in SCALINGS:
        raise UserError(f"scaling {scaling!r} is not known: expected one of {', '.join(SCALINGS)}")
    if (metric == "map") != (labels.ndim == 2):
        raise ValueError(f"metric {metric} for labels of shape {labels.shape}: map is for bool [n, C], and only that")
    return sorted({float(value) for value in strengths})


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
