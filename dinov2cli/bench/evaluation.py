"""`dinov2 bench eval`: the linear probe, k-NN and logistic regression on cached features, each beside its measure."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from dinov2cli.bench.peak import resident_peak
from dinov2cli.device import choose_device

PARTS = ("linear", "knn", "logreg")


def run(*, rows: int = 50_000, device: str = "auto", seed: int = 0, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Figures of each part, named after it (`linear_seconds`); `seconds` and `speedup` are of all together.

    All on random features with class structure. linear: 52 heads on features of `rows` images beside their matrix
    products alone (see `eval_linear`); knn: `rows` images and a fifth as many queries beside one float32 product with
    top-k (`eval_knn`); logreg: a grid of C on a tenth of the rows beside scikit-learn's (`eval_logreg`).
    """
    sizes = {
        "linear": {"rows": rows},
        "knn": {"references": rows, "tests": rows // 5},
        "logreg": {"images": rows // 10, "tests": rows // 25},
    }
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        figures = getattr(importlib.import_module(f"dinov2cli.bench.eval_{part}"), f"{part}_figures")
        found[part] = figures(device=device, seed=seed, **sizes[part])
    ours = sum(figures["seconds"] for figures in found.values())
    theirs = sum(
        figures["reference_seconds"] if "reference_seconds" in figures else figures["seconds"] / figures["ratio"]
        for figures in found.values()
    )
    return {
        "rows": rows,
        "device": str(choose_device(device)),
        "threads": torch.get_num_threads(),
        **{f"{part}_{name}": value for part, figures in found.items() for name, value in figures.items()},
        "seconds": ours,
        "speedup": theirs / ours,
        "peak_rss_mb": resident_peak() / 2**20,
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures as lines to read."""
    width = max(map(len, figures))
    return [
        f"{name.ljust(width)}  {value:.4g}" if isinstance(value, float) else f"{name.ljust(width)}  {value}"
        for name, value in figures.items()
    ]
