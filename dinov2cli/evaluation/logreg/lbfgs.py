"""Multinomial and one-vs-rest logistic regression for many strengths of regularisation at once, by L-BFGS.

All problems share the features, so that one matrix product serves them all; each has its own steps, memory and end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MEMORY = 10
TOLERANCE = 1e-6
MAX_ITERATIONS = 1000
_ARMIJO = 1e-4
_MIN_STEP = 1e-6
# Where all rows are told apart with certainty the loss goes to nothing with C; nothing is gained by following it there.
_LOSS_FLOOR = 0.1
# Scores held at once: 2 MiB stay in the cache of a CPU core; a GPU wants few, large products.
_SCORES_CPU, _SCORES_GPU = 1 << 19, 1 << 26


@dataclass(frozen=True)
class Fit:
    """Solutions of H problems. weights: float [r, K, H], the last row being the intercepts; loss: float64 [H], the
    mean loss plus |w|^2 / (2 C n); iterations: int64 [H]; converged: bool [H]."""

    weights: Tensor
    loss: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray


class Objective:
    """Mean loss of rows x [n, r] (their last column all ones) with penalty |w|^2 / (2 C n) on all but the intercepts.

    That is scikit-learn's `LogisticRegression(C)` divided by C n. targets: int64 [n], classes of a softmax over K; or a
    float [n, K] of 0 and 1, each column a logistic regression of its own whose losses are added up.
    """

    def __init__(self, x: Tensor, targets: Tensor, n_outputs: int) -> None:
        self.x, self.targets, self.n_outputs = x, targets, n_outputs
        self.softmax = targets.dim() == 1
        # Bounds of the curvature of the two losses (Boehning, Ann. Inst. Stat. Math. 1992): 1/2 and 1/4.
        squares = torch.stack([part.double().square().sum(0) for part in x.split(65_536)]).sum(0)
        self._curvature_r = squares / len(x) * (0.5 if self.softmax else 0.25)
        self._penalised_r = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
        self._penalised_r[-1] = 0

    def penalties(self, strengths: Tensor) -> Tensor:
        """1 / (C n) on every weight, 0 on intercepts: [r, 1, H] for C of strengths [H]."""
        return (self._penalised_r[:, None] / (strengths.double() * len(self.x)))[:, None].to(self.x.dtype)

    def scaling(self, strengths: Tensor) -> Tensor:
        """The inverse of the bound on the curvature in each direction, [r, 1, H]: where L-BFGS starts from."""
        bound = self._curvature_r[:, None] + self._penalised_r[:, None] / (strengths.double() * len(self.x))
        # A feature that is always zero has no curvature at all without a penalty; its gradient is zero as well.
        return torch.where(bound > 0, 1 / bound, 0)[:, None].to(self.x.dtype)

    def __call__(self, weights: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
        """Loss float64 [H] and gradient [r, K, H] at weights [r, K, H]."""
        outputs, problems = weights.shape[1:]
        flat = weights.flatten(1)
        gradient = torch.zeros_like(flat)
        loss = torch.zeros(problems, dtype=torch.float64, device=weights.device)
        limit = _SCORES_CPU if weights.device.type == "cpu" else _SCORES_GPU
        rows = max(64, limit // (outputs * problems))
        # One place for all blocks of scores: fresh memory for each would cost as much as the arithmetic.
        room = torch.empty(min(rows, len(self.x)), outputs * problems, dtype=weights.dtype, device=weights.device)
        score = _softmax_scores if self.softmax else _sigmoid_scores
        for start in range(0, len(self.x), rows):
            x, targets = self.x[start : start + rows], self.targets[start : start + rows]
            scores = torch.mm(x, flat, out=room[: len(x)])
            loss += score(scores.view(len(x), outputs, problems), targets)
            gradient.addmm_(x.T, scores)
        weighted = penalties * weights
        loss = loss / len(self.x) + 0.5 * _dot(weighted, weights)
        return loss, gradient.view_as(weights) / len(self.x) + weighted


def _softmax_scores(scores: Tensor, targets: Tensor) -> Tensor:
    """Turn scores [b, K, H] into probabilities less the truth, in place; the sum of the losses, float64 [H]."""
    scores -= scores.amax(1, keepdim=True)
    own = targets[:, None, None].expand(-1, 1, scores.shape[2])
    true = scores.gather(1, own)
    scores.exp_().scatter_(1, own, 0.0)
    # The others are summed without the true class: where they are tiny, 1 - probability would lose all its digits.
    others = scores.sum(1, keepdim=True)
    total = others + true.exp()
    scores /= total
    scores.scatter_(1, own, -others / total)
    return torch.where(true == 0, others.log1p(), total.log() - true).sum((0, 1), dtype=torch.float64)


def _sigmoid_scores(scores: Tensor, targets: Tensor) -> Tensor:
    """As `_softmax_scores` for a logistic loss of each output; targets [b, K] of 0 and 1."""
    truth = targets[:, :, None]
    loss = (torch.nn.functional.softplus(scores) - truth * scores).sum((0, 1), dtype=torch.float64)
    scores.sigmoid_().sub_(truth)
    return loss


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over all but the problems: float64 [H] of [r, K, H]."""
    return (a * b).sum((0, 1)).double()


