import tracemalloc

import numpy as np
import pytest
from scipy import stats

from dinov2cli.errors import UserError
from dinov2cli.evaluation import intervals
from dinov2cli.evaluation.clustered import (
    cluster_codes,
    cluster_weights,
    clustered_share_interval,
    expanded_confidence,
)
from dinov2cli.evaluation.group_rates import all_pairs, cells_of, rates
from dinov2cli.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_mean_interval,
    difference,
    interval,
    paired_difference,
    resample_weights,
    wilson_interval,
)
from dinov2cli.evaluation.statistics import (
    average_precision,
    class_mean,
    drop,
    gap,
    mean,
    micro_average_precision,
    ratio,
    root_mean,
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


def alike(seed=0, clusters=50, images=10, share=0.7, correlation=0.3):
    """Right or wrong of images of a cluster that hang together: beta-binomial."""
    rng = np.random.default_rng(seed)
    spread = (1 - correlation) / correlation
    cluster = np.repeat(rng.permutation(clusters), images)
    return (rng.random(len(cluster)) < rng.beta(share * spread, (1 - share) * spread, clusters)[cluster]) * 1.0, cluster


def by_loop(metric, clusters, resamples=2000):
    """A metric of row numbers in resamples of clusters, one after the other."""
    rng, owners = np.random.default_rng(1), np.unique(clusters)
    members = [np.flatnonzero(clusters == owner) for owner in owners]
    return np.array(
        [
            metric(np.concatenate([members[i] for i in rng.integers(0, len(owners), len(owners))]))
            for _ in range(resamples)
        ]
    )


def test_a_share_of_clusters_is_as_sure_as_a_bootstrap_of_clusters_says():
    hits, clusters = alike()
    low, high = clustered_share_interval(hits, clusters, confidence=0.95)
    drawn = by_loop(lambda rows: hits[rows].mean(), clusters)
    assert (high - low) / 2 == pytest.approx(1.96 * drawn.std(), rel=0.1)
    assert high - low > 1.4 * np.ptp(wilson_interval(int(hits.sum()), len(hits)))
    assert interval(mean(hits), clusters=clusters, seed=0) == (low, high)
    counted = np.arange(len(hits)) % 3 > 0
    some = ratio(hits * counted, counted)
    expected = clustered_share_interval(hits[counted], clusters[counted], confidence=0.95)
    assert interval(some, clusters=clusters, seed=0) == expected


def test_the_effective_number_of_images_is_that_of_the_linearised_variance():
    hits, clusters = alike(clusters=12)
    share, n = hits.mean(), len(hits)
    residuals = np.array([(hits[clusters == c] - share).sum() for c in range(12)])
    variance = 12 / 11 * (residuals**2).sum() / n**2
    size = share * (1 - share) / variance
    kurtosis = 12 * (residuals**4).sum() / (residuals**2).sum() ** 2
    t = stats.t.ppf(0.975, min(11, 2 * 12 / (kurtosis - 1)))
    # Wilson's limits solve (p - share)^2 = t^2 p (1 - p) / size.
    roots = np.roots([1 + t**2 / size, -(2 * share + t**2 / size), share**2])
    assert clustered_share_interval(hits, clusters, confidence=0.95) == pytest.approx(sorted(roots), abs=1e-9)


def test_clusters_of_one_image_are_no_clusters():
    hits, _ = alike()
    alone = np.random.default_rng(0).permutation(len(hits))
    assert clustered_share_interval(hits, alone, confidence=0.9) == pytest.approx(
        wilson_interval(int(hits.sum()), len(hits), confidence=0.9), abs=1e-12
    )
    for own, plain in zip(cluster_weights(np.arange(50), 30, seed=4), resample_weights(50, 30, seed=4), strict=True):
        assert np.array_equal(own, plain)


def test_shares_at_the_ends_count_clusters_and_one_cluster_says_nothing():
    clusters = np.repeat(np.arange(8), 25)
    t = stats.t.ppf(0.975, 7)
    assert clustered_share_interval(np.ones(200), clusters, confidence=0.95) == pytest.approx((8 / (8 + t**2), 1))
    assert clustered_share_interval(np.zeros(200), clusters, confidence=0.95)[0] == 0
    assert clustered_share_interval([1.0, 0, 1], np.zeros(3, dtype=int), confidence=0.95) == (0, 1)
    # Clusters that are more alike than chance makes images say no more than their images do.
    balanced = np.tile([1.0, 0.0], 100)
    assert clustered_share_interval(balanced, clusters, confidence=0.95)[1] > wilson_interval(100, 200)[1]


def test_values_between_0_and_1_are_as_sure_as_their_clusters():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    values = np.clip(0.6 + 0.1 * rng.standard_normal(40)[clusters] + 0.05 * rng.standard_normal(200), 0, 1)
    low, high = interval(mean(values), clusters=clusters, seed=0)
    drawn = by_loop(lambda rows: values[rows].mean(), clusters)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.012)


@pytest.mark.parametrize("share, clusters, correlation", [(0.5, 10, 0.3), (0.9, 20, 0.1), (0.95, 50, 0.3)])
def test_clustered_intervals_cover_the_truth_as_often_as_they_say(share, clusters, correlation):
    sets = 400
    held = 0
    for number in range(sets):
        low, high = clustered_share_interval(*alike(number, clusters, 10, share, correlation), confidence=0.95)
        held += low <= share <= high
    assert held >= stats.binom.ppf(0.001, sets, 0.94)


