import dataclasses
import io
import os
import pickle
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2cli.data import remote
from dinov2cli.data.bad import BadImage
from dinov2cli.data.order import block_order
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.data.stream import StreamSource
from dinov2cli.errors import InputError, WorkError
from tests.data.parquet_sets import cached, stream, write, write_shards


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.fixture
def shards(tmp_path, encode):
    return write_shards(tmp_path / "set", encode)


def message(spec: object, kind: type[Exception] = InputError) -> str:
    with pytest.raises(kind) as caught:
        _ = open_source(str(spec)).labels
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_source(a: ImageSource, b: ImageSource) -> None:
    assert len(a) == len(b) and a.ids == b.ids
    assert [a.read(row) for row in range(len(a))] == [b.read(row) for row in range(len(b))]
    for role in ("mask", "depth"):
        assert a.has_role(role) == b.has_role(role)
        if a.has_role(role):
            assert [a.read(row, role) for row in range(len(a))] == [b.read(row, role) for row in range(len(b))]
    assert (a.labels is None) == (b.labels is None)
    if a.labels is not None:
        assert a.labels.tolist() == b.labels.tolist() and a.labels.dtype == b.labels.dtype
    assert a.label_names == b.label_names
    assert a.columns.schema.names == b.columns.schema.names and a.columns.schema.types == b.columns.schema.types
    assert a.columns.to_pylist() == b.columns.to_pylist()


# --- the same as the copy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [True, False])
def test_a_stream_is_the_map_style_source_row_by_row(tmp_path, encode, features):
    for part, count in enumerate((7, 1, 8)):
        images = [encode(10 * part + row) for row in range(count)]
        write(tmp_path / f"{part}.parquet", images, range(10 * part, 10 * part + count), encode, features=features)
    for pattern, options in (("", ""), ("/{2,0,1}.parquet", ""), ("/0.parquet", "&label=place&group=place")):
        copy = open_source(f"{tmp_path}{pattern}?{options[1:]}" if options else f"{tmp_path}{pattern}")
        ours = stream(f"{tmp_path}{pattern}", f"stream=true{options}")
        same_source(ours, copy)
        assert ours.kind == copy.kind == "parquet" and ours.content_hash() == copy.content_hash()
        if options:
            assert ours.column("group").to_pylist() == copy.column("group").to_pylist()
    assert ours.ids[:2] == ["0.png", "1.png"] and ours.label_names == ["p0", "p1", "p2"]


def test_tables_of_bytes_and_of_paths(picture_folder, tmp_path, encode):
    pq.write_table(pa.table({"jpg": [encode(0), None, encode(2)], "id": ["b", "a", "c"]}), tmp_path / "bytes.parquet")
    ours = stream(tmp_path / "bytes.parquet")
    assert [ours.read(row) for row in (0, 2)] == [encode(0), encode(2)] and ours.ids == ["b", "a", "c"]
    with pytest.raises(BadImage, match="empty cell"):
        ours.read(1)
    table = pa.table({"file": ["cat/0.png", str(picture_folder / "dog/2.png"), "gone.png"], "cls": [3, None, 5]})
    pq.write_table(table, picture_folder / "index.parquet")
    ours = stream(picture_folder / "index.parquet", "image=file&stream=true")
    assert ours.read(1) == (picture_folder / "dog/2.png").read_bytes() and ours.ids[0] == "cat/0.png"
    assert ours.read(0) == (picture_folder / "cat/0.png").read_bytes() and ours.labels.tolist() == [3, -1, 5]
    with pytest.raises(BadImage, match="the file does not exist"):
        ours.read(2)


