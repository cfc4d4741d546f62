"""Tars as they come: members of any name and kind are read, or skipped, counted, named and explained."""

import io
import os
import pickle
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.source import open_source
from tests.data.odd_images import explained, message, no_waiting, sizes_of

EXPLAINED = {  # member of a tar → why it cannot be read
    "hard.jpg": r"a link inside the tar; pack .* `tar --dereference --hard-dereference`",
    "soft.jpg": r"a link inside the tar; pack .* `tar --dereference --hard-dereference`",
    "pipe.jpg": "not a file but a pipe or a device",
    "sparse.jpg": "a sparse member, which cannot be read in place; pack it without `--sparse`",
    "empty.jpg": "empty file",
    "words.jpg": "not an image that can be read",
}


@pytest.fixture(autouse=True)
def _no_waiting():
    with no_waiting():
        yield


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(data)


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, io.BytesIO], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, data)
    return path


def sparse_member(name: str, data: bytes) -> bytes:
    """Header and data of an old GNU sparse file: `data`, and then a hole of 100 KiB."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % len(data)
    header[156:157] = b"S"
    header[386:410] = b"%011o\0%011o\0" % (0, len(data))
    header[483:495] = b"%011o\0" % (len(data) + (100 << 10))
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    return bytes(header) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_member_names_never_lead_out_of_a_folder(tmp_path, encode, format):
    names = {
        "/etc/x.jpg": "etc/x",
        "../../x.jpg": "x",
        "./cat/./1.jpg": "cat/1",
        "dog//../../2.jpg": "dog/2",
        "//3.jpg": "3",
        "été/猫.JPG": "été/猫",
        "a b/ c .jpg": "a b/ c ",
        "two\nlines.jpg": "two\\x0alines",
    }
    if format != tarfile.USTAR_FORMAT:
        long = "/".join(["folder" * 12] * 6) + "/" + "n" * 150
        names[f"../{long}.jpg"] = long
    images = [encode(seed) for seed in range(len(names))]
    path = write_tar(tmp_path / "x.tar", *map(member, names, images), format=format)
    source = open_source(str(path))
    assert source.ids == list(names.values())
    assert [source.read(row) for row in range(len(source))] == images
    for name in source.ids:  # what a command that writes files named after ids will do
        assert not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        assert (tmp_path / "out" / name).resolve().is_relative_to((tmp_path / "out").resolve())
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


def test_member_names_that_are_not_utf_8(tmp_path, encode):
    path = write_tar(tmp_path / "x.tar", member("caf\udce9.jpg", encode(0)), member("b\udcff/1.jp\udce9g", encode(1)))
    assert open_source(str(path)).ids == ["caf\\xe9"]


def test_names_that_come_to_the_same_stay_apart(tmp_path, encode):
    images = [encode(seed) for seed in range(5)]
    names = ["x.jpg", "../x.jpg", "/x.jpg", "y.jpg", "y.jpg"]
    source = open_source(str(write_tar(tmp_path / "s.tar", *map(member, names, images))))
    assert [source.read(row) for row in range(5)] == images
    assert source.ids == ["s/x#0", "s/x#1", "s/x#2", "s/y#3", "s/y#4"]


@pytest.mark.parametrize("workers", [0, 2])
def test_members_that_are_no_plain_images(tmp_path, encode, workers):
    image = encode(0)
    path = write_tar(
        tmp_path / "x.tar",
        member("folder", type=tarfile.DIRTYPE),
        member("called.jpg", type=tarfile.DIRTYPE),
        member("1.jpg", image),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="1.jpg"),
        member("soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("pipe.jpg", type=tarfile.FIFOTYPE),
        member("empty.jpg"),
        member("words.jpg", b"not an image"),
        member("._1.jpg", b"of macOS"),
        member("notes.txt", b"text"),
    )
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512) + sparse_member("sparse.jpg", image) + sparse_member("1.txt", b"a")
    info, content = member("2.jpg", image)
    path.write_bytes(data + info.tobuf() + content.read() + bytes(-len(image) % 512 + 1024))
    source = open_source(str(path))
    bad = BadImages(max_fraction=1)
    assert list(sizes_of(source, bad, workers)) == ["1", "2"]
    explained(bad, {f"{path}/{name.removesuffix('.jpg')}": reason for name, reason in EXPLAINED.items()})


def test_tars_that_are_not_whole(tmp_path, encode):
    path = write_tar(tmp_path / "x.tar", *(member(f"{n}.jpg", encode(n)) for n in range(3)))
    whole = path.read_bytes()
    blocks = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    path.write_bytes(whole[: blocks[2]])  # without its end, but no image is missing in it
    assert open_source(str(path)).ids == ["0", "1"]
    for cut, text in ((blocks[2] + 100, "damaged at byte"), (blocks[1] + 600, "it ends inside 1.jpg")):
        path.write_bytes(whole[:cut])
        assert f"{path}: not a whole tar file ({text}" in message(path)
    path.write_bytes(whole[: blocks[1]] + b"garbage!" * 64 + whole[blocks[1] + 512 :])
    assert message(path) == f"{path}: not a whole tar file (damaged at byte {blocks[1]:,}); fetch or write it again"
    path.write_bytes(b"")
    assert f"{path}: not a whole tar file (" in message(path)
    path.unlink()
    os.mkfifo(path)
    assert message(path) == f"{path}: not a file; shards are read at random, a pipe or a folder cannot be"


def test_a_tar_that_breaks_or_vanishes_while_it_is_read(tmp_path, encode):
    path = write_tar(tmp_path / "x.tar", *(member(f"{n}.jpg", encode(n)) for n in range(3)))
    source = open_source(str(path))
    assert source.read(0) == encode(0)
    os.truncate(path, 2000)
    with pytest.raises(BadImage, match=r"x\.tar/2: truncated file"):
        source.read(2)
    clone = pickle.loads(pickle.dumps(source))
    path.unlink()
    with pytest.raises(BadImage, match=r"x\.tar/0: cannot be read \(No such file or directory\)"):
        clone.read(0)


def test_label_folders_of_a_tar_made_with_a_dot(tmp_path, encode):
    path = write_tar(tmp_path / "x.tar", *(member(f"./{name}", encode()) for name in ("cat/1.jpg", "dog/2.jpg")))
    source = open_source(f"{path}?label=folder")
    assert source.label_names == ["cat", "dog"] and np.array_equal(source.labels, [0, 1])
