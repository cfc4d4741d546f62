"""The similarity (shift, turn, scale, mirror) that lays one image over another, from their local features.

Every match of two features is a hypothesis by itself, for both have a place, a size and a direction (fast spatial
matching: Philbin et al. 2007, section 5). All are tried and the best is refined, so there is nothing random here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.search.local_features import LocalFeatures, mirror_signs
from dinov2cli.search.vectors import Float32, Int64

RATIO = 0.92
"""A match counts if it is so much nearer (in distance) than the second nearest at another place."""

FARTHEST = 0.75
"""Distance of two descriptors of unit length above which they are of different things."""

_COARSE, _FINE = 0.05, 0.02  # distance from where a point should be, in the smaller of the two scales
_LEAST_TOLERANCE = 0.004  # in the longer side: 2 pixels of 512
_TURN, _LOG_SCALE = np.deg2rad(30), np.log(1.6)
_ROUNDS = 4
_HYPOTHESES = 96
_NEAR = 0.01  # features so near each other are one place


@dataclass(frozen=True)
class Alignment:
    """transform [2, 3]: from positions in a (over its longer side; mirrored first where `mirrored`) to those in b;
    inliers [I, 2]: rows of features of a and b that agree with it; matches: how many were tried."""

    transform: Float32
    mirrored: bool
    inliers: Int64
    matches: int

    @property
    def scale(self) -> float:
        return float(np.sqrt(abs(np.linalg.det(self.transform[:, :2].astype(np.float64)))))


def align(features: LocalFeatures, a: int, other: LocalFeatures, b: int, mirrored: bool) -> Alignment | None:
    """How image a of `features` (mirrored or not) lies over image b of `other`; None where no three features agree."""
    from_a, from_b = mirrored_places(features, a, mirrored), other.places(b)
    code_a, code_b = features.descriptors(a), other.descriptors(b)
    if mirrored:
        code_a = code_a * mirror_signs()
    matches = _matches(code_a, code_b, from_b)
    if len(matches) < 3:
        return None
    p, q = from_a[matches[:, 0]].astype(np.float64), from_b[matches[:, 1]].astype(np.float64)
    found = _best_similarity(p, q)
    if found is None:
        return None
    transform, inside = found
    return Alignment(transform.astype(np.float32), mirrored, matches[inside], len(matches))


def mirrored_places(features: LocalFeatures, row: int, mirrored: bool) -> Float32:
    """`LocalFeatures.places` of the picture or of its mirror image (left for right)."""
    places = features.places(row)
    if mirrored:
        places[:, 0] = features.extent[row, 0] - places[:, 0]
        places[:, 3] = np.pi - places[:, 3]
    return places


def _matches(code_a: Float32, code_b: Float32, from_b: Float32) -> Int64:
    """Pairs [M, 2] of features that are each other's nearest, and distinctly so; the nearest pair first."""
    if not len(code_a) or not len(code_b):
        return np.zeros((0, 2), dtype=np.int64)
    square = (code_a**2).sum(1)[:, None] + (code_b**2).sum(1)[None, :] - 2 * (code_a @ code_b.T)
    nearest = square.argmin(axis=1)
    back = square.argmin(axis=0)
    rows = np.flatnonzero(back[nearest] == np.arange(len(code_a)))
    best = np.maximum(square[rows, nearest[rows]], 0)
    rows, best = rows[best < FARTHEST**2], best[best < FARTHEST**2]
    # The second nearest must be elsewhere: one corner gives several features of near directions and sizes.
    x, y = from_b[:, 0], from_b[:, 1]
    here = np.abs(x[nearest[rows], None] - x) <= _NEAR
    here &= np.abs(y[nearest[rows], None] - y) <= _NEAR
    others = square[rows]
    others[here] = np.inf
    second = others.min(axis=1, initial=np.inf)
    clear = np.flatnonzero(best < RATIO**2 * second)
    clear = clear[np.argsort(best[clear], kind="stable")]
    return np.column_stack([rows[clear], nearest[rows[clear]]]).astype(np.int64)


def _best_similarity(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, npt.NDArray[np.bool_]] | None:
    """The transform [2, 3] most of the matches p [M, 4] -> q [M, 4] agree with, and which do [M].

    The first matches are tried as hypotheses, so they should be the surest.
    """
    ratio, turn = q[:, 2] / p[:, 2], q[:, 3] - p[:, 3]
    log, direction = np.log(ratio), np.column_stack([np.cos(turn), np.sin(turn)])
    tries = slice(0, _HYPOTHESES)
    agree = np.abs(log[None, :] - log[tries, None]) < _LOG_SCALE
    agree &= direction[tries] @ direction.T > np.cos(_TURN)
    matrix = ratio[tries, None, None] * np.stack([direction[tries], direction[tries, ::-1] * [-1, 1]], axis=1)
    # [[c, s], [-s, c]] by rows: row vectors times it are turned.
    moved = p[None, :, :2] @ matrix
    off = (moved - moved[np.arange(len(matrix)), np.arange(len(matrix))][:, None]) - (
        q[None, :, :2] - q[tries, None, :2]
    )
    agree &= np.einsum("hmc,hmc->hm", off, off) < (_tolerance(_COARSE, ratio[tries]) ** 2)[:, None]
    best = int(agree.sum(axis=1).argmax())
    inside = agree[best]
    transform = None
    for step in range(_ROUNDS):
        fitted = _fit(p[inside, :2], q[inside, :2], affine=step >= 2)
        if fitted is None:
            return None
        transform = fitted
        scale = np.sqrt(abs(np.linalg.det(transform[:, :2])))
        away = np.linalg.norm(p[:, :2] @ transform[:, :2].T + transform[:, 2] - q[:, :2], axis=1)
        limit = _COARSE / 2 if step == 0 else _FINE
        inside = away < _tolerance(limit, np.array(scale))
        inside &= np.abs(np.log(ratio / max(scale, 1e-6))) < _LOG_SCALE
        if inside.sum() < 3:
            return None
    assert transform is not None
    return transform, inside


def _tolerance(limit: float, scale: np.ndarray) -> np.ndarray:
    return np.maximum(limit * np.minimum(scale, 1.0), _LEAST_TOLERANCE)


def _fit(p: np.ndarray, q: np.ndarray, *, affine: bool) -> np.ndarray | None:
    """Least squares: a similarity of two matches or more, or an affine map where there are enough of them."""
    if len(p) < 2:
        return None
    if affine and len(p) >= 12:
        system = np.column_stack([p, np.ones(len(p))])
        map_, _, rank, _ = np.linalg.lstsq(system, q, rcond=1e-3)
        values = np.linalg.svd(map_[:2], compute_uv=False)
        # Copies change their proportions a little; a slanting map is a sign that the matches lie on a line.
        if rank == 3 and values[1] > 0.7 * values[0] and np.linalg.det(map_[:2]) > 0:
            return map_.T
    mean_p, mean_q = p.mean(axis=0), q.mean(axis=0)
    u, v = p - mean_p, q - mean_q
    spread = (u**2).sum()
    if spread < 1e-8:
        return None
    c = (u * v).sum() / spread
    s = (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]).sum() / spread
    if np.hypot(c, s) < 1e-3:
        return None
    turn = np.array([[c, -s], [s, c]])
    return np.column_stack([turn, mean_q - turn @ mean_p])
