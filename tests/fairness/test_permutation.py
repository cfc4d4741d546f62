import itertools

import numpy as np
import pytest
from scipy import stats

from dinov2cli.fairness import permutation
from dinov2cli.fairness.permutation import holm, permutation_test, scheme

MANY = 20_000


def test_two_groups_of_images_are_scipys_permutation_test():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.random(40) < 0.6, rng.random(25) < 0.85]).astype(float)
    groups = np.repeat([0, 1], [40, 25])
    expected = stats.permutation_test(
        (values[:40], values[40:]),
        lambda a, b: abs(a.mean() - b.mean()),
        n_resamples=MANY,
        alternative="greater",
        rng=1,
    ).pvalue
    found = permutation_test(values, groups, None, permutations=MANY, seed=0)
    assert found.scheme == "images"
    assert found.gap == pytest.approx(expected, abs=0.012)
    assert found.groups == pytest.approx([found.gap] * 2)  # with two groups the others are the other
    # By hypergeometric counts: as likely or less a split of the successes.
    total = int(values.sum())
    splits = np.arange(max(0, total - 25), min(40, total) + 1)
    apart = np.abs(splits / 40 - (total - splits) / 25)
    chance = stats.hypergeom.pmf(splits, 65, total, 40)
    here = abs(values[:40].mean() - values[40:].mean())
    assert found.gap == pytest.approx(chance[apart >= here - 1e-12].sum(), abs=0.012)


def every_order(values, groups, statistic):
    """p-value of a statistic by all distinct orders of the values."""
    found = statistic(values, groups)
    reached = [statistic(np.array(order), groups) >= found - 1e-9 for order in itertools.permutations(values)]
    return np.mean(reached)


def largest_pair(values, groups):
    """Largest squared difference over its variance with the variance of all values in each group."""
    found = 0.0
    for one, other in itertools.combinations(np.unique(groups), 2):
        a, b = values[groups == one], values[groups == other]
        found = max(found, (a.mean() - b.mean()) ** 2 / (1 / len(a) + 1 / len(b)))
    return found


def largest_rest(values, groups):
    return max(largest_pair(values, (groups == one).astype(int)) for one in np.unique(groups))


def test_three_groups_are_all_orders_of_a_tiny_set():
    values, groups = np.array([1.0, 1, 1, 1, 0, 0, 1, 0]), np.array([0, 0, 0, 1, 1, 2, 2, 2])
    found = permutation_test(values, groups, None, permutations=MANY, seed=0)
    assert found.gap == pytest.approx(every_order(values, groups, largest_pair), abs=0.012)
    assert found.groups.min() == pytest.approx(every_order(values, groups, largest_rest), abs=0.012)


@pytest.mark.parametrize("levels", [4, 100])
def test_values_between_are_dealt_out_like_any_others(levels):
    # Both ways of shuffling are the same test: the statistic is standardised by the groups' own variances.
    rng = np.random.default_rng(levels)
    values = np.round(rng.random(50) * levels) / levels
    groups = rng.integers(0, 3, 50)
    values[groups == 1] = np.minimum(values[groups == 1] + 0.2, 1)

    def largest(shuffled):
        sums = [(shuffled[groups == g].mean(), shuffled[groups == g], (groups == g).sum()) for g in range(3)]
        common = values.var()
        variance = [(((own - mean) ** 2).sum() * n / n**2 + 5 * common / n) / (n - 1 + 5) for mean, own, n in sums]
        pairs = itertools.combinations(range(3), 2)
        return max((sums[i][0] - sums[j][0]) ** 2 / (variance[i] + variance[j]) for i, j in pairs)

    here, drawn = largest(values), [largest(rng.permutation(values)) for _ in range(4000)]
    found = permutation_test(values, groups, None, permutations=8000, seed=0)
    assert found.gap == pytest.approx(np.mean(np.array(drawn) >= here - 1e-12), abs=0.02)


