"""The program on a folder of every odd file a user may have: it ends, and says what it left out and why."""

import json
import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from dinov2cli.data.source import open_source
from tests.cli.conftest import TINY
from tests.data.odd_images import NAMES, write_all


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """(folder, id → size of the images in it, id → pattern of the reason why the rest are none)."""
    root = tmp_path_factory.mktemp("odd") / "photos"
    return root, *write_all(root)


def named_in(err: str) -> dict[str, str]:
    """Image → reason, of the images that were said to be skipped."""
    found = re.findall(r"skipped unreadable image (.+?): (.+)", err)
    assert len(found) == len(dict(found)), "an image is named once"
    return dict(found)


def assert_explained(named: dict[str, str], reasons: dict[str, str]) -> None:
    assert set(named) == set(reasons)
    assert [name for name, reason in named.items() if not re.fullmatch(reasons[name], reason)] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_embed(dinov2, odd, tmp_path, workers):
    folder, good, reasons = odd
    out = tmp_path / "e"
    options = ["--workers", workers, "--set", "max_bad_fraction=0.9", "--json"]
    done = dinov2("embed", folder, "-m", "tiny", "-o", out, *options)
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["unreadable"]) == (len(good), len(reasons))
    assert_explained(named_in(done.err), reasons)
    table = pq.read_table(out / "metadata" / "metadata_0000.parquet").to_pydict()
    sizes = zip(table["width"], table["height"], strict=True)
    assert dict(zip(table["id"], sizes, strict=True)) == good
    behind = open_source(str(out))  # the names lead back to the files
    for name in NAMES.values():
        assert behind.read(behind.ids.index(name)).startswith(b"\xff\xd8")


def test_embed_stops_where_so_many_are_not_expected(dinov2, odd, tmp_path):
    folder, good, reasons = odd
    done = dinov2("embed", folder, "-m", "tiny", "-o", tmp_path / "e", "--workers", 0, "-q")
    assert done.code == 3
    assert re.search(
        rf"error: \d+ of {len(good) + len(reasons)} images cannot be read, the limit is 1\.0%: .+; "
        r"repair or remove them, or raise max_bad_fraction with --set",
        done.err,
    )
    assert "Traceback" not in done.err


def test_pretrain(dinov2, odd, tmp_path):
    folder, good, reasons = odd
    run = tmp_path / "run"
    epoch = -(-len(good) // 8) + len(reasons)  # more than enough steps of eight to meet every image once
    options = ["--set", "data.max_bad_fraction=0.9", "--set", f"train.steps={epoch}"]
    done = dinov2("pretrain", folder, "-o", run, *TINY, *options, "--json")
    assert done.code == 0, done.err
    assert_explained(named_in(done.err), reasons)
    losses = [json.loads(line).get("loss/total") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None and loss == loss]) > 1


def test_dedup_finds_the_copies_among_them(dinov2, odd, tmp_path):
    folder, _, reasons = odd
    out = tmp_path / "d"
    done = dinov2("dedup", folder, "-o", out, "--tiers", "exact", "--set", "max_bad_fraction=0.9", "--json")
    assert done.code == 0, done.err
    assert_explained(named_in(done.err), reasons)
    dropped = pq.read_table(out / "dropped.parquet").to_pydict()
    pairs = dict(zip(dropped["id"], dropped["duplicate_of"], strict=True))
    assert {"grey.jpg", "link.jpg"} & set(pairs)  # one file under two names


def test_the_program_does_not_wait_for_a_pipe(tmp_path):
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "a.jpg")
    command = [sys.executable, "-m", "dinov2cli", "embed", str(tmp_path / "set"), "-m", "tiny"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "o"), "--workers", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3
    assert "none of the 1 images can be read: a.jpg (a named pipe, not a file); give another set" in done.stderr
