"""`-n N` as a user meets it: one voice, one result, the exit codes of the command, and a run that changes its ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2cli.cli.launch import relaunch, without_processes
from dinov2cli.errors import UserError
from tests.launch import ROOT

TINY = ("--config", "tiny-cpu", "--workers", "1", "--device", "cpu", "--set", "log.pictures=false")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dinov2cli", *arguments]


def dinov2(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False
    )


def pretrain(run: Path, *arguments: str, steps: int = 4) -> subprocess.CompletedProcess[str]:
    return dinov2("pretrain", "demo:digits", "-o", str(run), *TINY, "--set", f"train.steps={steps}", *arguments)


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_n_is_taken_out_of_the_line_however_it_is_spelled():
    line = ["pretrain", "a", "-n", "2", "--processes", "3", "--processes=4", "-n8", "-o", "run", "--name"]
    assert without_processes(line) == ["pretrain", "a", "-o", "run", "--name"]


def test_one_voice_one_result_and_already_done(tmp_path):
    run = tmp_path / "run"
    done = pretrain(run, "-n", "2", "--set", "data.global_batch_size=16", "--set", "eval.every=2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["steps"], result["rows"]) == (4, 64)
    assert done.stderr.count("2 ranks of cpu, ddp") == done.stderr.count("4 steps, 64 images") == 1
    assert "eval/knn" in steps_of(run)[-1]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["complete"]
    assert "export/model.safetensors" in manifest["files"]
    again = pretrain(run, "--set", "data.batch_size=16", "--set", "eval.every=2")  # the same batch, in one process
    assert again.returncode == 0
    assert "already done" in again.stderr
    other = pretrain(
        run, "--set", "data.batch_size=12", "--set", "eval.every=2", "-n", "2"
    )  # another batch, divided otherwise
    assert other.returncode == 2
    assert other.stderr.count("data.batch_size: 8 → 12") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("demo:digits", "--set", "data.batchsize=3"), 2, "did you mean data.batch_size"),
        (("nowhere/",), 3, "nowhere"),
        (("demo:digits", "--set", "data.global_batch_size=15"), 2, "found 15 images for 2 ranks, expected a multiple"),
    ],
)
def test_bad_input_is_said_once_with_its_exit_code(tmp_path, arguments, code, sentence):
    done = dinov2("pretrain", *arguments, *TINY, "-o", str(tmp_path / "run"), "-n", "2")
    assert done.returncode == code, done.stderr
    assert done.stderr.count(sentence) == 1
    assert "Traceback" not in done.stderr


def test_a_signal_saves_and_the_same_command_goes_on_over_other_ranks(tmp_path):
    run = tmp_path / "run"
    settings = ("--set", "data.batch_size=8", "--set", "log.every=1", "--set", "parallel.sharding=fsdp")
    line = command("pretrain", "demo:digits", "-o", str(run), *TINY, "--set", "train.steps=60", *settings, "-n", "2")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
    ) as running:
        while running.poll() is None and not (run / "metrics.jsonl").is_file():
            time.sleep(0.1)
        time.sleep(1)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=120)
    assert running.returncode == 75, said
    assert "stopped by SIGTERM after saving step" in said
    reached = steps_of(run)[-1]["step"]
    assert 0 < reached < 60

    done = pretrain(run, *settings, steps=60)
    assert done.returncode == 0, done.stderr
    assert "a step has 8 images from here on, it had 16; the number of steps stays" in done.stderr
    images = {line["step"]: line["images"] for line in steps_of(run)}
    assert list(images) == list(range(1, 61))
    assert images[60] == 16 * reached + 8 * (60 - reached)


def test_n_that_contradicts_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    relaunch(None)
    relaunch(4)
    with pytest.raises(UserError, match="-n 2 inside a launch of 4 processes"):
        relaunch(2)


def test_embeddings_of_two_processes_are_those_of_one(tmp_path):
    for processes in ("1", "2"):
        out = str(tmp_path / processes)
        done = dinov2("embed", "demo:digits", "-m", "tiny", "-o", out, "--device", "cpu", "-n", processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}\n"
    one, two = (next((tmp_path / name / "img_emb").iterdir()).read_bytes() for name in "12")
    assert one == two