def test_local_copy_of_a_hub_dataset(tmp_path, encode, monkeypatch):
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    write(copy / "data" / "train-00000-of-00002.parquet", [encode(0), encode(1)], range(2), encode, features=False)
    write(copy / "data" / "train-00001-of-00002.parquet", [encode(2)], range(2, 3), encode, features=False)
    write(copy / "data" / "test-00000-of-00001.parquet", [encode(3)], range(3, 4), encode, features=False)
    (copy / "README.md").write_text(CARD)
    monkeypatch.chdir(tmp_path)
    ours = stream("hf:./copy", "split=train&stream=true")
    same_source(ours, open_source("hf:./copy"))
    assert ours.kind == "hub" and ours.label_names == ["wolf", "fox"]  # from the card, not from the files
    assert ours.spec == f"hf:{copy}?split=train&stream=true" and ours.blocks.tolist() == [0, 2, 3]
    assert open_source(ours.spec).content_hash() == ours.content_hash()
    assert ours.content_hash() != stream("hf:./copy", "split=test&stream=true").content_hash()
    assert message("hf:./copy?split=val&stream=true").endswith(
        "no split 'val'; with stream=true one whole split is read, its splits are train, test"
    )
    assert isinstance(open_source("hf:./copy?stream=false"), ImageSource)
    assert not isinstance(open_source("hf:./copy?stream=false"), StreamSource)


CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: mask
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': wolf
          '1': fox
  - name: place
    dtype: string
