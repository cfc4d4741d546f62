"""The training benchmark measures two steps that compute the same thing. No timing is asserted."""

import torch

from dinov2cli.bench.train import Case, run


def test_both_steps_compute_one_loss_and_every_figure_is_there():
    torch.set_num_threads(1)
    case = Case("tiny", 4, 512, 32, 16, 2, 0.3, "fp32", "cpu", 0)
    figures = run(rounds=1, case=case)
    assert figures["loss_difference"] < 1e-5
    for name in ("images_per_s", "seconds", "speedup", "memory_ratio", "reference_images_per_s"):
        assert figures[name] > 0
    assert figures["memory_mib"] > 20  # at least the weights
