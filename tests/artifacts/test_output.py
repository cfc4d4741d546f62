"""Outputs: opened, resumed, found done, or refused, and never half-written."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2cli.artifacts import output as outputs
from dinov2cli.artifacts.manifest import FILE_NAME, config_hash, read_manifest, require_kind
from dinov2cli.artifacts.output import Output, differing_keys
from dinov2cli.errors import InputError, UserError, WorkError

INPUTS = [{"spec": "photos", "rows": 3, "hash": "a"}]


def opened(path: Path, **changes) -> Output:
    arguments = {"command": "dinov2 embed photos -o out", "config": {"a": {"b": 1}}, "seed": 0, "inputs": INPUTS}
    return Output.open(path, "embeddings", **(arguments | changes))


def begun(path: Path) -> None:
    with opened(path) as out:
        out.write_text("part-0", "kept")


def test_finished_output_is_found_done(tmp_path):
    with opened(tmp_path / "out") as out:
        out.write_text("sub/x.txt", "hello")
        manifest = out.finish(rows=3, dim=8)
    assert manifest.files["sub/x.txt"]["size"] == 5
    assert manifest.files["sub/x.txt"]["sha256"].startswith("2cf24dba5fb0a30e")  # sha256 of "hello"
    again = opened(tmp_path / "out")
    assert again.done
    assert again.manifest.extra == {"dim": 8}
    raw = json.loads((tmp_path / "out" / FILE_NAME).read_text())
    assert raw["complete"] is True
    assert raw["rows"] == 3
    assert {"kind", "schema", "command", "config", "config_hash", "seed", "inputs", "environment", "seconds"} <= set(
        raw
    )


def test_unfinished_output_is_resumed_and_its_leftovers_are_swept(tmp_path):
    out = opened(tmp_path / "out")
    out.write_text("part-0", "kept")
    out.close()
    (tmp_path / "out" / ".aside-99-part-1").write_text("half")
    again = opened(tmp_path / "out")
    assert again.resumed
    assert not again.done
    assert not list((tmp_path / "out").glob(".aside-*"))
    manifest = again.finish(rows=1)
    assert list(manifest.files) == ["part-0"]


def test_lost_file_of_a_finished_output_makes_it_unfinished(tmp_path):
    with opened(tmp_path / "out") as out:
        out.write_text("x", "hello")
        out.finish()
    (tmp_path / "out" / "x").unlink()
    assert not opened(tmp_path / "out").done


def test_other_settings_are_refused_and_listed(tmp_path):
    begun(tmp_path / "out")
    with pytest.raises(UserError, match=r"made with other settings: a\.b: 1 → 2; c: absent → 3; choose another"):
        opened(tmp_path / "out", config={"a": {"b": 2}, "c": 3})


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([{"spec": "photos", "rows": 4, "hash": "b"}], "input photos has changed since"),
        ([{"spec": "others", "rows": 3, "hash": "a"}], "input: photos → others"),
        ([], "number of inputs: 1 → 0"),
    ],
)
def test_other_inputs_are_refused(tmp_path, inputs, text):
    begun(tmp_path / "out")
    with pytest.raises(UserError, match=text):
        opened(tmp_path / "out", inputs=inputs)


def test_other_kind_is_refused_and_overwrite_replaces(tmp_path):
    with opened(tmp_path / "out") as out:
        out.write_text("x", "hello")
    with pytest.raises(UserError, match=r"holds embeddings; choose another directory, or replace it with --overwrite"):
        Output.open(tmp_path / "out", "selection", command="c", config={})
    replaced = Output.open(tmp_path / "out", "selection", command="c", config={}, overwrite=True)
    assert not replaced.resumed
    assert not (tmp_path / "out" / "x").exists()


def test_files_of_others_are_never_deleted(tmp_path):
    (tmp_path / "photo.jpg").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds 1 file\(s\) that dinov2 did not write"):
            opened(tmp_path, overwrite=overwrite)
    assert (tmp_path / "photo.jpg").read_text() == "precious"


def test_somebody_elses_manifest_is_never_deleted(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"name": "my app"}')
    (tmp_path / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="--overwrite does not touch this one"):
            opened(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_overwrite_never_deletes_its_own_input(tmp_path):
    with opened(tmp_path / "s", inputs=[]) as out:
        out.write_text("kept", "1")
        out.finish()
    for spec in (tmp_path / "s", tmp_path / "s" / "kept", f"{tmp_path / 's'}?label=folder"):
        with pytest.raises(UserError, match=r"holds the input .*, which --overwrite would delete first"):
            opened(tmp_path / "s", inputs=[{"spec": str(spec)}], overwrite=True)
    assert (tmp_path / "s" / "kept").exists()


def test_a_place_where_nothing_was_written_yet_is_free_for_other_settings(tmp_path):
    opened(tmp_path / "out").close()
    assert not opened(tmp_path / "out", config={"a": {"b": 2}}).resumed


def test_finished_run_without_its_checkpoints_stays_finished(tmp_path):
    with opened(tmp_path / "out") as out:
        out.write_text("checkpoints/step_1/x", "1")
        out.write_text("export/x", "1")
        out.finish()
    (tmp_path / "out" / "checkpoints" / "step_1" / "x").unlink()
    assert opened(tmp_path / "out").done
    (tmp_path / "out" / "export" / "x").unlink()
    assert not opened(tmp_path / "out").done


def test_file_and_unwritable_places_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a directory"):
        opened(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file/out: not a directory; choose another place with -o"):
        opened(tmp_path / "file" / "out")


def test_two_writers_cannot_share_a_place(tmp_path):
    first = opened(tmp_path / "out")
    children: list[int] = []
    for expected in (2, 0):
        if pid := os.fork():  # what a forked loader worker is to a run; it must not hold the lock of its parent either
            children.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        else:
            try:
                opened(tmp_path / "out").close()
            except UserError as error:
                os._exit(2 if "being written by another dinov2 process" in str(error) else 3)
            os._exit(0)
        assert children[-1] == expected
        first.close()


def test_a_forked_child_does_not_keep_the_place_of_its_killed_parent(tmp_path):
    first = opened(tmp_path / "out")
    child = os.fork()
    if not child:
        signal.pause()
    first.close()  # as the end of the process would
    try:
        opened(tmp_path / "out").close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    out = opened(tmp_path / "out")
    out.write_text("x", "old")

    def fail(path: Path) -> None:
        path.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        WorkError, match=r"the disk is full while writing .*x; free some space and run the same command"
    ):
        out.write("x", fail)
    assert (tmp_path / "out" / "x").read_text() == "old"
    assert not list((tmp_path / "out").glob(".aside-*"))


def test_killed_writer_leaves_no_half_file(tmp_path):
    """A process killed inside a write leaves the directory unfinished and resumable, without the file."""
    code = f"""
