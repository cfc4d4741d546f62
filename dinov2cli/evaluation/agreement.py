"""How far the tokens of two models of any widths say the same, for the same images.

Legend: n tokens, x [n, Dx] of the student, y [n, Dy] of the teacher; Xc, Yc with their column means taken off.

Two measures, both blind to a rotation, a shift and a uniform scale of the student's features:

- cosine through a linear map: y is predicted as x W + b, where W and b minimise sum ||y - x W - b||^2 + p ||W||^2 on
  one half of the images (ridge regression; p = `penalty` x trace(Xc' Xc) / Dx, chosen among `PENALTIES` on a fifth of
  that half, then fitted to all of it); the measure is the mean cosine of prediction and y on the other half. It has to
  be read beside the same cosine of the constant prediction (the mean of y), which is high where all tokens share a
  large component.
- linear CKA: ||Yc' Xc||^2 / (||Xc' Xc|| ||Yc' Yc||), Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.intervals import DEFAULT_CONFIDENCE

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.floating]

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Shares of the mean variance of the student's features; a map from few images to many widths needs a large one."""

_CHUNK = 8192  # rows in float64 at once
_HELD = 5  # one image in so many of the fitting half chooses the penalty
_ROUNDING = 1e-13
_FEWEST = 10  # images


@dataclass(frozen=True)
class LinearMap:
    """x -> x weight + bias; weight float64 [Dx, Dy], bias [Dy]; penalty: the share it was fitted with."""

    weight: Floats
    bias: Floats
    penalty: float

    def __call__(self, x: Vectors) -> Floats:
        """Predictions float64 [n, Dy] for x [n, Dx]."""
        return np.asarray(x, np.float64) @ self.weight + self.bias


@dataclass(frozen=True)
class Agreement:
    """Cosines float64 [m] with the teacher's token, of the images not fitted to (a mean over the tokens of each).

    mapped: of the student's token through the map; constant: of the teacher's mean token; plain: of the student's
    token as it is, None where the widths differ.
    """

    mapped: Floats
    constant: Floats
    plain: Floats | None
    penalty: float
    fitted: int  # images


