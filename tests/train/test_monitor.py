"""The monitor's figures on features whose answer is known, and its sentences."""

import math

import pytest
import torch

from dinov2cli.train.monitor import (
    Monitor,
    feature_std,
    nearest_distance,
    prototype_use,
    rankme,
    target_entropy,
)

HEALTHY = {
    "feature_std": 0.9,
    "rankme": 40.0,
    "koleo_distance": 0.6,
    "target_entropy": 0.5,
    "prototype_use": 0.7,
    "grad_norm": 2.0,
}


def test_rankme_counts_equal_directions():
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(basis[:, :10] @ basis[:10]) == pytest.approx(10, rel=1e-3)
    assert rankme(torch.ones(20, 8)) == pytest.approx(1, rel=1e-3)


def test_feature_std_of_even_and_collapsed_features():
    spread = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert feature_std(spread) == pytest.approx(1.0, abs=0.02)
    assert feature_std(torch.ones(50, 32) * torch.arange(1, 51)[:, None]) == pytest.approx(0.0, abs=1e-6)


def test_nearest_distance_by_hand():
    square = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert nearest_distance(square) == pytest.approx(math.sqrt(2))
    assert nearest_distance(torch.ones(4, 3)) == pytest.approx(0.0, abs=1e-3)
    assert nearest_distance(torch.ones(1, 3)) == 0.0


def test_entropy_and_use_of_targets():
    assert target_entropy(torch.full((5, 8), 1 / 8)) == pytest.approx(1.0)
    assert target_entropy(torch.eye(8)) == pytest.approx(0.0, abs=1e-6)
    assert prototype_use(torch.eye(8)) == 1.0
    assert prototype_use(torch.eye(8)[[0, 0, 0, 1]]) == 0.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"feature_std": 0.02}, "the features have collapsed; lower optim.lr or raise teacher.momentum"),
        ({"rankme": 2.0}, "fill few directions (RankMe 2.0 of at most 64): raise loss.koleo_weight"),
        ({"koleo_distance": 0.001}, "nearest class tokens almost touch (distance 0.001): raise loss.koleo_weight"),
        ({"target_entropy": 0.995}, "targets are nearly uniform (entropy 0.995 of 1): they teach nothing; lower loss."),
        ({"prototype_use": 0.02}, "few prototypes win (2% of those that could): use loss.centering sinkhorn"),
        ({"grad_norm": 300.0}, "gradients are 100 times the clip: lower optim.lr or lengthen optim.warmup"),
    ],
)
def test_what_it_says(change, sentence):
    monitor = Monitor(rank_limit=64, clip=3.0)
    assert monitor.changes(HEALTHY, 0.5) == []
    (said,) = monitor.changes(HEALTHY | change, 0.5)
    assert sentence in said
    assert monitor.changes(HEALTHY | change, 0.6) == []  # once, not at every line
    assert monitor.changes(HEALTHY, 0.7) == [f"no longer: {said}"]


def test_it_is_quiet_at_the_start():
    assert Monitor(rank_limit=64).changes(HEALTHY | {"feature_std": 0.0}, 0.1) == []
