import numpy as np
import pytest
from scipy import stats

from dinov2cli.errors import UserError
from dinov2cli.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_mean_interval,
    paired_difference,
    wilson_interval,
)


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
