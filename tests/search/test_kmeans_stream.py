"""k-means by blocks: against float64 Lloyd, the same for every block size, memory and number of ranks; restarts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinov2cli.artifacts.parts import Parts
from dinov2cli.distributed import ALONE, Ranks, join, leave
from dinov2cli.errors import InputError, UserError
from dinov2cli.search import kmeans as room
from dinov2cli.search import lloyd
from dinov2cli.search.balanced import balanced_assign
from dinov2cli.search.kmeans import assign, fit_kmeans
from dinov2cli.search.nearest import finder
from dinov2cli.search.seeding import start_centroids
from dinov2cli.search.threads import Threads
from dinov2cli.search.vectors import SubsetVectors, as_vectors
from tests.launch import launch

MB = 1 << 20


def clouds(rows: int = 6000, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(40, dim))
    return (means[rng.integers(0, 40, rows)] + rng.normal(size=(rows, dim))).astype(np.float16)


def textbook(x: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
    """Lloyd's iterations in float64, all distances in full."""
    x, c = x.astype(np.float64), centroids.astype(np.float64)
    for _ in range(iterations):
        label = ((x[:, None] - c[None]) ** 2).sum(-1).argmin(1)
        c = np.stack([x[label == i].mean(0) if (label == i).any() else c[i] for i in range(len(c))])
    return c, ((x[:, None] - c[None]) ** 2).sum(-1).min(1).mean()


@pytest.fixture
def streamed(monkeypatch):
    """Fits that never keep rows and never take the short way."""

    def switch(block: int, keep: bool = False, short: bool = False) -> None:
        monkeypatch.setattr(room, "room_for", lambda *_, **__: lloyd.Room(block, keep))
        monkeypatch.setattr(room, "_SHORT", 4e11 if short else 0.0)

    return switch


@pytest.mark.parametrize("short", [False, True])
def test_iterations_are_those_of_the_textbook(streamed, short):
    x = clouds(3000)
    streamed(512, keep=short, short=short)
    ours = fit_kmeans(x, 30, fit="full", nested=False, spherical=False, iterations=12)
    start = start_centroids(as_vectors(x, unit=False), 30, "random", 0)
    centroids, inertia = textbook(x, start, 12)
    np.testing.assert_allclose(ours.centroids, centroids, atol=2e-4)
    assert ours.inertia == pytest.approx(inertia, rel=1e-5)
    assert ours.sample == 3000 and ours.empty == 0


@pytest.mark.parametrize("spherical", [False, True])
def test_blocks_and_what_is_kept_change_no_bit(streamed, spherical):
    x = clouds()
    found = []
    for block, keep, short in ((256, False, False), (2048, False, False), (1024, True, False), (512, True, True)):
        streamed(block, keep, short)
        found.append(fit_kmeans(x, 40, fit="full", iterations=20, spherical=spherical))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].centroids, other.centroids)
        assert (found[0].inertia, found[0].passes) == (other.inertia, other.passes)


def test_sums_are_exact_in_any_order():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5000, 8)) * 10.0 ** rng.integers(-12, 1, (5000, 1))).astype(np.float32)
    start, found = x[:4], []
    for block, order in ((64, np.arange(5000)), (1024, np.arange(5000)[::-1]), (5000, rng.permutation(5000))):
        rows = lloyd.Rows(as_vectors(x[order], unit=False), lloyd.Room(block, False), seed=0, device="cpu")
        passes = lloyd.Passes(rows, False, lloyd.power_above(x), ALONE, False, Threads())
        found.append(passes.run(start, 8))
    for total, count, error in found[1:]:
        np.testing.assert_array_equal(total, found[0][0])
        np.testing.assert_array_equal(count, found[0][1])
        assert error == found[0][2]
    np.testing.assert_allclose(found[0][0].sum(0), x.sum(0, dtype=np.float64), atol=5000 * 2.0**-20)


def test_nested_samples_cost_less_and_end_as_well():
    x = clouds(40_000)
    plain = fit_kmeans(x, 50, fit="full", nested=False, iterations=10)
    nested = fit_kmeans(x, 50, fit="full", iterations=10)
    assert (plain.passes, nested.passes) == (10.0, 4.5)
    assert nested.inertia <= 1.03 * plain.inertia
    # The inertia told is that of all rows.
    assert nested.inertia == pytest.approx(assign(x, nested).distance.mean(dtype=np.float64), rel=1e-4)
    assert room._passes(100, 10, 10, True) == [8] * 10  # too few rows for samples
    assert fit_kmeans(x, 50, fit=0.1).sample == 4000


