"""What goes, what stays and why, on planted duplicates whose groups are known."""

import numpy as np
import pyarrow as pa
import pytest

from dinov2cli.curation.dedup import dedup
from dinov2cli.curation.resolve import keep_order
from dinov2cli.curation.tables import pool_from_metadata
from dinov2cli.curation.thresholds import Thresholds
from dinov2cli.curation.tiers import Reference, Tier
from dinov2cli.errors import UserError
from dinov2cli.search.edges import make_edges


def near(x: np.ndarray, cosine: float, seed: int) -> np.ndarray:
    """Unit vectors at exactly this cosine from the rows of x."""
    noise = np.random.default_rng(seed).normal(size=x.shape)
    noise -= (noise * x).sum(1, keepdims=True) * x
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (cosine * x + np.sqrt(1 - cosine**2) * noise).astype(np.float32)


@pytest.fixture
def planted(make_pool, random_vectors):
    """300 images; 300 .. 339 copy 0 .. 39 at cosine .9; 340 .. 359 copy 0 .. 19 at .5."""
    x = random_vectors(300)
    vectors = np.concatenate([x, near(x[:40], 0.9, 1), near(x[:20], 0.5, 2)])
    rng = np.random.default_rng(3)
    return make_pool(360, width=rng.integers(50, 60, 360), height=np.full(360, 10)), vectors


def test_planted_copies_go_and_nothing_else(planted):
    pool, vectors = planted
    result = dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.8))
    dropped = result.dropped.to_pylist()
    assert len(dropped) == 40 and result.kept.num_rows == 320
    number = {name: i for i, name in enumerate(pool["id"].to_pylist())}
    area = pool["width"].to_numpy()
    for row in dropped:
        a, b = number[row["id"]], number[row["duplicate_of"]]
        assert sorted((a, b))[0] + 300 == sorted((a, b))[1]
        assert area[b] > area[a] or (area[b] == area[a] and b < a)  # the larger stays, else the lower id
        assert row["reason"] == row["tier"] == "embedding" and row["via"] == row["duplicate_of"]
        assert row["similarity"] == pytest.approx(0.9, abs=1e-3)
    assert set(result.kept["id"].to_pylist()).isdisjoint(r["id"] for r in dropped)
    assert result.groups.num_rows == 80 and result.summary["groups"] == 40
    assert result.kept.column_names[:4] == ["id", "image_path", "source", "row"]
    assert result.kept["row"].to_pylist() == [int(r) + 7 for r in result.rows]


def test_groups_list_every_member_the_kept_one_first(planted):
    pool, vectors = planted
    groups = dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.8)).groups.to_pylist()
    for first, second in zip(groups[::2], groups[1::2], strict=True):
        assert first["group"] == second["group"] and first["keep"] and not second["keep"]
    assert [g["group"] for g in groups[::2]] == list(range(40))


def test_kept_images_do_not_depend_on_the_order_of_the_pool(planted):
    pool, vectors = planted
    kept = set(dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.8)).kept["id"].to_pylist())
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(pool.num_rows)
        again = dedup(pool.take(pa.array(order)), vectors=vectors[order], thresholds=Thresholds(embedding=0.8))
        assert set(again.kept["id"].to_pylist()) == kept


def test_second_run_on_what_was_kept_drops_nothing(planted):
    pool, vectors = planted
    first = dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.8))
    second = dedup(first.kept, vectors=vectors[first.rows], thresholds=Thresholds(embedding=0.8))
    assert second.dropped.num_rows == 0 and second.kept.num_rows == first.kept.num_rows


def test_largest_then_sharpest_then_lowest_id(make_pool):
    pool = make_pool(5, width=[9, 10, 10, 10, None], height=[9, 10, 10, 10, 10], sharpness=[9.0, 1.0, 2.0, 2.0, 99.0])
    assert np.argsort(keep_order(pool)).tolist() == [2, 3, 1, 0, 4]
    assert np.argsort(keep_order(make_pool(3))).tolist() == [0, 1, 2]


