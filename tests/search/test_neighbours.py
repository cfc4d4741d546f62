"""Search against brute force in numpy, its edges against all pairs, and its behaviour at the awkward ends."""

import numpy as np
import pytest

from dinov2cli.errors import InputError, UserError
from dinov2cli.search.edges import join_edges, make_edges
from dinov2cli.search.index import build_index
from dinov2cli.search.neighbours import best_match, edge_blocks, neighbour_blocks, similarity_edges, top_k
from dinov2cli.search.normalise import background_bias
from dinov2cli.search.plan import ivf_factory
from dinov2cli.search.vectors import ArrayVectors, as_vectors, sample_rows


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def mixture(rows: int, dim: int, seed: int, centres: int = 200, spread: float = 0.35) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, dim))
    return unit(means[rng.integers(0, centres, rows)] + spread * rng.normal(size=(rows, dim)))


class ShardedHalf:
    """Like an embeddings directory: float16 shards, read by blocks, counting the largest block asked for."""

    def __init__(self, array: np.ndarray, shard: int) -> None:
        self._half = array.astype(np.float16)
        self._shard = shard
        self.rows, self.dim = array.shape
        self.largest = 0

    def block(self, start: int, stop: int) -> np.ndarray:
        self.largest = max(self.largest, stop - start)
        return self._half[start:stop].astype(np.float32)

    def gather(self, index: np.ndarray) -> np.ndarray:
        return self._half[index].astype(np.float32)


def brute(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1)[:, :k]
    return np.take_along_axis(similarity, order, 1), order


def test_top_k_equals_brute_force():
    x = mixture(700, 24, 0)
    similarity, row = top_k(x, 10)
    expected, expected_row = brute(x, 10)
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    assert (row == expected_row).mean() > 0.999  # ties aside


def test_vectors_of_any_length_are_compared_by_cosine():
    x = mixture(100, 8, 1)
    scale = np.random.default_rng(0).uniform(0.1, 9, (100, 1)).astype(np.float32)
    np.testing.assert_array_equal(top_k(x * scale, 5)[1], top_k(x, 5)[1])


def test_exact_search_in_blocks_is_the_same_as_in_one(monkeypatch):
    x = mixture(40_000, 16, 2)
    whole = build_index(x, index="flat")
    monkeypatch.setattr("dinov2cli.search.index.FILL_ROWS", 1024)
    source = ShardedHalf(x, 500)
    blocked = build_index(source, index="flat", memory=whole.plan.peak_bytes - (1 << 20))
    a, b = whole.search(x[:50], 7), blocked.search(x[:50], 7)
    assert source.largest <= 1024  # never all rows at once
    np.testing.assert_allclose(a[0], b[0], atol=2e-3)  # float16 rows
    assert (a[1] == b[1]).mean() > 0.97


def test_row_is_never_its_own_neighbour_among_many_copies():
    x = mixture(60, 8, 3)
    x[10:40] = x[10]  # thirty copies: with k = 5 a row is usually not in its own list
    for block in neighbour_blocks(build_index(x), x, 5, exclude_self=True, block=7):
        rows = np.arange(block.start, block.start + len(block.row))
        assert not (block.row == rows[:, None]).any()
        assert (block.row >= 0).all()
        copies = (rows >= 10) & (rows < 40)
        np.testing.assert_allclose(block.similarity[copies], 1.0, atol=1e-6)


def test_fewer_rows_than_k_are_padded():
    similarity, row = top_k(mixture(4, 8, 4), 6)
    assert row.shape == (4, 6)
    assert (np.sort(row[0])[-3:] == [1, 2, 3]).all()
    assert (row[:, 3:] == -1).all() and np.isneginf(similarity[:, 3:]).all()
    lonely = top_k(mixture(1, 8, 4), 3)
    assert (lonely[1] == -1).all()
    assert top_k(np.zeros((0, 8), np.float32), 3)[1].shape == (0, 3)


def test_best_match_in_another_set_and_in_an_empty_one():
    x = mixture(50, 8, 5)
    similarity, row = best_match(x[[7, 3]], x)
    assert row.tolist() == [7, 3] and similarity.min() > 0.999
    assert best_match(x[:2], np.zeros((0, 8), np.float32))[1].tolist() == [-1, -1]


def test_edges_are_all_pairs_above_the_threshold():
    x = mixture(500, 16, 6, centres=60, spread=0.25)
    similarity = x.astype(np.float64) @ x.T.astype(np.float64)
    expected = {(i, j) for i, j in zip(*np.nonzero(np.triu(similarity > 0.8, 1)), strict=True)}
    edges = similarity_edges(x, 0.8, k=64)
    assert len(expected) > 300
    assert set(zip(edges.src, edges.dst, strict=True)) == expected
    assert (edges.src < edges.dst).all() and len(edges.truncated) == 0
    np.testing.assert_allclose(edges.similarity, similarity[edges.src, edges.dst], atol=1e-5)


