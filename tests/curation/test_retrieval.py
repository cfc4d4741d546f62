"""Retrieval for query sets: which images, how many, within which budget, and where they came from."""

import numpy as np
import pytest

from dinov2cli.curation.query_sets import QuerySet, default_clusters, distinct_names
from dinov2cli.curation.retrieval import retrieve
from dinov2cli.curation.retrieval_tables import table_cells, table_lines
from dinov2cli.errors import InputError, UserError
from dinov2cli.search.kmeans import KMeans


def queries(name: str, vectors: np.ndarray, **budget) -> QuerySet:
    return QuerySet(name, vectors, [f"{name}-{i}" for i in range(len(vectors))], **budget)


def clustered(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, KMeans]:
    """Pool in tight clusters around known centroids."""
    rng = np.random.default_rng(seed)
    centres = np.eye(len(sizes), 16, dtype=np.float32)
    label = np.repeat(np.arange(len(sizes)), sizes)
    x = centres[label] + 0.05 * rng.normal(size=(len(label), 16)).astype(np.float32)
    return x, label, KMeans(centres, True, 0.0, 0)


def at_home(name: str, counts: list[int], **budget) -> QuerySet:
    """A cluster-based set with so many images exactly on each centroid."""
    return queries(name, np.repeat(np.eye(len(counts), 16, dtype=np.float32), counts, axis=0), mode="cluster", **budget)


def test_union_of_the_k_nearest_of_every_query_of_every_set(make_pool, random_vectors):
    x, a, b = random_vectors(500), random_vectors(20, 1), random_vectors(5, 2)
    result = retrieve(make_pool(500), x, [queries("a", a, k=6), queries("b", b, k=17)])
    similarity = np.concatenate([a, b]).astype(np.float64) @ x.T.astype(np.float64)
    nearest = np.argsort(-similarity, axis=1)
    wanted = [np.unique(nearest[:20, :6]), np.unique(nearest[20:, :17])]
    np.testing.assert_array_equal(result.rows, np.union1d(*wanted))
    table = {row["dataset"]: row for row in result.summary["table"]}
    assert [table[n]["retrieved"] for n in "ab"] == [table[n]["final"] for n in "ab"] == [len(w) for w in wanted]
    both = np.intersect1d(*wanted)
    assert len(both) and result.summary["overlap"] == [{"sets": ["a", "b"], "images": len(both)}]
    assert [table[n]["only"] for n in "ab"] == [len(w) - len(both) for w in wanted]
    assert [table[n]["pairs"] for n in "ab"] == [120, 85]
    hit = {(h["query_id"], h["rank"]): h for h in result.hits.to_pylist()}
    assert len(hit) == result.hits.num_rows == 20 * 6 + 5 * 17
    for q, name, k in [(0, "a-0", 6), (19, "a-19", 6), (22, "b-2", 17)]:
        for rank in range(k):
            assert hit[(name, rank + 1)]["row"] == nearest[q, rank]
            assert hit[(name, rank + 1)]["similarity"] == pytest.approx(similarity[q, nearest[q, rank]], abs=1e-5)
    for row in result.kept.to_pylist():
        mine = [h for h in result.hits.to_pylist() if h["id"] == row["id"]]
        best = min(mine, key=lambda h: (h["rank"], -h["similarity"]))
        assert row["query_hits"] == len(mine) and row["query_rank"] == best["rank"]
        assert (row["query_best"], row["query_id"]) == (best["query_source"], best["query_id"])
        assert row["query_source"] == ";".join(sorted({h["query_source"] for h in mine}))
    assert result.kept.num_rows + result.dropped.num_rows == 500
    assert set(result.dropped["reason"].to_pylist()) == {"not_retrieved"}


