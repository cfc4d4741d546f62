import io
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2cli.data.columns import list_labels
from dinov2cli.data.source import LabelLists, open_source
from dinov2cli.errors import InputError


def png() -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def write(path, lists, kind) -> str:
    table = {"image": [png() for _ in lists], "label": pa.array(lists, kind), "one": list(range(len(lists)))}
    pq.write_table(pa.table(table), path)
    return str(path)


@pytest.mark.parametrize("option", ["", "?stream=2"])
def test_a_column_of_lists_is_several_labels(tmp_path, option):
    path = write(tmp_path / "a.parquet", [["b", "a"], [], None, ["c", "c"]], pa.list_(pa.string()))
    source = open_source(path + option)
    assert source.labels is None and source.label_names is None
    assert source.label_lists == LabelLists([[0, 1], [], None, [2]], ["a", "b", "c"])
    assert source.label_lists.given.tolist() == [True, True, False, True]
    assert source.label_lists.take([3, 0]) == LabelLists([[2], [0, 1]], ["a", "b", "c"])
    assert "label_lists" not in pickle.loads(pickle.dumps(source)).__dict__


def test_numbers_and_the_names_of_a_data_set(tmp_path):
    path = write(tmp_path / "a.parquet", [[3, 1], [0]], pa.large_list(pa.int32()))
    assert open_source(path).label_lists == LabelLists([[1, 3], [0]], None)
    other = open_source(path + "?label=one")
    assert other.label_lists is None and other.labels.tolist() == [0, 1]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"]))}
    )
    dataset = datasets.Dataset.from_dict({"image": [png(), png()], "label": [[1], [0, 1]]}, features=features)
    dataset.to_parquet(tmp_path / "b.parquet")
    assert open_source(str(tmp_path / "b.parquet")).label_lists == LabelLists([[1], [0, 1]], ["cat", "dog"])


@pytest.mark.parametrize(
    "lists, kind, message",
    [
        ([[0.5]], pa.float32(), "a, column: labels are lists of float, expected lists of whole numbers or strings"),
        ([[0], [1, -1]], pa.int64(), "a, column, row 1: the list [1, -1] holds an empty or negative label"),
        ([["x", None]], pa.string(), "a, column, row 0: the list ['x', None] holds an empty or negative label"),
    ],
)
def test_unfit_lists_are_named(lists, kind, message):
    with pytest.raises(InputError) as caught:
        list_labels(pa.chunked_array([pa.array(lists, pa.list_(kind))]), None, "a, column")
    assert str(caught.value).startswith(message)


def test_sources_without_lists_have_none(tmp_path):
    assert open_source("demo:digits?count=3").label_lists is None
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    assert open_source(str(tmp_path)).label_lists is None
