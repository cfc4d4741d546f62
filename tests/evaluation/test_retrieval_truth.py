import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dinov2cli.data.loader import CentreView
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError
from dinov2cli.evaluation.retrieval.queries import BoxView, some_rows
from dinov2cli.evaluation.retrieval.ranking import EASY, HARD, JUNK
from dinov2cli.evaluation.retrieval.truth import (
    as_flags,
    graded_rows,
    group_codes,
    moved,
    read_ground_truth,
    rows_by_id,
    truths_between,
    truths_within,
)


def test_groups_of_several_columns_share_their_numbers():
    first = pa.chunked_array([pa.array([7, None]), pa.array([9])])
    second = pa.chunked_array([pa.array(["9", "x", "7"])])
    a, b = group_codes(first, second)
    assert a[1] == -1 and a[0] == b[2] and a[2] == b[0]
    assert len({a[0], a[2], b[1]}) == 3


def test_queries_are_what_is_flagged_and_never_find_themselves():
    groups = np.array([4, 5, 4, -1, 6, 4, 5, -1])
    asked = np.array([True, False, False, True, True, False, True, False])
    queries, truths, left_out = truths_within(groups, asked)
    assert queries.tolist() == [0, 6] and left_out == 2
    assert truths[0].rows.tolist() == [0, 2, 5] and truths[0].grades.tolist() == [JUNK, EASY, EASY]
    assert truths[1].rows.tolist() == [1, 6] and truths[1].grades.tolist() == [EASY, JUNK]
    # Without flags every image of a group of several asks.
    queries, _, left_out = truths_within(groups, None)
    assert queries.tolist() == [0, 1, 2, 5, 6] and left_out == 3


def test_queries_of_another_set_may_have_nothing_to_find():
    truths = truths_between(np.array([2, 9, -1]), np.array([2, 3, 2, -1]))
    assert [truth.rows.tolist() for truth in truths] == [[0, 2], [], []]


def test_flags_are_bools_or_zeros_and_ones():
    for values in ([True, None, False], [1, 0, 0]):
        assert as_flags(pa.chunked_array([values]), "x").tolist() == [True, False, False]
    with pytest.raises(InputError, match="x: is_query holds 'yes'; expected true and false"):
        as_flags(pa.chunked_array([["yes"]]), "x")


def write(tmp_path, content):
    path = tmp_path / "truth.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_ground_truth_file_is_read_as_it_stands(tmp_path):
    first = {"id": "q1", "bbox": [1, 2.5, 30, 40], "easy": ["a"], "hard": ["b", "c"], "junk": ["d"]}
    path = write(tmp_path, {"queries": [first, {"id": "q2", "easy": ["b"]}], "database": ["a", "b", "c", "d"]})
    given = read_ground_truth(path)
    assert given.database == ["a", "b", "c", "d"] and given.boxed
    assert given.queries[0].box == (1.0, 2.5, 30.0, 40.0) and given.queries[1].box is None
    rows = rows_by_id(["a.jpg", "sub/b.jpg", "b", "c.jpg", "c.png", "d"])
    assert rows["a"] == rows["a.jpg"] == 0 and rows["sub/b"] == 1 and rows["b"] == 2 and "c" not in rows
    truth = graded_rows(given.queries[0], {"a": 5, "b": 6, "c": 7, "d": 8}, path="t", data="x")
    assert truth.rows.tolist() == [5, 6, 7, 8] and truth.grades.tolist() == [EASY, HARD, HARD, JUNK]
    place = np.full(9, -1)
    place[[6, 8]] = [0, 1]
    assert moved(truth, place).rows.tolist() == [0, 1] and moved(truth, place).grades.tolist() == [HARD, JUNK]


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "cannot be read .JSONDecodeError.; expected"),
        ([], "has no list of queries; expected"),
        ({"queries": []}, "has no list of queries"),
        ({"queries": [{"easy": ["a"]}]}, "query 0 has no id"),
        ({"queries": [{"id": "q", "ok": ["a"]}]}, r"query 0 \(q\) has the unknown key 'ok'; expected id, bbox, easy"),
        ({"queries": [{"id": "q", "easy": "a"}]}, "easy is not a list of ids"),
        ({"queries": [{"id": "q", "easy": ["a"], "junk": ["a"]}]}, "has 'a' twice; expected each image once"),
        ({"queries": [{"id": "q", "bbox": [1, 2, 3]}]}, r"has the bbox \[1, 2, 3\]; expected four numbers"),
        ({"queries": [{"id": "q", "bbox": [9, 2, 3, 4]}]}, r"has the empty bbox \[9, 2, 3, 4\]"),
        ({"queries": [{"id": "q"}, {"id": "q"}]}, "names a query twice"),
    ],
)
def test_a_ground_truth_file_that_is_wrong_says_where(tmp_path, content, said):
    with pytest.raises(InputError, match=said):
        read_ground_truth(write(tmp_path, content))
    with pytest.raises(InputError, match="cannot be read"):
        read_ground_truth(tmp_path / "none.json")


def test_ids_that_the_data_lack_are_named(tmp_path):
    query = read_ground_truth(write(tmp_path, {"queries": [{"id": "q", "easy": list("abcde")}]})).queries[0]
    with pytest.raises(InputError, match=r"ground truth t names 4 images that x does not have \(b, c, d, \.\.\.\)"):
        graded_rows(query, {"a": 0}, path="t", data="x")


def test_a_box_shows_a_part_of_an_image_and_some_rows_are_a_source(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    view = BoxView(CentreView(16, 16), ((10, 5, 26, 21), None, (50.4, 20, 900, 900), (100, 100, 120, 120)))
    assert view.size == 16
    assert torch.equal(view(pixels, 0), torch.from_numpy(pixels[5:21, 10:26]).permute(2, 0, 1))
    whole = CentreView(16, 16)(pixels, 1)
    assert torch.equal(view(pixels, 1), whole)
    assert torch.equal(view(pixels, 2), CentreView(16, 16)(np.ascontiguousarray(pixels[20:, 50:]), 0))
    assert torch.equal(view(pixels, 3), whole)  # a box beside the image
    assert view.name != BoxView(CentreView(16, 16), ((10, 5, 26, 22), None, None, None)).name
    for name in "abc":
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), ord(name), np.uint8)).save(buffer, "PNG")
        (tmp_path / f"{name}.png").write_bytes(buffer.getvalue())
    source = open_source(str(tmp_path))
    part = some_rows(source, [2, 0])
    assert part.ids == ["c.png", "a.png"] and len(part) == 2
    assert part.read(0) == source.read(2)
    assert part.content_hash() != source.content_hash()
