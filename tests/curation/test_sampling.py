"""Balanced sampling: exact size, even shares, the same for the same seed."""

import numpy as np
import pytest

from dinov2cli.curation.sampling import (
    sample_balanced,
    sample_bounded,
    sample_random,
    sample_tree,
    waterfill,
    waterfill_groups,
)
from dinov2cli.errors import UserError
from dinov2cli.search.hierarchy import Hierarchy, Level, fit_hierarchy
from dinov2cli.search.kmeans import Assignment, KMeans


@pytest.mark.parametrize("seed", range(200))
def test_water_filling_is_exact_and_level(seed):
    draw = np.random.default_rng(seed)
    capacity = draw.integers(0, 50, draw.integers(0, 12)).tolist()
    total = int(draw.integers(0, 400))
    share = waterfill(capacity, total, np.random.default_rng(seed))
    assert share.sum() == min(total, sum(capacity))
    assert (share <= np.array(capacity, dtype=int)).all() and (share >= 0).all()
    room = share < np.array(capacity, dtype=int)
    if room.any():  # a vessel with room left stands at most one below any other
        assert share[room].min() >= share.max() - 1


@pytest.mark.parametrize("seed", range(60))
def test_water_filling_of_many_groups_is_that_of_each(seed):
    draw = np.random.default_rng(seed)
    groups = int(draw.integers(1, 9))
    group = draw.integers(0, groups, draw.integers(0, 40))
    capacity = draw.integers(0, 12, len(group))
    totals = draw.integers(0, 60, groups)
    share = waterfill_groups(capacity, group, totals, np.random.default_rng(seed))
    assert (share <= capacity).all() and (share >= 0).all()
    for one in range(groups):
        mine, room = share[group == one], capacity[group == one]
        assert mine.sum() == min(totals[one], room.sum())
        level = next(v for v in range(61) if np.minimum(room, v + 1).sum() > totals[one] or v == 60)
        assert ((mine == np.minimum(room, level)) | (mine == level + 1)).all()


def test_what_does_not_divide_is_drawn_evenly():
    rng = np.random.default_rng(0)
    shares = [waterfill_groups([9] * 4 + [1, 9], np.array([0] * 4 + [1, 1]), np.array([6, 4]), rng) for _ in range(400)]
    mean = np.mean(shares, axis=0)
    np.testing.assert_allclose(mean[:4], 1.5, atol=0.1)
    assert mean[4:].tolist() == [1, 3]


