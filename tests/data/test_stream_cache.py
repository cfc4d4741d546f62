"""The cache of a stream: its bound, its writers, what happens to damaged files and full disks."""

import io
import multiprocessing
import os
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from dinov2cli.data import remote
from dinov2cli.data.block_cache import BlockCache
from dinov2cli.data.stream import StreamSource
from dinov2cli.errors import WorkError
from tests.data.parquet_sets import cached, stream, write, write_shards


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.fixture
def shards(tmp_path, encode):
    return write_shards(tmp_path / "set", encode)


def test_the_bound_holds_and_the_least_recently_asked_for_go_first(shards, encode):
    source = stream(shards, "stream=3")
    for block in (0, 1, 2):
        source.fetch(block)
        time.sleep(0.01)
    source.fetch(0)
    time.sleep(0.01)
    source.fetch(3)
    assert cached(source) == ["0000000-0.arrow", "0000002-0.arrow", "0000003-0.arrow"]
    order = np.random.default_rng(0).permutation(20)
    for row in order:
        assert source.read(row) == encode(row)
        assert len(cached(source)) <= 3
        assert all(os.path.exists(path) for path, _ in list(source._mapped.values())[-1:])
        assert len(source._mapped) <= 3
    leftovers = [path.name for path in (Path(source._folder) / "image").iterdir() if path.suffix != ".lock"]
    assert len(leftovers) <= 3 and all(name.endswith(".arrow") for name in leftovers)


def test_maps_of_removed_blocks_are_let_go(shards, encode):
    source, other = stream(shards, "stream=2"), stream(shards, "stream=2")
    source.read(0)
    for row in (4, 8, 11):
        other.read(row)
        time.sleep(0.01)
    assert source.read(1) == encode(1)  # removed, but mapped
    source.read(11)
    assert [key[0] for key in source._mapped] == [4]


def test_damaged_and_removed_blocks_are_fetched_again(shards, encode):
    source = stream(shards)
    source.fetch(0)
    path = Path(source._folder) / "image" / "0000000-0.arrow"
    whole = path.read_bytes()
    for content in (whole[:-40], b"", b"junk" * 100):
        path.write_bytes(content)
        assert stream(shards).read(1) == encode(1)
        assert path.read_bytes() == whole
    path.unlink()
    assert stream(shards).read(2) == encode(2)


def test_leftovers_of_killed_runs_do_no_harm(tmp_path):
    cache = BlockCache(str(tmp_path / "c"), 2)
    os.makedirs(cache.folder)
    for name, age in (("a.partial", 10_000), ("b.partial", 0), ("x.partial", 0)):
        (tmp_path / "c" / name).write_text("cut")
        os.utime(tmp_path / "c" / name, (time.time() - age,) * 2)
    assert Path(cache.get("x", lambda file: file.write(b"whole"))).read_bytes() == b"whole"
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.suffix != ".lock") == ["b.partial", "x"]
    with pytest.raises(RuntimeError):
        cache.get("y", _fail)
    assert not (tmp_path / "c" / "y").exists() and not (tmp_path / "c" / "y.partial").exists()
    assert Path(cache.get("y", lambda file: file.write(b"y"))).read_bytes() == b"y"  # the lock is free again


def _fail(file) -> None:
    file.write(b"half")
    raise RuntimeError("the network went away")


def test_a_cache_that_cannot_be_made(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(WorkError, match=r"cannot be written .*; set HF_DATASETS_CACHE to a folder that can"):
        stream(shards).read(0)


# --- processes ----------------------------------------------------------------------------------------------------


def _read_all(source: StreamSource, log: str, start, out) -> None:
    real = remote.copy_row_group

    def counting(file, group, column, target):
        with open(log, "a") as lines:
            lines.write(f"{os.path.basename(file.url)} {group}\n")
        time.sleep(0.02)  # long enough for the other process to want it too
        real(file, group, column, target)

    from dinov2cli.data import stream as module

    module.copy_row_group = counting
    start.wait()
    out.put([source.read(row) for row in range(len(source))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_processes_fetch_a_block_once(shards, tmp_path, encode, method):
    source = stream(shards)
    source.read(0)
    context = multiprocessing.get_context(method)
    start, out = context.Barrier(2), context.Queue()
    log = str(tmp_path / "log")
    workers = [context.Process(target=_read_all, args=(source, log, start, out), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [out.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert results == [[encode(row) for row in range(20)]] * 2
    fetched = Path(log).read_text().splitlines()
    assert sorted(fetched) == sorted(set(fetched)) and len(fetched) == 7  # all but the one that was there


def test_fetching_in_the_background_while_reading(shards, encode):
    source = stream(shards, "stream=4")
    failed: list[BaseException] = []

    def ahead() -> None:
        try:
            for block in list(range(8)) * 5:
                source.fetch(block)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=ahead)
    thread.start()
    for row in np.random.default_rng(1).permutation(20).tolist() * 3:
        assert source.read(row) == encode(row)
    thread.join()
    assert not failed


def _read_some(source: StreamSource, out) -> None:
    out.put([source.read(row) for row in range(0, 20, 2)])


def test_workers_may_be_forked_while_blocks_are_fetched(shards, encode):
    """A lock that the thread holds at the fork must not stay held by the child."""
    source = stream(shards, "stream=2")
    stop = threading.Event()

    def ahead() -> None:
        while not stop.is_set():
            for block in range(8):
                source.fetch(block)

    thread = threading.Thread(target=ahead)
    thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(6):
            out = context.Queue()
            worker = context.Process(target=_read_some, args=(source, out), daemon=True)
            worker.start()
            assert out.get(timeout=30) == [encode(row) for row in range(0, 20, 2)]
            worker.join()
    finally:
        stop.set()
        thread.join()


def test_a_full_disk_is_named(shards, monkeypatch):
    def full(file, group, column, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov2cli.data.stream.copy_row_group", full)
    source = stream(shards)
    with pytest.raises(WorkError, match=r"no space left for its row groups in .*dinov2-streams.*; free some"):
        source.read(0)


class FullDisk(io.FileIO):
    """A file on a disk that takes nothing."""

    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_disk_that_refuses_what_is_left_in_the_buffer(shards, monkeypatch):
    """Small writes go to a buffer; a full disk refuses them when it is flushed, and once more when it is closed."""
    full = lambda path, mode: io.BufferedWriter(FullDisk(path, "w"), 1 << 20)  # noqa: E731
    monkeypatch.setattr("dinov2cli.data.block_cache.open", full, raising=False)
    source = stream(shards)
    with pytest.raises(WorkError, match=r"dinov2-streams.*: cannot be written \(No space left on device\)"):
        source.read(0)
    assert cached(source) == []


def test_sets_that_look_alike_share_no_cache(tmp_path, encode):
    """Same file names, sizes and times, other images."""
    sources = []
    for number, seeds in enumerate(((1, 2), (2, 1))):
        folder = tmp_path / f"set-{number}"
        folder.mkdir()
        path = folder / "a.parquet"
        images = [encode(seed, format="BMP") for seed in seeds]  # all of one size
        write(path, images, range(2), encode)
        os.utime(path, ns=(10**18, 10**18))
        sources.append((stream(path), images))
    assert sources[0][0].content_hash() == sources[1][0].content_hash()
    for source, images in sources:
        assert [source.read(row) for row in range(2)] == images


def test_runs_that_keep_few_blocks_leave_those_that_keep_many_alone(shards):
    many, few = stream(shards, "stream=8"), stream(shards, "stream=1")
    for row in range(len(many)):
        many.read(row)
    few.read(0)
    assert len(cached(many)) == 8
