import numpy as np
import pytest

from dinov2cli.errors import InputError
from dinov2cli.fairness import neighbours
from dinov2cli.fairness.neighbours import outside_neighbours, same_attribute_precision


def brute(vectors, codes, clusters, k):
    """Every pair in float64, one image at a time: neighbours, precision, counted, what chance gives."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    n = len(vectors)
    near, values = np.full((n, k), -1), np.zeros(n)
    counted, expected = np.zeros(n, dtype=bool), np.zeros(n)
    for i in range(n):
        if codes[i] < 0:
            continue
        others = [j for j in range(n) if codes[j] >= 0 and clusters[j] != clusters[i]]
        others.sort(key=lambda j: -(unit[j] @ unit[i]))
        near[i, : len(others[:k])] = others[:k]
        counted[i] = len(others) >= k
        if counted[i]:
            values[i] = np.mean([codes[j] == codes[i] for j in others[:k]])
            expected[i] = np.mean([codes[j] == codes[i] for j in others])
    return near, values, counted, expected


@pytest.fixture(params=["single", "small", "mixed", "one large"])
def images(request):
    rng = np.random.default_rng(3)
    n = 160
    vectors = rng.normal(size=(n, 6)).astype(np.float32)
    clusters = {
        "single": rng.permutation(n) + 7,
        "small": rng.integers(0, 60, n),
        "mixed": np.repeat(np.arange(9), [1, 2, 3, 5, 9, 20, 30, 40, 50]),
        "one large": np.r_[np.zeros(140, np.int64), np.arange(20) + 1],
    }[request.param]
    # Images of a cluster look alike, as frames of a video do: its own cluster is what an image finds first.
    vectors += 5 * rng.normal(size=(clusters.max() + 1, 6))[clusters].astype(np.float32)
    codes = rng.integers(0, 3, n)
    codes[rng.random(n) < 0.2] = -1
    return vectors, codes, clusters


@pytest.mark.parametrize("large", [256, 8])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_equals_brute_force(images, k, large, monkeypatch):
    monkeypatch.setattr(neighbours, "_LARGE", large)
    monkeypatch.setattr(neighbours, "_LISTED", 500)
    vectors, codes, clusters = images
    near, values, counted, expected = brute(vectors, codes, clusters, k)
    assert np.array_equal(outside_neighbours(vectors, codes >= 0, clusters, k), near)
    found = same_attribute_precision(vectors, codes, clusters, [k])[k]
    assert np.array_equal(found.counted, counted)
    assert found.values == pytest.approx(values) and found.expected == pytest.approx(expected)


def test_every_k_comes_from_one_search(images, monkeypatch):
    vectors, codes, clusters = images
    alone = {k: same_attribute_precision(vectors, codes, clusters, [k])[k] for k in (1, 3, 10)}
    rows = outside_neighbours(vectors, codes >= 0, clusters, 10)
    monkeypatch.setattr(neighbours, "outside_neighbours", None)
    for k, found in same_attribute_precision(vectors, codes, clusters, [10, 1, 3], neighbours=rows).items():
        for one, other in zip(found, alone[k], strict=True):
            assert np.array_equal(one, other)


def test_frames_of_one_person_do_not_count_and_a_told_value_is_found():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 10)
    codes = (np.arange(30) % 3)[clusters]
    vectors = rng.normal(size=(30, 16))[clusters] + 0.01 * rng.normal(size=(300, 16))
    by_person = same_attribute_precision(vectors.astype(np.float32), codes, clusters, [5])[5]
    by_image = same_attribute_precision(vectors.astype(np.float32), codes, None, [5])[5]
    assert by_image.values.mean() == 1.0  # all five are of the very person
    assert by_person.values.mean() < 0.6 and by_person.expected == pytest.approx(np.full(300, 90 / 290))
    told = vectors + 20 * np.eye(16)[codes]
    assert same_attribute_precision(told.astype(np.float32), codes, clusters, [5])[5].values.mean() == 1.0


def test_nothing_to_find_is_not_counted():
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    for codes, clusters in (
        (np.full(6, -1), np.arange(6)),
        (np.zeros(6, np.int64), np.zeros(6, np.int64)),
        (np.array([0, -1, -1, -1, -1, -1]), np.arange(6)),
    ):
        values, counted, expected = same_attribute_precision(vectors, codes, clusters, [2])[2]
        assert not counted.any() and not values.any() and not expected.any()


def test_impossible_input_is_refused():
    vectors = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match="ks: expected whole numbers from 1"):
        same_attribute_precision(vectors, np.zeros(4, np.int64), None, [0, 5])
    vectors[2, 1] = np.inf
    with pytest.raises(InputError, match="NaN or infinity"):
        same_attribute_precision(vectors, np.zeros(4, np.int64), None, [1])