def test_full_lists_of_edges_are_reported():
    x = mixture(100, 8, 7)
    x[20:50] = x[20]
    assert set(similarity_edges(x, 0.99, k=10).truncated) >= set(range(20, 50))
    assert len(similarity_edges(x, 0.99, k=29).truncated) == 30  # exactly full: cannot know that nothing is missing
    assert len(similarity_edges(x, 0.99, k=40).truncated) == 0
    # With k covering every other row nothing can be missing, however full the lists are.
    assert len(similarity_edges(np.ones((5, 4), np.float32), 0.5, k=4).truncated) == 0


def test_no_row_has_more_than_k_edges_of_its_own():
    same = np.ones((12, 4), np.float32)
    for block in edge_blocks(same, 0.5, k=3):
        # Of twelve copies each lists the first four: rows 4 to 11 are not in their own list and keep three of them.
        assert not np.isin(3, block.src) and set(block.src) == {0, 1, 2} and len(block.truncated) == 12


def test_threshold_is_exclusive():
    x = np.eye(4, dtype=np.float32)
    x[1] = x[0]
    assert len(similarity_edges(x, 0.999)) == 1
    assert len(similarity_edges(x, 1.0)) == 0


def test_ivf_finds_nine_of_ten_and_almost_all_edges():
    x = mixture(20_000, 32, 8, centres=400, spread=0.4)
    exact = top_k(x, 10, queries=x[:500])
    index = build_index(x, index="IVF64,PQ8x4fs,Refine(SQfp16)", nprobe=8)
    assert not index.exact
    found = index.search(x[:500], 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact[1], found[1], strict=True)])
    assert recall >= 0.9, recall
    all_edges = similarity_edges(x[:8000], 0.9, index="flat")
    ivf_edges = similarity_edges(x[:8000], 0.9, index="ivf")
    common = set(zip(all_edges.src, all_edges.dst, strict=True)) & set(zip(ivf_edges.src, ivf_edges.dst, strict=True))
    assert len(all_edges) > 100 and len(common) >= 0.99 * len(all_edges)


