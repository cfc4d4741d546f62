"""The linear probe's grid beside its matrix products alone, by turns in one process."""

import time
from typing import Any

import numpy as np
import torch

from dinov2cli.device import choose_device
from dinov2cli.evaluation.linear.grid import LEARNING_RATES
from dinov2cli.evaluation.linear.probe import LinearTraining
from dinov2cli.evaluation.linear.training import Inputs

_BLOCKS = 4
_WIDTHS = (1, 2, 4, 5)
"""What the heads read, in vectors of the model's width: class tokens of 1 or 4 blocks, with or without patches."""


def linear_figures(
    *,
    rows: int = 50_000,
    dim: int = 384,
    classes: int = 10,
    batch_size: int = 1024,
    epochs: int = 10,
    turns: int = 10,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds of the whole probe (52 heads, `epochs` passes over cached features of `rows` images) and of its floor.

    The floor is as many steps of nothing but what the mathematics asks for, a product per input: [B, d] x [d, 13 C] and
    [d, B] x [B, 13 C], d = 1, 2, 4 and 5 times `dim`. Both go by `turns` of equally many steps. `seconds` holds what
    comes before and after the steps too: checking the features, the split, and judging 52 heads on held-out rows.
    `ratio` is ours over the floor.
    """
    where = choose_device(device)
    tokens, patches, labels = _features(rows, dim, classes, seed)
    batch_size = min(batch_size, rows // 2)
    floor = _Floor(dim, classes * len(LEARNING_RATES), batch_size, where)
    floor.steps(2)
    _wait(where)

    started = time.perf_counter()
    inputs = Inputs.of(tokens, patches, "the features", where)
    training = LinearTraining(
        labels,
        available_blocks=_BLOCKS,
        dim=dim,
        seed=seed,
        batch_size=batch_size,
        steps=-(-epochs * rows // batch_size),
        device=where,
    )
    _wait(where)
    around = time.perf_counter() - started
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(turns):
        before = training.step
        started = time.perf_counter()
        training.run(inputs, until=(turn + 1) * training.steps // turns)
        _wait(where)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        floor.steps(training.step - before)
        _wait(where)
        theirs.append(time.perf_counter() - started)
    started = time.perf_counter()
    trained = training.finish(inputs)
    around += time.perf_counter() - started
    seconds, reference = sum(ours) + around, sum(theirs)
    return {
        "rows": rows,
        "dim": dim,
        "classes": classes,
        "heads": len(trained.heads),
        "steps": trained.steps,
        "batch_size": trained.batch_size,
        "seconds": seconds,
        "steps_seconds": sum(ours),
        "reference_seconds": reference,
        "ratio": seconds / reference,
        "median_turn_ratio": float(np.median(np.array(ours) / np.array(theirs))),
        "speedup": reference / seconds,
        "validation_accuracy": trained.validation[trained.chosen.id],
    }


class _Floor:
    """Matrix products of one step, on numbers that never change."""

    def __init__(self, dim: int, columns: int, batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        widths = [dim * times for times in _WIDTHS]
        self._gradient = some(batch, columns)
        self._inputs = [some(batch, width) for width in widths]
        self._weights = [some(width, columns) for width in widths]
        self._logits = [torch.empty(batch, columns, device=device) for _ in widths]
        self._slopes = [torch.empty(width, columns, device=device) for width in widths]

    def steps(self, number: int) -> None:
        """The products of so many steps."""
        for _ in range(number):
            for x, weight, logits, slope in zip(self._inputs, self._weights, self._logits, self._slopes, strict=True):
                torch.mm(x, weight, out=logits)
                torch.mm(x.T, self._gradient, out=slope)


def _features(rows: int, dim: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class tokens [n, 4, dim], averaged patches [n, dim] and labels: the class is a faint direction in noise."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    labels = rng.integers(0, classes, rows)
    tokens = rng.standard_normal((rows, _BLOCKS, dim), dtype=np.float32)
    patches = rng.standard_normal((rows, dim), dtype=np.float32)
    centres = rng.standard_normal((2, classes, dim), dtype=np.float32) * (1.5 / dim**0.5)
    tokens[:, -1] += centres[0][labels]
    patches += centres[1][labels]
    return tokens, patches, labels


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
