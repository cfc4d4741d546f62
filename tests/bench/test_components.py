"""The bench of components gives the figures it promises, and compares the same thing."""

import json

import numpy as np

from dinov2cli.bench import components
from dinov2cli.bench.components import run, same_components


def test_figures_are_there_and_both_agree(monkeypatch):
    monkeypatch.setattr(components, "run_in_child", lambda function, *arguments: function(*arguments))
    result = run(rows=20_000, rounds=1)
    json.dumps(result)
    assert result["same"] and 0 < result["components"] < 20_000 and result["edges"] == 20_000
    for name in ("seconds", "reference_seconds", "speedup", "memory_ratio", "peak_mb"):
        assert result[name] > 0, name


def test_other_components_are_told_apart():
    label = np.array([0, 0, 2, 2])
    assert same_components(label, np.array([7, 7, 1, 1]))
    assert not same_components(label, np.array([7, 7, 7, 7]))
    assert not same_components(label, np.array([0, 1, 2, 2]))
