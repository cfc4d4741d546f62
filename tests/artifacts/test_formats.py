"""Embeddings, selections and results: written, read back, and refused when damaged."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2cli.artifacts.embeddings import EmbeddingsWriter, open_embeddings
from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.results import ResultRow, read_results, write_results
from dinov2cli.artifacts.selection import open_selection, write_selection
from dinov2cli.errors import InputError


def metadata(rows: range) -> pa.Table:
    return pa.table(
        {
            "id": [f"i{r}" for r in rows],
            "image_path": [f"{r}.jpg" for r in rows],
            "width": list(rows),
            "height": list(rows),
            "sha256": ["0"] * len(rows),
        }
    )


@pytest.fixture
def embeddings(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    out = Output.open(tmp_path / "e", "embeddings", command="dinov2 embed", config={})
    writer = EmbeddingsWriter(out, 4)
    for shard, rows in enumerate((range(4), range(4, 8), range(8, 10))):
        writer.write_shard(shard, vectors[rows.start : rows.stop], metadata(rows))
    writer.finish(10)
    return tmp_path / "e", vectors


def test_embeddings_read_back_by_block_and_by_row(embeddings):
    path, vectors = embeddings
    found = open_embeddings(path)
    assert (found.rows, found.dim, found.normalized) == (10, 4, True)
    assert found.shards[0].dtype == np.float16
    assert isinstance(found.shards[0], np.memmap)
    half = vectors.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found.block(3, 9), half[3:9])
    np.testing.assert_array_equal(found.block(9, 99), half[9:])
    np.testing.assert_array_equal(np.concatenate([b for _, b in found.blocks(3)]), half)
    order = np.array([9, 0, 4, 4, 3])
    np.testing.assert_array_equal(found.gather(order), half[order])
    assert found.metadata(["id"])["id"].to_pylist() == [f"i{i}" for i in range(10)]


def test_embeddings_files_are_what_other_tools_read(embeddings):
    path, _ = embeddings
    plain = np.load(path / "img_emb" / "img_emb_0001.npy", mmap_mode="r")
    assert plain.flags["C_CONTIGUOUS"]
    assert plain.shape == (4, 4)
    assert pq.read_table(path / "metadata" / "metadata_0001.parquet").num_rows == len(plain)


def rewritten(path, name, write):
    """Write a file of a finished directory again, as a tool would that also keeps the manifest true."""
    write(path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name]["size"] = (path / name).stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_embeddings_with_unequal_pair_are_damaged(embeddings):
    path, _ = embeddings
    name = "metadata/metadata_0001.parquet"
    rewritten(path, name, lambda file: pq.write_table(metadata(range(3)), file))
    with pytest.raises(InputError, match=r"has 4 rows and metadata_0001\.parquet has 3, expected the same"):
        open_embeddings(path)


@pytest.mark.parametrize(
    "name", ["img_emb/img_emb_0001.npy", "metadata/metadata_0002.parquet", "img_emb/img_emb_0002.npy"]
)
def test_embeddings_with_a_shard_missing_or_truncated_are_damaged(embeddings, name):
    path, _ = embeddings
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-8])
    with pytest.raises(InputError, match=rf"{name} has {len(data) - 8:,} bytes, expected {len(data):,}; make .* again"):
        open_embeddings(path)
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing; make .* again"):
        open_embeddings(path)


@pytest.mark.parametrize(
    "array, found",
    [
        (np.zeros((4, 5), np.float16), "holds vectors of length 5, img_emb_0000.npy of 4"),
        (np.zeros(4, np.float16), r"holds float16 of shape \(4,\), expected one float vector per row"),
        (np.zeros((4, 4), np.int64), "holds int64"),
        (np.array([[None] * 4] * 4), "cannot be read"),
    ],
)
def test_embeddings_of_another_kind_of_array_are_refused(embeddings, array, found):
    path, _ = embeddings
    rewritten(path, "img_emb/img_emb_0001.npy", lambda file: np.save(file, array))
    with pytest.raises(InputError, match=found):
        open_embeddings(path)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the system does not list mappings")
def test_reading_embeddings_leaves_no_page_resident(tmp_path):
    """The mapping's resident size, which the kernel lists, stays small however much was read."""
    out = Output.open(tmp_path / "e", "embeddings", command="c", config={})
    writer = EmbeddingsWriter(out, 256)
    writer.write_shard(0, np.ones((32768, 256), np.float32), metadata(range(32768)))
    writer.finish(32768)
    found = open_embeddings(tmp_path / "e")
    for _ in found.blocks(4096):
        pass
    found.gather(np.arange(0, 32768, 7))
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any("img_emb_0000.npy" in line for line in lines)
    resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    assert resident < 1024  # kB, of 16 MiB


def test_a_shard_counts_only_when_both_files_are_there(tmp_path):
    out = Output.open(tmp_path / "e", "embeddings", command="c", config={})
    writer = EmbeddingsWriter(out, 4)
    writer.write_shard(0, np.zeros((2, 4), np.float32), metadata(range(2)))
    assert writer.has_shard(0)
    assert not writer.has_shard(1)
    (tmp_path / "e" / "metadata" / "metadata_0000.parquet").unlink()
    assert not writer.has_shard(0)
    with pytest.raises(ValueError, match="do not fit"):
        writer.write_shard(1, np.zeros((3, 4), np.float32), metadata(range(2)))


def test_selection_round_trip_and_damage(tmp_path):
    kept = pa.table({"id": ["a"], "image_path": ["a.jpg"], "source": ["photos"], "row": [0]})
    dropped = pa.table({"id": ["b"], "reason": ["hash"], "duplicate_of": ["a"], "similarity": [0.9], "group": [0]})
    groups = pa.table({"id": ["a", "b"], "image_path": ["a.jpg", "b.jpg"], "group": [0, 0], "keep": [True, False]})
    out = Output.open(tmp_path / "s", "selection", command="dinov2 dedup x", config={})
    with pytest.raises(ValueError, match=r"kept table lacks \['source', 'row'\]"):
        write_selection(out, kept=kept.select(["id", "image_path"]), dropped=dropped)
    write_selection(out, kept=kept, dropped=dropped, groups=groups, report="<html></html>")
    found = open_selection(tmp_path / "s")
    assert found.kept.equals(kept)
    assert found.dropped.equals(dropped)
    assert found.groups.equals(groups)
    assert found.manifest.extra == {"kept": 1, "dropped": 1}
    (tmp_path / "s" / "kept.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"kept\.parquet cannot be read"):
        open_selection(tmp_path / "s")


def test_results_round_trip(tmp_path):
    rows = [ResultRow("m", "knn", "d", "top1", 0.5, 0.4, 0.6, 100, {"k": 10}, 1.0)]
    with Output.open(tmp_path / "r", "results", command="dinov2 eval knn", config={}) as out:
        write_results(out, rows)
    assert read_results(tmp_path / "r") == rows
    table = pq.read_table(tmp_path / "r" / "results.parquet")
    assert table.column_names == [
        *("model", "task", "dataset", "metric", "value", "ci_low", "ci_high", "n", "settings", "seconds")
    ]
    with pytest.raises(InputError, match=r"is evaluation results, expected embeddings"):
        open_embeddings(tmp_path / "r")