---
"""


def test_hub_sets_that_are_not_parquet_say_what_to_do(tmp_path, encode, monkeypatch):
    (tmp_path / "copy").mkdir()
    with tarfile.open(tmp_path / "copy" / "train-000.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(encode(0))
        tar.addfile(info, io.BytesIO(encode(0)))
    monkeypatch.chdir(tmp_path)
    assert message("hf:./copy?stream=true") == (
        "hf:./copy: split 'train' consists of 1 tar shards such as train-000.tar, stream=true reads Parquet only; "
        "fetch them and give the files themselves as DATA, or leave out stream=true"
    )
    assert message("hf:nobody/nothing?stream=true").endswith("private sets need `hf auth login`")


# --- opening ------------------------------------------------------------------------------------------------------


def test_blocks_are_row_groups(shards):
    source = stream(shards)
    assert source.blocks.tolist() == [0, 3, 6, 7, 10, 12, 15, 18, 20] and source.blocks.dtype == np.int64
    assert source.keep == 64 and stream(shards, "stream=5").keep == 5
    assert cached(source) == []
    source.fetch(4)
    assert cached(source) == ["0000004-0.arrow"]
    source.read(11), source.read(12), source.read(12, "mask")
    assert cached(source) == ["0000004-0.arrow", "0000005-0.arrow"]
    for row in (-1, 20):
        with pytest.raises(IndexError):
            source.read(row)


def test_what_is_wrong_is_said_before_anything_is_read(shards, tmp_path, encode):
    assert message(f"{shards}?stream=yes") == (
        f"{shards}: stream=yes; expected true, false, or how many row groups are kept on disk (true keeps 64)"
    )
    assert "stream=0; expected" in message(f"{shards}?stream=0")
    assert "no column 'imge' for image; did you mean 'image'?" in message(f"{shards}?image=imge&stream=true")
    assert "no column 'nope' for labels; its columns are label, place" in message(f"{shards}?label=nope&stream=true")
    (shards / "part-1.parquet").write_bytes(b"PAR1 no PAR1")
    text = message(f"{shards}?stream=true")
    assert text.startswith(f"{shards}/part-1.parquet: not a readable Parquet file (")
    assert text.endswith("fetch or write it again")
    pq.write_table(pa.table({"image": [encode(0)]}), shards / "part-1.parquet")
    assert message(f"{shards}?stream=true") == (
        f"{shards}/part-1.parquet: its columns are image, those of {shards}/part-0.parquet are image, mask, label, "
        "place; the files of one set must have the same columns"
    )
    write(tmp_path / "none.parquet", [], [], encode)
    assert "1 Parquet files without a row" in message(f"{tmp_path}/none.parquet?stream=true")


def test_files_and_row_groups_without_rows(tmp_path, encode):
    for part, count in enumerate((0, 2, 0, 1)):
        write(tmp_path / f"{part}.parquet", [encode(10 * part + row) for row in range(count)], range(count), encode)
    source = stream(tmp_path)
    assert source.blocks.tolist()[0] == 0 and source.blocks.tolist()[-1] == 3
    assert [source.read(row) for row in range(3)] == [encode(10), encode(11), encode(30)]
    assert sorted(block_order(0, 0, source.blocks, 1).tolist()) == [0, 1, 2] and source.labels.tolist() == [0, 1, 0]


def test_huge_row_groups_are_named(shards, monkeypatch, caplog):
    monkeypatch.setattr(remote, "_HUGE_BYTES", 100)
    stream(shards)
    assert len(caplog.messages) == 1 and re.search(
        r"part-\d\.parquet: a row group holds 0\.0 GB of images and is fetched and kept whole", caplog.messages[0]
    )


# --- the cache ----------------------------------------------------------------------------------------------------


def test_pickles_without_what_belongs_to_one_process(shards, encode):
    source = stream(shards)
    names = source.ids
    _ = source.columns, source.labels
    source.read(0)
    clone = pickle.loads(pickle.dumps(source))
    assert clone._mapped == {} and not {"ids", "columns", "_labelling"} & set(clone.__dict__)
    assert clone.ids == names and clone.read(19) == encode(19) and clone.blocks.tolist() == source.blocks.tolist()


# --- the source fails during the run ------------------------------------------------------------------------------


def test_a_file_that_goes_or_changes_stops_the_run_with_a_reason(shards, encode, caplog):
    source = stream(shards)
    source.read(0)
    (shards / "part-2.parquet").unlink()
    with pytest.raises(WorkError) as caught:
        source.read(19)
    assert re.fullmatch(
        rf"{shards}/part-2\.parquet: cannot be read \(.*\); check the file and the connection, "
        "then give the same command again",
        str(caught.value),
    )
    with pytest.raises(WorkError):
        source.fetch(7)
    assert source.read(1) == encode(1)
    write(shards / "part-0.parquet", [encode(row) for row in range(50, 57)], range(7), encode)
    assert source.read(2) == encode(2)  # its block is in the cache
    with pytest.raises(InputError, match=r"part-0\.parquet: changed while it was in use; start the command again"):
        source.read(3)
    again = stream(shards / "part-0.parquet")
    assert again.read(2) == encode(52)  # not the old block


def test_damage_inside_a_row_group(shards):
    path = shards / "part-0.parquet"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[4:600] = b"\xff" * 596
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    source = stream(path)
    with pytest.raises(WorkError, match=r"part-0\.parquet: cannot be read"):
        source.read(0)
    assert cached(source) == []


def test_block_order_reads_every_block_of_a_window_once(shards):
    source = stream(shards, "stream=4")
    seen = []
    real = remote.copy_row_group

    def counting(file, group, column, target):
        seen.append((file.url, group))
        real(file, group, column, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dinov2cli.data.stream.copy_row_group", counting)
        for row in block_order(0, 0, source.blocks, 2):
            source.read(row)
    assert len(seen) == len(set(seen)) == 8


def test_files_that_store_images_differently(tmp_path, encode):
    """One as structs with paths, one as plain bytes: both are read, and there are no names to serve as ids."""
    write(tmp_path / "a.parquet", [encode(1)], range(1), encode)
    table = pq.read_table(tmp_path / "a.parquet")
    plain = pa.array([encode(2)], pa.binary())
    table = table.set_column(table.schema.get_field_index("image"), "image", plain).replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "b.parquet")
    source = stream(tmp_path)
    assert [source.read(row) for row in range(2)] == [encode(1), encode(2)]
    assert source.ids == ["00000000", "00000001"]


def test_ids_never_cost_the_pixels(tmp_path, encode, monkeypatch):
    path = tmp_path / "large.parquet"
    pq.write_table(pa.table({"image": pa.array([encode(row) for row in range(3)], pa.large_binary())}), path)
    asked = []
    real = remote.read_columns
    monkeypatch.setattr("dinov2cli.data.stream.read_columns", lambda f, names: asked.append(names) or real(f, names))
    assert stream(path).ids == ["00000000", "00000001", "00000002"]
    assert asked == []


def test_a_row_group_that_is_not_what_its_footer_said(shards):
    source = stream(shards)
    wrong = dataclasses.replace(source._files[0], rows=(99, *source._files[0].rows[1:]))
    with pytest.raises(InputError, match=r"row group 0 has 3 rows, its footer says 99"):
        remote.copy_row_group(wrong, 0, "image", io.BytesIO())


def test_parquet_without_rows_is_said_in_one_line(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    for text in ("", "?stream=true"):
        assert "without a row" in message(str(tmp_path / "none.parquet") + text)
