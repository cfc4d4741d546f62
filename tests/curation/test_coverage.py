"""Evenness over clusters, shares of sources and nearness to query sets, beside their definitions in float64."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import entropy

from dinov2cli.curation.coverage import (
    balance,
    coverage_messages,
    default_clusters,
    gini,
    measure,
    near_share,
    source_shares,
)
from dinov2cli.curation.query_sets import QuerySet
from dinov2cli.search.kmeans import assign, fit_kmeans


@pytest.mark.parametrize("seed", range(20))
def test_balance_is_what_its_definitions_say(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 40, rng.integers(2, 30))
    counts[0] += 1
    found = balance(counts)
    assert found.entropy == pytest.approx(entropy(counts), abs=1e-12)
    assert found.evenness == pytest.approx(entropy(counts) / np.log(len(counts)), abs=1e-12)
    assert found.effective == pytest.approx(np.exp(entropy(counts)))
    pairs = np.abs(counts[:, None] - counts[None, :]).mean()
    assert found.gini == pytest.approx(pairs / (2 * counts.mean()), abs=1e-12)
    assert found.empty == (counts == 0).sum()


def test_extremes_of_balance():
    even, one = balance([5] * 8), balance([40] + [0] * 7)
    assert (even.evenness, even.gini, even.effective) == pytest.approx((1, 0, 8))
    assert (one.evenness, one.gini, one.effective) == pytest.approx((0, 1 - 1 / 8, 1))
    assert balance([0, 0]).entropy == 0 and gini([]) == 0 and balance([7]).evenness == 1
    assert [default_clusters(n) for n in (1, 10, 6400, 10**9)] == [1, 2, 200, 1000]


def test_clusters_are_counted_before_and_after(make_pool, random_vectors):
    x = random_vectors(600, dim=8)
    rows = np.arange(0, 600, 7)
    found = measure(make_pool(600), x, rows, clusters=12, seed=2)
    label = assign(x, fit_kmeans(x, 12, iterations=20, seed=2 + 7919)).label
    np.testing.assert_array_equal(found.counts[0], np.bincount(label, minlength=12))
    np.testing.assert_array_equal(found.counts[1], np.bincount(label[rows], minlength=12))
    assert found.after.entropy == pytest.approx(entropy(np.bincount(label[rows], minlength=12)))
    assert found.sources == [] and found.source_column is None  # all from one place: nothing to tell


def test_shares_of_sources_and_labels(make_pool, random_vectors):
    source = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    pool = make_pool(100).set_column(2, "source", pa.array(source))
    found = measure(pool, random_vectors(100), np.arange(50, 100), clusters=3)
    assert found.source_column == "source"
    assert [(s.name, s.before, s.after) for s in found.sources] == [("a", 0.6, 0.2), ("b", 0.3, 0.6), ("c", 0.1, 0.2)]
    labelled = measure(make_pool(100, label=[0, 1] * 50), random_vectors(100), np.arange(0, 100, 2), clusters=3)
    assert labelled.source_column == "label" and labelled.sources[0].after == 1.0
    many = source_shares(pa.chunked_array([pa.array([*map(str, range(50)), None])]), np.arange(5), shown=10)
    assert many[-1].name == "41 others" and sum(s.before for s in many) == pytest.approx(1)


def test_near_is_closer_than_the_median_of_the_set_to_itself(random_vectors):
    x, q = random_vectors(500, dim=6), random_vectors(40, 1, dim=6)
    rows = np.arange(100)
    share, threshold = near_share(x, rows, QuerySet("q", q, [str(i) for i in range(40)]))
    own = q.astype(np.float64) @ q.T.astype(np.float64)
    np.fill_diagonal(own, -2)
    assert threshold == pytest.approx(np.median(own.max(axis=1)), abs=1e-6)
    best = (x.astype(np.float64) @ q.T.astype(np.float64)).max(axis=1)
    assert share.before == pytest.approx((best >= threshold).mean(), abs=0.003)
    assert share.after == pytest.approx((best[rows] >= threshold).mean(), abs=0.011)
    assert 0 < share.after < 1


def test_a_set_of_one_image_has_no_near_and_the_summary_is_json(make_pool, random_vectors):
    x = random_vectors(100)
    found = measure(make_pool(100), x, np.arange(10), clusters=3, queries=[QuerySet("one", x[:1], ["a"])])
    text = json.dumps(found.summary(), allow_nan=False)
    assert json.loads(text)["near"]["sets"][0]["cosine"] is None
    assert len(coverage_messages(found)) == 1