def test_whole_clusters_are_dealt_out_when_the_group_is_the_cluster_s():
    rng = np.random.default_rng(29)  # of 60 the one where every part of the variance matters to p
    sizes = np.array([2, 30, 3, 25, 2, 4, 3])
    clusters = np.repeat(np.arange(7), sizes)
    groups = (clusters >= 3).astype(int)
    values = (rng.random(len(clusters)) < rng.beta(2, 1, 7)[clusters]).astype(float)
    assert scheme(groups, clusters) == "clusters"

    def largest(owner):  # owner [7]: group of each cluster
        shares, variances = [], []
        share = values.mean()
        residuals = [(values[clusters == c] - share).sum() ** 2 for c in range(7)]
        whole, squares = values.var(), (sizes**2).sum()
        between = np.clip((sum(residuals) - whole * len(values)) / (squares - len(values)), 0, whole)
        for group in (0, 1):
            own = [values[clusters == c] for c in np.flatnonzero(owner == group)]
            n, count = sum(map(len, own)), len(own)
            shares.append(np.concatenate(own).mean())
            common = ((whole - between) * n + between * sum(len(one) ** 2 for one in own)) / n**2
            variance = sum((one - shares[-1]).sum() ** 2 for one in own) * count / n**2
            variances.append((variance + 5 * common) / (count - 1 + 5))
        return (shares[0] - shares[1]) ** 2 / sum(variances)

    orders = [np.array([0 if c in chosen else 1 for c in range(7)]) for chosen in itertools.combinations(range(7), 3)]
    statistics = np.array([largest(owner) for owner in orders])
    expected = np.mean(statistics >= largest(np.repeat([0, 1], [3, 4])) - 1e-12)
    found = permutation_test(values, groups, clusters, permutations=MANY, seed=0)
    assert found.scheme == "clusters"
    assert found.gap == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("levels", [2, 40])
def test_outcomes_are_shuffled_within_clusters_when_the_group_varies_there(levels, monkeypatch):
    rng = np.random.default_rng(levels)
    clusters = np.repeat([5, 2, 9], [6, 8, 5])
    groups = np.array([0, 1, 1, 0, 1, 0] + [0, 1] * 4 + [1, 0, 0, 1, 1])
    values = np.round(rng.random(19) * (levels - 1)) / (levels - 1)
    assert scheme(groups, clusters) == "within"
    drawn = np.empty(5000)
    for row in range(5000):
        shuffled = values.copy()
        for cluster in np.unique(clusters):
            shuffled[clusters == cluster] = rng.permutation(values[clusters == cluster])
        drawn[row] = shuffled[groups == 0].mean() - shuffled[groups == 1].mean()
    here = values[groups == 0].mean() - values[groups == 1].mean()
    monkeypatch.setattr(permutation, "_PER_CHUNK", 1000)  # in many pieces
    found = permutation_test(values, groups, clusters, permutations=5000, seed=0)
    assert found.gap == pytest.approx(np.mean(np.abs(drawn) >= abs(here) - 1e-12), abs=0.03)


def test_clusters_of_one_group_may_be_larger():
    # Labels shuffled over clusters, every image counting alike, would make 26 in 100 of such sets a finding.
    rng, alarms = np.random.default_rng(0), 0
    cluster = np.repeat(np.arange(60), np.where(np.arange(60) < 30, 2, 20))
    for number in range(200):
        values = (rng.random(len(cluster)) < 0.7).astype(float)
        alarms += permutation_test(values, (cluster >= 30) * 1, cluster, permutations=200, seed=number).gap <= 0.05
    assert alarms <= stats.binom.ppf(0.999, 200, 0.05)


def test_differences_between_clusters_are_no_evidence_within_them():
    clusters = np.repeat(np.arange(40), 10)
    groups = np.tile([0, 1], 200)
    groups[(clusters < 20) & (np.arange(400) % 10 < 8)] = 0  # mostly one group in the first half
    values = (clusters < 20).astype(float)
    assert permutation_test(values, groups, clusters, permutations=500, seed=0).gap == 1.0
    assert permutation_test(values, groups, None, permutations=500, seed=0).gap == 1 / 501


def test_p_values_are_never_0_and_decided_by_the_seed():
    values, groups = np.repeat([1.0, 0.0], 50), np.repeat([0, 1], 50)
    assert permutation_test(values, groups, None, permutations=999, seed=0).gap == 0.001
    values = (np.random.default_rng(0).random(100) < 0.5).astype(float)
    first = permutation_test(values, groups, None, permutations=200, seed=3)
    assert permutation_test(values, groups, None, permutations=200, seed=3).gap == first.gap
    assert permutation_test(values, groups, None, permutations=200, seed=4).gap != first.gap


def test_schemes():
    owner = np.repeat(np.arange(10), 10)
    assert scheme(owner % 2, None) == "images"
    assert scheme(np.arange(10) % 2, np.arange(10)[::-1]) == "images"  # every image its own
    assert scheme(owner % 2, owner) == "clusters"
    groups = owner % 2
    groups[0] = 1  # one cluster of ten is mixed: 90 % of the images are in clusters of one group
    assert scheme(groups, owner) == "within"
    twenty = np.repeat(np.arange(20), 10)
    groups = twenty % 2
    groups[0] = 1
    assert scheme(groups, twenty) == "clusters"


def test_holm_is_its_definition():
    p_values = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    assert holm(p_values) == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert np.isnan(holm([np.nan])).all() and holm([]).shape == (0,)
    assert holm([0.7, 0.6]).tolist() == [1.0, 1.0]