def uneven(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = [2000, 300, 200, 100]
    label = np.repeat(np.arange(4), sizes)
    return (6 * np.eye(4, 12)[label] + rng.normal(size=(2600, 12))).astype(np.float32), label


def test_sample_is_exact_distinct_and_more_even_than_the_pool(make_pool):
    x, label = uneven(0)
    result = sample_balanced(make_pool(2600), x, 400, levels=[40, 4], resample_steps=2)
    assert result.kept.num_rows == 400 and len(np.unique(result.rows)) == 400
    counts = np.bincount(label[result.rows], minlength=4)
    assert counts.min() >= 60, counts  # a plain random sample would hold 15 of the smallest
    assert result.summary["evenness_after"] > result.summary["evenness_before"] + 0.2
    assert result.dropped.num_rows == 2200 and set(result.dropped["reason"].to_pylist()) == {"not_sampled"}
    assert {"cluster", "cluster_top"} <= set(result.kept.column_names)


def test_seed_decides(make_pool):
    x, _ = uneven(1)
    rows = [sample_balanced(make_pool(2600), x, 100, levels=[30, 5], resample_steps=1, seed=s).rows for s in (3, 3, 4)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


@pytest.mark.parametrize("target", [1, 7, 2599, 2600])
def test_any_size_up_to_the_pool(make_pool, target):
    x, _ = uneven(2)
    assert sample_balanced(make_pool(2600), x, target, levels=[20, 3], resample_steps=1).kept.num_rows == target


def test_closest_takes_rows_nearer_to_their_centroids(make_pool):
    x, _ = uneven(3)
    tree = fit_hierarchy(x, [30, 4], resample_steps=1)
    distance = tree.levels[0].assignment.distance
    near, any_ = (sample_tree(tree, 300, strategy=s) for s in ("closest", "random"))
    assert distance[near].mean() < 0.8 * distance[any_].mean()


def test_impossible_targets_and_strategies(make_pool):
    x, _ = uneven(4)
    for target in (0, 2601):
        with pytest.raises(UserError, match=f"--target-size {target}: the pool holds 2600 images"):
            sample_balanced(make_pool(2600), x, target)
    with pytest.raises(UserError, match="strategy 'nearest': expected one of random, closest"):
        sample_balanced(make_pool(2600), x, 10, strategy="nearest")


@pytest.mark.parametrize("slack", [1.0, 3.0])
def test_bounded_clusters_give_equally_many(make_pool, slack):
    x, _ = uneven(5)
    result = sample_bounded(make_pool(2600), x, 260, clusters=20, slack=slack)
    assert result.kept.num_rows == 260 and len(np.unique(result.rows)) == 260
    assert result.summary["largest_cluster"] <= np.ceil(slack * 2600 / 20)
    counts = np.bincount(result.kept["cluster"].to_pylist(), minlength=20)
    assert counts.max() - counts[counts < 13].min(initial=13) <= 1 if slack == 1 else counts.max() <= 26
    again = sample_bounded(make_pool(2600), x, 260, clusters=20, slack=slack)
    np.testing.assert_array_equal(result.rows, again.rows)
    near = sample_bounded(make_pool(2600), x, 260, clusters=20, slack=slack, strategy="closest")
    assert not np.array_equal(near.rows, result.rows)
    with pytest.raises(UserError, match="--target-size 2601"):
        sample_bounded(make_pool(2600), x, 2601)


def test_a_tree_of_many_clusters_is_sampled_level_by_level():
    """Every cluster's budget is poured over its own children: checked cluster by cluster, for every level."""
    rng = np.random.default_rng(0)
    parents = [rng.integers(0, 40, 400), rng.integers(0, 5, 40)]
    label = rng.integers(0, 400, 6000)
    centroids = [KMeans(np.eye(k, 4, dtype=np.float32), True, 0.0, 0) for k in (400, 40, 5)]
    assigned = [Assignment(each, rng.random(len(each)).astype(np.float32)) for each in (label, *parents)]
    tree = Hierarchy([Level(k, a) for k, a in zip(centroids, assigned, strict=True)])
    rows = sample_tree(tree, 1500, seed=1)
    labels = tree.labels()
    taken = [np.bincount(each[rows], minlength=k) for each, k in zip(labels, (400, 40, 5), strict=True)]
    sizes = [np.bincount(each, minlength=k) for each, k in zip(labels, (400, 40, 5), strict=True)]
    assert taken[2].sum() == 1500
    for child, parent in ((0, 1), (1, 2)):
        for cluster in range(len(taken[parent])):
            mine = parents[child] == cluster
            room = taken[child][mine] < sizes[child][mine]
            if room.any():
                assert taken[child][mine][room].min() >= taken[child][mine].max() - 1


def test_a_random_draw_is_exact_and_favours_no_row(make_pool):
    pool = make_pool(40)
    draws = [sample_random(pool, 10, seed=seed).rows for seed in range(800)]
    assert all(len(set(rows.tolist())) == 10 and (np.diff(rows) > 0).all() for rows in draws)
    count = np.bincount(np.concatenate(draws), minlength=40)
    # Each row is in a quarter of the draws: binomial with mean 200 and deviation 12.2.
    assert abs(count - 200).max() < 5 * 12.2
    again = sample_random(pool, 10, seed=3)
    np.testing.assert_array_equal(again.rows, draws[3])
    assert again.kept.num_rows == 10 and again.dropped.num_rows == 30
    with pytest.raises(UserError, match="the pool holds 40 images"):
        sample_random(pool, 41)
