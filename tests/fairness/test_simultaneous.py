import numpy as np
import pytest
from scipy import optimize, stats

from dinov2cli.evaluation import group_rates
from dinov2cli.evaluation.clustered import clustered_share_interval
from dinov2cli.evaluation.group_rates import Rates, all_pairs, cells_of, critical_value, rates
from dinov2cli.evaluation.intervals import wilson_interval
from dinov2cli.fairness.outcomes import Outcome
from dinov2cli.fairness.simultaneous import compare, largest_gap

HOW = {"min_images": 2, "min_clusters": 1, "confidence": 0.95, "resamples": 1000, "seed": 0}

FEW = {"min_images": 5, "confidence": 0.95, "resamples": 1000, "seed": 0}


def outcome(values, counted=None):
    values = np.asarray(values, dtype=float)
    return Outcome("top1", values, np.ones(len(values), dtype=bool) if counted is None else counted)


def independent(values, sizes):
    values, sizes = np.asarray(values, dtype=float), np.asarray(sizes, dtype=float)
    return Rates(values, sizes, np.full(len(values), np.inf), np.eye(len(values)))


def bootstrap(values, codes, clusters, groups, resamples=3000):
    """Rates of all groups in resamples of clusters, in a plain loop; [resamples, G]."""
    rng, owners = np.random.default_rng(0), np.unique(clusters)
    members = [np.flatnonzero(clusters == owner) for owner in owners]
    found = np.empty((resamples, groups))
    for row in found:
        rows = np.concatenate([members[i] for i in rng.integers(0, len(owners), len(owners))])
        for group in range(groups):
            row[group] = values[rows][codes[rows] == group].mean()
    return found


