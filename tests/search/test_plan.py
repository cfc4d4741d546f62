"""The planner's choices, the recall it promises, and searches that do not fit in memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dinov2cli.distributed import Ranks
from dinov2cli.errors import UserError
from dinov2cli.search import neighbours, plan, recall
from dinov2cli.search.components import component_labels, streamed_labels
from dinov2cli.search.index import build_index
from dinov2cli.search.neighbours import edge_blocks, neighbour_blocks, similarity_edges, top_k
from dinov2cli.search.plan import plan_index
from dinov2cli.search.recall import exact_similarities
from dinov2cli.search.rerank import rerank
from dinov2cli.search.vectors import as_vectors
from tests.search.test_neighbours import mixture


class Kept(dict):
    """A store in memory that counts what is asked of it."""

    def stage(self, name, key):
        return KeptStage(self, (name, repr(sorted(key.items()))))


class KeptStage:
    def __init__(self, store, name):
        self.store, self.name = store, name

    def load(self, start):
        return self.store.get((*self.name, start))

    def save(self, start, arrays):
        self.store[(*self.name, start)] = {name: np.array(array) for name, array in arrays.items()}


@pytest.fixture
def small_is_large(monkeypatch):
    """Sets of a few thousand rows are planned as large ones."""
    monkeypatch.setattr(plan, "EXACT_ROWS", 1000)
    monkeypatch.setattr(plan, "EXACT_WORK", 1e6)


def pairs(edges):
    return set(zip(edges.src.tolist(), edges.dst.tolist(), strict=True))


def test_choices_by_size_length_target_and_memory():
    assert plan_index(9000, 384).kind == "flat"
    assert plan_index(1_000_000, 384, queries=100).kind == "flat"  # few queries do not repay an index
    large = plan_index(200_000, 384)
    assert large.factory == "IVF1024,PQ96x4fs,Refine(SQfp16)" and large.rerank == "memory" and large.shards == 1
    assert (large.nprobe, plan_index(200_000, 384, purpose="lists").nprobe) == (16, 32)
    assert plan_index(200_000, 386).factory == "IVF1024,SQfp16"
    assert plan_index(200_000, 384, recall=0.99).kind == "ivf_flat"
    assert plan_index(200_000, 384, gpus=2).kind == "ivf_flat"
    assert plan_index(1_200_000_000, 512).factory.startswith("IVF262144_HNSW32,PQ128x4fs")
    assert plan_index(50, 8, index="IVF4,SQ8", nprobe=3).factory == "IVF4,SQ8"
    for found in (large, plan_index(100, 8), plan_index(200_000, 386)):
        assert str(found.rows) in found.reason and found.record()["factory"] == found.factory


@pytest.mark.parametrize("rows", [200_000, 1_000_000, 20_000_000, 1_200_000_000])
def test_memory_bounds_every_plan(rows):
    for memory in (1 << 30, 2 << 30, 8 << 30, 128 << 30):
        try:
            chosen = plan_index(rows, 512, memory=memory)
        except UserError:
            assert rows > 10**9 and memory <= 2 << 30
            continue
        assert chosen.peak_bytes <= memory
        assert chosen.shards * chosen.shard_rows >= rows
    whole = plan_index(rows, 512)
    lean = plan_index(rows, 512, memory=whole.peak_bytes - 1)
    if rows < 1_000_000:
        return
    assert whole.rerank == "memory" and lean.rerank == "disk" and "disk" in lean.reason and lean.shards == 1
    cut = plan_index(rows, 512, memory=lean.peak_bytes - (1 << 20))
    assert cut.shards > 1 and "shards" in cut.reason


def test_too_little_memory_is_one_line_with_what_is_needed():
    with pytest.raises(UserError, match=r"memory: found 0.1 GB; expected at least 0\.\d+ GB for vectors of 384; raise"):
        plan_index(1_000_000, 384, memory=100_000_000)


def test_exact_similarities_are_those_of_float64():
    x = mixture(900, 16, 0)
    rows = np.array([3, 500, 899])
    full = x[rows].astype(np.float64) @ x.T.astype(np.float64)
    full[np.arange(3), rows] = -np.inf
    found = exact_similarities(as_vectors(x), x[rows], 20, rows)
    np.testing.assert_allclose(found, -np.sort(-full, axis=1)[:, :20], atol=1e-5)


def test_reported_recall_is_the_recall(small_is_large):
    x = mixture(6000, 32, 1, centres=100, spread=0.6)
    built = build_index(x, nprobe=1, k=10)
    truth = top_k(x, 10, index="flat")[1]
    found = np.concatenate([b.row for b in neighbour_blocks(built, x, 10, exclude_self=True)])
    recall_of_all = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
    report = built.report
    assert report.queries == recall.SAMPLE and len(report.tried) == 1
    assert report.nprobe == 1 and report.reached is False  # an effort that was given is kept, and said to fall short
    assert abs(report.recall - recall_of_all) < 0.03
    assert "NOT reached" in report.lines()[1]


def test_effort_is_raised_until_the_target_is_reached(small_is_large):
    x = mixture(8000, 32, 2, centres=40, spread=1.2)
    reports = []
    edges = similarity_edges(x, 0.7, k=20, index="ivf", recall=0.97, tell=reports.append)
    report = reports[0]
    tried = [(t.nprobe, t.k_factor) for t in report.tried]
    assert report.reached and report.edge_recall >= recall.edge_target(0.97) and report.edges > recall.FEW_EDGES
    truth = similarity_edges(x, 0.7, k=20, index="flat")
    assert len(pairs(edges) & pairs(truth)) >= 0.99 * len(truth)
    lists = build_index(x, index="ivf", k=20, recall=0.97).report
    assert (lists.reached and lists.recall >= 0.97 and lists.nprobe > 32) or lists.k_factor > 4, tried
    assert lists.record()["tried"][0]["nprobe"] == 32


def test_few_edges_are_not_judged(small_is_large):
    reports = []
    similarity_edges(mixture(3000, 32, 3, centres=3000), 0.99, tell=reports.append)
    assert reports[0].reached is None and len(reports[0].tried) == 1 and "not judged" in reports[0].lines()[1]


def test_candidates_read_from_disk_are_ranked_by_their_cosine():
    x = mixture(500, 24, 4)
    rng = np.random.default_rng(0)
    candidates = np.stack([rng.permutation(500)[:40] for _ in range(30)])
    candidates[0, 5:] = -1
    similarity, row = rerank(as_vectors(x), x[:30], candidates, 7)
    exact = np.where(
        candidates < 0, -np.inf, np.einsum("nd,nkd->nk", x[:30].astype(float), x[candidates].astype(float))
    )
    order = np.argsort(-exact, axis=1)[:, :7]
    np.testing.assert_allclose(similarity, np.take_along_axis(exact, order, 1), atol=1e-5)
    np.testing.assert_array_equal(row[1:], np.take_along_axis(candidates, order, 1)[1:])
    assert (row[0, 5:] == -1).all()


def test_a_second_look_from_disk_finds_what_one_in_memory_finds(small_is_large, monkeypatch):
    # The scratch that does not grow with the rows would outweigh the copy of so few.
    monkeypatch.setattr(plan, "rerank_rows", lambda dim: 0)
    monkeypatch.setattr(plan, "training_rows", lambda *_: 0)
    x = mixture(8000, 32, 5, centres=100, spread=0.5)
    whole = plan_index(8000, 32, k=30)
    lean = plan_index(8000, 32, k=30, memory=whole.peak_bytes - 1)
    assert lean.rerank == "disk" and lean.shards == 1
    a = similarity_edges(x, 0.8, k=30)
    b = similarity_edges(x, 0.8, k=30, memory=whole.peak_bytes - 1)
    assert len(a) > 1000 and len(pairs(a) & pairs(b)) >= 0.995 * len(pairs(a) | pairs(b))  # float16 or float32 there


def in_shards(monkeypatch, rows, dim):
    """An amount of memory for which a set is cut into shards."""
    monkeypatch.setattr(plan, "_scratch", lambda *_: 0)
    monkeypatch.setattr(plan, "rerank_rows", lambda dim: 0)
    monkeypatch.setattr(plan, "training_rows", lambda *_: 0)
    lean = plan.plan_index(rows, dim, memory=plan.plan_index(rows, dim).peak_bytes - 1)
    memory = lean.peak_bytes - lean.bytes["codes"] // 2
    monkeypatch.setattr(plan, "_LIST_BYTES", 0)
    assert plan.plan_index(rows, dim, memory=memory).shards > 1
    return memory


def test_shards_find_the_edges_and_lists_of_the_whole(small_is_large, monkeypatch):
    x = mixture(8000, 32, 6, centres=240, spread=0.4)
    memory = in_shards(monkeypatch, *x.shape)
    truth = similarity_edges(x, 0.85, k=64, index="flat")
    reports = []
    found = similarity_edges(x, 0.85, k=64, memory=memory, tell=reports.append)
    assert reports[0].plan.shards > 1
    assert len(truth) > 1000 and pairs(found) <= pairs(truth) | pairs(similarity_edges(x, 0.8499, k=64, index="flat"))
    assert len(pairs(found) & pairs(truth)) >= 0.99 * len(truth)
    exact = top_k(x, 10, index="flat")
    lists = top_k(x, 10, memory=memory)
    shared = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(exact[1], lists[1], strict=True)])
    assert shared >= 0.95 and (lists[1] != np.arange(8000)[:, None]).all()
    built = build_index(x, memory=memory, k=10)
    np.testing.assert_array_equal(built.search(x[:50], 11)[1][:, 1:], lists[1][:50])


def test_streamed_edges_give_the_same_edges_and_components(small_is_large, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERY_ROWS", 512)
    x = mixture(5000, 32, 7, centres=500, spread=0.3)
    edges = similarity_edges(x, 0.85)
    blocks = list(edge_blocks(x, 0.85))
    assert len(blocks) == 10 and sum(map(len, blocks)) > len(edges) > 500
    assert set().union(*map(pairs, blocks)) == pairs(edges)
    np.testing.assert_array_equal(streamed_labels(5000, blocks), component_labels(5000, edges.src, edges.dst))


def test_a_stopped_search_continues_where_it_was(small_is_large, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERY_ROWS", 512)
    x = mixture(5000, 32, 8, centres=500, spread=0.3)
    expected = similarity_edges(x, 0.85, index="ivf", k=20)
    store = Kept()
    stream = edge_blocks(x, 0.85, index="ivf", k=20, store=store)
    for _ in range(4):
        next(stream)
    stream.close()  # killed
    finished = [key for key in store if key[0] == "edges"]
    assert len(finished) == 4 and {key[0] for key in store} == {"index", "recall", "edges"}

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("dinov2cli.search.index._train", never)
    monkeypatch.setattr("dinov2cli.search.index.tune", never)
    for key in finished:  # what was kept is taken, not computed again
        store[key] = {**store[key], "truncated": np.array([4999], np.uint32)}
    reports = []
    again = similarity_edges(x, 0.85, index="ivf", k=20, store=store, tell=reports.append)
    for name in ("src", "dst", "similarity"):
        np.testing.assert_array_equal(getattr(again, name), getattr(expected, name))
    assert 4999 in again.truncated and reports[0].tried[0].recall > 0.5
    monkeypatch.undo()
    stricter = similarity_edges(x, 0.9, index="ivf", k=20, store=store)  # another threshold, other parts
    assert len(stricter) < len(expected) and stricter.similarity.min() > 0.9


class Together(Ranks):
    """Ranks that are threads of one process."""

    def merge(self, own, total, *, main_only=False):
        found = self._share(list(own))
        yield from (found[i % self.world_size][i // self.world_size] for i in range(total))

    def first(self, make):
        return self._share(make() if self.main else None)[0]

    def _share(self, mine):
        barrier, box = self.host
        box[self.rank] = mine
        barrier.wait(60)
        everyone = list(box)
        barrier.wait(60)
        return everyone


def together(world_size, work):
    """`work(ranks)` on every rank."""
    host = threading.Barrier(world_size), [None] * world_size
    ranks = [Together(rank=rank, world_size=world_size, host=host) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, ranks))


def test_one_two_and_three_ranks_find_the_same(small_is_large, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERY_ROWS", 512)
    x = mixture(4000, 32, 9, centres=120, spread=0.4)
    memory = in_shards(monkeypatch, *x.shape)
    for settings in ({"index": "ivf"}, {"memory": memory}):
        edges = similarity_edges(x, 0.8, seed=1, **settings)
        lists = top_k(x, 5, seed=1, **settings)
        for world_size in (2, 3):
            for found in together(world_size, lambda r, s=settings: similarity_edges(x, 0.8, seed=1, ranks=r, **s)):
                for name in ("src", "dst", "similarity", "truncated"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(edges, name))
        for found in together(3, lambda r, s=settings: top_k(x, 5, seed=1, ranks=r, **s)):
            np.testing.assert_array_equal(found[1], lists[1])
    assert len(edges) > 1000


@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_rows_that_are_all_the_same(index):
    x = np.ones((3000, 16), np.float32)
    edges = similarity_edges(x, 0.9, k=8, index=index)
    assert (component_labels(3000, edges.src, edges.dst) >= 0).all() and len(edges.truncated) == 3000
    similarity, row = top_k(x, 8, index=index)
    np.testing.assert_allclose(similarity, 1.0, atol=1e-3)
    assert (row != np.arange(3000)[:, None]).all()


@pytest.mark.parametrize("index", ["auto", "flat", "ivf"])
def test_empty_and_tiny_sets(index):
    assert len(similarity_edges(np.zeros((0, 8), np.float32), 0.5, index=index)) == 0
    assert list(edge_blocks(np.zeros((0, 8), np.float32), 0.5, index=index)) == []
    assert len(similarity_edges(np.ones((1, 16), np.float32), 0.5, index=index)) == 0
    assert pairs(similarity_edges(np.ones((2, 16), np.float32), 0.5, index=index)) == {(0, 1)}
