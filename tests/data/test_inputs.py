"""What users really have in their folders: each file is read, or skipped, counted, named and explained."""

import ctypes
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2cli.data import files, loader
from dinov2cli.data.bad import BadImages
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.files import printable, scan_folder
from dinov2cli.data.loader import CropLoader, iterate_images
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError
from tests.data.odd_images import NAMES, accepted, explained, no_waiting, sizes_of, write_all

CROP = MultiCrop(global_size=16, local_size=8, local_number=2)


@pytest.fixture(autouse=True)
def _no_waiting():
    with no_waiting():
        yield


# --- one folder with everything -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_every_odd_file_is_read_or_explained(tmp_path, workers, caplog):
    good, reasons = write_all(tmp_path / "odd")
    source = open_source(str(tmp_path / "odd"))
    assert sorted(source.ids) == sorted([*good, *reasons])
    bad = BadImages(max_fraction=1)
    with caplog.at_level(logging.WARNING):
        assert sizes_of(source, bad, workers) == good
    explained(bad, reasons)
    named = [line for line in caplog.messages if line.startswith("skipped unreadable image ")]
    assert len(named) == len(reasons) and not any("\n" in line for line in named)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_over_every_odd_file(tmp_path, workers):
    good, reasons = write_all(tmp_path / "odd")
    source = open_source(str(tmp_path / "odd"))
    bad = BadImages(max_fraction=1)
    crops = CropLoader(source, crop=CROP, batch_size=8, seed=3, workers=workers, bad=bad)
    used: list[int] = []
    pixels = []
    for _, batch in zip(range(2 * len(source) // 8 + 1), crops, strict=False):
        assert batch["global_crops"].shape == (2, 8, 3, 16, 16)
        used += batch["index"].tolist()
        pixels.append(batch["global_crops"].clone())
    explained(bad, reasons)
    assert {source.ids[row] for row in used} == set(good)
    again = CropLoader(source, crop=CROP, batch_size=8, seed=3, workers=0, bad=BadImages(max_fraction=1))
    for expected, batch in zip(pixels, again, strict=False):
        assert torch.equal(expected, batch["global_crops"])


@pytest.mark.parametrize("name", ["still.webp", "animated.webp", "still.avif", "still.jp2"])
def test_formats_that_pillow_may_lack(name):
    if name not in accepted():
        pytest.skip(f"this Pillow is built without {name.rpartition('.')[2]}")
    assert loader.decode_image(accepted()[name][0], name=name).shape == (30, 40, 3)


def test_over_the_limit_the_run_stops_with_names(tmp_path):
    write_all(tmp_path / "odd")
    with pytest.raises(InputError, match=r"images cannot be read, the limit is 1\.0%: [^;]+ \([^;]+\); "):
        sizes_of(open_source(str(tmp_path / "odd")), BadImages())


def test_a_folder_of_heic_is_not_an_empty_one(tmp_path):
    for number in range(3):
        (tmp_path / f"IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    source = open_source(str(tmp_path))
    assert len(source) == 3
    with pytest.raises(InputError, match=r"none of the 3 images can be read: IMG_0\.HEIC \("):
        sizes_of(source, BadImages())


# --- names --------------------------------------------------------------------------------------------------------


def test_ids_are_one_line_and_unique_and_lead_to_the_files(tmp_path):
    write_all(tmp_path / "odd")
    source = open_source(str(tmp_path / "odd"))
    assert len(set(source.ids)) == len(source)
    assert all(id.encode() and id.isprintable() for id in source.ids)
    assert [source.name(row) for row in range(len(source))] == source.ids
    for raw, name in NAMES.items():
        row = source.ids.index(name)
        with open(os.path.join(os.fsencode(tmp_path), b"odd", raw), "rb") as file:
            assert source.read(row) == file.read()
        if b"\xe9" not in raw:  # the path is the true one where it is text at all
            assert source.paths[row] == f"{tmp_path}/odd/{raw.decode()}"
    clone = pickle.loads(pickle.dumps(source))
    assert clone.name(3) == source.name(3)


def test_printable_names_never_meet():
    names = [
        b"a",
        b"\\",
        b"\\\\",
        b"\\x0a",
        b"\n",
        b"\\\n",
        b"\\x5cx0a",
        b"\\x5",
        b"\\x5\xe9",
        b"\xe9",
        b"\\xe9",
        b"\\xE9",
    ]
    shown = [printable(name) for name in names]
    assert len(set(shown)) == len(names) and all(text.isprintable() for text in shown)
    assert [printable(b"a"), printable(b"\n"), printable(b"\\x0a")] == ["a", "\\x0a", "\\x5cx0a"]


def test_a_set_whose_own_path_is_not_utf_8(tmp_path, encode):
    root = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(root)
    with open(os.path.join(root, b"1.png"), "wb") as file:
        file.write(encode())
    for part in (b"", b"/1.png"):
        with pytest.raises(InputError) as caught:
            open_source(os.fsdecode(root + part))
        assert str(caught.value) == (
            f"{tmp_path}/caf\\xe9{part.decode()}: this path is not UTF-8, so no manifest can name it; "
            "rename it, or give a link to it (`ln -s`)"
        )
    os.symlink(root, tmp_path / "cafe")
    assert open_source(str(tmp_path / "cafe")).read(0) == encode()


# --- links and folders --------------------------------------------------------------------------------------------


def test_links_to_folders_add_no_image_twice(tmp_path, encode):
    root = tmp_path / "set"
    for name in ("a/b/1.png", ".store/2.png", "outside/3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode())
    shutil.move(root / "outside", tmp_path / "outside")
    for link, target in {
        "a/b/up": "..",  # the walk is inside it already
        "a/b/here": ".",
        "0": "a",  # comes by later
        "ping": "pong",
        "pong": "ping",
        "store": ".store",  # hidden, so this is the only way to it
        "store2": ".store",
        "x": str(tmp_path / "outside"),
        "y": str(tmp_path / "outside"),
        "z": str(tmp_path),  # above the set
    }.items():
        (root / link).symlink_to(target)
    (tmp_path / "outside" / "back").symlink_to(root)
    assert open_source(str(root)).ids == ["a/b/1.png", "store/2.png", "x/3.png"]
    (root / "0 above").symlink_to(tmp_path)  # before x: now that is where the walk comes by
    assert open_source(str(root)).ids == ["0 above/outside/3.png", "a/b/1.png", "store/2.png"]


def test_a_folder_that_is_called_like_an_image_is_a_folder(tmp_path, encode):
    (tmp_path / "a.jpg").mkdir()
    (tmp_path / "a.jpg" / "b.png").write_bytes(encode())
    (tmp_path / "c.png").symlink_to("a.jpg")
    assert open_source(str(tmp_path)).ids == ["a.jpg/b.png"]


# --- rights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def closable(tmp_path):
    """A folder whose parts a test may close; opened again at the end, or pytest could not remove it."""
    root = tmp_path / "set"
    root.mkdir()
    yield root
    root.chmod(0o755)
    for folder, folders, _ in os.walk(root):
        for name in folders:
            os.chmod(os.path.join(folder, name), 0o755)


READ = """
import json, logging, sys
from dinov2cli.data.bad import BadImages
from dinov2cli.data.loader import iterate_images
from dinov2cli.data.source import open_source
from dinov2cli.data.spec import DataSpec
from dinov2cli.errors import InputError
lines = []
logging.getLogger().addHandler(type("Lines", (logging.Handler,), {"emit": lambda _, r: lines.append(r.getMessage())})())
try:
    source = open_source(sys.argv[1])
    bad = BadImages(max_fraction=1)
    batches = iterate_images(source, resize=8, crop=8, batch_size=4, workers=int(sys.argv[2]), bad=bad)
    read = [source.ids[row] for batch in batches for row in batch.index]
    print(json.dumps({"read": read, "bad": bad.reasons, "warnings": lines}))
except InputError as error:
    print(json.dumps({"error": str(error), "warnings": lines}))
"""


def read_with_rights_in_force(root: Path, workers: int = 0) -> dict:
    """What comes of a folder in another process, for which permissions count even if it belongs to root."""
    give_up = None
    if os.geteuid() == 0:
        if not sys.platform.startswith("linux"):
            pytest.skip("permissions do not count for root")
        prctl = ctypes.CDLL(None, use_errno=True).prctl

        def give_up() -> None:
            for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root reads everything
                prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, in force from the exec that follows

    command = [sys.executable, "-c", READ, str(root), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, preexec_fn=give_up)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("workers", [0, 1])
def test_closed_files_are_skipped_and_closed_folders_said(closable, encode, workers):
    for name in ("open.png", "closed.png", "a/1.png", "b/c/2.png", "b/c/3.png", "names only/4.png"):
        path = closable / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode())
    (closable / "closed.png").chmod(0)
    (closable / "a").chmod(0)
    (closable / "b" / "c").chmod(0)
    (closable / "names only").chmod(0o444)
    found = read_with_rights_in_force(closable, workers)
    assert found["read"] == ["open.png"]
    reason = "cannot be opened (Permission denied)"
    assert found["bad"] == {"closed.png": reason, "names only/4.png": reason}
    assert found["warnings"][0] == (
        "passed over 2 folders that cannot be opened: a (Permission denied), b/c (Permission denied)"
    )


def test_closed_sets_are_no_empty_sets(closable, encode):
    root = closable
    (root / "a").mkdir()
    (root / "a" / "1.png").write_bytes(encode())
    (root / "a").chmod(0)
    assert read_with_rights_in_force(root)["error"] == (
        f"{root}: no image found, passed over 1 folder that cannot be opened: a (Permission denied); "
        "allow yourself to read what is below"
    )
    root.chmod(0)
    assert read_with_rights_in_force(root)["error"] == (
        f"{root}: the folder cannot be opened (Permission denied); allow yourself to read it, or give another one"
    )


# --- what happens during a run ------------------------------------------------------------------------------------


def test_files_that_vanish_or_break_while_they_are_read(tmp_path, encode):
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(encode(number, size=(100, 80)))
    source = open_source(str(tmp_path))
    bad = BadImages(max_fraction=1)
    batches = iterate_images(source, resize=8, crop=8, batch_size=2, workers=0, bad=bad)
    read = next(batches).index.tolist()
    (tmp_path / "05.png").unlink()
    (tmp_path / "06.png").write_bytes(encode(6, size=(100, 80))[:900])
    (tmp_path / "07.png").unlink()
    (tmp_path / "07.png").mkdir()
    (tmp_path / "08.png").unlink()
    os.mkfifo(tmp_path / "08.png")
    read += [int(row) for batch in batches for row in batch.index]
    assert read == [0, 1, 2, 3, 4, 9, 10, 11]
    assert bad.reasons == {
        "05.png": "the file does not exist",
        "06.png": "truncated file",
        "07.png": "a folder, not a file",
        "08.png": "a named pipe, not a file",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_training_survives_files_that_vanish(tmp_path, encode, workers):
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(encode(number))
    bad = BadImages(max_fraction=1)
    crops = CropLoader(open_source(str(tmp_path)), crop=CROP, batch_size=3, seed=1, workers=workers, bad=bad)
    late: list[int] = []
    for step, batch in zip(range(20), crops, strict=False):
        if step == 0:
            (tmp_path / "04.png").unlink()
            (tmp_path / "09.png").write_bytes(b"")
        if step >= 10:  # an epoch after everything that workers had read ahead
            late += batch["index"].tolist()
    assert bad.reasons == {"04.png": "the file does not exist", "09.png": "empty file"}
    assert set(late) == set(range(12)) - {4, 9}


def test_a_set_that_vanishes_stops_the_run(tmp_path, encode):
    root = tmp_path / "set"
    root.mkdir()
    for number in range(40):
        (root / f"{number:02d}.png").write_bytes(encode(number))
    batches = iterate_images(open_source(str(root)), resize=8, crop=8, batch_size=4, workers=0, bad=BadImages())
    next(batches)
    shutil.rmtree(root)
    with pytest.raises(InputError, match=r"12 of 40 images cannot be read.*: 04\.png \(the file does not exist\)"):
        list(batches)


# --- many files ---------------------------------------------------------------------------------------------------


def test_thousands_of_files_in_one_folder(tmp_path, encode, monkeypatch):
    first = tmp_path / "image_0000.png"
    first.write_bytes(encode())
    for number in reversed(range(1, 5000)):
        os.link(first, tmp_path / f"image_{number:04d}.png")
    looked_at = []
    real_stat = os.stat
    monkeypatch.setattr(files.os, "stat", lambda *args, **more: looked_at.append(args) or real_stat(*args, **more))
    found = scan_folder(str(tmp_path))
    assert not looked_at  # one reading of the folder tells names and kinds: on a network disk each look costs
    assert found.images == [f"image_{number:04d}.png" for number in range(5000)] and not found.others
    monkeypatch.undo()
    source = open_source(str(tmp_path))
    assert source.ids == found.images and len(pickle.dumps(source)) < 5000 * 40
    before = source.content_hash()
    assert open_source(str(tmp_path)).content_hash() == before
    (tmp_path / "image_4321.png").unlink()
    (tmp_path / "image_4321.png").write_bytes(b"other")
    assert source.content_hash() != before