@dataclass
class _Running:
    """The problems still running; every tensor has them along its last dimension."""

    number: Tensor
    penalties: Tensor
    scaling: Tensor
    weights: Tensor
    gradient: Tensor
    loss: Tensor
    direction: Tensor
    slope: Tensor
    step: Tensor
    calm: Tensor
    pairs: list[tuple[Tensor, Tensor, Tensor]]

    def only(self, chosen: Tensor) -> "_Running":
        """Those where `chosen` [H] holds."""
        values = {name: value[..., chosen] for name, value in vars(self).items() if name != "pairs"}
        return _Running(**values, pairs=[(s[..., chosen], y[..., chosen], rho[chosen]) for s, y, rho in self.pairs])


def minimise(
    objective: Objective,
    strengths: Tensor,
    start: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    progress: Callable[[int], None] | None = None,
) -> Fit:
    """Solve the problems with C of strengths [H] from weights `start` [r, K, H].

    L-BFGS (Nocedal & Wright 2006, ch. 7) whose first guess of the curvature is its upper bound in each direction of
    the features, so that their scale does not matter; steps are halved until the loss falls enough. A problem ends when
    its last step and the one to come promise less than `tolerance` of its loss (taken as 0.1 where it is less).
    progress is told how many have ended.
    """
    problems = len(strengths)
    weights = start.clone()
    loss = np.full(problems, np.nan)
    iterations, converged = np.zeros(problems, np.int64), np.zeros(problems, bool)
    now = _begin(objective, strengths, start)
    for iteration in range(max_iterations + 1):
        now, ended = _move(objective, now, tolerance) if iteration else (now, torch.zeros_like(now.number) > 0)
        last = iteration == max_iterations
        done = torch.ones_like(ended) if last else ended
        if bool(done.any()):
            places = now.number[done].cpu().numpy()
            weights[..., now.number[done]] = now.weights[..., done]
            loss[places], iterations[places] = now.loss[done].cpu().numpy(), iteration
            converged[places] = ended[done].cpu().numpy()
            if progress is not None:
                progress(len(places))
            now = now.only(~done)
        if not len(now.number):
            break
    return Fit(weights, loss, iterations, converged)


def _begin(objective: Objective, strengths: Tensor, start: Tensor) -> _Running:
    penalties, scaling = objective.penalties(strengths), objective.scaling(strengths)
    loss, gradient = objective(start, penalties)
    direction = -scaling * gradient
    return _Running(
        number=torch.arange(len(strengths), device=start.device),
        penalties=penalties,
        scaling=scaling,
        weights=start,
        gradient=gradient,
        loss=loss,
        direction=direction,
        slope=_dot(direction, gradient),
        step=torch.ones_like(loss),
        calm=torch.zeros(len(strengths), dtype=torch.bool, device=start.device),
        pairs=[],
    )


def _move(objective: Objective, now: _Running, tolerance: float) -> tuple[_Running, Tensor]:
    """One evaluation for every problem: those whose loss falls go on from there, the others try half the step."""
    step = now.step.to(now.weights.dtype)
    trial = now.weights + step * now.direction
    loss, gradient = objective(trial, now.penalties)
    noise = 8 * torch.finfo(now.weights.dtype).eps * now.loss.abs()
    taken = loss <= now.loss + _ARMIJO * now.step * now.slope + noise
    # A step of a millionth that does not help: the numbers are exhausted, the solution is as good as they allow.
    stuck = ~taken & (now.step < _MIN_STEP)
    s, y = (trial - now.weights) * taken, (gradient - now.gradient) * taken
    product = _dot(s, y)
    floor = torch.finfo(now.weights.dtype).eps * (_dot(s, s) * _dot(y, y)).sqrt()
    rho = torch.where(product > floor, 1 / product, 0)
    fell = now.loss - loss
    now.pairs = [*now.pairs[-MEMORY + 1 :], (s, y, rho)]
    now.weights = torch.where(taken, trial, now.weights)
    now.gradient = torch.where(taken, gradient, now.gradient)
    now.loss = torch.where(taken, loss, now.loss)
    fresh = _direction(now)
    now.direction = torch.where(taken, fresh, now.direction)
    now.slope = torch.where(taken, _dot(now.direction, now.gradient), now.slope)
    now.step = torch.where(taken, 1.0, now.step / 2)
    small = tolerance * now.loss.clamp(min=_LOSS_FLOOR)
    calm = taken & (fell <= small) & (-0.5 * now.slope <= small)
    ended = stuck | (calm & now.calm)
    now.calm = torch.where(taken, calm, now.calm)
    return now, ended


def _direction(now: _Running) -> Tensor:
    """Minus the estimated inverse curvature times the gradient (two-loop recursion), [r, K, H].

    A pair with rho = 0 (a step not taken) changes nothing.
    """
    dtype = now.weights.dtype
    q = now.gradient.clone()
    alphas = []
    for s, y, rho in reversed(now.pairs):
        alpha = (rho * _dot(s, q)).to(dtype)
        q -= alpha * y
        alphas.append(alpha)
    q *= now.scaling * _gain(now).to(dtype)
    for (s, y, rho), alpha in zip(now.pairs, reversed(alphas), strict=True):
        q += (alpha - (rho * _dot(y, q)).to(dtype)) * s
    return q.neg_()


def _gain(now: _Running) -> Tensor:
    """By how much the curvature of the newest pair is below its bound, float64 [H]."""
    gain = torch.ones_like(now.loss)
    for s, y, rho in now.pairs:
        del s
        gain = torch.where(rho > 0, 1 / (rho * _dot(y, now.scaling * y)), gain)
    return gain
