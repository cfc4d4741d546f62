"""Schedules against their closed forms, and what a budget becomes."""

import math

import pytest

from dinov2cli.errors import UserError
from dinov2cli.train.schedules import (
    Budget,
    RunLength,
    Schedules,
    linear_then_constant,
    parse_budget,
    scaled_lr,
    warmup_cosine,
)


def test_warmup_rises_linearly_and_reaches_the_base():
    values = [warmup_cosine(s, 100, base=2.0, final=0.5, warmup=0.1) for s in range(10)]
    assert values == pytest.approx([0.2 * (s + 1) for s in range(10)])


def test_cosine_matches_its_closed_form():
    for step in range(10, 100):
        expected = 0.5 + 0.75 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert warmup_cosine(step, 100, base=2.0, final=0.5, warmup=0.1) == pytest.approx(expected, rel=1e-12)
    assert warmup_cosine(100, 100, base=2.0, final=0.5, warmup=0.1) == 0.5
    assert warmup_cosine(55, 100, base=2.0, final=0.5, warmup=0.1) == pytest.approx(1.25)


def test_temperature_is_linear_then_constant():
    at = [linear_then_constant(s, 100, start=0.04, end=0.07, warmup=0.3) for s in (0, 15, 30, 99)]
    assert at == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_schedules_scale_with_the_length_of_the_run():
    schedules = Schedules(lr=1e-3, freeze_last_layer=0.1, min_lr=0.0)
    for fraction in (0.05, 0.3, 0.5, 0.9):
        short, long = schedules.at(round(1000 * fraction), 1000), schedules.at(round(100_000 * fraction), 100_000)
        for name in ("weight_decay", "momentum", "teacher_temperature"):
            assert getattr(short, name) == pytest.approx(getattr(long, name), rel=1e-9)
        assert short.lr == pytest.approx(long.lr, rel=0.02)


def test_last_layer_is_frozen_for_the_first_fraction():
    schedules = Schedules(lr=1e-3, freeze_last_layer=0.1)
    assert [schedules.at(s, 50).last_layer_lr == 0.0 for s in (0, 4, 5)] == [True, True, False]
    assert schedules.at(5, 50).last_layer_lr == schedules.at(5, 50).lr > 0


def test_momentum_and_decay_end_values():
    last = Schedules(lr=1e-3, momentum=0.99, weight_decay=0.04, weight_decay_end=0.4).at(1000, 1000)
    assert (last.momentum, last.weight_decay) == (1.0, 0.4)


def test_lr_scales_with_the_root_of_the_batch():
    assert scaled_lr(4e-3, 4096) == pytest.approx(8e-3)
    assert scaled_lr(4e-3, 64) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("300 steps", Budget(steps=300)),
        ("1 step", Budget(steps=1)),
        ("20_000 images", Budget(images=20000)),
        ("5m", Budget(seconds=300)),
        ("90s", Budget(seconds=90)),
        ("1.5 h", Budget(seconds=5400)),
        ("100 epochs", Budget(epochs=100)),
        ("2 days", Budget(seconds=172800)),
        ("10 min", Budget(seconds=600)),
    ],
)
def test_budget_forms(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "5", "five minutes", "-3m", "0 steps", "2.5 steps", "3 weeks", "ms", "s"])
def test_a_bad_budget_says_what_is_accepted(text):
    with pytest.raises(
        UserError, match=r"train\.budget: cannot read .*'300 steps', '20000 images', '100 epochs', '5m'"
    ):
        parse_budget(text)


def test_budgets_become_steps_rounded_up():
    assert Budget(images=1000).total_steps(64, 500) == 16
    assert Budget(steps=7).total_steps(64, 500) == 7
    assert Budget(epochs=2.5).total_steps(64, 500) == 20
    assert Budget(seconds=60).total_steps(64, 500) is None


def timed(text: str) -> RunLength:
    return RunLength.of(parse_budget(text), 64)


def test_time_budget_is_fixed_after_calibration_and_survives_a_resume():
    length = timed("100s")
    assert length.update(0, 0.0) == 1000  # unknown rate: warm-up is taken as long
    assert length.update(2, 3.0) == 1000  # the first steps also start workers
    assert length.update(4, 4.0) == 4 + 2 * 96  # 2 steps a second since then
    assert not length.fixed
    assert length.update(18, 7.0) == 18 + 4 * 93
    assert length.fixed
    assert length.update(30, 50.0) == 390  # a slower machine later no longer changes the schedule
    resumed = timed("100s")
    resumed.load_state_dict(length.state_dict())
    assert resumed.update(31, 51.0) == 390


def test_time_budget_ends_even_if_every_step_is_slow():
    length = timed("10s")
    length.update(1, 4.0)
    length.update(2, 8.0)
    assert length.update(3, 12.0) == 3


def test_length_given_in_steps_follows_the_config_not_the_checkpoint():
    length = RunLength(total=10)
    length.load_state_dict(RunLength(total=5).state_dict())
    assert length.update(0, 0.0) == 10
