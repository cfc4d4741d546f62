"""Automatic settings: bounds, direction and reasons."""

import pytest

from dinov2cli.train.automatic import automatic


@pytest.mark.parametrize(
    ("batch", "images", "steps", "prototypes", "momentum", "temperature", "warmup"),
    [
        (64, 2_000, 600, 128, 0.98, 0.05, 0.1),  # the demo
        (64, 50_000, 9_000, 512, 0.994, 0.05, 0.1),
        (512, 1_200_000, 100, 4096, 0.9, 0.054, 0.3),
        (3072, 10**8, 625_000, 16384, 0.994, 0.062, 0.1),
        (32, 10, None, 128, 0.99, 0.05, 0.1),
    ],
)
def test_values(batch, images, steps, prototypes, momentum, temperature, warmup):
    chosen = {name: pick.value for name, pick in automatic(batch, images, steps).items()}
    assert chosen == {
        "heads.prototypes": prototypes,
        "teacher.momentum": pytest.approx(momentum),
        "loss.teacher_temperature": pytest.approx(temperature),
        "optim.warmup": pytest.approx(warmup),
    }


def test_reasons_name_what_decided():
    chosen = automatic(64, 2_000, 600)
    assert chosen["heads.prototypes"].reason.startswith("one for 8 of 2,000 images")
    assert chosen["teacher.momentum"].reason.startswith("the average spans 50 of 600 steps")
    assert "60 of 600 steps" in chosen["optim.warmup"].reason
