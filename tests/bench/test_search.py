"""The bench of the search gives the figures it promises; their size is not a test's business."""

import json

import numpy as np
import pytest

from dinov2cli.bench import search
from dinov2cli.bench.search import exact_lists, lines, list_recall, measure_scale, mixture, run
from dinov2cli.errors import UserError
from dinov2cli.search.components import component_labels
from dinov2cli.search.neighbours import similarity_edges


@pytest.mark.parametrize(("index", "least"), [("auto", 0.999), ("ivf", 0.9)])
def test_figures_are_there_and_recall_is_right(index, least, monkeypatch):
    monkeypatch.setattr(search, "run_in_child", lambda function, *arguments: function(*arguments))
    result = run(rows=4000, dim=32, k=8, index=index)
    json.dumps(result)
    for name in ("seconds", "speedup", "memory_ratio", "build_seconds", "search_seconds", "peak_mb", "index_mb"):
        assert result[name] > 0, name
    assert least <= result["recall"] <= 1
    assert least <= result["edge_recall"]["0.8"] <= 1 and result["edges"]["0.7"] > result["edges"]["0.9"] > 50
    assert result["report"]["plan"]["kind"] == ("flat" if index == "auto" else "ivf_codes")
    assert result["plan"][0] in lines(result)


def test_reference_is_brute_force():
    x = mixture(400, 16, 0)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    similarity, found = exact_lists(x[:50], x, np.arange(50), 5)
    full = x[:50] @ x.T
    np.fill_diagonal(full, -1)
    expected = np.argsort(-full, axis=1)[:, :5]
    assert (found == expected).mean() > 0.99
    np.testing.assert_allclose(similarity, np.take_along_axis(full, expected, 1), atol=1e-5)
    assert list_recall(found, expected) > 0.99 and list_recall(found[:, :4], expected) < 0.81


def test_the_data_are_seeded_and_hold_near_copies():
    x = mixture(2000, 64, 1)
    np.testing.assert_array_equal(x, mixture(2000, 64, 1))
    assert (x != mixture(2000, 64, 2)).any()
    similarity, _ = exact_lists(x, x, np.arange(2000), 1)
    assert 50 < (similarity > 0.95).sum() < 150  # about two in five of the 100 pairs


def test_other_devices_are_refused():
    with pytest.raises(UserError, match="bench search --device cuda: the search runs on the CPU"):
        run(device="cuda")


def test_scale_is_measured_beside_its_prediction():
    x = mixture(2000, 32, 3)
    figures = measure_scale(x, 0.8)
    json.dumps(figures)
    edges = similarity_edges(x, 0.8)
    assert figures["components"] == len(np.unique(component_labels(2000, edges.src, edges.dst)))
    assert figures["edges"] >= len(edges) > 0 and figures["predicted_seconds"] > 0 and figures["predicted_peak_mb"] > 0
