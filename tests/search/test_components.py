"""Components against SciPy and a union-find written here, and the guards against chains."""

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinov2cli.search import components
from dinov2cli.search.components import UnionFind, component_labels, cut_components, leave_unlike, streamed_labels
from dinov2cli.search.edges import make_edges


def union_find(rows: int, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    parent = list(range(rows))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for a, b in zip(src, dst, strict=True):
        ra, rb = root(a), root(b)
        parent[max(ra, rb)] = min(ra, rb)
    return np.array([root(i) for i in range(rows)])


def scipy_labels(rows: int, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(len(src), bool), (src, dst)), shape=(rows, rows))
    count, label = connected_components(graph, directed=False)
    lowest = np.full(count, rows)
    np.minimum.at(lowest, label, np.arange(rows))
    return lowest[label]


def graphs() -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    n = 20_000
    path = np.arange(n - 1)
    shuffled = rng.permutation(n)
    return {
        "random": (n, rng.integers(0, n, n), rng.integers(0, n, n)),
        "sparse": (n, rng.integers(0, n, n // 4), rng.integers(0, n, n // 4)),
        "path": (n, path, path + 1),
        "path backwards": (n, path[::-1] + 1, path[::-1]),
        "shuffled path": (n, shuffled[:-1], shuffled[1:]),
        "star below": (n, np.zeros(n - 1, np.int64), path + 1),
        "star above": (n, np.full(n - 1, n - 1), path),
        "comb": (n, np.r_[path[: n // 2], path[: n // 2]], np.r_[path[: n // 2] + 1, path[: n // 2] + n // 2]),
        "loops": (n, path, path),
    }


@pytest.mark.parametrize("edges", [0, 30, 150, 400])
def test_labels_are_the_lowest_row_of_each_component(edges):
    rng = np.random.default_rng(edges)
    src, dst = rng.integers(0, 300, edges), rng.integers(0, 300, edges)
    np.testing.assert_array_equal(component_labels(300, src, dst), union_find(300, src, dst))
    order = rng.permutation(edges)
    np.testing.assert_array_equal(component_labels(300, src[order], dst[order]), component_labels(300, dst, src))


@pytest.mark.parametrize("name", graphs())
def test_any_cut_and_order_of_the_edges_gives_the_labels_of_scipy(name, monkeypatch):
    rows, src, dst = graphs()[name]
    expected = scipy_labels(rows, src, dst)
    np.testing.assert_array_equal(component_labels(rows, src, dst), expected)
    rng = np.random.default_rng(0)
    for chunk, rounds in ((700, 8), (5000, 1)):  # many pieces; and SciPy for what one round leaves
        monkeypatch.setattr(components, "_CHUNK", chunk)
        monkeypatch.setattr(components, "_ROUNDS", rounds)
        order = rng.permutation(len(src))
        np.testing.assert_array_equal(component_labels(rows, src[order], dst[order]), expected)
        cuts = np.sort(rng.integers(0, len(src), 7))
        blocks = [make_edges(src[part], dst[part], np.ones(len(part))) for part in np.split(order, cuts)]
        found = streamed_labels(rows, iter(blocks))
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found, expected)


def test_edges_may_be_added_after_the_labels_were_read():
    forest = UnionFind(6)
    forest.add(np.array([4]), np.array([5]))
    assert forest.labels().tolist() == [0, 1, 2, 3, 4, 4]
    forest.add(np.array([5, 3], np.uint32), np.array([1, 3], np.uint32))
    assert forest.labels().tolist() == [0, 1, 2, 3, 1, 1]


def test_no_rows_and_no_edges():
    none = np.zeros(0, np.int64)
    assert component_labels(0, none, none).tolist() == []
    assert streamed_labels(3, []).tolist() == [0, 1, 2]
    label, alive, recuts = cut_components(3, none, none, none.astype(float), max_size=2)
    assert label.tolist() == [0, 1, 2] and not len(alive) and recuts == []


def test_a_chain_of_tight_groups_is_cut_at_its_weak_links():
    # Ten groups of 4 (strength .9), joined in a chain by weak edges (strength .1).
    src, dst, strength = [], [], []
    for g in range(10):
        for i in range(3):
            src.append(4 * g + i), dst.append(4 * g + i + 1), strength.append(0.9)
        if g:
            src.append(4 * g - 1), dst.append(4 * g), strength.append(0.1)
    arrays = np.array(src), np.array(dst), np.array(strength)
    label, alive, recuts = cut_components(42, *arrays, max_size=8)
    np.testing.assert_array_equal(np.bincount(label)[::4][:10], [4] * 10)
    assert alive.sum() == 30 and label[40] == 40
    assert [(r.first_row, r.size, r.largest_after) for r in recuts] == [(0, 40, 4)]
    assert 0.1 < recuts[0].strength <= 0.9


def cut_plainly(rows, src, dst, strength, max_size):
    """The rule of cut_components by recomputing everything at every rise of the bar."""
    label, alive, bar = scipy_labels(rows, src, dst), np.ones(len(src), bool), 0.0
    while bar < 0.999:
        large = np.bincount(label, minlength=rows)[label] > max_size
        if not large.any():
            break
        bar += (1 - bar) / 4
        alive &= ~(large[src] & (strength < bar))
        label = scipy_labels(rows, src[alive], dst[alive])
    return label, alive


def test_cutting_many_components_equals_the_plain_rule():
    rng = np.random.default_rng(3)
    group = rng.integers(0, 20, 3000)  # pairs within twenty groups of 100, and a few across
    src, dst = group * 100 + rng.integers(0, 100, 3000), group * 100 + rng.integers(0, 100, 3000)
    dst[:8] = rng.integers(0, 2000, 8)
    strength = rng.random(3000)
    strength[::40] = 1.0
    label, alive, recuts = cut_components(2000, src, dst, strength, max_size=30)
    expected, expected_alive = cut_plainly(2000, src, dst, strength, 30)
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_array_equal(alive, expected_alive)
    before = scipy_labels(2000, src, dst)
    assert len(recuts) >= 10
    for cut in recuts:
        assert cut.size == (before == cut.first_row).sum()
        assert cut.largest_after == np.bincount(expected[before == cut.first_row]).max()


def test_components_within_the_limit_keep_their_weak_edges():
    label, alive, recuts = cut_components(4, np.array([0, 2]), np.array([1, 3]), np.array([0.01, 0.02]), max_size=2)
    assert label.tolist() == [0, 0, 2, 2] and alive.all() and recuts == []


def test_identical_images_are_never_cut():
    dst = np.arange(1, 50)
    label, alive, recuts = cut_components(50, np.zeros(49, np.int64), dst, np.ones(49), max_size=10)
    assert (label == 0).all() and alive.all()
    assert not recuts  # nothing was cut


def test_rows_tied_to_the_representative_by_a_chain_alone_leave():
    # 1 stands for 0 .. 5: 0 and 2 are tied to it, 3 and 4 hang on 2 by a chain, 5 does too but resembles 1.
    src, dst = np.array([0, 1, 2, 3, 2, 6]), np.array([1, 2, 3, 4, 5, 7])
    label = component_labels(8, src, dst)
    representative = np.array([1, 1, 1, 1, 1, 1, 6, 6])
    known = {(3, 1): 0.3, (4, 1): 0.2, (5, 1): 0.7}
    asked: list[tuple[int, int]] = []

    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        asked.extend(zip(a.tolist(), b.tolist(), strict=True))
        return np.array([known[pair] for pair in zip(a.tolist(), b.tolist(), strict=True)])

    found, left = leave_unlike(label, representative, similarity, src, dst, floor=0.5, block=2)
    assert sorted(asked) == sorted(known)  # rows with an edge to the representative are not asked about
    assert left.tolist() == [False, False, False, True, True, False, False, False]
    assert found.tolist() == [0, 0, 0, 3, 3, 0, 6, 6]
    unknown, left = leave_unlike(label, representative, lambda a, b: np.full(len(a), np.nan), src, dst, floor=0.5)
    assert unknown.tolist() == label.tolist() and not left.any()
