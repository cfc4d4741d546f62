"""The bench of groups gives the figures it promises, and both sides say the same."""

import json

import numpy as np

from dinov2cli.bench import fairness


def test_figures_are_there_and_both_agree(monkeypatch):
    monkeypatch.setattr(fairness, "run_in_child", lambda function, *arguments: function(*arguments))
    result = fairness.run(rows=3000, repeats=400, rounds=1)
    json.dumps(result)
    for name in ("seconds", "reference_seconds", "speedup", "clustered_seconds", "memory_ratio", "peak_mb"):
        assert result[name] > 0, name
    assert result["limits_apart"] < 0.01 and result["p_values_apart"] < 0.2


def test_the_textbook_knows_a_gap_from_none():
    outcomes, axes = fairness.make(2000, 0)
    outcomes[0].values[:] = axes[0].codes == 1
    limits, p_values = fairness.textbook(outcomes[:1], axes[:1], 100, 0)
    assert p_values[0] == 1 / 101 and limits.shape == (5, 2)
    np.testing.assert_array_equal(limits[1], [1, 1])
