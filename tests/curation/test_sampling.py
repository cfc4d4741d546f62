"""Balanced sampling: exact size, even shares, the same for the same seed."""

import numpy as np
import pytest

from dinov2cli.curation.sampling import sample_balanced, sample_tree, waterfill
from dinov2cli.errors import UserError
from dinov2cli.search.hierarchy import fit_hierarchy


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