def test_same_seed_gives_the_same_ivf_result():
    x = mixture(5000, 16, 9)
    a, b = (top_k(x, 5, index="ivf", nprobe=4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(a[0], b[0])


def test_auto_is_exact_for_small_sets_and_ivf_for_large(monkeypatch):
    x = mixture(2000, 16, 10)
    assert build_index(x).exact
    monkeypatch.setattr("dinov2cli.search.plan.EXACT_ROWS", 1000)
    monkeypatch.setattr("dinov2cli.search.plan.EXACT_WORK", 1e6)
    large = build_index(x)
    assert not large.exact and large.description.startswith("IVF")
    assert ivf_factory(200_000, 384) == "IVF1024,PQ96x4fs,Refine(SQfp16)"
    assert ivf_factory(200_000, 386) == "IVF1024,SQfp16"


def test_unknown_index_is_one_line_with_the_cure():
    with pytest.raises(UserError, match=r"--index HNSWX9: Faiss cannot build this for 8 dimensions; use auto, flat"):
        build_index(mixture(20, 8, 0), index="HNSWX9")


def test_rows_that_are_not_finite_are_named():
    x = mixture(30, 8, 0)
    x[17, 3] = np.nan
    with pytest.raises(InputError, match=r"embeddings: row 17 holds NaN or infinity \(1 such rows"):
        top_k(x, 3)
    x[17, 3] = np.inf
    x[17, 4] = -np.inf
    with pytest.raises(InputError, match="row 17"):
        top_k(x, 3)


def test_zero_rows_resemble_nothing():
    x = mixture(20, 8, 0)
    x[5] = x[6] = 0
    edges = similarity_edges(x, 0.5)
    assert not np.isin([5, 6], np.concatenate([edges.src, edges.dst])).any()


def test_queries_of_another_length_are_refused():
    with pytest.raises(ValueError, match="expected vectors of length 8, found 6"):
        list(neighbour_blocks(build_index(mixture(20, 8, 0)), mixture(5, 6, 0), 3))
    with pytest.raises(ValueError, match="at least 1"):
        list(neighbour_blocks(build_index(mixture(20, 8, 0)), mixture(5, 8, 0), 0))
    with pytest.raises(ValueError, match="shape"):
        ArrayVectors(np.zeros(3))


def test_progress_counts_every_row_once():
    calls: list[tuple[int, int]] = []
    index = build_index(mixture(50, 8, 0))
    list(neighbour_blocks(index, mixture(50, 8, 0), 2, block=20, progress=lambda a, b: calls.append((a, b))))
    assert calls == [(20, 50), (40, 50), (50, 50)]


def test_edges_are_canonical_whatever_their_order():
    edges = make_edges([3, 1, 2, 5], [1, 3, 2, 0], [0.5, 0.7, 0.9, 0.6])
    assert edges.src.tolist() == [0, 1] and edges.dst.tolist() == [5, 3]
    np.testing.assert_allclose(edges.similarity, [0.6, 0.7], atol=1e-6)
    joined = join_edges([edges, make_edges([1], [3], [0.8], truncated=[4, 4])])
    assert len(joined) == 2 and joined.truncated.tolist() == [4]
    np.testing.assert_allclose(joined.similarity, [0.6, 0.8], atol=1e-6)
    assert len(join_edges([])) == 0


def test_sample_rows_is_sorted_distinct_and_seeded():
    a = sample_rows(1000, 100, 1)
    assert len(np.unique(a)) == 100 and (np.diff(a) > 0).all()
    np.testing.assert_array_equal(a, sample_rows(1000, 100, 1))
    assert (a != sample_rows(1000, 100, 2)).any()
    assert sample_rows(5, 10, 0).tolist() == [0, 1, 2, 3, 4]


def test_unit_view_can_be_undone():
    x = np.full((3, 4), 2.0, np.float32)
    once = as_vectors(x)
    assert as_vectors(once) is once
    np.testing.assert_allclose(as_vectors(once, unit=False).block(0, 3), x)
    np.testing.assert_allclose(once.block(0, 3), 0.5)


def test_background_bias_is_the_mean_of_the_nearest():
    x, background = mixture(200, 12, 11), mixture(300, 12, 12)
    x[7] = 0
    full = np.sort(x.astype(np.float64) @ background.T.astype(np.float64), axis=1)
    np.testing.assert_allclose(background_bias(x, background, n=4, beta=0.5), 0.5 * full[:, -4:].mean(1), atol=1e-6)
    with pytest.raises(UserError, match="found 2 background images; expected at least 3; give more"):
        background_bias(x, background[:2])


def test_normalised_edges_are_all_pairs_whose_score_is_above_the_threshold():
    x = mixture(400, 12, 13, centres=80, spread=0.2)
    bias = np.random.default_rng(0).uniform(-0.1, 0.4, 400).astype(np.float32)
    score = x.astype(np.float64) @ x.T.astype(np.float64) - 0.5 * (bias[:, None] + bias[None, :]).astype(np.float64)
    expected = {(i, j) for i, j in zip(*np.nonzero(np.triu(score > 0.7, 1)), strict=True)}
    edges = similarity_edges(x, 0.7, k=200, bias=bias)
    assert len(expected) > 200 and set(zip(edges.src, edges.dst, strict=True)) == expected
    np.testing.assert_allclose(edges.similarity, score[edges.src, edges.dst], atol=1e-5)
    # A list that is cut where a better score could still follow is named.
    few = similarity_edges(x, 0.7, k=3, bias=bias)
    missed = expected - set(zip(few.src.tolist(), few.dst.tolist(), strict=True))
    assert missed and all(i in few.truncated and j in few.truncated for i, j in missed)
    with pytest.raises(ValueError, match="bias: expected one value for each of 400 rows, found 5"):
        similarity_edges(x, 0.7, bias=bias[:5])


def test_mapped_files_are_let_go_and_read_the_same(tmp_path, monkeypatch):
    x = mixture(5000, 16, 14).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("dinov2cli.search.vectors._MAPPED_BYTES", 1000)  # after every block
    vectors = ArrayVectors(mapped)
    np.testing.assert_array_equal(vectors.block(10, 900), x[10:900])
    np.testing.assert_array_equal(vectors.gather(np.array([4999, 0, 7])), x[[4999, 0, 7]])
    a, b = similarity_edges(mapped, 0.9), similarity_edges(x, 0.9)
    np.testing.assert_array_equal(a.src, b.src)
    np.testing.assert_array_equal(a.similarity, b.similarity)
    np.save(tmp_path / "y.npy", x.astype(np.float32))
    whole = ArrayVectors(np.load(tmp_path / "y.npy", mmap_mode="r")).block(0, 100)
    assert not isinstance(whole.base, np.memmap)  # a copy: its pages may go


def test_lengths_that_float32_cannot_square_are_made_unit():
    x = mixture(20, 8, 15)
    for scale in (1e-25, 1e25):
        np.testing.assert_allclose(as_vectors(x * np.float32(scale)).block(0, 20), x, atol=1e-6)
