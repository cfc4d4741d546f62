import pickle

import numpy as np
import pyarrow as pa
import pytest

from dinov2cli.artifacts.embeddings import EmbeddingsWriter
from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.selection import write_selection
from dinov2cli.bench.input_path import InMemory
from dinov2cli.data.derived import DerivedSource
from dinov2cli.data.source import open_source
from dinov2cli.data.spec import DataSpec
from dinov2cli.errors import InputError


def select(path, kept: list[tuple[str, int]], **columns):
    """A selection of (DATA string, row) pairs."""
    sources = {spec: open_source(spec) for spec, _ in kept}
    table = pa.table(
        {
            "id": pa.array([f"{number}" for number in range(len(kept))], pa.string()),
            "image_path": pa.array([sources[spec].paths[row] for spec, row in kept], pa.string()),
            "source": pa.array([sources[spec].origin(row)[0] for spec, row in kept], pa.string()),
            "row": pa.array([sources[spec].origin(row)[1] for spec, row in kept], pa.int64()),
            **columns,
        }
    )
    dropped = pa.table(
        {name: pa.array([], pa.string()) for name in ("id", "reason", "duplicate_of")}
        | {"similarity": pa.array([], pa.float32()), "group": pa.array([], pa.int64())}
    )
    with Output.open(path, kind="selection", command="dinov2 dedup x", config={}, seed=0, inputs=[]) as out:
        write_selection(out, kept=table, dropped=dropped)
    return path


@pytest.fixture
def second_folder(tmp_path, encode):
    for name in ("dog/a.png", "cat/b.png"):
        path = tmp_path / "second" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(20 + len(name)))
    return tmp_path / "second"


def test_selection_over_several_sources(tmp_path, picture_folder, second_folder):
    first, second = f"{picture_folder}?label=folder", f"{second_folder}?label=folder"
    path = select(tmp_path / "kept", [(second, 1), (first, 2), (first, 0)], cluster=[5, 6, 7])
    source = open_source(str(path))
    assert source.kind == "selection" and source.ids == ["0", "1", "2"]
    assert source.read(0) == (second_folder / "dog/a.png").read_bytes()
    assert source.read(1) == (picture_folder / "dog/2.png").read_bytes()
    assert source.paths[2] == str(picture_folder / "cat/0.png")
    assert source.origin(1) == (first, 2)
    assert source.label_names == ["cat", "dog"] and source.labels.tolist() == [1, 1, 0]
    assert source.columns.column_names == ["cluster"]
    clone = pickle.loads(pickle.dumps(source))
    assert clone.read(2) == source.read(2)


def test_selection_of_a_selection_points_to_the_images(tmp_path, picture_folder):
    first = select(tmp_path / "one", [(str(picture_folder), 2), (str(picture_folder), 1)])
    second = select(tmp_path / "two", [(str(first), 1)])
    source = open_source(str(second))
    assert source.origin(0) == (str(picture_folder), 1)
    assert source.read(0) == (picture_folder / "cat/1.jpg").read_bytes()


def test_labels_of_the_selection_itself(tmp_path, picture_folder):
    path = select(
        tmp_path / "kept", [(str(picture_folder), 0), (str(picture_folder), 1)], label=[4, 2], kind=["b", "a"]
    )
    source = open_source(str(path))
    assert source.labels.tolist() == [4, 2] and source.label_names is None
    named = open_source(f"{path}?label=kind")
    assert named.labels.tolist() == [1, 0] and named.label_names == ["a", "b"]
    with pytest.raises(InputError, match="no column 'knd' for labels; did you mean 'kind'"):
        _ = open_source(f"{path}?label=knd").labels


def test_selection_notices_that_its_images_changed(tmp_path, picture_folder, encode):
    path = select(tmp_path / "kept", [(str(picture_folder), 2)])
    before = open_source(str(path)).content_hash()
    assert open_source(str(path)).content_hash() == before
    (picture_folder / "bird.png").write_bytes(encode(7))
    with pytest.raises(InputError) as caught:
        open_source(str(path))
    assert str(caught.value) == (
        f"{path}: row 2 of {picture_folder} was {picture_folder}/dog/2.png and is {picture_folder}/cat/1.jpg now; "
        "the images changed since: make the selection again"
    )


