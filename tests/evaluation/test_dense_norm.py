"""Batch norm over ranks: torch's BatchNorm2d over the joined batch is the oracle."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dinov2cli.evaluation.dense.norm import SyncedBatchNorm

SPLITS = ((5, 0), (2, 3))  # samples of each rank


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 3, 2, generator=generator) * torch.tensor([1, 9, 0.1, 3]).view(1, 4, 1, 1) + 100
    return x, torch.randn(5, 4, 3, 2, generator=generator)


def filled(norm):
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2, -3, 0.5]))
        norm.bias.copy_(torch.tensor([0.0, 1, 2, 3]))
    return norm


def outcome(norm, x, weights):
    """Output, gradients and buffers of the loss sum(output * weights)."""
    x = x.clone().requires_grad_()
    output = norm(x)
    (output * weights).sum().backward()
    return {
        "output": output.detach(),
        "grad": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "mean": norm.running_mean,
        "variance": norm.running_var,
    }


def test_alone_it_is_torchs():
    x, weights = problem()
    ours, theirs = (outcome(filled(norm), x, weights) for norm in (SyncedBatchNorm(4), nn.BatchNorm2d(4)))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    norm = filled(SyncedBatchNorm(4)).eval()
    assert torch.allclose(norm(x.flatten(1)[:, :4]), x.flatten(1)[:, :4] * norm.weight + norm.bias, atol=2e-3)
    with pytest.raises(ValueError, match=r"expected \[N, 4, ...\], found \[5, 3\]"):
        norm(torch.zeros(5, 3))


def check_two_ranks(tmp_path):
    """What `on_a_rank` of two ranks wrote is what one batch of both comes to; `test_dense_train` launches them."""
    x, weights = problem()
    wanted = outcome(filled(nn.BatchNorm2d(4)).double(), x.double(), weights.double())
    for number, _ in enumerate(SPLITS):
        ranks = [dict(np.load(tmp_path / f"norm-{number}-{rank}.npz")) for rank in (0, 1)]
        for name in ("output", "grad"):
            found = np.concatenate([rank[name] for rank in ranks])
            assert np.allclose(found, wanted[name].numpy(), atol=2e-4), name
        for name in ("weight", "bias"):
            assert np.allclose(ranks[0][name] + ranks[1][name], wanted[name].numpy(), atol=1e-3), name
        for name in ("mean", "variance"):
            for rank in ranks:
                assert np.allclose(rank[name], wanted[name].numpy(), rtol=1e-5), name


def on_a_rank(folder: Path, me: int) -> None:
    """Outcomes of this rank's samples, written down."""
    for number, split in enumerate(SPLITS):
        norm = filled(SyncedBatchNorm(4, group=dist.group.WORLD))
        x, weights = (whole.split(split)[me] for whole in problem())
        found = outcome(norm, x, weights)
        np.savez(folder / f"norm-{number}-{me}.npz", **{name: value.numpy() for name, value in found.items()})