def test_a_limit_of_a_sample_set_keeps_its_best_ranked(make_pool, random_vectors):
    x, a = random_vectors(400), random_vectors(10, 1)
    limited = retrieve(make_pool(400), x, [queries("a", a, k=8, per_set=25), queries("b", a[:2], k=2)])
    similarity = a @ x.T
    nearest = np.argsort(-similarity, axis=1)[:, :8]
    best = {}
    for q in range(10):
        for rank in range(8):
            row = int(nearest[q, rank])
            best[row] = min(best.get(row, (9, 0.0)), (rank, -float(similarity[q, row])))
    first = sorted(best, key=lambda row: (*best[row], row))[:25]
    np.testing.assert_array_equal(limited.rows, np.union1d(first, nearest[:2, :2]))
    entry = limited.summary["table"][0]
    assert (entry["retrieved"], entry["final"]) == (len(best), 25)
    hits = [h for h in limited.hits.to_pylist() if h["query_source"] == "a"]
    assert {h["row"] for h in hits} == set(first)  # what the limit cut off is no longer this set's


@pytest.mark.parametrize("target", [1, 37, 120, 300])
def test_target_size_is_met_exactly_and_by_rank(make_pool, random_vectors, target):
    x, q = random_vectors(300), random_vectors(15, 1)
    result = retrieve(make_pool(300), x, [queries("q", q, k=2)], target_size=target)
    assert result.kept.num_rows == target
    if target == 37:  # no query's next neighbour is taken before all have got theirs
        worst = max(result.kept["query_rank"].to_pylist())
        best = np.argsort(-(q @ x.T), axis=1)[:, : worst - 1]
        assert set(best.ravel()) <= set(result.rows)
    again = retrieve(make_pool(300), x, [queries("q", q, k=2)], target_size=target)
    np.testing.assert_array_equal(result.rows, again.rows)


def test_a_target_shrinks_sets_in_proportion(make_pool, random_vectors):
    x = random_vectors(3000)
    few, many = random_vectors(10, 1), random_vectors(100, 2)
    whole = retrieve(make_pool(3000), x, [queries("few", few, k=4), queries("many", many, k=8)])
    half = retrieve(make_pool(3000), x, [queries("few", few, k=4), queries("many", many, k=8)], target_size=400)
    assert half.kept.num_rows == 400 < whole.kept.num_rows
    share = [half.summary["per_set"][n] / whole.summary["per_set"][n] for n in ("few", "many")]
    assert share[0] == pytest.approx(share[1], abs=0.12)  # images of both sets count for each


def test_clusters_with_more_than_three_queries_give_up_to_m(make_pool):
    x, label, kmeans = clustered([100, 40, 60, 30])
    result = retrieve(make_pool(230), x, [at_home("q", [4, 3, 5, 0], per_cluster=50)], kmeans=kmeans)
    assert np.bincount(label[result.rows], minlength=4).tolist() == [50, 0, 50, 0]
    assert result.kept["cluster"].to_pylist() == label[result.rows].tolist()
    pairs = zip(result.kept["cluster"].to_pylist(), result.kept["query_count"].to_pylist(), strict=True)
    assert dict(pairs) == {0: 4, 2: 5}
    assert result.summary["table"][0]["settings"]["clusters_used"] == 2 and result.summary["per_set"] == {"q": 100}
    assert result.hits.num_rows == 100 and set(result.hits["query_count"].to_pylist()) == {4, 5}


def test_cap_per_set_and_target_are_exact_and_even(make_pool):
    x, label, kmeans = clustered([100, 10, 60, 30])
    a, b = at_home("a", [4, 4, 4, 0], per_set=50), at_home("b", [0, 0, 0, 4], per_set=50)
    result = retrieve(make_pool(200), x, [a, b], kmeans=kmeans)
    assert np.bincount(label[result.rows], minlength=4).tolist() == [20, 10, 20, 30]
    assert result.summary["per_set"] == {"a": 50, "b": 30}
    assert result.summary["table"][0]["retrieved"] == 170
    assert set(result.kept["query_source"].to_pylist()) == {"a", "b"}
    small = retrieve(make_pool(200), x, [a, b], target_size=40, kmeans=kmeans)
    assert small.kept.num_rows == 40
    assert np.bincount(label[small.rows], minlength=4)[:3].tolist() in ([9, 8, 8], [8, 9, 8], [8, 8, 9])


