"""The monitor's figures on features whose answer is known, and its sentences."""

import math

import numpy as np
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
from dinov2cli.train.schedules import Schedules
from dinov2cli.train.ssl import Objective
from tests.train.tiny_run import TileLoader, tiny_model, tiny_train

NO_KOLEO = {"objective": Objective(koleo_weight=0)}

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


def test_one_prototype_for_every_image_is_told_also_in_a_small_batch():
    monitor = Monitor(rank_limit=16, target_limit=16)
    collapsed = HEALTHY | {"prototype_use": 1 / 16, "target_entropy": 0.01}
    assert "one prototype wins for every image" in monitor.changes(collapsed, 0.5)[0]


class Shades(TileLoader):
    """Tiles of one even grey each, `count` different ones: images that show nothing."""

    def __init__(self, count: int) -> None:
        super().__init__()
        greys = np.linspace(0, 255, count).astype(np.uint8)
        self.tiles = [np.full((64, 64, 3), grey, np.uint8) for grey in greys] * 40


def without_colours(global_crops, local_crops, *, seed, epoch, sample):
    return global_crops.float() / 255 - 0.5, local_crops.float() / 255 - 0.5


def hot(temperature: float) -> dict:
    schedules = Schedules(lr=2e-3, momentum=0.9, teacher_temperature_start=temperature, teacher_temperature=temperature)
    return {"phase": {"schedules": schedules}}


def alike() -> dict:
    model = tiny_model()
    model.student.backbone.set_drop_path(0.0)  # the same image gives the same token
    return {
        "model": model,
        "phase": {"loader": Shades(1)},
        "augment": without_colours,
        "method": {"mask_probability": 0},
    }


@pytest.mark.parametrize(
    ("steps", "broken", "sentence"),
    [
        (60, {"model": tiny_model(centering="none"), "method": NO_KOLEO, "lr": 2e-2}, "one prototype wins for every"),
        (20, hot(1.0), "teacher targets are nearly uniform"),
        (10, {"method": {"objective": Objective(koleo_weight=300)}}, "gradients are"),
        (15, {"phase": {"loader": Shades(1)}, "augment": without_colours}, "the features have collapsed"),
        (15, {"phase": {"loader": Shades(2)}, "augment": without_colours}, "fill few directions"),
        (15, alike(), "nearest class tokens almost touch"),
    ],
    ids=["centring off", "temperature", "weight of a term", "one image", "two images", "copies"],
)
def test_it_tells_of_a_run_that_was_broken_on_purpose(tmp_path, steps, broken, sentence):
    torch.set_num_threads(1)
    tiny_train(tmp_path, steps, checkpoint_every=0, log_every=5, **broken)
    assert sentence in (tmp_path / "log.txt").read_text()


def test_it_says_nothing_of_a_sound_run(tmp_path):
    torch.set_num_threads(1)
    sharp = Schedules(lr=2e-3, momentum=0.9, teacher_temperature_start=0.02, teacher_temperature=0.02)
    tiny_train(tmp_path, 60, checkpoint_every=0, log_every=5, phase={"schedules": sharp})
    assert not (tmp_path / "log.txt").exists()


def test_it_is_quiet_at_the_start():
    assert Monitor(rank_limit=64).changes(HEALTHY | {"feature_std": 0.0}, 0.1) == []
