import dataclasses
import io
import multiprocessing
import os
import pickle
import re
import tarfile
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2cli.data import remote
from dinov2cli.data.bad import BadImage
from dinov2cli.data.block_cache import BlockCache
from dinov2cli.data.order import block_order
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.data.stream import StreamSource
from dinov2cli.errors import InputError, WorkError


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.fixture
def shards(tmp_path, encode):
    """Three files 'set/part-0.parquet' … of 7, 5 and 8 rows in row groups of 3, with masks, labels and columns."""
    root = tmp_path / "set"
    root.mkdir()
    start = 0
    for part, count in enumerate((7, 5, 8)):
        rows = range(start, start + count)
        write(root / f"part-{part}.parquet", [encode(row) for row in rows], rows, encode)
        start += count
    return root


def write(path, images, rows, encode, group=3, features=True):
    table = {
        "image": [{"bytes": image, "path": f"{row}.png"} for row, image in zip(rows, images, strict=True)],
        "mask": [{"bytes": encode(100 + row), "path": None} for row in rows],
        "label": [row % 2 for row in rows],
        "place": [f"p{row % 3}" if row % 4 else None for row in rows],
    }
    schema = datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "place": datasets.Value("string"),
        }
    ).arrow_schema
    if not features:
        schema = schema.remove_metadata()
    pq.write_table(pa.Table.from_pydict(table, schema=schema), path, row_group_size=group)


def message(spec: object, kind: type[Exception] = InputError) -> str:
    with pytest.raises(kind) as caught:
        _ = open_source(str(spec)).labels
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stream(path: object, options: str = "stream=true") -> StreamSource:
    source = open_source(f"{path}?{options}")
    assert isinstance(source, StreamSource)
    return source


def cached(source: StreamSource) -> list[str]:
    """Block numbers that lie in the cache for images."""
    folder = Path(source._folder) / "image"
    return sorted(path.name for path in folder.glob("*.arrow")) if folder.exists() else []


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


def test_a_full_disk_is_named(shards, monkeypatch):
    def full(file, group, column, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov2cli.data.stream.copy_row_group", full)
    source = stream(shards)
    with pytest.raises(WorkError, match=r"no space left for its row groups in .*dinov2-streams.*; free some"):
        source.read(0)


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