def test_it_ends_when_nothing_moves_or_little_is_gained():
    x = clouds(2000)
    done = fit_kmeans(x, 10, fit="full", nested=False, iterations=300)
    assert done.converged and done.passes < 300
    assert fit_kmeans(x, 10, fit="full", nested=False, iterations=301).inertia == done.inertia
    assert fit_kmeans(x, 10, fit="full", nested=False, iterations=300, tolerance=0.01).passes < done.passes


def test_empty_clusters_get_half_of_the_largest():
    total = np.array([[10.0, 0], [0, 0], [0, 0], [0, 16.0]])
    moved, empty = lloyd.moved_centroids(total, np.array([10, 0, 0, 8]), spherical=False)
    assert empty == 2
    # The first takes five of the ten rows, so that the second takes from the eight.
    np.testing.assert_allclose(moved, [[1, 0], [1.001, 0], [0, 1.998], [0, 2]], atol=1e-6)
    # Two far groups, all starts in one of them: the other is reached.
    x = np.concatenate([np.zeros((50, 3)), 9 * np.ones((50, 3))]) + np.random.default_rng(0).normal(size=(100, 3)) / 9
    lost = fit_kmeans(x.astype(np.float32), 12, spherical=False, nested=False, iterations=30)
    assert lost.empty == 0 and lost.inertia < 0.05


def test_copies_of_few_rows_are_reported_not_waited_for():
    one = fit_kmeans(np.ones((500, 4), np.float32), 6, iterations=8)
    assert one.empty == 5 and one.inertia < 1e-6 and np.isfinite(one.centroids).all() and one.splits > 0
    zeros = fit_kmeans(np.zeros((50, 4), np.float32), 3)
    assert np.isfinite(zeros.centroids).all()


def test_bad_rows_and_settings_are_named():
    x = clouds(500).astype(np.float32)
    x[321, 2] = np.nan
    with pytest.raises(InputError, match="row 321 holds NaN"):
        fit_kmeans(x, 5, fit="full")
    for use in (assign, lambda rows, kmeans: balanced_assign(rows, kmeans, 100)):
        with pytest.raises(InputError, match="rows of length 9, centroids of length 16"):
            use(np.zeros((4, 9), np.float32), fit_kmeans(clouds(500), 5))
        assert len(use(np.zeros((0, 16), np.float32), fit_kmeans(clouds(500), 5)).label) == 0
    for wrong in ({"fit": "some"}, {"fit": 0.0}, {"iterations": 0}, {"init": "best"}):
        with pytest.raises(UserError, match=r"k-means.*expected"):
            fit_kmeans(clouds(500), 5, **wrong)
    with pytest.raises(UserError, match=r"needs at least 0\.\d+ GB of memory, found 0\.10 GB allowed"):
        fit_kmeans(clouds(500), 5, memory=100 * MB)


def test_room_follows_memory():
    assert lloyd.room_for(10**6, 256, 1000, None).keep
    small = lloyd.room_for(10**9, 1024, 1000, 700 * MB)
    assert not small.keep and small.block >= 1024
    assert lloyd.room_for(10**9, 1024, 1000, 700 * MB) == lloyd.room_for(10**12, 1024, 1000, 700 * MB)
    assert lloyd.room_for(10**6, 256, 1000, 4 << 30).keep


_MEASURED = """
import re, sys
import numpy as np
from dinov2cli.search.kmeans import fit_kmeans
x = np.load(sys.argv[1], mmap_mode="r")
found = fit_kmeans(x, 16, fit="full", iterations=3, memory=int(sys.argv[2]))
# Not getrusage: its peak begins with that of the process that started this one.
print(found.sample, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
"""


@pytest.fixture(autouse=True)
def _pages(monkeypatch):
    """Small pages, whatever a command that ran in this process has set."""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("huge, megabytes", [("0", 600), ("1", 960)])
