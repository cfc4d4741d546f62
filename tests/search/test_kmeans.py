"""k-means against scikit-learn, its assignment, and its starts."""

import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans

from dinov2cli.errors import UserError
from dinov2cli.search.kmeans import Assignment, assign, closest_in_cluster, fit_kmeans, rank_in_group, spread_centroids


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    rng = np.random.default_rng(0)
    means = 4 * rng.normal(size=(12, 10))
    return (means[rng.integers(0, 12, 4000)] + rng.normal(size=(4000, 10))).astype(np.float32)


def test_inertia_is_close_to_scikit_learn(blobs):
    ours = fit_kmeans(blobs, 12, spherical=False, iterations=30, points_per_centroid=1000)
    theirs = SklearnKMeans(12, n_init=1, init="random", random_state=0, max_iter=30).fit(blobs)
    assert ours.sample == 4000
    assert ours.inertia <= 1.15 * theirs.inertia_ / 4000
    # The reported inertia is the mean squared distance, checked by hand.
    distance = ((blobs[:, None] - ours.centroids[None]) ** 2).sum(-1).min(1)
    assert ours.inertia == pytest.approx(distance.mean(), rel=1e-4)


@pytest.mark.parametrize("spherical", [True, False])
def test_assignment_is_the_nearest_centroid(blobs, spherical):
    kmeans = fit_kmeans(blobs, 20, spherical=spherical)
    assignment = assign(blobs, kmeans, block=999)
    x = blobs / np.linalg.norm(blobs, axis=1, keepdims=True) if spherical else blobs
    distance = ((x[:, None].astype(np.float64) - kmeans.centroids[None]) ** 2).sum(-1)
    picked = distance[np.arange(len(x)), assignment.label]
    np.testing.assert_allclose(picked, distance.min(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(assignment.distance, picked, rtol=1e-3, atol=1e-4)
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(kmeans.centroids, axis=1), 1, atol=1e-5)
    assert assignment.sizes(20).sum() == 4000


def test_same_seed_same_clusters_other_seed_others(blobs):
    a, b, c = (fit_kmeans(blobs, 15, seed=s).centroids for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_fit_uses_a_bounded_sample(blobs):
    assert fit_kmeans(blobs, 5, points_per_centroid=50).sample == 250


def test_as_many_clusters_as_rows_and_too_many(blobs):
    x = blobs[:7]
    assert assign(x, fit_kmeans(x, 7, spherical=False)).label.tolist() == list(range(7))
    with pytest.raises(UserError, match="k-means: 8 clusters asked of 7 rows; expected between 1 and"):
        fit_kmeans(x, 8)
    with pytest.raises(UserError, match="0 clusters"):
        fit_kmeans(x, 0)


def test_fewer_distinct_rows_than_clusters_leaves_finite_centroids():
    x = np.repeat(np.eye(3, 6, dtype=np.float32), 20, axis=0)
    kmeans = fit_kmeans(x, 5)
    assert np.isfinite(kmeans.centroids).all()
    assignment = assign(x, kmeans)
    assert len(np.unique(assignment.label)) <= 5


def test_rank_in_group_and_closest():
    assert rank_in_group(np.array([3, 3, 5, 5, 5])).tolist() == [0, 1, 0, 1, 2]
    assert rank_in_group(np.zeros(0, np.int64)).tolist() == []
    label = np.array([1, 0, 1, 1, 0])
    distance = np.array([0.3, 0.2, 0.1, 0.2, 0.2], np.float32)
    assert closest_in_cluster(Assignment(label, distance), 2).tolist() == [1, 2, 3, 4]
    assert closest_in_cluster(Assignment(label, distance), 1).tolist() == [1, 2]


def test_spread_start_reaches_every_blob_and_copes_with_copies():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(5000, 4)), 50 + 30 * np.eye(4)]).astype(np.float32)  # four lonely rows
    start = spread_centroids(x, 64, seed=0)
    assert {tuple(r) for r in x[-4:]} <= {tuple(r) for r in start}
    np.testing.assert_array_equal(start, spread_centroids(x, 64, seed=0))
    copies = np.repeat(np.eye(3, 6, dtype=np.float32), 20, axis=0)
    assert len(np.unique(spread_centroids(copies, 5, seed=0), axis=0)) == 3
    assert len(spread_centroids(copies, 60, seed=0)) == 60
