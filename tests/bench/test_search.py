"""The bench of the search gives the figures it promises; their size is not a test's business."""

import json

import numpy as np
import pytest

from dinov2cli.bench.search import mixture, run, torch_top_k
from dinov2cli.errors import UserError


@pytest.mark.parametrize(("index", "least"), [("flat", 0.999), ("ivf", 0.6)])
def test_figures_are_there_and_recall_is_right(index, least):
    result = run(rows=3000, dim=32, k=8, queries=200, index=index, rounds=1)
    json.dumps(result)
    for name in ("seconds", "speedup", "memory_ratio", "recall", "build_seconds", "reference_seconds", "peak_rss_mb"):
        assert result[name] > 0, name
    assert least <= result["recall"] <= 1
    assert result["index"].startswith("Flat" if index == "flat" else "IVF")


def test_reference_is_brute_force():
    x = mixture(400, 16, 0)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    found = torch_top_k(x[:50], x, 5)
    expected = np.argsort(-(x[:50] @ x.T), axis=1)[:, :5]
    assert (found == expected).mean() > 0.99


def test_other_devices_are_refused():
    with pytest.raises(UserError, match="bench search --device cuda: the search runs on the CPU"):
        run(device="cuda")
