"""The training benchmark measures two steps that compute the same thing. No timing is asserted."""

import pytest
import torch

from dinov2cli.bench.textbook import drop
from dinov2cli.bench.train import PARTS, Case, run


def test_both_steps_compute_one_loss_and_every_figure_is_there():
    torch.set_num_threads(1)
    case = Case("tiny", 4, 512, 32, 16, 2, 0.3, "fp32", "cpu", 0)
    figures = run(rounds=1, case=case, reference=True)
    assert figures["loss_difference"] < 1e-5
    for name in ("images_per_s", "seconds", "speedup", "memory_ratio", "reference_images_per_s", "mfu", "gflop"):
        assert figures[name] > 0
    assert figures["reference_gflop"] > figures["gflop"]  # the textbook computes the branches it drops
    assert figures["state_mib"] > 20  # at least the weights
    assert tuple(figures["parts"]) == PARTS
    assert all(seconds > 0 for seconds in figures["parts"].values())


def test_without_a_reference_only_our_step_is_timed():
    torch.set_num_threads(1)
    figures = run(rounds=1, case=Case("tiny", 4, 64, 32, 16, 2, 0.0, "fp32", "cpu", 0))
    assert "speedup" not in figures
    assert figures["images_per_s"] > 0


def test_textbook_drop_path_keeps_the_expected_branch():
    branch = torch.ones(4000, 2, 3)
    dropped = drop(branch, 0.25, torch.Generator().manual_seed(0))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