def test_chain_reports_the_edge_that_removed_each_image(make_pool):
    # a - b - c - d: only neighbours are alike; a is the largest.
    angle = np.deg2rad([0, 30, 60, 90])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1)
    pool = make_pool(4, width=[50, 10, 10, 10], height=[10, 10, 10, 10])
    result = dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.8))
    rows = {r["id"][-1]: r for r in result.dropped.to_pylist()}
    assert {k: r["duplicate_of"][-1] for k, r in rows.items()} == {"1": "0", "2": "0", "3": "0"}
    assert {k: r["via"][-1] for k, r in rows.items()} == {"1": "0", "2": "1", "3": "2"}


def test_exact_copies_by_digest_alone(make_pool):
    pool = make_pool(6, sha256=["x", "y", "x", None, None, "x"], width=[1, 1, 1, 1, 1, 5], height=[1] * 6)
    result = dedup(pool)
    assert [(r["id"][-1], r["reason"], r["duplicate_of"][-1], r["similarity"]) for r in result.dropped.to_pylist()] == [
        ("0", "bytes", "5", 1.0),
        ("2", "bytes", "5", 1.0),
    ]
    assert [r["via"][-1] for r in result.dropped.to_pylist()] == ["5", "5"]


def test_thousand_identical_files_do_not_hide_a_near_copy(make_pool, random_vectors):
    x = random_vectors(50)
    many = np.repeat(x[:1], 200, axis=0)
    vectors = np.concatenate([x, many, near(x[:1], 0.9, 0)])
    keys = [f"k{i}" for i in range(50)] + ["k0"] * 200 + ["other"]
    result = dedup(make_pool(251, sha256=keys), vectors=vectors, thresholds=Thresholds(embedding=0.8), k=4)
    assert result.kept.num_rows == 50 and result.summary["truncated_rows"] == 0
    assert result.summary["reasons"] == {"bytes": 200, "embedding": 1}
    # Without digests the lists are full of copies, and the run says so.
    alone = dedup(make_pool(251), vectors=vectors, thresholds=Thresholds(embedding=0.8), k=4)
    assert alone.summary["truncated_rows"] > 100
    assert any("more than 4 neighbours above the threshold" in m for m in alone.messages)


def test_chains_above_the_limit_are_cut_and_reported(make_pool):
    angle = np.deg2rad(np.arange(0, 60, 2.0))  # each is alike only to its neighbours
    tight = np.concatenate([angle, angle + 1e-3])  # and each has a true copy
    vectors = np.stack([np.cos(tight), np.sin(tight)], 1)
    result = dedup(make_pool(60), vectors=vectors, thresholds=Thresholds(embedding=0.99), max_component=10)
    assert result.kept.num_rows == 30 and result.summary["largest_group"] == 2
    assert result.summary["recut"][0]["size"] == 60 and result.summary["recut"][0]["largest_after"] == 2
    assert any("chain of look-alikes" in m for m in result.messages)
    assert dedup(make_pool(60), vectors=vectors, thresholds=Thresholds(embedding=0.99)).kept.num_rows == 1


def test_against_drops_direct_matches_only(planted, random_vectors):
    pool, vectors = planted
    reference = Reference(
        ids=["test-a", "test-b"], vectors=np.concatenate([near(vectors[[5]], 0.7, 9), random_vectors(1, 77)])
    )
    result = dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.8, against=0.65), against=[reference])
    leaked = [r for r in result.dropped.to_pylist() if r["reason"] == "against"]
    assert [(r["id"], r["duplicate_of"], r["tier"], r["group"]) for r in leaked] == [
        ("img-00005", "test-a", "embedding", None)
    ]
    assert leaked[0]["similarity"] == pytest.approx(0.7, abs=1e-3)
    # Its planted copy stays: it is not similar enough itself, and no transitive closure is taken.
    assert "img-00305" in result.kept["id"].to_pylist()
    assert result.kept.num_rows == 320
    whole = dedup(
        pool,
        vectors=vectors,
        thresholds=Thresholds(embedding=0.8, against=0.65),
        against=[reference],
        against_components=True,
    )
    leaked = [(r["id"], r["duplicate_of"], r["via"]) for r in whole.dropped.to_pylist() if r["reason"] == "against"]
    assert leaked == [("img-00005", "test-a", None), ("img-00305", "test-a", "img-00005")]


