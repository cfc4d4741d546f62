"""The profile of nearest similarities: the histogram, the pairs at the threshold, and the gap."""

import numpy as np
import pytest

from dinov2cli.curation.profile import BINS, histogram_gap, similarity_profile


@pytest.fixture
def vectors():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(300, 24)).astype(np.float32)
    x[250:] = x[:50] + 0.1 * rng.normal(size=(50, 24)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_counts_and_pairs_are_those_of_brute_force(vectors):
    profile = similarity_profile(vectors, 0.6, pairs=5, neighbours=299)
    cosine = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(cosine, -1)
    best = cosine.max(axis=1)
    np.testing.assert_array_equal(profile.counts, np.histogram(best, bins=BINS, range=(0, 1))[0])
    assert profile.sampled == 300
    upper = [(cosine[a, b], a, b) for a in range(300) for b in range(a + 1, 300)]
    above = sorted((c - 0.6, a, b) for c, a, b in upper if c > 0.6)[:5]
    below = sorted((0.6 - c, a, b) for c, a, b in upper if c <= 0.6)[:5]
    assert [(a, b) for a, b, _ in profile.above] == [(a, b) for _, a, b in above]
    assert [(a, b) for a, b, _ in profile.below] == [(a, b) for _, a, b in below]
    assert profile.gap is not None and max(best[best < 0.9]) < profile.gap < min(best[best > 0.9])


def test_a_gap_is_the_middle_of_the_valley_between_two_heaps():
    x = (np.arange(100) + 0.5) / 100
    heaps = 1000 * np.exp(-0.5 * ((x - 0.4) / 0.05) ** 2) + 50 * np.exp(-0.5 * ((x - 0.95) / 0.02) ** 2)
    assert histogram_gap(heaps.astype(int)) == pytest.approx(0.74, abs=0.06)


@pytest.mark.parametrize("counts", [np.zeros(100, int), np.full(100, 7), np.arange(100), np.arange(100)[::-1]])
def test_one_heap_has_no_gap(counts):
    assert histogram_gap(counts) is None


def test_one_heap_with_noise_has_no_gap():
    rng = np.random.default_rng(0)
    assert histogram_gap(np.histogram(rng.normal(0.5, 0.1, 5000), bins=100, range=(0, 1))[0]) is None


def test_identical_rows_and_sets_too_small(vectors):
    opposite = similarity_profile(np.stack([vectors[0], -vectors[0]]), 0.6)
    assert opposite.counts[0] == 2
    same = similarity_profile(np.repeat(vectors[:1], 20, axis=0), 0.6)
    assert same.counts[-1] == 20 and not same.below and same.above[0][2] == pytest.approx(1)
    assert similarity_profile(vectors[:1], 0.6).sampled == 0
    assert similarity_profile(vectors[:0], 0.6).sampled == 0


def test_rows_beyond_the_sample_are_still_compared_with(monkeypatch, vectors):
    monkeypatch.setattr("dinov2cli.curation.profile._FLOPS", 1.0)
    monkeypatch.setattr("dinov2cli.curation.profile._LEAST", 100)
    profile = similarity_profile(vectors, 0.6, seed=3)
    assert profile.sampled == 100 == profile.counts.sum()
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -1)
    whole = np.histogram(cosine.max(axis=1), bins=BINS, range=(0, 1))[0]
    assert (profile.counts <= whole).all()
