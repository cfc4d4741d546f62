"""Logistic regression of `dinov2 bench eval`: our grid over C beside scikit-learn's, on the same features."""

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dinov2cli.bench.eval_knn import by_turns
from dinov2cli.bench.knn import labelled_features
from dinov2cli.device import choose_device
from dinov2cli.evaluation.linear.grid import split_validation
from dinov2cli.evaluation.logreg.protocol import STRENGTHS, logistic_regression

_NOISE = 2.0


def logreg_figures(
    *,
    device: str = "auto",
    seed: int = 0,
    images: int = 5_000,
    tests: int = 2_000,
    dim: int = 384,
    classes: int = 10,
    strengths: int = 45,
    rounds: int = 1,
) -> dict[str, Any]:
    """Seconds and accuracies of the whole protocol (every C on nine tenths, the choice on a tenth, all at that C).

    The reference is scikit-learn's `LogisticRegression(C, max_iter=1000)` at its own tolerance, once per C on the same
    rows of the same float32 features, on the CPU. Medians of `rounds` by turns; `speedup` is reference over ours.
    `largest_difference` is that of the validation accuracies at one C. strengths: how many of the 45 values, evenly.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    where = choose_device(device)
    grid = [STRENGTHS[i] for i in np.unique(np.linspace(0, len(STRENGTHS) - 1, strengths).round().astype(int))]
    train_x, train_y, test_x, test_y = labelled_features(images, tests, dim, classes, seed)
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    train_x, test_x = (x + _NOISE * rng.standard_normal(x.shape, dtype=np.float32) for x in (train_x, test_x))
    fit_rows, held = split_validation(train_y, 0.1, seed=seed)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = logistic_regression(
            train_x, train_y, test_x, n_classes=classes, seed=seed, strengths=grid, device=where
        )

    def reference() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            values = [
                LogisticRegression(C=c, max_iter=1000)
                .fit(train_x[fit_rows], train_y[fit_rows])
                .score(train_x[held], train_y[held])
                for c in grid
            ]
            best = LogisticRegression(C=grid[int(np.argmax(values))], max_iter=1000).fit(train_x, train_y)
        found["reference"] = values, best.C, best.score(test_x, test_y)

    runs: dict[str, Callable[[], Any]] = {"ours": ours, "reference": reference}
    _warm(where)
    seconds = {name: statistics.median(v) for name, v in by_turns(runs, rounds, where, warm=False).items()}
    result, (values, best, accuracy) = found["ours"], found["reference"]
    return {
        "images": images,
        "dim": dim,
        "classes": classes,
        "strengths": len(grid),
        "device": str(where),
        "threads": torch.get_num_threads(),
        "seconds": seconds["ours"],
        "reference_seconds": seconds["reference"],
        "speedup": seconds["reference"] / seconds["ours"],
        "C": result.strength,
        "reference_C": best,
        "accuracy": float((result.scores.argmax(axis=1) == test_y).mean()),
        "reference_accuracy": float(accuracy),
        "largest_difference": float(np.abs(result.validation - values).max()),
        "steps": int(result.iterations.sum()),
    }


def _warm(device: torch.device) -> None:
    """Threads started, libraries loaded: a fit of next to nothing."""
    x = np.eye(8, dtype=np.float32).repeat(4, axis=0)
    logistic_regression(x, np.arange(32) // 4, x, n_classes=8, seed=0, strengths=[1.0], device=device)
