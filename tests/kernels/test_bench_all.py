"""The GPU programme as a script: every step is run, one that fails does not stop the others, and one file holds all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2cli.cli.bench import _BENCHES

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "kernels" / "bench_all.sh"

STAND_IN = """#!/bin/sh
# Answers for python: the collecting part at the end is real, a step says what it was asked for.
[ "$1" = - ] && exec {python} "$@"
echo "$@" >> {calls}
case "$*" in
  *"bench losses"*) echo "kernel is wrong" >&2; exit 1 ;;
  *" bench "*) echo "told"; echo '{{"name": "'$4'"}}' ;;
  *"import json"*) echo '{{"gpu": "NVIDIA H100 80GB HBM3"}}' ;;
  *) echo "two words" ;;
esac
"""


@pytest.fixture
def outcome(tmp_path):
    calls, python = tmp_path / "calls.txt", tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, calls=calls))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60, check=True)
    (path,) = (tmp_path / "out").glob("*.json")
    return done.stdout, calls.read_text(), path, json.loads(path.read_text())


def test_every_step_runs_and_one_file_holds_their_results(outcome):
    said, calls, path, kept = outcome
    assert re.fullmatch(r"nvidia-h100-80gb-hbm3-\d{4}-\d\d-\d\d\.json", path.name)
    assert kept["steps"]["bench-attention"]["result"] == {"name": "attention"}
    assert kept["steps"]["bench-losses"]["exit"] == 1
    assert "kernel is wrong" in said
    assert "failed: bench-losses" in said
    assert kept["steps"]["build"]["last_lines"] == ["two words"]
    assert "-m dinov2cli bench train --arch vitl14 --reference --json" in calls
    assert "-m pytest tests/gpu" in calls


def test_the_benches_it_names_exist_and_their_limits_fit():
    text = SCRIPT.read_text()
    named = set(re.findall(r"\bbench ([a-z-]+)", text))
    assert {"attention", "losses", "stochastic-depth", "train", "curve"} == named <= set(_BENCHES)
    assert int(re.search(r"LIMIT:-(\d+)", text)[1]) < 9 * 60
