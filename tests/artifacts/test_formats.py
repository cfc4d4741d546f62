"""Embeddings, selections and results: written, read back, and refused when damaged."""

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


def test_embeddings_with_unequal_pair_are_damaged(embeddings):
    path, _ = embeddings
    pq.write_table(metadata(range(3)), path / "metadata" / "metadata_0001.parquet")
    with pytest.raises(InputError, match=r"has 4 rows and metadata_0001\.parquet has 3, expected the same"):
        open_embeddings(path)
    (path / "metadata" / "metadata_0001.parquet").unlink()
    with pytest.raises(InputError, match=r"is missing beside img_emb_0001\.npy"):
        open_embeddings(path)


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
