"""Retrieval from query sets: which images, how many, and where they came from."""

import numpy as np
import pytest

from dinov2cli.curation.retrieval import QuerySet, default_clusters, retrieve_clusters, retrieve_samples
from dinov2cli.errors import UserError
from dinov2cli.search.kmeans import KMeans


def queries(name: str, vectors: np.ndarray) -> QuerySet:
    return QuerySet(name, vectors, [f"{name}-{i}" for i in range(len(vectors))])


def test_union_of_the_k_nearest_of_every_query(make_pool, random_vectors):
    x, a, b = random_vectors(500), random_vectors(20, 1), random_vectors(5, 2)
    result = retrieve_samples(make_pool(500), x, [queries("a", a), queries("b", b)], k=6)
    similarity = np.concatenate([a, b]) @ x.T
    nearest = np.argsort(-similarity, axis=1)[:, :6]
    np.testing.assert_array_equal(result.rows, np.unique(nearest))
    assert result.hits.num_rows == 25 * 6
    hit = {(h["query_id"], h["rank"]): h for h in result.hits.to_pylist()}
    for q, name in [(0, "a-0"), (19, "a-19"), (22, "b-2")]:
        for rank in range(6):
            assert hit[(name, rank + 1)]["row"] == nearest[q, rank]
            assert hit[(name, rank + 1)]["similarity"] == pytest.approx(similarity[q, nearest[q, rank]], abs=1e-5)
    for row in result.kept.to_pylist():
        mine = [h for h in result.hits.to_pylist() if h["id"] == row["id"]]
        assert row["query_hits"] == len(mine) and row["query_rank"] == min(h["rank"] for h in mine)
        assert (row["query_source"], row["query_id"]) in {(h["query_source"], h["query_id"]) for h in mine}
    assert result.kept.num_rows + result.dropped.num_rows == 500
    assert set(result.dropped["reason"].to_pylist()) == {"not_retrieved"}


@pytest.mark.parametrize("target", [1, 37, 120, 300])
def test_target_size_is_met_exactly_and_by_rank(make_pool, random_vectors, target):
    x, q = random_vectors(300), random_vectors(15, 1)
    result = retrieve_samples(make_pool(300), x, [queries("q", q)], k=2, target_size=target)
    assert result.kept.num_rows == target
    if target == 37:  # no query's next neighbour is taken before all have got theirs
        worst = max(result.kept["query_rank"].to_pylist())
        best = np.argsort(-(q @ x.T), axis=1)[:, : worst - 1]
        assert set(best.ravel()) <= set(result.rows)
    again = retrieve_samples(make_pool(300), x, [queries("q", q)], k=2, target_size=target)
    np.testing.assert_array_equal(result.rows, again.rows)


def clustered(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, KMeans]:
    """Pool in tight clusters around known centroids."""
    rng = np.random.default_rng(seed)
    centres = np.eye(len(sizes), 16, dtype=np.float32)
    label = np.repeat(np.arange(len(sizes)), sizes)
    x = centres[label] + 0.05 * rng.normal(size=(len(label), 16)).astype(np.float32)
    return x, label, KMeans(centres, True, 0.0, 0)


def test_clusters_with_more_than_three_queries_give_up_to_m(make_pool):
    x, label, kmeans = clustered([100, 40, 60, 30])
    q = np.eye(4, 16, dtype=np.float32)[[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]]  # 4, 3, 5, 0 per cluster
    result = retrieve_clusters(make_pool(230), x, [queries("q", q)], per_cluster=50, kmeans=kmeans)
    assert np.bincount(label[result.rows], minlength=4).tolist() == [50, 0, 50, 0]
    assert result.kept["cluster"].to_pylist() == label[result.rows].tolist()
    assert dict(zip(result.kept["cluster"].to_pylist(), result.kept["query_count"].to_pylist(), strict=True)) == {
        0: 4,
        2: 5,
    }
    assert result.summary["clusters_used"] == {"q": 2} and result.summary["per_set"] == {"q": 100}


def test_cap_per_set_and_target_are_exact_and_even(make_pool):
    x, label, kmeans = clustered([100, 10, 60, 30])
    a = queries("a", np.repeat(np.eye(3, 16, dtype=np.float32), 4, axis=0))
    b = queries("b", np.repeat(np.eye(4, 16, dtype=np.float32)[3:], 4, axis=0))
    result = retrieve_clusters(make_pool(200), x, [a, b], per_set=50, kmeans=kmeans)
    assert np.bincount(label[result.rows], minlength=4).tolist() == [20, 10, 20, 30]
    assert result.summary["per_set"] == {"a": 50, "b": 30}
    assert set(result.kept["query_source"].to_pylist()) == {"a", "b"}
    small = retrieve_clusters(make_pool(200), x, [a, b], per_set=50, target_size=40, kmeans=kmeans)
    assert np.bincount(label[small.rows], minlength=4).tolist() == [10, 10, 10, 10]


def test_sets_meeting_in_a_cluster_share_its_images(make_pool):
    x, _, kmeans = clustered([100, 100])
    q = np.repeat(np.eye(1, 16, dtype=np.float32), 5, axis=0)
    result = retrieve_clusters(make_pool(200), x, [queries("a", q), queries("b", q)], per_cluster=30, kmeans=kmeans)
    assert result.kept.num_rows == 30 and set(result.kept["query_source"].to_pylist()) == {"a;b"}


def test_own_clusters_are_deterministic_by_seed(make_pool):
    x, label, _ = clustered([300, 300, 300])
    q = queries("q", x[label == 1][:20])
    results = [retrieve_clusters(make_pool(900), x, [q], clusters=6, per_cluster=40, seed=s).rows for s in (1, 1, 2)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert (label[results[0]] == 1).all()
    assert default_clusters(10) == 1 and default_clusters(6400) == 100 and default_clusters(10**9) == 100_000


def test_errors_say_what_to_do(make_pool, random_vectors):
    x = random_vectors(100)
    with pytest.raises(UserError, match="retrieval: no query set; give --query"):
        retrieve_samples(make_pool(100), x, [])
    with pytest.raises(UserError, match="query set q: found 3 vectors for 2 ids"):
        retrieve_samples(make_pool(100), x, [QuerySet("q", x[:3], ["a", "b"])])
    with pytest.raises(UserError, match="--target-size 101: the pool holds 100 images"):
        retrieve_samples(make_pool(100), x, [queries("q", x[:3])], target_size=101)
    with pytest.raises(UserError, match=r"no cluster holds more than 3 images of a query set \(at most \d of 20"):
        retrieve_clusters(make_pool(100), x, [queries("q", x[:3])], clusters=20)
