"""Packing: what becomes of one image, of names, and of shards on disk."""

import hashlib
import io
import json
import os
import struct
import sys
import tarfile
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.packed import PackWriter
from dinov2cli.artifacts.packed_names import safe_names
from dinov2cli.artifacts.packed_shards import stored_columns
from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.decode import decode_image
from dinov2cli.data.pack import pack_image, packed_size, stream_packed
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, WorkError


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def as_bytes(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(400, 200, (128, 64)), (200, 400, (64, 128)), (99, 65, None)]
)
def test_large_images_are_scaled_down_to_the_shorter_side(width, height, expected):
    data = as_bytes(smooth(width, height), "JPEG", quality=90)
    packed = pack_image(data, name="x", size=64)
    expected = expected or packed_size(width, height, 64)
    with Image.open(io.BytesIO(packed.data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", expected)
        assert image.layer[1][1:3] == (1, 1)  # chroma in full
        small = np.asarray(image, dtype=np.float32)
    reference = Image.fromarray(decode_image(data, name="x")).resize(expected, Image.Resampling.BICUBIC)
    assert np.abs(small - np.asarray(reference, dtype=np.float32)).mean() < 1.5
    assert (packed.width, packed.height, packed.bytes_before) == (width, height, len(data))
    assert packed.sha256 == hashlib.sha256(data).hexdigest()
    assert not packed.copied and packed.extension == ".jpg"


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return as_bytes(smooth(60, 40), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (as_bytes(smooth(64, 90), "JPEG"), ".jpg"),
        (as_bytes(smooth(90, 64, "L"), "JPEG"), ".jpg"),
        (as_bytes(smooth(60, 40), "PNG"), ".png"),
        (as_bytes(smooth(60, 40, "L"), "PNG"), ".png"),
        (as_bytes(smooth(60, 40), "WEBP"), ".webp"),
        (rotated(1), ".jpg"),
        (as_bytes(smooth(60, 40), "JPEG", icc_profile=b"profile"), ".jpg"),
    ],
)
def test_small_files_are_copied_byte_for_byte(data, extension):
    packed = pack_image(data, name="x", size=64)
    assert packed.copied and packed.data == data and packed.extension == extension


@pytest.mark.parametrize(
    "data",
    [
        as_bytes(smooth(65, 65), "JPEG"),  # one pixel too large
        rotated(6),
        rotated(3),  # turned by half: the size says nothing
        as_bytes(smooth(60, 40, "CMYK"), "JPEG"),
        as_bytes(smooth(60, 40, "P"), "PNG"),
        as_bytes(smooth(60, 40, "RGBA"), "PNG"),
        as_bytes(smooth(60, 40), "PNG", transparency=(1, 2, 3)),
        as_bytes(smooth(60, 40, "1"), "PNG"),
        as_bytes(Image.fromarray(np.full((40, 60), 40_000, np.uint16)), "PNG"),
        as_bytes(smooth(60, 40), "BMP"),
        as_bytes(smooth(60, 40), "GIF"),
        as_bytes(smooth(60, 40), "WEBP", save_all=True, append_images=[smooth(60, 40, "L").convert("RGB")]),
    ],
)
def test_everything_else_becomes_an_upright_jpeg(data):
    packed = pack_image(data, name="x", size=64)
    assert not packed.copied and packed.extension == ".jpg"
    with Image.open(io.BytesIO(packed.data)) as image:
        assert image.format == "JPEG" and image.mode == "RGB" and not image.getexif()
    before, after = decode_image(data, name="x"), decode_image(packed.data, name="x")
    assert (packed.height, packed.width) == before.shape[:2]
    assert after.shape[:2] == packed_size(packed.width, packed.height, 64)[::-1]
    if after.shape == before.shape:
        assert np.abs(after.astype(int) - before).mean() < 4


def test_sizes_of_packed_images():
    assert packed_size(2048, 1536, 512) == (683, 512)
    assert packed_size(300, 200, 512) == (300, 200)  # never up
    assert packed_size(20_000, 1000, 512) == (10_240, 512)  # a panorama keeps its aspect
    assert packed_size(200_000, 600, 512) == (65_500, 196)  # and fits into a JPEG
    assert packed_size(200_000, 1, 512) == (65_500, 1)


def test_what_cannot_be_read_is_said():
    data = as_bytes(smooth(60, 40), "JPEG")
    with pytest.raises(BadImage, match="truncated"):  # though it is small enough to be copied
        pack_image(data[: len(data) // 2], name="x", size=512)
    with pytest.raises(BadImage, match="not an image"):
        pack_image(b"text", name="x", size=512)


def test_names_are_safe_unique_and_always_the_same():
    long = "x" * 300
    ids = [
        *("cat/1.jpg", "cat/1.png", "CAT/1.JPG", "/etc/passwd", "../../etc/passwd", "a/../b.jpg", "..", "", "."),
        *(".hidden/.file.png", "__MACOSX/a.jpg", "v1.0/a.b.c.jpg", "x.jpg/y.png", "x.png", "c:\\dir\\f.jpg"),
        *(f"{long}.jpg", f"{long}y.jpg", "/".join(["deep"] * 100), "é.jpg", "new\nline?*.jpg", "cat/1.jpg"),
        *("~/a.jpg", "hf:x/y#12"),
    ]
    names = safe_names(ids)
    assert names == safe_names(ids) and names[0] == "cat/1"
    assert len({name.casefold() for name in names}) == len(ids)
    for name in names:
        parts = name.split("/")
        assert not name.startswith("/") and "\\" not in name and ".." not in parts and "" not in parts
        assert all(not part.startswith(".") and len(part.encode()) <= 130 for part in parts)
        assert "." not in parts[-1] and "__MACOSX" not in name and len(name.encode()) <= 300
        assert not any(part.endswith((".jpg", ".png", ".webp")) for part in parts)
        assert name.isprintable()
    assert names[ids.index("v1.0/a.b.c.jpg")] == "v1.0/a_b_c"


def table_of(ids: list[str], **columns) -> pa.Table:
    return pa.table({"id": ids, "source": ["s"] * len(ids), "row": list(range(len(ids))), **columns})


def write(path, table, images, *, format="parquet", shard_bytes=3000, label_names=None) -> PackWriter:
    with Output.open(path, "selection", command="x", config={}, inputs=[]) as out:
        writer = PackWriter(out, table, format=format, label_names=label_names, shard_bytes=shard_bytes)
        writer.write(iter(images[writer.rows :]))
        out.finish(rows=writer.rows)
    return writer


@pytest.fixture
def images():
    """Nine images and, at rows 0, 4, 10 and 11, ones that cannot be read."""
    found = [pack_image(as_bytes(smooth(60 + row, 50), "JPEG"), name="x", size=64) for row in range(12)]
    return [f"bad {row}" if row in (0, 4, 10, 11) else image for row, image in enumerate(found)]


def test_parquet_shards_are_a_data_set_for_others(tmp_path, images):
    kind = pa.array(["x", None] * 6).dictionary_encode()
    table = table_of([f"d/{row}.jpg" for row in range(12)], label=[-1, 1] * 6, kind=kind, image=["text"] * 12)
    writer = write(tmp_path / "o", table, images, label_names=["cat", "dog"])
    shards = sorted(str(path) for path in (tmp_path / "o" / "packed").iterdir())
    assert len(shards) > 2
    found = datasets.load_dataset("parquet", data_files=shards, split="train")
    assert isinstance(found.features["image"], datasets.Image) and found.features["label"].names == ["cat", "dog"]
    assert found.column_names == ["image", "id", "label", "kind", "source_image", "width", "height", "sha256"]
    readable = [row for row, image in enumerate(images) if not isinstance(image, str)]
    assert found["id"] == [f"d/{row}.jpg" for row in readable]
    assert found["label"] == [None if row % 2 == 0 else 1 for row in readable]
    assert found["kind"] == ["x" if row % 2 == 0 else None for row in readable]
    assert [image.size for image in found["image"]] == [(60 + row, 50) for row in readable]
    raw = found.cast_column("image", datasets.Image(decode=False))
    assert [cell["bytes"] for cell in raw["image"]] == [images[row].data for row in readable]
    assert found["sha256"] == [images[row].sha256 for row in readable]
    assert writer.index.column("unreadable").to_pylist() == [i if isinstance(i, str) else None for i in images]


def test_row_groups_are_small(tmp_path):
    image = pack_image(as_bytes(smooth(8, 8), "JPEG"), name="x", size=64)
    write(tmp_path / "o", table_of([str(row) for row in range(150)]), [image] * 150, shard_bytes=1 << 30)
    (shard,) = (tmp_path / "o" / "packed").iterdir()
    metadata = pq.read_metadata(shard)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [64, 64, 22]


def test_webdataset_shards(tmp_path, images):
    ids = [f"d.e/{row}.x.png" for row in range(12)]
    score = [float("nan"), 0.5] * 6
    write(
        tmp_path / "o",
        table_of(ids, label=[-1, 1] * 6, score=score),
        images,
        format="webdataset",
        label_names=["cat", "dog"],
    )
    members = {}
    for shard in sorted((tmp_path / "o" / "packed").glob("pack-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                members[member.name] = tar.extractfile(member).read()
    assert list(members)[:5] == ["d.e/1_x.jpg", "d.e/1_x.json", "d.e/1_x.cls", "d.e/2_x.jpg", "d.e/2_x.json"]
    assert members["d.e/3_x.jpg"] == images[3].data and members["d.e/3_x.cls"] == b"1"
    facts = json.loads(members["d.e/3_x.json"])
    assert facts == {
        "id": "d.e/3.x.png",
        "label": 1,
        "label_name": "dog",
        "score": 0.5,
        "width": 63,
        "height": 50,
        "sha256": images[3].sha256,
    }
    assert json.loads(members["d.e/2_x.json"])["score"] is None
    source = open_source(str(tmp_path / "o" / "packed"))
    assert source.ids[:2] == ["d.e/1_x", "d.e/2_x"] and source.labels.tolist()[:2] == [1, -1]


@pytest.mark.parametrize("format", ["parquet", "webdataset", "folder"])
def test_shards_do_not_depend_on_where_a_run_stopped(tmp_path, images, format):
    table = table_of([f"{row}" for row in range(12)])

    def files(path):
        found = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
        return {name: data for name, data in found.items() if name.name != "manifest.json"}

    whole = write(tmp_path / "whole", table, images, format=format)
    assert len(whole.index) == 12 and whole.summary()["shards"] > 2
    for stop in range(1, 12):
        path = tmp_path / f"{stop}"

        def broken(stop=stop):
            yield from images[:stop]
            raise InputError("stop")

        with Output.open(path, "selection", command="x", config={}, inputs=[]) as out:
            writer = PackWriter(out, table, format=format, label_names=None, shard_bytes=3000)
            with pytest.raises(InputError):
                writer.write(broken())
            assert writer.rows <= stop
        again = write(path, table, images, format=format)
        assert again.summary() == whole.summary()
        assert files(path) == files(tmp_path / "whole")


def test_shards_of_other_images_are_refused(tmp_path, images):
    path = tmp_path / "o"
    with Output.open(path, "selection", command="x", config={}, inputs=[]) as out:
        writer = PackWriter(out, table_of(list("abcdefghijkl")), format="parquet", label_names=None, shard_bytes=3000)
        writer.write(iter(images))
        with pytest.raises(
            WorkError, match="lists other images than are to be packed now; start over with --overwrite"
        ):
            PackWriter(out, table_of(list("abcdefghijkm")), format="parquet", label_names=None, shard_bytes=3000)


def test_columns_that_datasets_does_not_know_become_text():
    table = pa.table({"id": ["a"], "pairs": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())), "row": [3]})
    found = stored_columns(table)
    assert found.column_names == ["id", "pairs"] and found["pairs"].to_pylist() == ["[('k', 1)]"]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_in_order_and_unreadable_ones_are_counted(picture_folder, workers):
    for number in range(40):
        (picture_folder / f"z{number:02d}.png").write_bytes(as_bytes(smooth(100, 90 + number), "PNG"))
    (picture_folder / "z07.png").write_text("no image")
    source = open_source(str(picture_folder))
    bad = BadImages()
    rows = np.arange(len(source))[::-1].copy()
    done = []
    with stream_packed(source, rows, size=50, workers=workers, bad=bad, start=3, advance=done.append) as stream:
        found = list(stream)
    assert bad.reasons == {"z07.png": "not an image that can be read"} and sum(done) == len(source) - 3
    for row, item in zip(rows[3:], found, strict=True):
        if source.ids[row] == "z07.png":
            assert item == "not an image that can be read"
        else:
            assert item == pack_image(source.read(row), name="x", size=50)


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("no image")
    with (
        pytest.raises(InputError, match="none of the 3 images can be read"),
        stream_packed(open_source(str(tmp_path)), np.arange(3), size=50) as stream,
    ):
        list(stream)


def png_of(depth: int, colour: int, rows: bytes, width: int, height: int) -> bytes:
    """A PNG that Pillow cannot write: 16-bit RGB, 2-bit grey."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        png_of(16, 2, b"".join(b"\0" + bytes(range(6 * 4)) for _ in range(4)), 4, 4),
        png_of(2, 0, b"".join(b"\0" + bytes([0b00011011]) for _ in range(4)), 4, 4),
    ],
    ids=["16-bit colours", "2-bit grey"],
)
def test_pngs_of_other_depths_are_encoded_anew(data):
    packed = pack_image(data, name="x", size=64)
    assert not packed.copied and decode_image(packed.data, name="x").shape == (4, 4, 3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forked workers see the patched function")
def test_an_image_that_kills_its_worker_is_passed_over(tmp_path, monkeypatch):
    for number in range(4):
        smooth(40 + number, 40).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    monkeypatch.setattr(
        "dinov2cli.data.pack.decode_image",
        lambda data, name: os._exit(9) if name == "2.png" else decode_image(data, name=name),
    )
    bad = BadImages(max_fraction=1)
    with stream_packed(source, np.arange(4), size=32, workers=1, bad=bad) as stream:
        found = list(stream)
    assert [isinstance(item, str) for item in found] == [False, False, True, False]
    assert bad.reasons == {"2.png": "it killed the two workers that decoded it"}


@pytest.mark.parametrize("form", ["parquet", "webdataset", "folder"])
def test_a_shard_that_was_lost_is_written_again(tmp_path, form):
    """Its index is there, the images are not."""
    for number in range(6):
        smooth(40 + number, 40).save(tmp_path / f"{number}.png")
    source, place = open_source(str(tmp_path)), tmp_path / "out"

    def work(stop: int | None) -> PackWriter:
        with Output.open(place, "selection", command="x", config={}) as out:
            table = pa.table({"id": source.ids})
            writer = PackWriter(out, table, format=form, label_names=None, shard_bytes=1)
            start = writer.rows
            with stream_packed(source, np.arange(6), size=32, start=start) as stream:
                while writer.rows < (stop or 6):
                    writer._write_shard(stream)
            return writer

    work(3)
    lost = sorted(file for file in (place / "packed").iterdir())[1]
    content = lost.read_bytes()
    lost.unlink()
    assert work(None).summary()["images"] == 6
    assert lost.read_bytes() == content


def test_shards_of_nothing_but_unreadable_images_are_not_counted(tmp_path):
    with Output.open(tmp_path / "out", "selection", command="x", config={}) as out:
        writer = PackWriter(out, pa.table({"id": ["a", "b"]}), format="webdataset", label_names=None, shard_bytes=1)
        image = pack_image(as_bytes(smooth(40, 40), "JPEG"), name="a", size=64)
        writer.write(iter([image, "truncated file"]))
        assert writer.summary()["shards"] == 1
