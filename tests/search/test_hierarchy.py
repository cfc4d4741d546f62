"""The hierarchy of clusters on data of very uneven density, its restart, and levels of very many clusters."""

import numpy as np
import pytest

from dinov2cli.artifacts.parts import Parts
from dinov2cli.errors import UserError
from dinov2cli.search import hierarchy
from dinov2cli.search.hierarchy import default_levels, fit_hierarchy
from dinov2cli.search.kmeans import assign, fit_kmeans
from dinov2cli.search.splitting import fit_split, shares


def uneven_square(seed: int) -> np.ndarray:
    """90 % of the points on the left tenth of a unit square, the rest uniform over it."""
    rng = np.random.default_rng(seed)
    dense = rng.random((9000, 2)) * [0.1, 1.0]
    return np.concatenate([dense, rng.random((1000, 2))]).astype(np.float32)


def test_resampling_moves_centroids_towards_a_uniform_cover():
    x = uneven_square(0)
    shares = []
    for steps in (0, 5):
        tree = fit_hierarchy(x, [200, 20], resample_steps=steps, spherical=False, seed=1)
        shares.append((tree.levels[0].kmeans.centroids[:, 0] > 0.1).mean())
    # A uniform cover of the support would have .9; k-means has the root of the density, .5; random rows .1.
    assert 0.35 < shares[0] < 0.55 and shares[1] > 0.62, shares


def test_hierarchy_labels_follow_the_tree_and_the_seed():
    x = uneven_square(1)[:3000]
    a, b = (fit_hierarchy(x, [60, 12, 3], resample_steps=2, spherical=False, seed=4) for _ in range(2))
    labels = a.labels()
    assert [len(np.unique(label)) for label in labels] == [60, 12, 3]
    for fine, coarse, level in zip(labels, labels[1:], a.levels[1:], strict=False):
        np.testing.assert_array_equal(coarse, level.assignment.label[fine])
    np.testing.assert_array_equal(labels[-1], b.labels()[-1])


def test_levels_must_shrink():
    with pytest.raises(UserError, match="cluster levels: found 10,10; expected numbers of clusters that shrink"):
        fit_hierarchy(np.eye(20, dtype=np.float32), [10, 10])
    with pytest.raises(UserError, match="found none"):
        fit_hierarchy(np.eye(20, dtype=np.float32), [])
    with pytest.raises(UserError, match="30 clusters asked of 20 rows"):
        fit_hierarchy(np.eye(20, dtype=np.float32), [30, 10])


def test_default_levels_shrink_to_tens_and_follow_the_target():
    assert default_levels(5) == [1]
    assert default_levels(50_000) == [1562, 156, 15]
    assert default_levels(50_000, target=800) == [800, 80]
    assert default_levels(10**9)[0] == 100_000
    assert default_levels(743_000_000, most=10**7) == [10**7, 10**6, 10**5, 10**4, 1000, 100, 10]


def rings(seed: int, rows: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Points on five rings of equal area, 90 % of them on the third; and the [5 x 24] equal cell each lies in."""
    rng = np.random.default_rng(seed)
    ring = np.where(rng.random(rows) < 0.9, 2, rng.integers(0, 5, rows))
    area = 2 * ring + rng.random(rows)  # every second unit of area is bare
    turn = rng.random(rows)
    x = np.sqrt(area + 1)[:, None] * np.stack([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)], axis=1)
    return x.astype(np.float32), ring


def divergence(points: np.ndarray) -> float:
    """KL divergence of where points lie from the uniform distribution over the rings' 120 equal cells, in nats."""
    area = (points**2).sum(1) - 1
    ring = np.clip(np.round((area - 0.5) / 2), 0, 4).astype(int)
    turn = np.floor((np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) % 1) * 24).astype(int) % 24
    share = np.bincount(ring * 24 + turn, minlength=120) / len(points)
    return float((share[share > 0] * np.log(share[share > 0] * 120)).sum())


def test_on_rings_of_uneven_density_resampled_centroids_cover_the_support_evenly():
    x, _ = rings(0)
    found = [
        divergence(fit_hierarchy(x, [600, 60], resample_steps=n, spherical=False).levels[0].kmeans.centroids)
        for n in (0, 10)
    ]
    uniform = [rings(0)[0][np.random.default_rng(s).choice(20_000, 600)] for s in range(1)]
    assert divergence(x) > 1.0 and divergence(uniform[0]) > 1.0  # rows themselves follow the density
    # Chance alone, 600 uniform draws in 120 cells, has 0.1.
    assert found[1] < 0.6 * found[0], found


def test_a_stopped_hierarchy_continues_from_its_fits(tmp_path, monkeypatch):
    x, store = uneven_square(2)[:4000], Parts(tmp_path)
    whole = fit_hierarchy(x, [80, 8], resample_steps=2, spherical=False)

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_hierarchy(x, [80, 8], resample_steps=2, spherical=False, store=store, progress=stop)
    fits: list[int] = []
    fit = hierarchy.fit_kmeans
    monkeypatch.setattr(hierarchy, "fit_kmeans", lambda *a, **k: fits.append(a[1]) or fit(*a, **k))
    again = fit_hierarchy(x, [80, 8], resample_steps=2, spherical=False, store=store)
    assert fits == [8, 8]  # one of three of the second level was done
    for a, b in zip(whole.levels, again.levels, strict=True):
        np.testing.assert_array_equal(a.kmeans.centroids, b.kmeans.centroids)
        np.testing.assert_array_equal(a.assignment.label, b.assignment.label)
        assert a.kmeans.inertia == b.kmeans.inertia


def test_very_many_clusters_are_split_in_two_stages(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12_000, 8)).astype(np.float32)
    plain = fit_kmeans(x, 900, spherical=False, init="spread")
    split = fit_split(x, 900, spherical=False)
    assert split.centroids.shape == (900, 8) and split.sample == 12_000
    error = assign(x, split).distance.mean()
    assert error <= split.inertia * 1.0001 and error < 1.12 * plain.inertia
    tree = fit_hierarchy(x, [900, 30], split_above=500, resample_steps=1, spherical=False)
    assert [len(np.unique(label)) for label in tree.labels()] == [900, 30]
    # Kept splits are not made again, and come to the same.
    store = Parts(tmp_path)

    def stop(done: int, _: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_split(x, 900, spherical=False, store=store, progress=stop)
    again = fit_split(x, 900, spherical=False, store=store)
    np.testing.assert_array_equal(again.centroids, split.centroids)


@pytest.mark.parametrize("seed", range(50))
def test_shares_are_exact_and_in_proportion(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 40, 12) * rng.integers(0, 2, 12)
    sizes[0] += 1
    total = int(rng.integers((sizes > 0).sum(), sizes.sum() + 1))
    share = shares(sizes, total)
    assert share.sum() == total and (share <= sizes).all() and ((share > 0) == (sizes > 0)).all()
    free = (share > 1) & (share < sizes)
    assert (np.abs(share - sizes * total / sizes.sum())[free] < 12).all()
