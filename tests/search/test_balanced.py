"""Clusters of bounded size: capacities, and inertia beside the optimal assignment."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dinov2cli.errors import InputError, UserError
from dinov2cli.search.balanced import balanced_assign, fit_balanced
from dinov2cli.search.kmeans import KMeans, assign, fit_kmeans


def uneven(seed: int, rows: int = 1200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(6, 5))
    label = rng.choice(6, rows, p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02])
    return (means[label] + rng.normal(size=(rows, 5))).astype(np.float32)


@pytest.mark.parametrize("seed", range(12))
def test_no_cluster_exceeds_its_capacity_and_every_row_has_one(seed):
    rng = np.random.default_rng(seed)
    x = uneven(seed, int(rng.integers(30, 600)))
    k = int(rng.integers(2, 25))
    kmeans = fit_kmeans(x, k, spherical=bool(seed % 2), iterations=5)
    capacity = int(np.ceil(len(x) / k * rng.choice([1.0, 1.1, 2.0])))
    found = balanced_assign(x, kmeans, capacity, candidates=int(rng.integers(1, 9)))
    assert found.sizes(k).max() <= capacity and found.sizes(k).sum() == len(x)
    y = x / np.linalg.norm(x, axis=1, keepdims=True) if kmeans.spherical else x
    np.testing.assert_allclose(found.distance, ((y - kmeans.centroids[found.label]) ** 2).sum(1), atol=1e-3, rtol=1e-3)


def test_room_for_all_gives_the_plain_assignment():
    x = uneven(1)
    kmeans = fit_kmeans(x, 10, spherical=False)
    plain = assign(x, kmeans)
    found = balanced_assign(x, kmeans, int(plain.sizes(10).max()))
    np.testing.assert_array_equal(found.label, plain.label)


@pytest.mark.parametrize("seed", range(4))
def test_total_distance_is_near_the_optimum(seed):
    x = uneven(seed, 300)
    kmeans = fit_kmeans(x, 10, spherical=False)
    found = balanced_assign(x, kmeans, 30)
    cost = ((x[:, None].astype(np.float64) - kmeans.centroids[None]) ** 2).sum(-1)
    rows, seats = linear_sum_assignment(np.repeat(cost, 30, axis=1))
    best = cost[rows, seats // 30].sum()
    assert best * 0.9999 <= found.distance.sum() < 1.01 * best
    # Lists of the nearest four cannot know what lies beyond them.
    assert balanced_assign(x, kmeans, 30, candidates=4).distance.sum() < 2 * best


def test_fitting_moves_centroids_to_their_share():
    x = uneven(5)
    plain = fit_kmeans(x, 12, spherical=False)
    kmeans, found = fit_balanced(x, 12, spherical=False)
    assert found.sizes(12).tolist() == [100] * 12
    assert kmeans.inertia == pytest.approx(found.distance.mean(), rel=1e-4)
    assert kmeans.inertia < balanced_assign(x, plain, 100).distance.mean()
    loose = fit_balanced(x, 12, spherical=False, slack=1.5)
    assert loose[1].sizes(12).max() <= 150 and loose[0].inertia < kmeans.inertia
    again = fit_balanced(x, 12, spherical=False)[1]
    np.testing.assert_array_equal(found.label, again.label)


def test_bad_input_is_named():
    x = uneven(0, 100)
    kmeans = fit_kmeans(x, 4)
    with pytest.raises(UserError, match="4 clusters of at most 20 rows hold 80, found 100 rows; expected a capacity"):
        balanced_assign(x, kmeans, 20)
    with pytest.raises(UserError, match=r"slack 0\.5; expected 1"):
        fit_balanced(x, 4, slack=0.5)
    x[7] = np.nan
    with pytest.raises(InputError, match="row 7 holds NaN"):
        balanced_assign(x, kmeans, 30)


def test_identical_rows_share_the_clusters():
    x = np.ones((90, 3), np.float32)
    kmeans = KMeans(np.eye(3, dtype=np.float32), True, 0.0, 0)
    assert balanced_assign(x, kmeans, 30).sizes(3).tolist() == [30, 30, 30]
    assert len(balanced_assign(x[:0], kmeans, 1).label) == 0


def test_rows_that_are_all_alike_are_placed_all_the_same():
    """Nearest centroids that are all equally far must not stop the auction."""
    x = np.random.default_rng(0).standard_normal((1500, 8)).astype(np.float32)
    x[:1400] = x[0]
    kmeans, found = fit_balanced(x, 60, slack=1.0, rounds=1, iterations=3)
    assert found.sizes(kmeans.k).max() <= 25
    assert (found.label >= 0).all()
