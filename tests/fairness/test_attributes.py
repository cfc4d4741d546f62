"""Attributes: files read and brought beside images, cells as texts, numbers and lists."""

import math
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError
from dinov2cli.fairness.attribute_files import read_table
from dinov2cli.fairness.attribute_values import literal_list
from dinov2cli.fairness.attributes import lists, numbers, read_attributes, texts
from tests.fairness.named_images import NamedImages, attributes


def written(folder, text, name="f.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def refusal(*args, **keywords):
    with pytest.raises(InputError) as caught:
        read_attributes(*args, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator, name", [(",", "f.csv"), (";", "f.csv"), ("\t", "f.csv"), ("\t", "f.tsv")])
def test_separated_files_are_all_texts(tmp_path, encoding, separator, name):
    rows = [["age", "file", "city"], ["007", "a.jpg", "Zürich"], ["", "b.jpg", "NA"]]
    file = written(tmp_path, "\r\n".join(separator.join(row) for row in rows) + "\r\n", name, encoding)
    assert read_table(file).to_pydict() == {"age": ["007", ""], "file": ["a.jpg", "b.jpg"], "city": ["Zürich", "NA"]}


def test_quoted_cells_keep_separators_and_line_ends(tmp_path):
    file = written(tmp_path, 'file,"a;b;c;d",note\nx.jpg,"1,2","two\nlines"\n')
    assert read_table(file).to_pydict() == {"file": ["x.jpg"], "a;b;c;d": ["1,2"], "note": ["two\nlines"]}


def test_lines_end_within_cells_of_a_file_read_in_several_pieces(tmp_path):
    cell = "two\n" * 10 + "lines"
    file = written(tmp_path, "file,note\n" + "".join(f'{row}.jpg,"{cell}"\n' for row in range(60_000)))
    table = read_table(file)
    assert table.num_rows == 60_000 and table.column("note").unique().to_pylist() == [cell]


def test_a_column_without_a_name(tmp_path):
    assert read_table(written(tmp_path, ",file\n0,a.jpg\n")).column_names == ["unnamed", "file"]
    pd.DataFrame({"file": ["a", "b"]}, index=[3, 5]).to_parquet(tmp_path / "f.parquet")
    assert read_table(tmp_path / "f.parquet").column_names == ["file", "unnamed"]


def test_parquet_keeps_types_and_leaves_bytes_behind(tmp_path):
    pixels = pa.array([{"bytes": b"x", "path": "a"}])
    table = pa.table({"id": ["a"], "age": [3], "image": pixels, "raw": [b"x"], "tags": [["u", "v"]]})
    pq.write_table(table, tmp_path / "f.parquet")
    assert read_table(tmp_path / "f.parquet").to_pydict() == {"id": ["a"], "age": [3], "tags": [["u", "v"]]}


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("f.csv", b"a,b\n1,2,3\n", "cannot be read as a table"),
        ("f.csv", b"", "cannot be read as a table"),
        ("f.csv", b"a,b\n", "a table without rows"),
        ("f.csv", b"a, a\n1,2\n", "two columns are called 'a'"),
        ("f.csv", "a,b\nZürich,2\n".encode("latin-1"), "not UTF-8; save it as UTF-8"),
        ("f.csv", "Stra\xdfe,b\nx,2\n".encode("latin-1"), "not UTF-8; save it as UTF-8"),
        ("f.parquet", b"PAR1 no", "cannot be read as a table"),
        ("f.csv.gz", b"no gzip", "cannot be read as a table"),
        ("f.xlsx", b"PK", "not a table of attributes; .*save it as CSV"),
        ("f.txt", b"a\n", "not a table of attributes"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert re.search(said, refusal(tmp_path / name, NamedImages(["a"])))


def test_no_file(tmp_path):
    assert "no such file; expected a table" in refusal(tmp_path / "g.csv", NamedImages(["a"]))
    assert "is a folder; expected a table" in refusal(tmp_path, NamedImages(["a"]))


# --- joining


def beside(file, names, column="x", **keywords):
    found = read_attributes(file, NamedImages(names), **keywords)
    assert found.table.num_rows == len(found) == len(names) == len(found.matched)
    values = found.table.column(column).to_pylist()
    assert [value is not None for value in values] == found.matched.tolist()
    return values, found


@pytest.mark.parametrize(
    "cells, names, key",
    [
        (["b", "a"], ["a", "b"], "id or path of the image in column file"),
        (["/pictures/b", "/pictures/a"], ["a", "b"], "id or path of the image in column file"),
        (["q/b.jpg", "q/a.jpg"], ["z/a.jpg", "z/b.jpg"], "file name of column file"),
        (["q/b.png", "q/a"], ["z/a.jpg", "z/b.jpg"], "file name without extension of column file"),
        (["B\\s/1.jpg", "C\\t/1.jpg"], ["t/1.jpg", "s/1.jpg"], "last 2 parts of the path of column file"),
        (["val/1.png", "train/1.png"], ["train/1.jpg", "val/1.jpg"], "last 2 parts of the path without extension of"),
        (["h://s/b%20c.jpg?w=3", "https://s/a.jpg#x"], ["a.jpg", "b c.jpg"], "file name of column file"),
        (["h://s/b%20c.jpg", "h://s/a.jpg"], ["a.jpg", "b%20c.jpg"], "file name of column file"),
        (["./sub/b.jpg", "./sub/a.jpg"], ["sub/a.jpg", "sub/b.jpg"], "last 2 parts of the path of column file"),
        (["Mr. B", "Mr. A"], ["Mr. A.jpg", "Mr. B.jpg"], "file name without extension of column file"),
    ],
)
def test_names_are_compared_from_strict_to_loose(tmp_path, cells, names, key):
    file = written(tmp_path, f"file,x\n{cells[0]},second\n{cells[1]},first\n")
    values, found = beside(file, names)
    assert values == ["first", "second"] and found.key.startswith(key)
    assert found.notes == [] and found.rows == 2 and found.file == str(file)


def test_a_folder_that_the_names_speak_of_tells_equal_file_names_apart(tmp_path):
    file = written(tmp_path, "file,x\nval/1.jpg,v1\ntrain/1.jpg,t1\ntrain/2.jpg,t2\n")
    found = read_attributes(file, NamedImages(["1.jpg", "2.jpg"], root="/faces/train"))
    assert found.table.column("x").to_pylist() == ["t1", "t2"] and found.rows_without_image == 1
    assert found.notes == ["1 of 3 rows of f.csv belong to no image and were left out"]


def test_the_column_that_finds_most_images_is_taken(tmp_path):
    file = written(tmp_path, "id,photo,x\na,1.jpg,1\nb,2.jpg,2\nc,3.jpg,3\n")
    assert beside(file, ["a", "2.jpg", "3.jpg"])[0] == [None, "2", "3"]
    values, found = beside(file, ["a", "2.jpg", "3.jpg"], key="id")
    assert values == ["1", None, None] and found.key == "id or path of the image in column id"
    assert (found.rows, found.rows_without_image, found.images_without_row) == (3, 2, 2)
    assert found.notes == [
        "2 of 3 images have no row in f.csv: all their attributes are unknown",
        "2 of 3 rows of f.csv belong to no image and were left out",
    ]


def test_a_column_that_finds_fewer_images_but_without_doubt_is_taken(tmp_path):
    file = written(tmp_path, "scene,crop,x\na,p,1\na,b,2\nc,q,3\nc,r,4\n")
    values, found = beside(file, ["a", "b", "c"])
    assert values == [None, "2", None] and found.key == "id or path of the image in column crop"


def test_an_index_of_names_written_by_pandas(tmp_path):
    pd.DataFrame({"x": ["1", "2"]}, index=["b.jpg", "a.jpg"]).to_csv(tmp_path / "f.csv")
    assert beside(tmp_path / "f.csv", ["a.jpg", "b.jpg"])[0] == ["2", "1"]


def test_ids_that_are_no_ends_of_paths(tmp_path):
    class Rows(NamedImages):
        paths = property(lambda self: [f"/data/f.parquet#{row}" for row in range(len(self))])

    file = written(tmp_path, "url,x\nhttp://h/b.jpg,B\nhttp://h/a.jpg,A\n")
    found = read_attributes(file, Rows(["s/a.png", "s/b.png"]))
    assert found.table.column("x").to_pylist() == ["A", "B"]


def test_row_numbers_and_ages_are_not_taken_for_names_of_images(tmp_path):
    file = written(tmp_path, ",age,x\n0,2,p\n1,0,q\n2,1,r\n")
    said = refusal(file, NamedImages(["0.jpg", "1.jpg", "2.jpg"]))
    assert "column 'x' begins with 'p'" in said and "--id" in said
    assert beside(file, ["0.jpg", "1.jpg", "2.jpg"], key="unnamed")[0] == ["p", "q", "r"]
    named = written(tmp_path, "id,x\n2,r\n1,q\n0,p\n", "g.csv")
    assert beside(named, ["0.jpg", "1.jpg", "2.jpg"])[0] == ["p", "q", "r"]


def test_whole_numbers_of_parquet_name_images(tmp_path):
    pq.write_table(pa.table({"id": [12, 7], "x": ["b", "a"]}), tmp_path / "f.parquet")
    assert beside(tmp_path / "f.parquet", ["7", "12"])[0] == ["a", "b"]


def test_names_that_several_images_have_count_for_none(tmp_path):
    file = written(tmp_path, "file,x\n1.jpg,one\n2.jpg,two\n")
    values, found = beside(file, ["u/1.jpg", "v/1.jpg", "v/2.jpg"])
    assert values == [None, None, "two"] and found.images_without_row == 2 and found.rows_without_image == 1


def test_rows_that_repeat_others_are_dropped_whatever_their_number(tmp_path):
    file = written(tmp_path, ",file,x\n0,a.jpg,1\n1,b.jpg,2\n2,a.jpg,1\n3,a.jpg,1\n")
    values, found = beside(file, ["a.jpg", "b.jpg"])
    assert values == ["1", "2"] and found.repeated_rows == 2 and found.rows_without_image == 0
    assert found.notes == ["2 rows of f.csv repeat another row of their image and were left out"]


def test_two_answers_for_one_image(tmp_path):
    file = written(tmp_path, "file,x\na.jpg,1\nb.jpg,2\na.jpg,3\n")
    said = refusal(file, NamedImages(["b.jpg", "a.jpg"]))
    assert "one image, a.jpg (x: '1' and '3'; 1 such image, found by id or path" in said and "--id" in said


def test_nothing_matches(tmp_path):
    file = written(tmp_path, "x,file\n1,a.jpg\n")
    said = refusal(file, NamedImages(["q.jpg"]))
    assert "no column matches any image" in said
    assert "an image is called 'q.jpg', column 'file' begins with 'a.jpg'" in said and "--id" in said
    assert "no name in column 'x' matches" in refusal(file, NamedImages(["q.jpg"]), key="x")
    assert "no column 'fil' to find images by; did you mean 'file'?; its columns are x, file" in refusal(
        file, NamedImages(["q.jpg"]), key="fil"
    )
    pq.write_table(pa.table({"x": [1.5]}), tmp_path / "f.parquet")
    assert "no column holds names of files" in refusal(tmp_path / "f.parquet", NamedImages(["q.jpg"]))


def test_columns_of_the_images_themselves():
    source = NamedImages(["a", "b"], {"sex": ["f", None]})
    found = read_attributes(None, source)
    assert texts(found, "sex") == ["f", None] and found.matched.all() and found.notes == []
    assert found.file == "columns of /pictures" and found.rows == 2 and found.key == "row by row"
    assert "no file of attributes was given" in refusal(None, source, key="sex")
    with pytest.raises(InputError, match="no column 'sex'; its columns are none: give a file of attributes"):
        texts(read_attributes(None, NamedImages(["a"])), "sex")


def test_a_real_list_of_images(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.jpg").write_bytes(b"")
    (tmp_path / "list.txt").write_text("one/b.jpg\none/a.jpg\n")
    file = written(tmp_path, "url,x\nhttp://h/a.jpg,A\nhttp://h/b.jpg,B\n")
    found = read_attributes(file, open_source(str(tmp_path / "list.txt")))
    assert found.table.column("x").to_pylist() == ["B", "A"]


def test_joins_agree_with_a_merge(tmp_path):
    """Random tables with missing images, missing rows and repeated rows, beside pandas' left join."""
    draw = np.random.Generator(np.random.Philox(key=5))
    for _ in range(20):
        names = [f"{number:04d}.jpg" for number in draw.permutation(60)[: draw.integers(5, 50)]]
        rows = pd.DataFrame({"file": [f"{number:04d}.jpg" for number in draw.permutation(60)[:30]]})
        rows["x"] = draw.integers(0, 5, len(rows)).astype(str)
        rows = rows.iloc[draw.integers(0, 30, 40)]
        rows.to_csv(tmp_path / "f.csv")
        merged = pd.DataFrame({"file": names}).merge(rows.drop_duplicates(), how="left", on="file")
        values, found = beside(tmp_path / "f.csv", names)
        assert values == [None if pd.isna(value) else value for value in merged["x"]]
        assert found.rows_without_image == (~rows["file"].isin(names)).sum()
        assert found.repeated_rows == rows[rows["file"].isin(names)].duplicated().sum()
        assert found.images_without_row == merged["x"].isna().sum()


# --- cells


def test_texts():
    unknown = ["", " ", "n/a", "N/A", "NA", "nan", "None", "NULL", "Unknown", "not stated", "Prefer not to say", "?"]
    found = attributes(x=[" a ", *unknown, "-", "nano", None])
    assert texts(found, "x") == ["a", *[None] * 13, "nano", None]
    found = attributes(
        i=[4, None], f=[4.0, math.nan], g=[4.5, None], b=[True, None], n=pa.nulls(2), e=[["u", "NA", "v"], []]
    )
    assert texts(found, "i") == ["4", None] == texts(found, "f")
    assert texts(found, "g") == ["4.5", None] and texts(found, "b") == ["true", None]
    assert texts(found, "n") == [None, None] and texts(found, "e") == ["u, v", None]
    category = attributes(x=pa.array(["p", None, "q", "p"]).dictionary_encode())
    assert texts(category, "x") == ["p", None, "q", "p"]
    with pytest.raises(InputError, match=r"f\.csv: no column 'regoin'; did you mean 'region'\?; its columns are reg"):
        texts(attributes(region=["a"]), "regoin")


def test_numbers():
    found = attributes(income=["175.21", " 3e2 ", "", "n/a", "0.5"], typed=[1.5, math.nan, None, 3.0, 2.0])
    values, notes = numbers(found, "income", what="income", least=0)
    np.testing.assert_array_equal(values, [175.21, 300, np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(numbers(found, "typed", what="x")[0], [1.5, np.nan, np.nan, 3, 2])
    assert notes == []


@pytest.mark.parametrize("wrong", ["0", "-3", "1,000", "1_000", "abc", "inf", "nan(1)"])
def test_impossible_numbers(wrong):
    found = attributes(income=["12", wrong, wrong, "5"])
    with pytest.raises(InputError) as caught:
        numbers(found, "income", what="income", least=0)
    assert str(caught.value) == (
        f"f.csv: column income, image a1: '{wrong}' is no income; expected a number above 0 (2 images with such "
        "values): correct them, or count them as unknown with --set invalid=unknown"
    )
    values, notes = numbers(found, "income", what="income", least=0, invalid="unknown")
    np.testing.assert_array_equal(values, [12, np.nan, np.nan, 5])
    assert notes == [
        f"the income of 2 images counts as unknown, for it is not a number above 0 (column income: '{wrong}')"
    ]


def test_numbers_without_a_bound_may_be_negative():
    assert numbers(attributes(lat=["-3", "0"]), "lat", what="latitude")[0].tolist() == [-3, 0]


def test_lists():
    cells = ["['a', 'b, c']", "[1, 2]", '["d\\u00e9", 3]', "plain, text", "[]", "", None, '["it\'s"]', "['a', 'b, c']"]
    expected = [["a", "b, c"], ["1", "2"], ["dé", "3"], ["plain, text"], [], None, None, ["it's"], ["a", "b, c"]]
    found = lists(attributes(x=cells), "x")
    assert found == expected and found[0] is not found[-1]
    assert lists(attributes(x=[["a", None], None, []]), "x") == [["a"], None, []]
    assert lists(attributes(x=[[1, 2], None]), "x") == [["1", "2"], None]
    assert lists(attributes(x=[3, None]), "x") == [["3"], None]


@pytest.mark.parametrize("wrong", ["['a'", "[True]", "[1.5]", "[['a']]", "[None]", "[f(1)]", "[1][0]", "[" * 5000])
def test_lists_that_are_none(wrong):
    assert literal_list(wrong) is None
    with pytest.raises(InputError, match=r"f\.csv: column x, image a1: .* is no list of texts or whole numbers"):
        lists(attributes(x=["['a']", wrong]), "x")
