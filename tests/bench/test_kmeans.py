import numpy as np
import pytest

from dinov2cli.bench import kmeans
from dinov2cli.search.kmeans import fit_kmeans


@pytest.mark.parametrize("huge", ["0", "1"])
def test_all_runs_reach_the_same_inertia_and_figures_are_there(monkeypatch, huge):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", huge)  # the program sets it, and memory limits reckon with it
    figures = kmeans.run(device="cpu", rows=4000, dim=24, clusters=20, iterations=8, rounds=1, seed=1)
    for name in ("inertia_ratio", "plain_inertia_ratio", "streamed_inertia_ratio"):
        assert 0.9 < figures[name] < 1.1
    for name in ("seconds", "reference_seconds", "streamed_seconds", "hierarchy_seconds", "speedup"):
        assert figures[name] > 0
    assert figures["hierarchy_levels"] == [20, 2] and "hierarchy_speedup" not in figures
    assert len(kmeans.lines(figures)) == len(figures)


def test_inertia_is_that_of_the_centroids_over_all_rows():
    x = kmeans._rows(None, 2000, 16, 0)
    found = fit_kmeans(x, 10, fit="full")
    distance = ((x[:, None] - found.centroids[None]) ** 2).sum(-1).min(1).mean()
    np.testing.assert_allclose(kmeans._inertia(x, found.centroids, "cpu"), distance, rtol=1e-4)
