import io
import os
from types import SimpleNamespace
from typing import ClassVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dinov2cli.data import remote
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, WorkError


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


class CountingFileSystem(MemoryFileSystem):
    """A remote store that counts the bytes read from it and fails when told to."""

    protocol = ("counted",)
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    bytes_read = 0
    failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("counted://").lstrip("/")

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if mode == "rb":
            assert options.get("cache_type") == "none"
            file = _Counted(file.getvalue())
        return file


class _Counted(io.BytesIO):
    def read(self, size=-1):
        if CountingFileSystem.failures:
            CountingFileSystem.failures -= 1
            raise ConnectionResetError("connection reset by peer")
        data = super().read(size)
        CountingFileSystem.bytes_read += len(data)
        return data


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(files): makes `hf:owner/name` a set whose split 'train' consists of these files in a remote store."""
    monkeypatch.setattr(CountingFileSystem, "store", {})
    monkeypatch.setattr(CountingFileSystem, "bytes_read", 0)
    monkeypatch.setattr(CountingFileSystem, "failures", 0)
    fsspec.register_implementation("counted", CountingFileSystem, clobber=True)

    def make(files):
        urls = []
        for path in files:
            urls.append(f"counted://owner/name@abc/{path.name}")
            with fsspec.open(urls[-1], "wb") as file:
                file.write(path.read_bytes())
        CountingFileSystem.bytes_read = 0

        found, info = SimpleNamespace(data_files={"train": urls}), SimpleNamespace(features=None)

        def load(name, config=None, revision=None):
            assert (name, config, revision) == ("owner/name", "small", "abc")
            return SimpleNamespace(config=found, info=info)

        monkeypatch.setattr(datasets, "load_dataset_builder", load)
        return "hf:owner/name?config=small&revision=abc&stream=true"

    return make


@pytest.fixture
def large(tmp_path):
    """Two files of 20 row groups of 5 images of 20 kB that do not compress."""
    random = np.random.default_rng(0)
    files = []
    for part in range(2):
        images = [random.bytes(20_000) for _ in range(100)]
        table = {"image": [{"bytes": image, "path": None} for image in images], "label": list(range(100))}
        files.append(tmp_path / f"train-{part}.parquet")
        pq.write_table(pa.table(table), files[-1], row_group_size=5)
    return files


def test_remote_files_are_read_in_parts(hub, large):
    spec = hub(large)
    whole = sum(path.stat().st_size for path in large)
    source = open_source(spec)
    assert len(source) == 200 and len(source.blocks) == 41 and source.kind == "hub"
    opened = CountingFileSystem.bytes_read
    assert 0 < opened < 0.05 * whole
    assert source.labels.tolist() == list(range(100)) * 2
    labelled = CountingFileSystem.bytes_read - opened
    assert labelled < 0.1 * whole
    copy = open_source(str(large[1]))
    before = CountingFileSystem.bytes_read
    assert [source.read(row) for row in range(110, 115)] == [copy.read(row) for row in range(10, 15)]
    assert 100_000 < CountingFileSystem.bytes_read - before < 100_000 + 0.05 * whole  # one row group and a footer
    before = CountingFileSystem.bytes_read
    source.read(112)
    assert CountingFileSystem.bytes_read == before
    assert open_source(spec).content_hash() == source.content_hash()


def test_a_network_that_comes_back_and_one_that_does_not(hub, large, caplog):
    spec = hub(large)
    source = open_source(spec)
    CountingFileSystem.failures = 2
    assert len(source.read(0)) == 20_000
    assert len(caplog.messages) == 2
    assert "cannot be read (connection reset by peer); trying again in 0 s" in caplog.messages[0]
    CountingFileSystem.failures = 1000
    with pytest.raises(WorkError) as caught:
        source.read(7)
    assert str(caught.value) == (
        "counted://owner/name@abc/train-0.parquet: cannot be read (connection reset by peer); "
        "check the file and the connection, then give the same command again"
    )
    with pytest.raises(WorkError):
        open_source(spec)
    CountingFileSystem.failures = 0
    assert len(source.read(7)) == 20_000  # nothing half-read is left


def test_a_remote_file_that_is_replaced_is_another_set(hub, large):
    source = open_source(hub(large))
    source.read(0)
    os.replace(large[1], large[0])
    spec = hub(large[:1])
    again = open_source(spec)
    assert again.content_hash() != source.content_hash() and again.read(0) != source.read(0)
    with pytest.raises(InputError, match="changed while it was in use"):
        source.read(5)
