import tracemalloc

import numpy as np
import pytest
from scipy import stats

from dinov2cli.errors import UserError
from dinov2cli.evaluation import intervals
from dinov2cli.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_mean_interval,
    difference,
    interval,
    paired_difference,
    resample_weights,
    wilson_interval,
)
from dinov2cli.evaluation.statistics import average_precision, mean, micro_average_precision, ratio, root_mean


@pytest.mark.parametrize("successes, n", [(0, 10), (3, 10), (10, 10), (1, 1), (0, 1), (412, 1000), (999, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    ours = wilson_interval(successes, n, confidence=confidence)
    assert ours == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_known_value():
    # Worked example: 81 of 263 (Newcombe, Statistics in Medicine 1998, table I, method 3).
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("successes, n", [(-1, 4), (5, 4), (0, 0)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson_interval(successes, n)


def test_confidence_outside_range_names_the_cure():
    with pytest.raises(UserError, match=r"^confidence is 95, expected a number between 0 and 1: use 0.95$"):
        wilson_interval(1, 2, confidence=95)


@pytest.mark.parametrize("n, p", [(30, 0.1), (200, 0.5), (1000, 0.95)])
def test_wilson_covers_the_truth_as_often_as_it_says(n, p):
    # Exact coverage: every possible outcome, weighted by its binomial probability.
    counts = np.arange(n + 1)
    weight = stats.binom.pmf(counts, n, p)
    covered = [low <= p <= high for low, high in (wilson_interval(int(c), n) for c in counts)]
    assert 0.93 < float(weight @ np.array(covered)) < 0.98


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        values = rng.exponential(size=80)
        low, high = bootstrap_mean_interval(values, seed=trial, resamples=400)
        hits += low <= 1.0 <= high
    # Percentile intervals of a skewed mean at n = 80 cover about 93 %; four standard errors are 5 points.
    assert 0.88 < hits / 400 < 0.985


def test_paired_interval_covers_the_true_difference_and_is_narrower_than_unpaired():
    rng = np.random.default_rng(1)
    hits, paired_width, unpaired_width = 0, 0.0, 0.0
    for trial in range(300):
        hard = rng.random(200)
        before = (hard < 0.6).astype(float)
        after = np.where(rng.random(200) < 0.1, 1.0, before)  # a tenth of the images becomes right: true change 0.04
        change = paired_difference(before, after, seed=trial, resamples=500)
        hits += change.low <= 0.04 <= change.high
        paired_width += change.high - change.low
        low, high = wilson_interval(int(after.sum()), 200)
        unpaired_width += high - low
    assert 0.89 < hits / 300 < 0.99
    assert paired_width < 0.6 * unpaired_width


def test_level_counts_and_index_draws_agree():
    values = np.repeat([0.0, 1.0], [300, 700])
    by_level = bootstrap_mean_interval(values, seed=3, resamples=20_000)
    by_index = bootstrap_interval(lambda index: values[index].mean(), 1000, seed=4, resamples=4000)
    assert by_level == pytest.approx(by_index, abs=0.004)
    jittered = values + np.linspace(0, 1e-6, 1000)  # more levels than the shortcut takes
    assert bootstrap_mean_interval(jittered, seed=3, resamples=4000) == pytest.approx(by_level, abs=0.004)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_bootstrap_of_a_large_sample_is_the_normal_interval(confidence):
    values = np.random.default_rng(0).normal(size=4000)
    low, high = bootstrap_mean_interval(values, seed=0, resamples=8000, confidence=confidence)
    expected = stats.norm.interval(confidence, values.mean(), values.std() / np.sqrt(4000))
    width = expected[1] - expected[0]
    assert (low, high) == pytest.approx(expected, abs=0.05 * width)
    assert bootstrap_interval(lambda i: values[i].mean(), 4000, seed=0, confidence=confidence) == pytest.approx(
        expected, abs=0.1 * width
    )


def test_bootstrap_is_decided_by_its_seed():
    values = np.random.default_rng(0).normal(size=100)
    first = bootstrap_mean_interval(values, seed=5)
    assert bootstrap_mean_interval(values, seed=5) == first
    assert bootstrap_mean_interval(values, seed=6) != first


def test_significance_is_zero_outside_the_interval():
    same = np.tile([0.0, 1.0], 100)
    assert not paired_difference(same, same, seed=0).significant
    better = paired_difference(np.zeros(100), np.repeat([1.0, 0.0], 50), seed=0)
    assert better.significant and better.value == 0.5 and better.n == 100
    assert paired_difference(np.ones(100), np.repeat([1.0, 0.0], 50), seed=0).significant


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match=r"one shape \[n\], got \(3,\) and \(4,\)"):
        paired_difference(np.zeros(3), np.zeros(4), seed=0)


def precise(rng, n):
    """Two classes whose intersections are about 0.6 and 0.3 of their unions, which vary."""
    unions = rng.integers(20, 100, (n, 2))
    return ratio(unions * np.clip([0.6, 0.3] + 0.2 * rng.standard_normal((n, 2)), 0, 1), unions)


def test_shares_get_the_score_interval_and_everything_else_a_bootstrap():
    right = np.repeat([0.0, 1.0], [30, 70])
    assert interval(mean(right), seed=0) == wilson_interval(70, 100)
    values = np.random.default_rng(0).random(100)
    assert interval(mean(values), seed=3) == bootstrap_mean_interval(values, seed=3)
    squares = values**2
    expected = bootstrap_interval(lambda rows: np.sqrt(squares[rows].mean()), 100, seed=1, resamples=4000)
    assert interval(root_mean(squares), seed=0, resamples=4000) == pytest.approx(expected, abs=0.004)


def test_metrics_over_classes_get_the_interval_of_resampled_images():
    found = precise(np.random.default_rng(0), 80)
    expected = bootstrap_interval(lambda rows: found.at(rows).value(), 80, seed=1, resamples=3000)
    assert interval(found, seed=0, resamples=3000) == pytest.approx(expected, abs=0.004)
    rng = np.random.default_rng(2)
    targets = rng.random((80, 2)) < 0.3
    ranked = average_precision(rng.random((80, 2)) + 0.5 * targets, targets)
    expected = bootstrap_interval(lambda rows: ranked.at(rows).value(), 80, seed=1, resamples=3000)
    assert interval(ranked, seed=0, resamples=3000) == pytest.approx(expected, abs=0.015)


def test_intervals_of_ratios_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = precise(rng, 400_000).value()
    hits = 0
    for trial in range(300):
        low, high = interval(precise(rng, 60), seed=trial, resamples=400)
        hits += low <= truth <= high
    assert 0.89 < hits / 300 < 0.985


def test_weights_are_the_same_however_many_are_held_at_once(monkeypatch):
    whole = np.concatenate(list(resample_weights(50, 30, seed=4)))
    assert whole.shape == (30, 50) and (whole.sum(1) == 50).all()
    monkeypatch.setattr(intervals, "_WEIGHTS_PER_CHUNK", 7 * 50)
    assert np.array_equal(np.concatenate(list(resample_weights(50, 30, seed=4))), whole)
    assert not np.array_equal(np.concatenate(list(resample_weights(50, 30, seed=5))), whole)


def test_a_large_set_is_resampled_in_bounded_memory():
    rng = np.random.default_rng(0)
    found = root_mean(rng.random(20_000))
    tracemalloc.start()
    interval(found, seed=0, resamples=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6  # all weights at once would be 160 MB


@pytest.mark.parametrize(
    "make", [root_mean, lambda v: ratio(v, v + 1), lambda v: micro_average_precision(v, v > 1, v > 0)]
)
def test_both_models_are_resampled_alike(make):
    rng = np.random.default_rng(0)
    common = 3 * rng.random(300)
    same = difference(make(common), make(common), seed=0)
    assert (same.value, same.low, same.high, same.n) == (0.0, 0.0, 0.0, 300)
    assert not same.significant
    shifted = make(common * 1.02)
    change = difference(make(common), shifted, seed=0)
    assert change.value == pytest.approx(shifted.value() - make(common).value(), abs=1e-12)
    assert change.low <= change.value <= change.high
    low, high = interval(shifted, seed=0)
    assert change.high - change.low < 0.2 * (high - low)


def test_a_difference_of_means_is_the_paired_one():
    before, after = (np.random.default_rng(0).random((2, 90)) < [[0.4], [0.6]]).astype(float)
    assert difference(mean(before), mean(after), seed=2) == paired_difference(before, after, seed=2)


def test_differences_between_ratios_cover_the_truth():
    rng = np.random.default_rng(3)
    hits, n = 0, 60
    for trial in range(200):
        before = precise(rng, n)
        unions = before.values[:, 2:]
        gained = np.clip(before.values[:, :2] + unions * (0.05 + 0.1 * rng.standard_normal((n, 2))), -1e9, 1e9)
        change = difference(before, ratio(gained, unions), seed=trial, resamples=400)
        hits += change.low <= 0.05 <= change.high
    assert 0.87 < hits / 200 < 0.99


def test_one_unit_and_no_value_have_no_interval_to_speak_of():
    assert interval(root_mean([4.0]), seed=0) == (2.0, 2.0)
    alone = difference(root_mean([4.0]), root_mean([9.0]), seed=0)
    assert (alone.value, alone.low, alone.high) == (1.0, 1.0, 1.0)
    assert not alone.significant
    assert interval(mean([1.0]), seed=0) == wilson_interval(1, 1)
    assert np.isnan(interval(ratio(np.zeros((5, 2)), np.zeros((5, 2))), seed=0)).all()


def test_resamples_without_a_value_are_left_out():
    # The only image with the class is missing from a third of the resamples.
    targets = np.zeros(12)
    targets[3] = 1
    low, high = interval(average_precision(np.arange(12.0), targets), seed=0)
    assert 0 < low < high <= 1


def test_other_metrics_and_other_numbers_of_units_are_not_compared():
    with pytest.raises(ValueError, match="got mean over 2 and root_mean over 2"):
        difference(mean([1, 0]), root_mean([1, 0]), seed=0)
    with pytest.raises(ValueError, match="got mean over 2 and mean over 3"):
        difference(mean([1, 0]), mean([1, 0, 1]), seed=0)


def test_a_share_of_some_of_the_units_has_wilson_s_interval_too():
    counted = np.arange(40) < 25
    right = np.arange(40) % 3 == 0
    share = ratio(right * counted, counted)
    assert intervals.interval(share, seed=0) == intervals.wilson_interval(int(right[:25].sum()), 25)
    assert intervals.interval(ratio(right * 2.0, counted), seed=0) != intervals.interval(share, seed=0)
