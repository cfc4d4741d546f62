"""Components against a union-find written here, and the guard against chains."""

import numpy as np
import pytest

from dinov2cli.search.components import component_labels, cut_components


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


@pytest.mark.parametrize("edges", [0, 30, 150, 400])
def test_labels_are_the_lowest_row_of_each_component(edges):
    rng = np.random.default_rng(edges)
    src, dst = rng.integers(0, 300, edges), rng.integers(0, 300, edges)
    np.testing.assert_array_equal(component_labels(300, src, dst), union_find(300, src, dst))
    order = rng.permutation(edges)
    np.testing.assert_array_equal(component_labels(300, src[order], dst[order]), component_labels(300, dst, src))


def test_no_rows_and_no_edges():
    none = np.zeros(0, np.int64)
    assert component_labels(0, none, none).tolist() == []
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


def test_components_within_the_limit_keep_their_weak_edges():
    label, alive, recuts = cut_components(4, np.array([0, 2]), np.array([1, 3]), np.array([0.01, 0.02]), max_size=2)
    assert label.tolist() == [0, 0, 2, 2] and alive.all() and recuts == []


def test_identical_images_are_never_cut():
    dst = np.arange(1, 50)
    label, alive, recuts = cut_components(50, np.zeros(49, np.int64), dst, np.ones(49), max_size=10)
    assert (label == 0).all() and alive.all()
    assert recuts[0].largest_after == 50