def test_against_takes_the_most_certain_tier(make_pool, random_vectors):
    x = random_vectors(3)
    reference = Reference(ids=["r0", "r1"], sha256=["a", "b"], vectors=x[:2])
    result = dedup(make_pool(3, sha256=["b", "z", None]), vectors=x, against=[reference])
    rows = [(r["id"][-1], r["duplicate_of"], r["tier"]) for r in result.dropped.to_pylist()]
    assert rows == [("0", "r1", "bytes"), ("1", "r1", "embedding")]
    empty = Reference(ids=[], sha256=[], vectors=np.zeros((0, 64), np.float32))
    assert dedup(make_pool(3), vectors=x, against=[empty]).dropped.num_rows == 0


def test_nothing_to_compare_by_and_bad_thresholds(make_pool, random_vectors):
    with pytest.raises(UserError, match="dedup: no sha256 column, fingerprints or vectors to compare by"):
        dedup(make_pool(3))
    with pytest.raises(UserError, match=r"threshold: found 1.5; expected a cosine above 0 and at most 1"):
        dedup(make_pool(3), vectors=random_vectors(3), thresholds=Thresholds(embedding=1.5))


def test_empty_and_single_pools(make_pool, random_vectors):
    for rows in (0, 1):
        result = dedup(make_pool(rows, sha256=pa.array(["k"] * rows, pa.string())), vectors=random_vectors(rows))
        assert result.kept.num_rows == rows and result.dropped.num_rows == 0 and result.groups.num_rows == 0


def test_pool_of_embeddings_points_back_to_its_source():
    metadata = pa.table({"width": [3, 4], "id": ["a", "b"], "image_path": ["x", "y"], "label": [1, 0]})
    pool = pool_from_metadata(metadata, source="/photos?label=folder")
    assert pool.column_names == ["id", "image_path", "source", "row", "width", "label"]
    assert pool["source"].to_pylist() == ["/photos?label=folder"] * 2 and pool["row"].to_pylist() == [0, 1]
    again = pool_from_metadata(pool.set_column(3, "row", pa.array([9, 8])), source="other")
    assert again["row"].to_pylist() == [9, 8] and again["source"][0].as_py() == "/photos?label=folder"


def test_direct_edge_to_the_kept_image_is_named_before_a_stronger_one_to_another(make_pool):
    angle = np.deg2rad([0, 30, 35])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1)
    pool = make_pool(3, width=[50, 10, 10], height=[10, 10, 10])
    first = dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.8)).dropped.to_pylist()[0]
    assert (first["via"], first["duplicate_of"]) == ("img-00000", "img-00000")
    assert first["similarity"] == pytest.approx(np.cos(angle[1]), abs=1e-5)


def test_a_member_must_resemble_the_image_kept(make_pool):
    """A chain from 0 to 40 degrees in steps of 8: edges join neighbours (cos 0.990), the image kept is the first."""
    angle = np.deg2rad(np.arange(0, 41, 8.0))
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1)
    pool = make_pool(6, width=[60, 50, 50, 50, 50, 50], height=[10] * 6)
    at = Thresholds(embedding=0.985)
    assert dedup(pool, vectors=vectors, thresholds=at).kept["id"].to_pylist() == ["img-00000"]
    result = dedup(pool, vectors=vectors, thresholds=at, min_representative=0.95)  # 18 degrees
    # 8 and 16 degrees stay with the first; the rest is a chain of its own, of which one is kept.
    assert result.kept["id"].to_pylist() == ["img-00000", "img-00003"]
    found = {r["id"]: (r["duplicate_of"], r["via"]) for r in result.dropped.to_pylist()}
    assert found["img-00002"] == ("img-00000", "img-00000") and found["img-00005"][0] == "img-00003"
    similarity = {r["id"]: r["similarity"] for r in result.dropped.to_pylist()}
    assert similarity["img-00002"] == pytest.approx(np.cos(np.deg2rad(16)), abs=1e-3)
    assert result.summary["left_chains"] == 3 and any("left a group" in line for line in result.messages)


