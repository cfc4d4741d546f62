"""`dinov2 pack`, and `--pack` of dedup and curate: the packed images take the place of the originals."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2cli.artifacts.manifest import read_manifest
from dinov2cli.data.decode import decode_image
from dinov2cli.data.source import open_source
from tests.cli.conftest import TINY
from tests.launch import launch

SMALL = ["--workers", "0", "--device", "cpu", "--set", "pack_shard_mib=0.02"]


@pytest.fixture(scope="module")
def originals(photos, tmp_path_factory):
    """The photographs enlarged to 160 pixels, one of them small already, and a file that is no image."""
    folder = tmp_path_factory.mktemp("originals")
    for path in sorted(photos.rglob("*.png"))[:40]:
        target = folder / path.relative_to(photos).with_suffix(".jpg")
        target.parent.mkdir(exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((200, 160), Image.Resampling.BICUBIC).save(target, quality=90)
    image.convert("RGB").resize((80, 60)).save(folder / "small.jpg")
    (folder / "bad.jpg").write_text("no image")
    return folder


@pytest.fixture
def mine(originals, tmp_path):
    """A copy of the originals that a test may remove."""
    return shutil.copytree(originals, tmp_path / "mine")


def contents(path):
    """Every file of an output but the manifest, with its bytes."""
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if name != "manifest.json"}


def equal_images(packed, before) -> None:
    for name, row in zip(packed.ids, range(len(packed)), strict=True):
        old = before.read(before.ids.index(name))
        pixels = decode_image(packed.read(row), name=name)
        if name == "small.jpg":
            assert packed.read(row) == old
        else:
            assert pixels.shape == (96, 120, 3)
            reference = Image.fromarray(decode_image(old, name=name)).resize((120, 96), Image.Resampling.BICUBIC)
            assert np.abs(pixels.astype(int) - np.asarray(reference)).mean() < 3


@pytest.mark.parametrize("form", ["parquet", "webdataset", "folder"])
def test_packed_images_take_the_place_of_the_originals(dinov2, mine, originals, tmp_path, form):
    data, out = f"{mine}?label=folder", tmp_path / "p"
    done = dinov2("pack", data, "-o", out, "--format", form, "--size", 96, *SMALL, "--json")
    assert done.code == 0, done.err
    facts = done.json["packed"]
    assert (facts["format"], facts["size"], facts["images"], facts["copied"]) == (form, 96, 41, 1)
    files = [path for path in mine.rglob("*.jpg") if path.name != "bad.jpg"]
    assert facts["bytes_before"] == sum(path.stat().st_size for path in files) > facts["bytes_after"]
    assert facts["shards"] > 3 and done.json["rows"] == 41 and done.json["dropped"] == 1
    assert "skipped unreadable image bad.jpg" in done.err
    assert "41 images packed as" in done.err and " before, " in done.err
    (dropped,) = pq.read_table(out / "dropped.parquet").to_pylist()
    assert (dropped["id"], dropped["reason"]) == ("bad.jpg", "unreadable: not an image that can be read")
    shutil.rmtree(mine)
    packed, before = open_source(str(out)), open_source(f"{originals}?label=folder")
    assert packed.ids == [name for name in before.ids if name != "bad.jpg"]
    assert packed.paths == [str(mine / name) for name in packed.ids]
    assert packed.label_names == before.label_names
    here = [row for row, name in enumerate(before.ids) if name != "bad.jpg"]
    assert packed.labels.tolist() == before.labels[here].tolist()
    equal_images(packed, before)
    kept = pq.read_table(out / "kept.parquet").to_pylist()
    assert {row["width"] for row in kept} == {200, 80}
    inside = open_source(str(out / "packed"))
    assert len(inside) == 41 and inside.kind == {"webdataset": "tar"}.get(form, form)
    again = dinov2("pack", data, "-o", out, "--format", form, "--size", 96, *SMALL)
    assert again.code == 3  # the input of the same command is gone


def test_training_on_packed_images_and_what_follows_from_them(dinov2, mine, tmp_path):
    assert dinov2("pack", f"{mine}?label=folder", "-o", tmp_path / "p", "--size", 64, *SMALL, "-q").code == 0
    shutil.rmtree(mine)
    done = dinov2("pretrain", tmp_path / "p", "-o", tmp_path / "run", *TINY, "-q")
    assert done.code == 0, done.err
    done = dinov2("dedup", tmp_path / "p", "-o", tmp_path / "d", "--tiers", "exact", "--workers", 0, "--json", "-q")
    assert done.code == 0 and done.json["rows"] > 30
    second = open_source(str(tmp_path / "d"))
    assert second.origin(0)[0] == str(tmp_path / "p") and len(second.read(0)) > 100
    assert second.label_names == open_source(str(tmp_path / "p")).label_names
    done = dinov2("pack", tmp_path / "d", "-o", tmp_path / "pp", "--size", 32, *SMALL, "--json", "-q")
    assert done.code == 0, done.err
    third = open_source(str(tmp_path / "pp"))
    assert third.ids == second.ids and third.labels.tolist() == second.labels.tolist()


def test_what_is_made_from_packed_embeddings_needs_no_originals(dinov2, mine, tmp_path):
    here = ["--workers", 0, "--device", "cpu", "-q"]
    assert dinov2("embed", mine, "-m", "tiny", "-o", tmp_path / "e", *here).code == 0
    choose = ["curate", tmp_path / "e", "-o", tmp_path / "c", "--target-size", 12, "--pack", "folder"]
    assert dinov2(*choose, "--pack-size", 64, *here).code == 0
    shutil.rmtree(mine)
    done = dinov2("curate", tmp_path / "c", "-o", tmp_path / "c2", "--target-size", 5, *here)
    assert done.code == 0, done.err
    second, first = open_source(str(tmp_path / "c2")), open_source(str(tmp_path / "c"))
    assert len(second) == 5 and "packed_path" not in second.columns.column_names
    for row, name in enumerate(second.ids):
        assert second.read(row) == first.read(first.ids.index(name))
    again = dinov2("embed", tmp_path / "c", "-m", "tiny", "-o", tmp_path / "e2", *here)
    assert again.code == 0 and len(open_source(str(tmp_path / "e2"))) == 12


@pytest.mark.parametrize("form", ["parquet", "webdataset", "folder"])
def test_images_in_any_order_and_from_anywhere(dinov2, originals, tmp_path, form):
    files = sorted(originals.rglob("train*.jpg"), reverse=True)[:12]
    listed = tmp_path / "list" / "some.txt"
    listed.parent.mkdir()
    lines = [str(path) if row % 2 else os.path.relpath(path, listed.parent) for row, path in enumerate(files)]
    listed.write_text("\n".join(lines))
    out = tmp_path / "p"
    assert dinov2("pack", listed, "-o", out, "--format", form, "--size", 96, *SMALL, "-q").code == 0
    equal_images(open_source(str(out)), open_source(str(listed)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list", "p"]
    assert all(file.resolve().is_relative_to(out.resolve()) for file in out.rglob("*"))


def test_the_fingerprint_follows_the_packed_images(dinov2, mine, tmp_path):
    def pack(size):
        assert dinov2("pack", mine, "-o", tmp_path / "p", "--size", size, *SMALL, "-q", "--overwrite").code == 0
        return open_source(str(tmp_path / "p")).fingerprint()

    first = pack(96)
    assert pack(64)["hash"] != first["hash"]
    opened = open_source(str(tmp_path / "p")).fingerprint()
    assert opened == open_source(str(tmp_path / "p")).fingerprint()
    (tmp_path / "mine" / "new.jpg").write_bytes((tmp_path / "mine" / "small.jpg").read_bytes())
    assert opened == open_source(str(tmp_path / "p")).fingerprint()  # the originals do not matter any more
    shard = sorted((tmp_path / "p" / "packed").iterdir())[1]
    os.utime(shard, (1, 1))
    assert open_source(str(tmp_path / "p")).fingerprint() != opened


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_missing_packed_images_are_said(dinov2, originals, tmp_path, form):
    out = tmp_path / "p"
    assert dinov2("pack", originals, "-o", out, "--format", form, "--size", 64, *SMALL, "-q").code == 0
    victim = sorted(path for path in (out / "packed").rglob("*") if path.is_file())[1]
    data = victim.read_bytes()
    victim.unlink()
    done = dinov2("dedup", out, "-o", tmp_path / "d", "--tiers", "exact", *SMALL)
    assert done.code == 3
    assert "copy it there again, or make the selection again with --overwrite" in done.err
    if form == "parquet":
        victim.write_bytes(data[:-10])
        done = dinov2("dedup", out, "-o", tmp_path / "d", "--tiers", "exact", *SMALL)
        assert "is missing or not as long as it was written" in done.err
    shutil.rmtree(out / "packed")
    done = dinov2("dedup", out, "-o", tmp_path / "d", "--tiers", "exact", *SMALL)
    assert done.code == 3 and "which holds the packed images" in done.err


def test_the_same_command_is_done_and_others_are_refused(dinov2, originals, tmp_path):
    out = tmp_path / "p"
    plan = dinov2("pack", originals, "-o", out, "--dry-run", "--json").json
    assert plan["images"] == 42 and plan["format"] == "parquet" and not out.exists()
    assert dinov2("pack", originals, "-o", out, "--size", 64, *SMALL, "-q").code == 0
    assert "already done" in dinov2("pack", originals, "-o", out, "--size", 64, *SMALL).err
    done = dinov2("pack", originals, "-o", out, "--size", 96, *SMALL)
    assert done.code == 2 and "pack_size: 64 → 96" in done.err
    done = dinov2("pack", originals, "-o", out, "--format", "zip")
    assert done.code == 2 and "'parquet', 'webdataset' or 'folder'" in done.err
    done = dinov2("pack", originals, "-o", out, "--size", 0)
    assert done.code == 2


def test_dedup_and_curate_pack_what_they_keep(dinov2, mine, originals, tmp_path):
    done = dinov2("dedup", mine, "-o", tmp_path / "d", "--pack", "webdataset", "--pack-size", 96, *SMALL, "--json")
    assert done.code == 0, done.err
    kept = pq.read_table(tmp_path / "d" / "kept.parquet")
    assert done.json["packed"]["images"] == kept.num_rows == done.json["rows"]
    assert "packed as webdataset" in (tmp_path / "d" / "report.html").read_text()
    embedded = dinov2("embed", mine, "-m", "tiny", "-o", tmp_path / "e", "--workers", 0, "--device", "cpu", "-q")
    assert embedded.code == 0
    choose = ["curate", tmp_path / "e", "-o", tmp_path / "c", "--target-size", 10, "--pack", "parquet"]
    done = dinov2(*choose, "--pack-size", 96, *SMALL, "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == done.json["packed"]["images"] == 10
    assert "packed as parquet" in (tmp_path / "c" / "report.html").read_text()
    plan = dinov2(*choose, "--pack-size", 96, *SMALL, "--dry-run", "--json").json
    assert "packed/pack-00000.parquet" in plan["files"]
    shutil.rmtree(mine)
    before = open_source(str(originals))
    for name in "dc":
        packed = open_source(str(tmp_path / name))
        equal_images(packed, before)
    assert {"cluster"} & set(open_source(str(tmp_path / "c" / "packed")).columns.column_names)


def test_kept_images_that_have_become_unreadable_are_dropped(dinov2, mine, tmp_path):
    shutil.copy(mine / "small.jpg", mine / "zz.jpg")
    embedded = dinov2("embed", mine, "-m", "tiny", "-o", tmp_path / "e", "--workers", 0, "--device", "cpu", "-q")
    assert embedded.code == 0
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "plain", "--tiers", "exact", "-q")
    groups = pq.read_table(tmp_path / "plain" / "groups.parquet").to_pylist()
    victim = next(row["id"] for row in groups if row["keep"])
    (mine / victim).write_text("no image any more")
    done = dinov2(
        "dedup", tmp_path / "e", "-o", tmp_path / "d", "--tiers", "exact", "--pack", "folder", *SMALL, "--json"
    )
    assert done.code == 0, done.err
    assert done.json["rows"] == read_manifest(tmp_path / "plain").rows - 1
    dropped = {row["id"]: row["reason"] for row in pq.read_table(tmp_path / "d" / "dropped.parquet").to_pylist()}
    assert dropped[victim] == "unreadable: not an image that can be read"
    assert victim not in pq.read_table(tmp_path / "d" / "kept.parquet").column("id").to_pylist()
    groups = pq.read_table(tmp_path / "d" / "groups.parquet").to_pylist()
    assert not any(row["keep"] for row in groups if row["id"] == victim)
    assert victim not in open_source(str(tmp_path / "d")).ids


def test_how_to_pack_is_no_part_of_a_selection_without_it(dinov2, originals, tmp_path):
    plain = ["dedup", originals, "-o", tmp_path / "d", "--tiers", "exact", "--workers", 0]
    assert dinov2(*plain, "-q").code == 0
    assert not any(key.startswith("pack") for key in read_manifest(tmp_path / "d").config)
    assert "already done" in dinov2(*plain, "--set", "pack_quality=80").err
    done = dinov2(*plain, "--pack", "parquet")
    assert done.code == 2 and "pack: absent → parquet" in done.err
    done = dinov2("curate", originals, "-o", tmp_path / "c", "--target-size", 3, "-m", "tiny", "--pack-size", 64)
    assert done.code == 2 and "--pack-size without --pack" in done.err


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_a_killed_run_goes_on_to_the_same_bytes(originals, tmp_path, form):
    def command(out, workers):
        arguments = ["pack", originals, "-o", out, "--format", form, "--size", 96, "--workers", workers, "-q"]
        arguments += ["--set", "pack_shard_mib=0.02"]
        return [sys.executable, "-m", "dinov2cli", *map(str, arguments)]

    subprocess.run(command(tmp_path / "whole", 0), check=True, capture_output=True)
    out = tmp_path / "killed"
    kills = 0
    # Each image takes a while, so that the kill comes in the middle; every second shard a run is killed.
    slow = "import time, dinov2cli.data.pack as p; f = p.pack_image\n"
    slow += "def g(*a, **k):\n time.sleep(0.02)\n return f(*a, **k)\n"
    slow += "p.pack_image = g\nfrom dinov2cli.cli.main import main\nmain()"
    for target in (1, 3):
        arguments = [sys.executable, "-c", slow, *command(out, 1)[3:]]
        run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list(out.glob("packed_index/pack-*.parquet"))) < target:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
    assert kills == 2 and not read_manifest(out).complete
    written = {path: path.stat().st_mtime_ns for path in out.glob("packed_index/pack-*.parquet")}
    done = subprocess.run(command(out, 1), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "whole")
    assert written and all(path.stat().st_mtime_ns == when for path, when in written.items())  # whole ones are kept
    assert read_manifest(out).extra == read_manifest(tmp_path / "whole").extra


def test_processes_of_a_launch_share_the_work_and_write_the_same_bytes(dinov2, originals, tmp_path):
    arguments = ["pack", str(originals), "--size", "96", *SMALL, "-q"]
    assert dinov2(*arguments, "-o", tmp_path / "alone").code == 0
    done = launch(*arguments, "-o", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")
    assert read_manifest(tmp_path / "two").extra == read_manifest(tmp_path / "alone").extra
    arguments = ["dedup", str(originals), "--tiers", "exact", "--pack", "folder", *SMALL, "--json"]
    assert dinov2(*arguments, "-o", tmp_path / "alone_d").code == 0
    done = launch(*arguments, "-o", str(tmp_path / "two_d"), processes=2)
    assert done.returncode == 0 and '"packed"' in done.stdout, done.stderr
    assert contents(tmp_path / "two_d") == contents(tmp_path / "alone_d")


def test_too_many_unreadable_images_stop_all_processes(originals, tmp_path):
    arguments = ["pack", str(originals), "-o", str(tmp_path / "p"), *SMALL]
    (tmp_path / "bad").mkdir()
    for number in range(40):
        (tmp_path / "bad" / f"{number}.jpg").write_text("no image")
    (tmp_path / "bad" / "z").symlink_to(originals, target_is_directory=True)
    arguments[1] = str(tmp_path / "bad")
    done = launch(*arguments, processes=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "of 82 images cannot be read, the limit is 1.0%" in errors[0]


def test_masks_are_not_packed_and_that_is_said(dinov2, originals, tmp_path):
    import datasets

    files = sorted(originals.rglob("*.jpg"))[-3:]
    cells = [{"bytes": path.read_bytes(), "path": None} for path in files]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells, "mask": cells}, features=features).to_parquet(tmp_path / "m.parquet")
    done = dinov2("pack", tmp_path / "m.parquet", "-o", tmp_path / "p", "--size", 32, *SMALL)
    assert done.code == 0 and "only images are packed; mask stay" in done.err
    source = open_source(str(tmp_path / "p"))
    assert not source.has_role("mask") and Image.open(io.BytesIO(source.read(0))).size[1] == 32


def test_labels_that_were_asked_for_are_packed_with_their_names(dinov2, originals, tmp_path):
    """Embeddings keep the labels of their source; another column may be asked for afterwards, and is another input."""
    table, made, place = tmp_path / "two.parquet", tmp_path / "e", tmp_path / "s"
    images = [path.read_bytes() for path in sorted(originals.rglob("*/*.jpg"))[:12]]
    colours = [["red", "green", "blue"][row % 3] for row in range(12)]
    labels = [5 + row % 2 for row in range(12)]
    pq.write_table(pa.table({"image": images, "label": labels, "colour": colours}), table)
    assert dinov2("embed", table, "-m", "tiny", "-o", made).code == 0
    pack = ["-o", place, "--tiers", "exact", "--pack", "parquet"]
    assert dinov2("dedup", f"{made}?label=colour", *pack).code == 0
    for source in (open_source(str(place)), open_source(str(place / "packed"))):
        assert [source.label_names[label] for label in source.labels] == colours
    other = dinov2("dedup", f"{made}?label=label", *pack)
    assert other.code == 2 and "input" in other.err
    assert dinov2("pack", place, "-o", tmp_path / "again", "--format", "webdataset").code == 0
