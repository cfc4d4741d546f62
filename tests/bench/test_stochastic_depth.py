"""`bench stochastic-depth` on a CPU: its figures, and that wrong kernels are refused. No timing is asserted."""

import pytest
import torch

from dinov2cli.bench import stochastic_depth as bench
from dinov2cli.errors import WorkError
from dinov2cli.kernels import depth_reference


def test_figures_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench, "CPU_SHAPES", (bench.Shape("small", ((4, 17), (6, 5)), 64),))
    figures = bench.run("cpu", rounds=2)
    assert not figures["triton"] and figures["ours"].startswith("torch (")
    assert [row["name"] for row in figures["shapes"][0]["rows"]] == ["ours", "eager"]
    assert figures["memory_ratio"] < 1
    text = "\n".join(bench.lines(figures))
    assert "Triton did not run" in text and "small, width 64, drop 0.4" in text


def test_the_floor_counts_what_must_move():
    part = bench.Residual(bench.Shape("small", ((10, 3),), 8), torch.device("cpu"), 0)
    assert part.bytes(backward=False) == 8 * (8 * 30 + 8 * 18)  # 6 of 10 samples are kept
    assert part.bytes(backward=True) == 8 * (16 * 30 + 22 * 18)


def test_wrong_kernels_are_not_timed(monkeypatch):
    right = depth_reference.gather_norm_grad
    monkeypatch.setattr(depth_reference, "gather_norm_grad", lambda *args: (right(*args)[0] * 1.01, *right(*args)[1:]))
    with pytest.raises(WorkError, match=r"the kernels are wrong on cpu .*: dx is off by 1.00e-02, allowed"):
        bench.run("cpu", rounds=1)
