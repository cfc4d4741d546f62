"""The bench of loss curves: same weights and batches for every run, and a wrong kernel does not coincide."""

import os

import torch

from dinov2cli.bench import curve
from dinov2cli.bench.train import Case
from dinov2cli.kernels.dispatch import SETTING
from dinov2cli.models import blocks

CASE = Case("tiny", 4, 64, 32, 16, 2, 0.3, "bf16", "cpu", 0)


def test_three_runs_on_one_set_of_batches(monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    torch.set_num_threads(1)
    figures = curve.run(case=CASE, steps=4)
    assert [len(figures["losses"][name]) for name in ("kernels", "torch", "float32")] == [4, 4, 4]
    assert figures["coincide"] is True
    assert 0 < figures["bf16_difference"] < 1e-2
    assert SETTING not in os.environ
    assert not any(line.startswith("losses") for line in curve.lines(figures))


def test_another_result_does_not_coincide(monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    torch.set_num_threads(1)
    plain = blocks.attention

    def wrong(qkv, groups):
        return plain(qkv, groups) * (1 if os.environ.get(SETTING) == "torch" else 0.5)

    monkeypatch.setattr(blocks, "attention", wrong)
    assert curve.run(case=CASE, steps=4)["coincide"] is False