def test_each_cluster_set_has_limits_of_its_own(make_pool):
    x, label, kmeans = clustered([100, 100])
    a, b = at_home("a", [5, 0], per_cluster=30, more_than=4), at_home("b", [0, 5], per_cluster=7, more_than=0)
    result = retrieve(make_pool(200), x, [a, b], kmeans=kmeans)
    assert np.bincount(label[result.rows]).tolist() == [30, 7]


def test_sets_meeting_in_a_cluster_share_its_images(make_pool):
    x, _, kmeans = clustered([100, 100])
    result = retrieve(make_pool(200), x, [at_home(n, [5, 0], per_cluster=30) for n in "ab"], kmeans=kmeans)
    assert result.kept.num_rows == 30 and set(result.kept["query_source"].to_pylist()) == {"a;b"}


def test_sample_and_cluster_sets_in_one_run(make_pool):
    x, label, kmeans = clustered([100, 80, 60])
    near = queries("near", x[label == 2][:3], k=5)
    home = at_home("home", [6, 0, 0], per_cluster=20)
    result = retrieve(make_pool(240), x, [near, home], kmeans=kmeans)
    alone = [retrieve(make_pool(240), x, [each], kmeans=kmeans).rows for each in (near, home)]
    np.testing.assert_array_equal(result.rows, np.union1d(*alone))
    assert result.summary["mode"] == "sample+cluster"
    by_source = {row["query_source"]: row for row in result.kept.to_pylist()}
    assert by_source["home"]["query_rank"] is None and by_source["home"]["query_hits"] == 0
    assert by_source["near"]["query_count"] == 0 and by_source["near"]["query_best"] == "near"
    cells = table_cells(result.summary)
    assert cells[1][2] == "sample: neighbours 5" and cells[2][2].startswith("cluster: more than 3, per cluster 20")
    assert cells[-1] == ["all, each image once", "9", "", "", str(len(result.rows)), ""]
    assert len({len(line) for line in table_lines(result.summary)}) == 1
    target = retrieve(make_pool(240), x, [near, home], kmeans=kmeans, target_size=60)
    assert target.kept.num_rows == 60  # the sample set asks for more neighbours until there are so many
    assert target.summary["table"][0]["settings"]["neighbours"] > 5