def test_weights_of_clusters_repeat_all_their_images(monkeypatch):
    clusters = np.array([7, 7, -1, 3, 3, 3, -1])
    whole = np.concatenate(list(cluster_weights(clusters, 200, seed=0)))
    assert whole.shape == (200, 7)
    assert (whole[:, [0, 2, 3]] == whole[:, [1, 6, 5]]).all() and (whole[:, [0, 2, 3]].sum(1) == 3).all()
    assert whole[:, [0, 2, 3]].mean(0) == pytest.approx(np.ones(3), abs=0.2)
    monkeypatch.setattr("dinov2cli.evaluation.clustered._WEIGHTS_PER_CHUNK", 20)
    assert np.array_equal(np.concatenate(list(cluster_weights(clusters, 200, seed=0))), whole)


@pytest.mark.parametrize("make", [root_mean, lambda v: ratio(v, v + 1), lambda v: class_mean(v, np.arange(240) % 3)])
def test_other_metrics_get_the_interval_of_clusters_drawn_again(make):
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 8)
    found = make(2 * rng.random(30)[clusters] + rng.random(240))
    drawn = by_loop(lambda rows: found.at(rows).value(), clusters)
    outside = (1 - expanded_confidence(0.95, 30)) / 2
    expected = np.quantile(drawn, [outside, 1 - outside])
    ours = interval(found, clusters=clusters, seed=0, resamples=4000)
    assert ours == pytest.approx(tuple(expected), abs=0.15 * np.ptp(expected))
    assert np.ptp(ours) > 1.5 * np.ptp(interval(found, seed=0))


def test_few_clusters_are_read_at_wider_percentiles():
    assert expanded_confidence(0.95, 10**6) == pytest.approx(0.95, abs=1e-6)
    assert stats.norm.ppf(0.5 + expanded_confidence(0.95, 5) / 2) == pytest.approx(
        np.sqrt(5 / 4) * stats.t.ppf(0.975, 4)
    )


def test_changes_over_clusters_are_those_of_clusters_drawn_again():
    before, clusters = alike(0)
    after, _ = alike(1)
    after = np.where(np.random.default_rng(2).random(500) < 0.8, before, after)
    change = difference(mean(before), mean(after), clusters=clusters, seed=0)
    drawn = by_loop(lambda rows: after[rows].mean() - before[rows].mean(), clusters)
    assert change.value == pytest.approx(after.mean() - before.mean()) and change.n == 500
    assert (change.low, change.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.012)
    squares = difference(root_mean(before + 1), root_mean(after + 1), clusters=clusters, seed=0)
    drawn = by_loop(lambda rows: np.sqrt((after[rows] + 1).mean()) - np.sqrt((before[rows] + 1).mean()), clusters)
    assert (squares.low, squares.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.006)
    alone = difference(mean(before), mean(after + 1), clusters=np.zeros(500, dtype=int), seed=0)
    assert np.isnan([alone.low, alone.high]).all() and not alone.significant


def test_changes_of_few_clusters_cover_the_truth():
    rng, held, sets = np.random.default_rng(0), 0, 300
    for number in range(sets):
        clusters = np.repeat(np.arange(10), 6)
        change = 0.05 + 0.1 * rng.standard_normal(10)[clusters] + 0.1 * rng.standard_normal(60)
        before = rng.random(60)
        found = difference(mean(before), mean(before + change), clusters=clusters, seed=number, resamples=400)
        held += found.low <= 0.05 <= found.high
    assert stats.binom.ppf(0.001, sets, 0.95) <= held  # plain percentiles hold it in 90 of 100


def test_gaps_and_drops_have_simultaneous_intervals():
    rng = np.random.default_rng(0)
    hits, clusters = alike(clusters=60)
    codes = clusters % 3
    groups = np.eye(3)[codes]
    values, counted = groups * hits[:, None], groups
    for metric in (gap, drop):
        found = metric(values, counted)
        low, high = interval(found, clusters=clusters, seed=0)
        assert low <= found.value() <= high and low == 0  # there is none
        plain = interval(found, seed=0)
        assert high - low > plain[1] - plain[0]
        pairs = all_pairs(rates(cells_of(hits, codes, clusters, 3)), confidence=0.95, draws=2000, seed=0)
        assert (low, high) == (pairs.gap() if metric is gap else pairs.drop())
    better = np.where(codes == 1, 1.0, hits)
    assert interval(gap(groups * better[:, None], groups), clusters=clusters, seed=0)[0] > 0.1
    empty = np.pad(groups, ((0, 0), (0, 1)))  # a group without images has no say
    assert interval(gap(empty * hits[:, None], empty), seed=0) == interval(gap(values, counted), seed=0)
    assert np.isnan(interval(gap(groups[:, :1], groups[:, :1]), seed=0)).all()
    assert np.isnan(interval(drop(0 * groups, groups), seed=0)).all()
    same = difference(gap(values, counted), gap(values, counted), clusters=clusters, seed=0)
    assert (same.low, same.high) == (0, 0)
    less = groups * np.where(rng.random(600) < 0.5, 1.0, better)[:, None]
    change = difference(gap(groups * better[:, None], groups), gap(less, groups), clusters=clusters, seed=0)
    assert change.low < change.value < change.high < 0


def test_names_of_clusters_are_numbers_in_order_and_no_name_is_a_cluster_of_its_own():
    assert cluster_codes(["b", "a", None, "b", None, 0, "0"]).tolist() == [0, 1, 2, 0, 3, 4, 5]
    assert cluster_codes([]).dtype == np.int64
