"""`dinov2 bench fairness`: rates of groups, their gaps and tests beside a textbook's loops, in one process."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.bench.peak import resident_peak, run_in_child
from dinov2cli.fairness.analysis import Findings, analyse
from dinov2cli.fairness.axis import Axis
from dinov2cli.fairness.outcomes import Outcome

Floats = npt.NDArray[np.float64]
_AXES, _GROUPS, _METRICS = 4, 5, 2
_IMAGES_PER_CLUSTER = 10


def run(
    *, rows: int = 50_000, repeats: int = 2000, rounds: int = 2, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Time and memory of 2 metrics of `rows` images on 4 axes of 5 groups, with `repeats` resamples and shuffles.

    Beside it the loops of a textbook: each group's rows drawn with replacement, one group after the other, for the
    interval of its rate; the labels of all images shuffled for the p-value of the largest gap. Ours runs `rounds`
    times, the best counts; the loops once. apart: how far limits of groups, and p-values, of the two lie apart at most:
    both are drawn at random, and standardised by ours alone. clustered_seconds: ours with clusters of 10 images.
    memory_ratio: peak memory of ours over the loops', each in a process of its own. The work is the CPU's, whatever
    the device.
    """
    del device
    outcomes, axes = make(rows, seed)
    seconds, found = _best(outcomes, axes, None, repeats, rounds)
    started = time.perf_counter()
    limits, p_values = textbook(outcomes, axes, repeats, seed)
    reference = time.perf_counter() - started
    known = [row for row in found.groups.to_pylist() if row["known"]]
    ours = np.array([[row["ci_low"], row["ci_high"]] for row in known])
    peaks = [run_in_child(_peak, name, rows, repeats, seed) for name in ("ours", "textbook")]
    return {
        "rows": rows,
        "groups": _AXES * _GROUPS,
        "metrics": _METRICS,
        "repeats": repeats,
        "limits_apart": float(np.abs(ours - limits).max()),
        "p_values_apart": float(np.abs(found.gaps["p_value"].to_numpy() - p_values).max()),
        "seconds": seconds,
        "reference_seconds": reference,
        "speedup": reference / seconds,
        "clustered_seconds": _best(outcomes, axes, np.arange(rows) // _IMAGES_PER_CLUSTER, repeats, rounds)[0],
        "peak_mb": peaks[0] / 2**20,
        "reference_peak_mb": peaks[1] / 2**20,
        "memory_ratio": peaks[0] / peaks[1],
    }


def make(rows: int, seed: int) -> tuple[list[Outcome], list[Axis]]:
    """Outcomes and axes of `rows` images: equal groups, the same for each 10 images in a row, without a difference."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xFA]))
    clusters = -(-rows // _IMAGES_PER_CLUSTER)
    names = tuple(f"group {number}" for number in range(_GROUPS))
    axes = [
        Axis(f"axis {number}", names, rng.integers(0, _GROUPS, clusters).repeat(_IMAGES_PER_CLUSTER)[:rows])
        for number in range(_AXES)
    ]
    every = np.ones(rows, dtype=bool)
    shares = np.linspace(0.7, 0.9, _METRICS)
    return [Outcome(f"metric {share:.2f}", (rng.random(rows) < share) * 1.0, every) for share in shares], axes


def textbook(outcomes: list[Outcome], axes: list[Axis], repeats: int, seed: int) -> tuple[Floats, Floats]:
    """Limits [axes x metrics x groups, 2] of all rates by resampling each group's rows, and p-values [axes x metrics]
    of the largest gaps by shuffling labels."""
    rng = np.random.default_rng(seed)
    limits, p_values = [], []
    for axis in axes:
        for outcome in outcomes:
            for group in range(len(axis.names)):
                own = outcome.values[axis.codes == group]
                drawn = [own[rng.integers(0, len(own), len(own))].mean() for _ in range(repeats)]
                limits.append(np.quantile(drawn, [0.025, 0.975]))
            found = _gap(outcome.values, axis.codes)
            reached = sum(_gap(outcome.values, rng.permutation(axis.codes)) >= found for _ in range(repeats))
            p_values.append((1 + reached) / (1 + repeats))
    return np.array(limits), np.array(p_values)


def _gap(values: Floats, codes: npt.NDArray[np.int64]) -> float:
    rates = [values[codes == group].mean() for group in range(_GROUPS)]
    return float(max(rates) - min(rates))


def _ours(outcomes: list[Outcome], axes: list[Axis], clusters: npt.NDArray[np.int64] | None, repeats: int) -> Findings:
    limits = {"min_images": 30, "min_clusters": 1, "confidence": 0.95}
    return analyse(outcomes, axes, clusters, **limits, resamples=repeats, permutations=repeats, seed=0)  # type: ignore[arg-type]


def _best(
    outcomes: list[Outcome], axes: list[Axis], clusters: npt.NDArray[np.int64] | None, repeats: int, rounds: int
) -> tuple[float, Findings]:
    """Seconds of the best round, and what it found."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        found = _ours(outcomes, axes, clusters, repeats)
        best = min(best, time.perf_counter() - started)
    return best, found


def _peak(name: str, rows: int, repeats: int, seed: int) -> int:
    """Peak memory of one of the two in this process, bytes. A few repeats take as much as all."""
    outcomes, axes = make(rows, seed)
    if name == "ours":
        _ours(outcomes, axes, None, repeats)
    else:
        textbook(outcomes, axes, min(repeats, 20), seed)
    return resident_peak()