def test_pairs_that_local_features_do_not_confirm_join_nothing(planted):
    pool, vectors = planted

    class Local:
        """Confirms what has an even row; finds the pair (50, 51) by itself."""

        def tier(self, known):
            assert not known
            return Tier("geometric", make_edges([50], [51], [0.7]), 0.5)

        def confirms(self, edges):
            return edges.src % 2 == 0

    alone = dedup(pool, vectors=vectors, local=Local(), thresholds=Thresholds(embedding=0.8))
    assert alone.dropped.num_rows == 41
    both = dedup(pool, vectors=vectors, local=Local(), confirm=True, thresholds=Thresholds(embedding=0.8))
    assert both.dropped.num_rows == 21
    assert [r["reason"] for r in both.dropped.to_pylist()].count("geometric") == 1
    assert [rule["tier"] for rule in both.summary["rules"]] == ["geometric", "embedding"]
    assert [rule["edges"] for rule in both.summary["rules"]] == [1, 20]


def test_the_bias_of_every_row_is_its_own_beside_exact_copies(make_pool, random_vectors):
    """Rows 0 and 1 are one file: what is searched skips one of them, and the biases of the others must not shift."""
    x = random_vectors(6)
    vectors = np.concatenate([x[:1], x[:1], x[1:2], near(x[1:2], 0.8, 1), x[2:3], near(x[2:3], 0.8, 2)])
    pool = make_pool(6, sha256=["a", "a", "b", "c", "d", "e"])
    bias = np.array([0, 0, 0.3, 0.3, 0, 0], dtype=np.float32)  # the pair (2, 3) scores 0.5, (4, 5) scores 0.8
    result = dedup(pool, vectors=vectors, thresholds=Thresholds(embedding=0.6), search={"bias": bias})
    assert sorted(r["id"] for r in result.dropped.to_pylist()) == ["img-00001", "img-00005"]
    assert "less how near" in result.summary["rules"][-1]["rule"]
    reference = Reference(ids=["r"], vectors=near(x[1:2], 0.8, 3))
    at = Thresholds(embedding=0.99, against=0.6)
    kept = dedup(pool, vectors=vectors, thresholds=at, against=[reference], search={"bias": bias})
    assert not any(r["reason"] == "against" for r in kept.dropped.to_pylist())  # 0.8 less 0.3
    plain = dedup(pool, vectors=vectors, thresholds=at, against=[reference])
    assert any(r["reason"] == "against" for r in plain.dropped.to_pylist())


def test_rows_without_a_digest_equal_nothing(make_pool, random_vectors):
    pool = make_pool(4, sha256=["", "", None, None])
    assert dedup(pool, vectors=random_vectors(4)).dropped.num_rows == 0
    reference = Reference(ids=["r"], sha256=[""])
    assert dedup(pool, vectors=random_vectors(4), against=[reference]).dropped.num_rows == 0


def test_many_true_copies_are_no_chain(make_pool):
    result = dedup(make_pool(30, sha256=["a"] * 30), max_component=10)
    assert result.kept.num_rows == 1 and not result.summary["recut"]
    assert not any("chain" in line for line in result.messages)


def test_the_first_reference_that_matches_is_named(make_pool, random_vectors):
    x = random_vectors(3)
    sets = [
        Reference(ids=["t0"], name="tests", vectors=near(x[:1], 0.9, 4)),
        Reference(ids=["v0", "v1"], name="val", vectors=np.concatenate([x[:1], x[1:2]])),
    ]
    result = dedup(make_pool(3), vectors=x, thresholds=Thresholds(against=0.8), against=sets)
    found = [(r["id"], r["reference"], r["duplicate_of"]) for r in result.dropped.to_pylist()]
    assert found == [("img-00000", "tests", "t0"), ("img-00001", "val", "v1")]