@dataclass(frozen=True)
class _Moments:
    """Sums over n pairs: what a ridge regression and its error depend on."""

    n: int
    x: Floats
    y: Floats
    xx: Floats
    xy: Floats
    yy: float  # trace

    @staticmethod
    def of(x: Vectors, y: Vectors) -> "_Moments":
        parts = []
        for start in range(0, len(x), _CHUNK):
            a, b = (np.asarray(v[start : start + _CHUNK], np.float64) for v in (x, y))
            parts.append(_Moments(len(a), a.sum(0), b.sum(0), a.T @ a, a.T @ b, float((b * b).sum())))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(
            self.n + other.n,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def fit(self, penalties: tuple[float, ...]) -> list[LinearMap]:
        """The ridge regression under each penalty, from one eigendecomposition."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        values, vectors = np.linalg.eigh(self.xx - self.n * np.outer(mean_x, mean_x))
        # What varies by no more than the rounding of these sums says nothing; a collapsed student has nothing else.
        varies = values > _ROUNDING * np.trace(self.xx)
        values = np.where(varies, values, 0)
        cross = vectors.T @ (self.xy - self.n * np.outer(mean_x, mean_y))
        maps = []
        for penalty in penalties:
            slopes = np.zeros_like(cross)
            slopes[varies] = cross[varies] / (values + penalty * values.mean())[varies, None]
            weight = vectors @ slopes
            maps.append(LinearMap(weight, mean_y - mean_x @ weight, penalty))
        return maps

    def error(self, found: LinearMap) -> float:
        """Sum of squared errors of a map over these pairs."""
        w, b = found.weight, found.bias
        explained = 2 * (self.xy * w).sum() + 2 * self.y @ b
        return self.yy - explained + (w * (self.xx @ w)).sum() + 2 * (self.x @ w) @ b + self.n * b @ b


def fit_map(
    x: Vectors, y: Vectors, *, held: npt.NDArray[np.bool_] | None = None, penalties: tuple[float, ...] = PENALTIES
) -> LinearMap:
    """The ridge map from x [n, Dx] to y [n, Dy]; the penalty is that with the least squared error on the rows `held`
    [n] by the map of all others. With one penalty nothing is chosen. The map returned is fitted to all rows.

    Raises ValueError for unequal numbers of rows, WorkError for values that are not finite.
    """
    _check_pair(x, y)
    if len(penalties) == 1:
        return _Moments.of(x, y).fit(penalties)[0]
    held = np.arange(len(x)) % _HELD == 0 if held is None else held
    rest, judged = _Moments.of(x[~held], y[~held]), _Moments.of(x[held], y[held])
    errors = [judged.error(found) for found in rest.fit(penalties)]
    return (rest + judged).fit((penalties[int(np.argmin(errors))],))[0]


def agreement(student: Vectors, teacher: Vectors, *, seed: int) -> Agreement:
    """Agreement of tokens [n, Dx] or [n, P, Dx] of n images with the teacher's [n, Dy] or [n, P, Dy].

    The images are halved by `seed`. Raises InputError for fewer than 10 images, WorkError for tokens that are not
    finite, ValueError for shapes that do not belong together.
    """
    if student.shape[:-1] != teacher.shape[:-1] or student.ndim not in (2, 3):
        raise ValueError(f"tokens must be [n, D] or [n, P, D] of the same images, got {student.shape}, {teacher.shape}")
    n = len(student)
    if n < _FEWEST:
        raise InputError(f"{n} images are too few to compare tokens: half of them fit a map; give {_FEWEST} or more")
    fit, test = halves(n, seed=seed)
    x, y = (tokens if tokens.ndim == 3 else tokens[:, None] for tokens in (student, teacher))
    held = np.repeat(np.arange(len(fit)) % _HELD == 0, x.shape[1])
    found = fit_map(x[fit].reshape(-1, x.shape[2]), y[fit].reshape(-1, y.shape[2]), held=held)
    mean = y[fit].reshape(-1, y.shape[2]).mean(axis=0, dtype=np.float64)

    def by_image(predict: Callable[[Vectors], Vectors]) -> Floats:
        values = np.empty(len(test))
        for start in range(0, len(test), 256):
            rows = test[start : start + 256]
            values[start : start + 256] = cosines(predict(x[rows]), y[rows]).mean(axis=1)
        return values

    plain = by_image(lambda tokens: tokens) if x.shape[2] == y.shape[2] else None
    return Agreement(by_image(found), by_image(lambda _: mean), plain, found.penalty, len(fit))


def halves(n: int, *, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows 0..n-1 in two halves drawn by `seed`, each rising; the first is the larger of odd ones."""
    order = np.random.Generator(np.random.Philox(key=[seed, 0x0A13])).permutation(n)
    return np.sort(order[: n - n // 2]), np.sort(order[n - n // 2 :])


def cosines(a: Vectors, b: Vectors) -> Floats:
    """Cosine of the vectors of a and b [..., D], float64 [...]; 0 where one of the two is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), lengths, out=np.zeros_like(lengths), where=lengths > 0)


def linear_cka(x: Vectors, y: Vectors, *, confidence: float = DEFAULT_CONFIDENCE) -> tuple[float, float, float]:
    """Linear CKA of features [n, Dx] and [n, Dy] of the same n images, and its interval (low, high), in 0..1.

    The interval is the normal one from the influence of each image on the value: with S = Xc' Yc / n and so on, the
    value is A / sqrt(B C), where A = ||Sxy||^2, B = ||Sxx||^2, C = ||Syy||^2, and image i moves it by value x
    (2 (xi' Sxy yi / A - 1) - (xi' Sxx xi / B - 1) - (yi' Syy yi / C - 1)) / n. With fewer images than widths
    CKA is biased upwards. NaN where the features of one model do not vary.
    Raises ValueError for unequal numbers of rows, WorkError for values that are not finite.
    """
    _check_pair(x, y)
    a, b = (np.asarray(v, np.float64) - np.asarray(v, np.float64).mean(axis=0) for v in (x, y))
    pulls, sizes = [], []
    for left, right in ((a, b), (a, a), (b, b)):
        covariance = left.T @ right / len(a)
        sizes.append(float((covariance**2).sum()))
        pulls.append(((left @ covariance) * right).sum(axis=1))
    if min(sizes[1:]) <= 0:
        return float("nan"), float("nan"), float("nan")
    value = sizes[0] / float(np.sqrt(sizes[1] * sizes[2]))
    if sizes[0] <= 0:
        return 0.0, 0.0, 0.0
    own = [pull / size - 1 for pull, size in zip(pulls, sizes, strict=True)]
    spread = value * float(np.std(2 * own[0] - own[1] - own[2])) / np.sqrt(len(a))
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    return min(value, 1.0), max(0.0, value - reach), min(1.0, value + reach)


def _check_pair(x: Vectors, y: Vectors) -> None:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise ValueError(f"expected features [n, Dx] and [n, Dy] of the same images, got {x.shape} and {y.shape}")
    for name, values in (("student", x), ("teacher", y)):
        if not np.isfinite(values).all():
            raise WorkError(f"tokens of the {name} hold NaN or infinity: check its training, or use precision fp32")
