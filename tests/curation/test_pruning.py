"""Semantic duplicates within clusters, beside a pass over all pairs in float64."""

import numpy as np
import pytest

from dinov2cli.curation import pruning
from dinov2cli.curation.pruning import default_clusters, prune_semantic
from dinov2cli.errors import UserError
from dinov2cli.search.kmeans import assign, fit_kmeans


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def look_alikes(groups: int = 120, seed: int = 0, dim: int = 24) -> np.ndarray:
    """Groups of 1 to 9 images around centres of their own, so that cosines lie everywhere between 0.6 and 1."""
    rng = np.random.default_rng(seed)
    centre = np.repeat(unit(rng.normal(size=(groups, dim))), rng.integers(1, 10, groups), axis=0)
    x = unit(centre + rng.uniform(0.01, 0.2, (len(centre), 1)) * rng.normal(size=centre.shape))
    return x[rng.permutation(len(x))]


def one_by_one(x, label, distance, threshold) -> dict[int, tuple[int, float]]:
    """Dropped row -> (kept row it repeats most, their cosine): the definition, a row at a time."""
    x = x.astype(np.float64)
    dropped = {}
    for cluster in np.unique(label):
        members = np.flatnonzero(label == cluster)
        kept: list[int] = []
        for row in members[np.lexsort((members, -distance[members]))].tolist():
            cosine = [float(x[row] @ x[other]) for other in kept]
            if cosine and max(cosine) > threshold:
                dropped[row] = (kept[int(np.argmax(cosine))], max(cosine))
            else:
                kept.append(row)
    return dropped


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_drops_what_a_pass_one_by_one_drops(make_pool, monkeypatch, eps, chunk):
    monkeypatch.setattr(pruning, "_CHUNK", chunk)
    x = look_alikes()
    result = prune_semantic(make_pool(len(x)), x, eps=eps, clusters=8, seed=3)
    kmeans = fit_kmeans(x, 8, iterations=20, seed=3)
    found = assign(x, kmeans)
    expected = one_by_one(x, found.label, found.distance, 1 - eps)
    rows = {name: row for row, name in enumerate(make_pool(len(x)).column("id").to_pylist())}
    dropped = {rows[row["id"]]: row for row in result.dropped.to_pylist()}
    assert set(dropped) == set(expected) and 0 < len(expected) < len(x)
    for row, (of, cosine) in expected.items():
        assert rows[dropped[row]["duplicate_of"]] == of and dropped[row]["via"] == dropped[row]["duplicate_of"]
        assert dropped[row]["similarity"] == pytest.approx(cosine, abs=1e-5)
    assert set(result.dropped["reason"].to_pylist()) == {"semantic_duplicate"}
    assert result.kept["cluster"].to_pylist() == found.label[result.rows].tolist()


def test_the_least_typical_image_of_a_group_stays(make_pool):
    axis = np.zeros((6, 8), np.float32)
    axis[:, 0], axis[:, 1] = 1, [0, 0.01, 0.02, 0.25, 0.03, 0.04]
    result = prune_semantic(make_pool(6), unit(axis), eps=0.5, clusters=1)
    assert result.rows.tolist() == [3]  # the centroid lies among the others


@pytest.mark.parametrize("target", [1, 8, 60, 200, 400])
def test_target_size_is_exact_and_drops_the_most_similar(make_pool, target):
    x = look_alikes()
    result = prune_semantic(make_pool(len(x)), x, target_size=target, clusters=8)
    assert result.kept.num_rows == target and result.dropped.num_rows == len(x) - target
    names = set(result.kept["id"].to_pylist())
    assert {row["duplicate_of"] for row in result.dropped.to_pylist()} <= names | {None}
    if target == 400:  # an eps that keeps more than that is smaller, one that keeps fewer is larger
        kept = [prune_semantic(make_pool(len(x)), x, eps=e, clusters=8).kept.num_rows for e in (0.01, 0.3)]
        assert kept[0] >= target >= kept[1] and 0.01 <= result.summary["eps"] <= 0.3


def test_the_order_of_the_rows_does_not_matter_within_given_clusters(make_pool):
    x = look_alikes(seed=5)
    order = np.random.default_rng(1).permutation(len(x))
    kmeans = fit_kmeans(x, 5)
    first = prune_semantic(make_pool(len(x)), x, eps=0.1, kmeans=kmeans)
    again = prune_semantic(make_pool(len(x)), x[order], eps=0.1, kmeans=kmeans)
    assert set(first.rows) == set(order[again.rows])


def test_identical_and_zero_images(make_pool):
    same = np.repeat(look_alikes()[:1], 50, axis=0)
    assert prune_semantic(make_pool(50), same, eps=0.01, clusters=1).kept.num_rows == 1
    assert prune_semantic(make_pool(50), same, target_size=20, clusters=4).kept.num_rows == 20
    nothing = np.zeros((5, 8), np.float32)
    assert prune_semantic(make_pool(5), nothing, eps=0.5, clusters=1).kept.num_rows == 5  # similar to nothing


class Breaking:
    """A place for finished blocks that fails as a kill does, after so many of them."""

    def __init__(self, room: int | None) -> None:
        self.blocks: dict = {}
        self.room = room
        self.loaded = 0

    def stage(self, name, key):
        store = self

        class Stage:
            def load(self, start):
                found = store.blocks.get((name, str(key), start))
                store.loaded += found is not None
                return found

            def save(self, start, arrays):
                if store.room is not None and len(store.blocks) >= store.room:
                    raise KeyboardInterrupt
                store.blocks[(name, str(key), start)] = {k: v.copy() for k, v in arrays.items()}

        return Stage()


def test_a_stopped_run_goes_on_at_its_blocks(make_pool, monkeypatch):
    monkeypatch.setattr(pruning, "_CHUNK", 2)
    x = look_alikes()
    whole = prune_semantic(make_pool(len(x)), x, eps=0.1, clusters=40)
    store = Breaking(3)
    with pytest.raises(KeyboardInterrupt):
        prune_semantic(make_pool(len(x)), x, eps=0.1, clusters=40, store=store)
    store.room = None
    resumed = prune_semantic(make_pool(len(x)), x, eps=0.1, clusters=40, store=store)
    assert store.loaded == 3 and len(store.blocks) > 3
    np.testing.assert_array_equal(whole.rows, resumed.rows)
    assert whole.dropped.equals(resumed.dropped)


def test_impossible_settings(make_pool):
    x = look_alikes()
    pool = make_pool(len(x))
    for eps, target, text in [
        (None, None, "found neither of eps and --target-size"),
        (0.1, 10, "found both of eps and --target-size"),
        (3.0, None, r"eps 3\.0; expected a number from 0"),
        (None, 10_000, "--target-size 10000: the pool holds"),
    ]:
        with pytest.raises(UserError, match=text):
            prune_semantic(pool, x, eps=eps, target_size=target)
    assert default_clusters(10) == 1 and default_clusters(440_000_000) == 50_000
