import numpy as np
import pytest
import torch

from dinov2cli.bench import evaluation
from dinov2cli.bench.eval_linear import _Floor, linear_figures
from dinov2cli.evaluation.linear.grid import head_grid


def test_the_linear_probe_and_its_floor_take_equally_many_steps(monkeypatch):
    counted: list[int] = []
    steps = _Floor.steps
    monkeypatch.setattr(_Floor, "steps", lambda self, number: (counted.append(number), steps(self, number))[1])
    figures = linear_figures(rows=300, dim=16, classes=3, batch_size=32, epochs=2, turns=4, device="cpu")
    assert figures["heads"] == 52 and figures["steps"] == 19 and figures["batch_size"] == 32
    assert sum(counted[1:]) == 19 and len(counted) == 5  # the first are to warm up
    assert figures["ratio"] == pytest.approx(figures["seconds"] / figures["reference_seconds"])
    assert figures["speedup"] == pytest.approx(1 / figures["ratio"])
    assert figures["seconds"] > figures["steps_seconds"] > 0


def test_the_floor_has_the_operations_of_the_grid():
    floor = _Floor(8, 3 * 13, 16, torch.device("cpu"))
    heads, _ = head_grid(4)
    own = sum((head.blocks + head.averaged_patches) * 8 * 3 for head in heads)
    assert sum(weight.numel() for weight in floor._weights) == own


def test_the_probe_learns_what_it_is_timed_on():
    figures = linear_figures(rows=3000, dim=32, classes=4, batch_size=64, epochs=4, device="cpu")
    assert 0.5 < figures["validation_accuracy"] < 1  # chance is 0.25, and it is no walkover


def test_parts_are_put_together(monkeypatch):
    asked = {}

    class Module:
        def __init__(self, name):
            self.part = name.rpartition("eval_")[2]

        def __getattr__(self, name):
            assert name == f"{self.part}_figures"

            def part(**settings):
                asked[self.part] = settings
                against = {"ratio": 0.5} if self.part == "knn" else {"reference_seconds": 3.0}
                return {"seconds": 2.0, **against}

            return part

    monkeypatch.setattr(evaluation.importlib, "import_module", Module)
    figures = evaluation.run(rows=1000, device="cpu", seed=3)
    assert asked["knn"] == {"references": 1000, "tests": 200, "device": "cpu", "seed": 3}
    assert asked["linear"]["rows"] == 1000 and asked["logreg"]["images"] == 100
    assert figures["seconds"] == 6.0 and figures["speedup"] == 10 / 6 and figures["rows"] == 1000
    assert {f"{name}_seconds" for name in evaluation.PARTS} <= set(figures)
    text = evaluation.lines(figures)
    assert any(line.split() == ["knn_seconds", "2"] for line in text) and len(text) == len(figures)
    assert np.isfinite(figures["peak_rss_mb"])


def test_all_parts_run():
    figures = evaluation.run(rows=1000, device="cpu")
    assert all(figures[f"{part}_seconds"] > 0 for part in evaluation.PARTS)
