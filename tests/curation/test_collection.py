"""One IN grammar for dedup and curate: the vectors of a selection are those of its own images, through any chain."""

import numpy as np
import pyarrow as pa
import pytest

from dinov2cli.artifacts.embeddings import EmbeddingsWriter
from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.selection import write_selection
from dinov2cli.curation.collection import open_collection
from dinov2cli.errors import InputError


def embeddings(path, ids):
    """Embeddings in which the first number of a vector is the number in its id."""
    table = pa.table(
        {
            "id": ids,
            "image_path": [f"{i}.png" for i in ids],
            "width": [1] * len(ids),
            "height": [1] * len(ids),
            "sha256": list(ids),
            "source": ["demo:photos"] * len(ids),
            "row": list(range(len(ids))),
        }
    )
    with Output.open(path, "embeddings", command="dinov2 embed", config={}) as out:
        writer = EmbeddingsWriter(out, 2)
        writer.write_shard(0, np.array([[int(i), 1] for i in ids], np.float32), table)
        writer.finish(len(ids))
    return table


def select(path, source, table, rows):
    kept = table.take(pa.array(rows))
    dropped = pa.table({name: [] for name in ("id", "reason", "duplicate_of", "similarity", "group")})
    with Output.open(
        path, "selection", command="c", config={}, inputs=[open_collection(str(source)).fingerprint]
    ) as out:
        write_selection(out, kept=kept, dropped=dropped)
    return kept


def test_vectors_follow_the_images_through_a_chain_of_selections(tmp_path):
    table = embeddings(tmp_path / "e", ["5", "3", "8", "1", "9"])
    first = select(tmp_path / "s1", tmp_path / "e", table, [4, 0, 2])
    select(tmp_path / "s2", tmp_path / "s1", first, [2, 0])
    for name, expected in (("e", [5, 3, 8, 1, 9]), ("s1", [9, 5, 8]), ("s2", [8, 9])):
        collection = open_collection(str(tmp_path / name))
        assert collection.vectors is not None
        assert collection.vectors.block(0, 9)[:, 0].tolist() == expected
        assert [int(i) for i in collection.table().column("id").to_pylist()] == expected


def test_selection_of_embeddings_made_again_is_refused(tmp_path):
    table = embeddings(tmp_path / "e", ["5", "3"])
    select(tmp_path / "s", tmp_path / "e", table, [0, 1])
    for file in sorted((tmp_path / "e").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    embeddings(tmp_path / "e", ["5", "4"])
    with pytest.raises(InputError, match=r"1 of its 2 images are not in .*the embeddings were made again since"):
        open_collection(str(tmp_path / "s"))