def test_memory_stays_below_the_limit(tmp_path, monkeypatch, huge, megabytes):
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (200_000, 768))  # 614 MB as float32
    part = np.random.default_rng(0).standard_normal((20_000, 768), dtype=np.float32).astype(np.float16)
    for start in range(0, 200_000, 20_000):
        file[start : start + 20_000] = np.roll(part, start // 20_000, axis=1)
    file.flush()
    limit = megabytes * MB
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", huge)
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "x.npy"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sample, peak = map(int, done.stdout.split())
    assert sample == 200_000 and peak * 1024 < limit


def test_a_stopped_fit_continues_at_its_last_iteration(streamed, tmp_path):
    x = clouds()
    streamed(1024)
    common = {"fit": "full", "iterations": 10, "spherical": False}
    whole = fit_kmeans(x, 20, **common)

    def stop(done: int, _: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    store = Parts(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit_kmeans(x, 20, store=store, progress=stop, **common)
    left: list[int] = []
    again = fit_kmeans(x, 20, store=store, progress=lambda done, _: left.append(done), **common)
    assert left[0] == 8
    np.testing.assert_array_equal(whole.centroids, again.centroids)
    assert (whole.inertia, whole.passes, whole.splits) == (again.inertia, again.passes, again.splits)
    left.clear()
    fit_kmeans(x, 21, store=store, progress=lambda done, _: left.append(done), **common)  # another fit
    assert left[0] == 1


def test_assignment_continues_from_its_blocks(tmp_path):
    x, store = clouds(), Parts(tmp_path)
    kmeans = fit_kmeans(x, 20)

    def stop(done: int, _: int) -> None:
        if done >= 3000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assign(x, kmeans, block=1000, store=store, progress=stop)
    read: list[int] = []

    class Counted(SubsetVectors):
        def block(self, start: int, stop: int) -> np.ndarray:
            read.append(start)
            return super().block(start, stop)

    counted = Counted(as_vectors(x), np.arange(len(x)))
    again = assign(counted, kmeans, block=1000, store=store)
    assert read == [3000, 4000, 5000]
    np.testing.assert_array_equal(again.label, assign(x, kmeans).label)


@pytest.mark.parametrize("spherical", [False, True])
def test_many_centroids_are_searched_through_cells(spherical):
    rng = np.random.default_rng(0)
    x = clouds(20_000)
    kmeans = room.KMeans(as_vectors(x, unit=spherical).gather(rng.choice(20_000, 4000, False)), spherical, 0.0, 0)
    exact, near = assign(x, kmeans), assign(x, kmeans, index="ivf")
    same = (exact.label == near.label).mean()
    assert same > 0.97 and near.agreement == pytest.approx(same, abs=0.02) and exact.agreement == 1.0
    agree = exact.label == near.label
    np.testing.assert_allclose(exact.distance[agree], near.distance[agree], atol=1e-3)
    assert finder(kmeans.centroids, spherical)[1]


@pytest.fixture(scope="module")
def ranks_found(tmp_path_factory) -> list[dict]:
    """What 1 (this one), 2 and 3 processes find, each rank of them."""
    kept = room.room_for, room._SHORT
    found = [json.loads(json.dumps(fits(ALONE)))]
    room.room_for, room._SHORT = kept
    for processes in (2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{processes}")
        done = launch(__file__, str(folder), processes=processes, module="")
        assert done.returncode == 0, done.stderr
        found += [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return found


def test_any_number_of_ranks_finds_the_same(ranks_found):
    assert len(ranks_found) == 6
    for other in ranks_found[1:]:
        assert other == ranks_found[0]


def fits(ranks: Ranks) -> dict:
    """Fits of several kinds, their bytes as hex, and the error that rows which are not finite come to."""
    x = clouds()
    found = {}
    for name, block, keep, short in (("kept", 512, True, True), ("streamed", 700, False, False)):
        room.room_for = lambda *_, block=block, keep=keep, **__: lloyd.Room(block, keep)
        room._SHORT = 4e11 if short else 0.0
        for spherical in (False, True):
            one = fit_kmeans(x, 30, fit="full", spherical=spherical, ranks=ranks)
            found[f"{name} {spherical}"] = [one.centroids.tobytes().hex(), one.inertia, one.passes]
    bad = x.astype(np.float32)
    bad[800] = np.inf  # in one rank's share
    try:
        fit_kmeans(bad, 30, fit="full", init="random", seed=3, ranks=ranks)
    except InputError as error:
        found["error"] = str(error)
    return found


def main(folder: Path) -> None:
    """The fits in this process of a launch, written to RANK.json."""
    ranks = join("cpu")
    (folder / f"{ranks.rank}.json").write_text(json.dumps(fits(ranks)))
    leave()
    os._exit(0)  # as the program does: Python's own exit may abort while threads of a process group end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