import os, signal
from dinov2cli.artifacts.output import Output
out = Output.open({str(tmp_path / "out")!r}, "embeddings", command="c", config={{}})
out.write_text("whole", "1")
def die(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
out.write("half", die)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match=r"is unfinished \(its run was stopped\); run `c` again to finish it"):
        require_kind(tmp_path / "out", "embeddings")
    out = Output.open(tmp_path / "out", "embeddings", command="c", config={})
    assert out.resumed
    assert sorted(p.name for p in out.path.iterdir()) == [".lock", FILE_NAME, "whole"]


def test_wrong_kind_names_the_command_to_use(tmp_path):
    with opened(tmp_path / "out") as out:
        out.finish()
    with pytest.raises(InputError) as caught:
        require_kind(tmp_path / "out", "selection")
    assert str(caught.value) == (
        f"{tmp_path / 'out'} is embeddings, expected a selection (made by dinov2 dedup, curate or pack); "
        "give it to `dinov2 dedup` or `dinov2 curate`"
    )


def test_damaged_foreign_and_newer_manifests(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has no manifest\.json, so it was not written by dinov2"):
        read_manifest(tmp_path)
    for text in ("{", "[]", '{"schema": 1}'):
        (tmp_path / FILE_NAME).write_text(text)
        with pytest.raises(InputError, match="cannot be read as a manifest"):
            read_manifest(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"kind": "run", "schema": 99}')
    with pytest.raises(InputError, match="has schema 99, this program reads up to 1"):
        read_manifest(tmp_path)


def test_config_hash_ignores_key_order_only():
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 1.5})
    assert differing_keys({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_writes_are_renamed_from_the_same_folder(tmp_path, monkeypatch):
    """Renaming across file systems is no rename; the temporary name must be beside the target."""
    seen = []
    monkeypatch.setattr(outputs.os, "replace", lambda a, b: (seen.append((a, b)), os.rename(a, b)))
    opened(tmp_path / "out").write_text("deep/x", "1")
    assert all(Path(a).parent == Path(b).parent for a, b in seen)
    assert len(seen) >= 2