def correlated(seed=0, clusters=60, images=8):
    """Rates of two groups that come together in every cluster, and of a third that is alone in its clusters."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(clusters), images)
    codes = np.where(cluster < clusters // 3, 2, rng.integers(0, 2, len(cluster)))
    easy = rng.beta(3, 1, clusters)[cluster]
    return (rng.random(len(cluster)) < easy).astype(float), codes, cluster


def test_variances_and_correlations_are_those_of_a_bootstrap_of_clusters():
    values, codes, clusters = correlated()
    cells = cells_of(values, codes, clusters, 3)
    assert len(cells.count) == len({*zip(clusters, codes, strict=True)}) and cells.binary
    found, drawn = rates(cells), bootstrap(values, codes, clusters, 3)
    assert found.value == pytest.approx([values[codes == group].mean() for group in range(3)])
    deviation = np.sqrt(found.value * (1 - found.value) / found.size)
    assert deviation == pytest.approx(drawn.std(0), rel=0.12)
    assert found.correlation == pytest.approx(np.corrcoef(drawn.T), abs=0.06)
    assert found.correlation[0, 1] > 0.2


def test_correlations_do_not_hang_on_how_many_clusters_are_held_at_once(monkeypatch):
    values, codes, clusters = correlated()
    whole = rates(cells_of(values, codes, clusters, 3)).correlation
    monkeypatch.setattr(group_rates, "_PER_CHUNK", 3 * 7)
    assert rates(cells_of(values, codes, clusters, 3)).correlation == pytest.approx(whole, abs=1e-12)


def test_two_rates_by_themselves_have_newcombe_s_interval():
    # Newcombe, Statistics in Medicine 1998, table II, method 10, examples (a), (b) and (g).
    for (a, m), (b, n), low, high in [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0000),
    ]:
        found = all_pairs(independent([a / m, b / n], [m, n]), confidence=0.95, draws=10, seed=0)
        assert (round(found.low[0, 1], 4), round(found.high[0, 1], 4)) == (low, high)
        assert found.low[1, 0] == -found.high[0, 1]
        assert found.gap() == (found.low[0, 1], found.high[0, 1])


def test_the_critical_value_of_equal_groups_is_the_studentised_range():
    for groups in (3, 6):
        equal = independent(np.full(groups, 0.5), np.full(groups, 100))
        found = critical_value(equal, np.zeros(groups, dtype=int), confidence=0.95, draws=200_000, seed=0)
        assert found == pytest.approx(stats.studentized_range.ppf(0.95, groups, np.inf) / np.sqrt(2), abs=0.012)
    # Three families of two groups: three independent differences.
    families = np.repeat([0, 1, 2], 2)
    found = critical_value(equal, families, confidence=0.95, draws=200_000, seed=0)
    assert found == pytest.approx(stats.norm.ppf((1 + 0.95 ** (1 / 3)) / 2), abs=0.012)


def test_limits_of_ratios_are_where_the_limits_of_a_difference_reach_0():
    # MOVER-R: the ratio r at which the interval of rate i - r rate j just touches 0 (Donner & Zou 2012).
    value, correlation = np.array([0.6, 0.8]), np.array([[1, 0.3], [0.3, 1]])
    given = Rates(value, np.array([40.0, 60]), np.full(2, np.inf), correlation)
    found = all_pairs(given, confidence=0.95, draws=10, seed=0)
    low, high = given.limits(0.025)

    def touched(ratio, first, second):
        spread = first**2 + (ratio * second) ** 2 - 2 * 0.3 * ratio * first * second
        return abs(value[0] - ratio * value[1]) - np.sqrt(spread)

    lower = optimize.brentq(touched, 0.1, 0.75, args=(value[0] - low[0], high[1] - value[1]))
    upper = optimize.brentq(touched, 0.75, 2, args=(high[0] - value[0], value[1] - low[1]))
    assert (found.ratio_low[0, 1], found.ratio_high[0, 1]) == pytest.approx((lower, upper), abs=1e-9)
    assert found.drop() == pytest.approx((max(0, 1 - upper), 1 - lower), abs=1e-9)


def test_groups_that_come_together_are_compared_more_sharply():
    values, codes, clusters = correlated()
    rows = codes < 2
    paired = compare(outcome(values[rows]), codes[rows], 2, clusters[rows], **HOW).pairs
    drawn = bootstrap(values[rows], codes[rows], clusters[rows], 2)
    spread = np.ptp(np.quantile(drawn[:, 0] - drawn[:, 1], [0.025, 0.975]))
    assert paired.high[0, 1] - paired.low[0, 1] == pytest.approx(spread, rel=0.15)
    apart = clusters + 100 * codes  # as if the groups had nothing in common
    unpaired = compare(outcome(values[rows]), codes[rows], 2, apart[rows], **HOW).pairs
    assert unpaired.high[0, 1] - unpaired.low[0, 1] > 1.1 * (paired.high[0, 1] - paired.low[0, 1])


def test_limits_of_single_groups_are_wilson_s_or_those_of_their_clusters():
    values, codes, clusters = correlated()
    alone = compare(outcome(values), codes, 3, None, **HOW)
    for group in range(3):
        own = values[codes == group]
        expected = wilson_interval(int(own.sum()), len(own))
        assert (alone.low[group], alone.high[group]) == pytest.approx(expected, abs=1e-12)
    one = compare(outcome(values), np.zeros_like(codes), 1, clusters, **HOW)
    expected = clustered_share_interval(values, clusters, confidence=0.95)
    assert (one.low[0], one.high[0]) == pytest.approx(expected, abs=1e-12)
    assert one.pairs is None
    every = compare(outcome(values), codes, 3, clusters, **HOW)
    assert (every.high - every.low > alone.high - alone.low).all()


def test_small_groups_and_images_without_a_say_take_no_part():
    values, codes, clusters = correlated()
    codes = codes.copy()
    codes[:3] = 3  # three images of one cluster
    codes[-5:] = -1
    counted = np.ones(len(values), dtype=bool)
    counted[10:30] = False
    limits = {**HOW, "min_images": 4}
    assert compare(outcome(values, counted), codes, 5, clusters, **{**HOW, "min_images": 3}).enough.tolist() == [
        0,
        1,
        2,
        3,
    ]
    found = compare(outcome(values, counted), codes, 5, clusters, **limits)
    assert found.images.tolist() == [*(np.sum((codes == g) & counted) for g in range(3)), 3, 0]
    assert found.clusters[3:].tolist() == [1, 0]
    assert found.enough.tolist() == [0, 1, 2] and found.pairs.low.shape == (3, 3)
    assert (found.low[3], found.high[3]) == (0, 1)  # one cluster says nothing of others
    assert np.isnan(found.rates.value[4])
    few = compare(outcome(values, counted), codes, 5, clusters, **{**HOW, "min_clusters": 30})
    assert few.enough.tolist() == [0, 1] and few.clusters[2] < 30
    with pytest.raises(ValueError, match="at least two rates with units"):
        all_pairs(found.rates, confidence=0.95, draws=10, seed=0)


def test_no_right_answer_anywhere_has_no_drop():
    codes = np.repeat([0, 1], 50)
    found = compare(outcome(np.zeros(100)), codes, 2, None, **HOW).pairs
    assert np.isnan(found.drop()).all()
    assert found.gap()[0] == 0 and 0 < found.gap()[1] < 0.1


def test_a_rate_that_may_be_0_bounds_no_ratio():
    given = Rates(np.array([0.0, 0.5]), np.array([30.0, 10]), np.array([np.inf, 0]), np.eye(2))
    found = all_pairs(given, confidence=0.95, draws=10, seed=0)
    assert (found.ratio_low[0, 1], found.ratio_high[0, 1]) == (0, np.inf)  # the other is of one cluster: 0 to 1
    assert np.isnan(found.ratio_low[1, 0]) and found.drop() == (0, 1)


def test_classes_that_are_unlike_are_no_gap_between_groups():
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 2, 2000), rng.integers(0, 2, 2000)
    values = (rng.random(2000) < np.where(labels == 1, 0.9, 0.2)).astype(float)
    found = largest_gap([outcome(values, labels == k) for k in (0, 1)], codes, [0, 1], None, **FEW)
    assert found.gap < found.high < 0.2


def test_the_largest_gap_over_classes_allows_for_all_of_them():
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(-1, 3, 900), rng.integers(0, 4, 900)
    values = (rng.random(900) < np.where((labels == 2) & (codes == 1), 0.3, 0.8)).astype(float)
    outcomes = [outcome(values, labels == label) for label in range(4)]
    found = largest_gap(outcomes, codes, [0, 1, 2], None, **FEW)
    assert (found.outcome, found.worst) == (2, 1)
    shares = [values[(labels == 2) & (codes == group)].mean() for group in range(3)]
    assert found.gap == pytest.approx(max(shares) - min(shares)) and found.low < found.gap < found.high
    single = largest_gap(outcomes[2:3], codes, [0, 1, 2], None, **FEW)
    assert single.gap == found.gap and single.low > found.low  # one class asked is one class allowed for
    pairs = compare(outcomes[2], codes, 3, None, **HOW).pairs
    assert (single.low, single.high) == pytest.approx(pairs.gap(), abs=0.01)
    # Classes without enough images of a group do not count, nor do other groups.
    assert largest_gap(outcomes, codes, [0, 2], None, **FEW).outcome != 2
    few = [outcome(values, (labels == 2) & ((codes != 1) | (np.arange(900) < 10))), outcomes[0]]
    assert largest_gap(few, codes, [0, 1, 2], None, **FEW).outcome == 1
    assert largest_gap(outcomes, codes, [1], None, **FEW) is None
    assert largest_gap(outcomes, codes, [0, 1], None, **{**FEW, "min_images": 500}) is None


@pytest.mark.parametrize("share, icc, clusters", [(0.5, 0.3, 10), (0.9, 0.0, 20), (0.97, 0.3, 20), (0.8, 0.1, 5)])
def test_intervals_of_gaps_hold_the_truth_as_often_as_they_say(share, icc, clusters):
    rng, sets, images = np.random.default_rng(0), 150, 10
    cluster = np.repeat(np.arange(4 * clusters), images)
    codes = cluster // clusters
    truth = np.array([share, share, share, share - 0.1])
    spread = (1 - icc) / icc if icc else None
    held = {"groups": 0.0, "pairs": 0, "gap": 0, "drop": 0}
    for number in range(sets):
        own = truth[np.arange(4 * clusters) // clusters]
        own = own if spread is None else rng.beta(own * spread, (1 - own) * spread)
        values = (rng.random(len(cluster)) < own[cluster]).astype(float)
        found = compare(outcome(values), codes, 4, cluster, **{**HOW, "resamples": 100, "seed": number})
        low, high = found.pairs.gap()
        drop_low, drop_high = found.pairs.drop()
        apart = truth[:, None] - truth
        held["groups"] += ((found.low <= truth) & (truth <= found.high)).mean()
        held["pairs"] += ((found.pairs.low <= apart) & (apart <= found.pairs.high)).all()
        held["gap"] += low <= 0.1 <= high
        held["drop"] += drop_low <= 0.1 / share <= drop_high
    least = stats.binom.ppf(0.001, sets, 0.95)  # of 1,000 such tests one fails by chance
    assert min(held.values()) >= least, held