def test_selection_whose_images_are_gone(tmp_path, picture_folder):
    path = select(tmp_path / "kept", [(str(picture_folder), 2)])
    picture_folder.rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=rf"{path} points to images that cannot be opened: {picture_folder}: no such file"
    ):
        open_source(str(path))


def test_empty_and_unfinished_selections(tmp_path, picture_folder):
    path = select(tmp_path / "kept", [])
    with pytest.raises(InputError, match="the selection kept no image; make it again with a wider choice"):
        open_source(str(path))
    with Output.open(
        tmp_path / "half", kind="selection", command="dinov2 dedup x -o half", config={}, seed=0, inputs=[]
    ):
        pass
    with pytest.raises(InputError, match="is unfinished"):
        open_source(str(tmp_path / "half"))


@pytest.mark.parametrize("with_rows", [True, False])
def test_embeddings_directory_gives_the_images_behind_it(tmp_path, picture_folder, with_rows):
    behind = open_source(f"{picture_folder}?label=folder")
    rows = [0, 2]  # row 1 could not be read, say
    table = pa.table(
        {
            "id": [behind.ids[row] for row in rows],
            "image_path": [behind.paths[row] for row in rows],
            "width": [24, 24],
            "height": [16, 16],
            "sha256": ["x", "y"],
            "score": [0.5, 0.7],
        }
    )
    if with_rows:
        table = table.append_column("source", pa.array([behind.spec] * 2)).append_column("row", pa.array(rows))
    path = tmp_path / "emb"
    inputs = [behind.fingerprint(), {"spec": "vits14", "kind": "model"}]
    with Output.open(path, kind="embeddings", command="dinov2 embed x", config={}, seed=0, inputs=inputs) as out:
        writer = EmbeddingsWriter(out, 4)
        writer.write_shard(0, np.zeros((2, 4), np.float32), table)
        writer.finish(2)
    source = open_source(str(path))
    assert source.kind == "embeddings" and source.ids == ["cat/0.png", "dog/2.png"]
    assert source.read(1) == (picture_folder / "dog/2.png").read_bytes()
    assert source.labels.tolist() == [0, 1] and source.label_names == ["cat", "dog"]
    assert source.columns.column_names == ["score"]
    (picture_folder / "dog/2.png").rename(picture_folder / "dog/3.png")
    with pytest.raises(InputError, match="run `dinov2 embed` again"):
        open_source(str(path))


class Blocky(InMemory):
    """Images in memory, in blocks of ten rows."""

    def __init__(self, rows: int, keep: int | None) -> None:
        super().__init__([b"x"] * rows)
        self.kept, self.fetched = keep, []

    @property
    def blocks(self):
        return np.arange(0, len(self) + 1, 10)

    @property
    def keep(self):
        return self.kept

    def fetch(self, block: int) -> None:
        self.fetched.append(block)


class TestBlocks:
    """A selection of what lies in blocks lies in blocks too: of fewer rows."""

    @staticmethod
    def make(places, keeps=(None, None), sources=None) -> DerivedSource:
        sources = sources or [Blocky(30, keeps[0]), Blocky(20, keeps[1])]
        which, rows = (np.array(values, dtype=np.int64) for values in zip(*places, strict=True))
        table = pa.table({"id": [str(number) for number in range(len(rows))]})
        return DerivedSource(DataSpec("demo", "photos"), table, sources, which, rows)

    def test_boundaries_are_those_behind(self):
        source = self.make([(0, 1), (0, 9), (0, 25), (0, 20), (1, 3), (1, 4), (1, 19)], keeps=(8, 5))
        assert source.blocks.tolist() == [0, 2, 4, 6, 7]
        assert source.keep == 5
        for block in range(4):
            source.fetch(block)
        assert [behind.fetched for behind in source._sources] == [[0, 2], [0, 1]]
        assert pickle.loads(pickle.dumps(source)).blocks.tolist() == [0, 2, 4, 6, 7]

    def test_rows_out_of_order_have_none(self):
        assert self.make([(0, 25), (0, 1)]).blocks is None
        assert self.make([(1, 3), (0, 1)]).blocks is None
        assert self.make([(0, 25), (0, 1)], keeps=(4, 4)).keep == 4

    def test_nor_has_a_selection_over_files(self):
        source = self.make([(0, 1), (1, 0)], sources=[Blocky(30, 8), InMemory([b"x"])])
        assert source.blocks is None
        source.fetch(0)