def test_own_clusters_are_deterministic_by_seed(make_pool):
    x, label, _ = clustered([300, 300, 300])
    q = queries("q", x[label == 1][:20], mode="cluster", per_cluster=40)
    results = [retrieve(make_pool(900), x, [q], clusters=6, seed=s).rows for s in (1, 1, 2)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert (label[results[0]] == 1).all()
    assert default_clusters(10) == 1 and default_clusters(6400) == 100 and default_clusters(10**9) == 100_000


def test_identical_images_are_ordinary_images(make_pool, random_vectors):
    x = np.repeat(random_vectors(1), 200, axis=0)
    sample = retrieve(make_pool(200), x, [queries("q", x[:2], k=5)])
    np.testing.assert_array_equal(sample.rows, np.arange(5))  # equal ones in the order of their rows
    home = retrieve(make_pool(200), x, [queries("q", x[:5], mode="cluster", per_cluster=9)], clusters=3)
    assert home.kept.num_rows == 9


def test_a_set_at_home_nowhere_is_said_beside_others(make_pool, random_vectors):
    x, label, kmeans = clustered([100, 80, 60])
    result = retrieve(
        make_pool(240), x, [at_home("small", [1, 1, 1]), at_home("home", [6, 0, 0], per_cluster=20)], kmeans=kmeans
    )
    assert result.summary["per_set"] == {"small": 0, "home": 20} and (label[result.rows] == 0).all()
    assert any("no cluster holds more than 3 images of query set small (at most 1 in" in m for m in result.messages)


def test_errors_say_what_to_do(make_pool, random_vectors):
    x = random_vectors(100)
    pool = make_pool(100)
    with pytest.raises(UserError, match="retrieval: no query set; give --query"):
        retrieve(pool, x, [])
    with pytest.raises(UserError, match="query set q: found 3 vectors for 2 ids"):
        retrieve(pool, x, [QuerySet("q", x[:3], ["a", "b"])])
    with pytest.raises(UserError, match="query set q: found 0 vectors for 0 ids; expected as many, at least 1"):
        retrieve(pool, x, [queries("q", x[:0])])
    with pytest.raises(InputError, match="query set q: its vectors have 32 dimensions, the pool's 64"):
        retrieve(pool, x, [queries("q", x[:3, :32])])
    with pytest.raises(UserError, match="--target-size 101: the pool holds 100 images"):
        retrieve(pool, x, [queries("q", x[:3])], target_size=101)
    with pytest.raises(UserError, match=r"holds more than 3 images of query set q \(at most \d in any of 20"):
        retrieve(pool, x, [queries("q", x[:3], mode="cluster")], clusters=20)
    centres = KMeans(np.stack([x[0], -x[0]]), True, 0.0, 0)
    with pytest.raises(UserError, match="are at home hold no image of the pool; use fewer clusters"):
        retrieve(make_pool(5), np.repeat(x[:1], 5, 0), [queries("q", -x[[0] * 5], mode="cluster")], kmeans=centres)
    with pytest.raises(UserError, match="query set q: mode 'nearest'"):
        retrieve(pool, x, [queries("q", x[:3], mode="nearest")])
    with pytest.raises(InputError, match="row 1 holds NaN"):
        retrieve(pool, x, [queries("q", np.where(np.arange(3)[:, None] == 1, np.nan, x[:3]))])


def test_names_given_twice_are_told_apart():
    assert distinct_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


class Kept:
    """Finished blocks in memory; `loads` counts those that were found again."""

    def __init__(self) -> None:
        self.blocks: dict = {}
        self.loads = 0

    def stage(self, name, key):
        store = self

        class Stage:
            def load(self, start):
                found = store.blocks.get((name, str(key), start))
                store.loads += found is not None
                return found

            def save(self, start, arrays):
                store.blocks[(name, str(key), start)] = {k: np.array(v) for k, v in arrays.items()}

        return Stage()


def test_finished_blocks_of_equally_large_sets_are_not_mixed_up(make_pool, random_vectors):
    x, label, kmeans = clustered([100, 80, 60])
    near = [queries(n, x[label == c][:3], k=5) for n, c in (("a", 0), ("b", 2))]
    home = [at_home(n, counts, per_cluster=20) for n, counts in (("c", [6, 0, 0]), ("d", [0, 6, 0]))]
    store = Kept()
    plain = retrieve(make_pool(240), x, [*near, *home], kmeans=kmeans)
    for turn in (0, 1):
        again = retrieve(make_pool(240), x, [*near, *home], kmeans=kmeans, store=store)
        assert again.kept.equals(plain.kept) and again.hits.equals(plain.hits)
        assert (store.loads > 0) == bool(turn)
    assert len(store.blocks) == store.loads == 5  # two searches, the pool's clusters, two sets' clusters


def test_a_query_of_zeros_resembles_nothing(make_pool, random_vectors):
    x = random_vectors(30)
    queries = np.concatenate([np.zeros((2, x.shape[1]), np.float32), x[3:4]])
    found = retrieve(make_pool(30), x, [QuerySet("q", queries, ["a", "b", "c"], mode="sample", k=2)])
    assert set(found.hits.column("query_id").to_pylist()) == {"c"}
    with pytest.raises(UserError, match="no query image resembles any image of the pool"):
        retrieve(make_pool(30), x, [QuerySet("q", queries[:2], ["a", "b"], mode="sample", k=2)])
