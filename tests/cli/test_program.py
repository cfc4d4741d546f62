"""The program as a whole: help without torch, exit codes, and that every command explains itself."""

import re
import resource
import subprocess
import sys

import pytest

from dinov2cli.evaluation.tasks.registry import TASKS
from dinov2cli.fairness.protocols.registry import PROTOCOLS
from tests.cli.conftest import TINY
from tests.cli.distill_runs import SMALL

COMMANDS = [
    *("embed", "dedup", "curate", "pack", "pretrain", "distill", "export", "eval compare", "eval suite"),
    *(f"eval {task}" for task in TASKS),
    *(f"fairness {study}" for study in PROTOCOLS),
    *("demo", "doctor", "info", "bench", "recipes"),
]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["distill", "--help"], ["eval", "depth", "--help"], ["fairness", "geo", "--help"]],
)
def test_help_and_version_are_quick_and_without_torch(arguments):
    """Under half a second of processor time; wall time on a shared machine says nothing."""
    code = f"""
import sys
from dinov2cli.cli.main import run
status = run({arguments!r})
heavy = [m for m in ("torch", "numpy", "datasets", "faiss", "matplotlib", "accelerate") if m in sys.modules]
print("loaded:", heavy, file=sys.stderr)
sys.exit(status)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "loaded: []" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(dinov2, command):
    done = dinov2(*command.split(), "--help")
    assert done.code == 0
    assert "Usage: dinov2" in done.out
    assert len(done.out) > 300


@pytest.mark.parametrize(
    "command",
    [
        "embed",
        "dedup",
        "curate",
        "pack",
        "pretrain",
        "distill",
        *(f"eval {task}" for task in TASKS),
        *(f"fairness {study}" for study in PROTOCOLS),
    ],
)
def test_common_options_are_the_same_everywhere(dinov2, command):
    text = dinov2(*command.split(), "--help").out
    common = "--config --set --dry-run --json --quiet --verbose --overwrite --workers --device --seed"
    for option in common.split():
        assert option in text, option


def test_unknown_commands_and_options_are_usage_errors(dinov2):
    done = dinov2("pretrian")
    assert done.code == 2
    assert "pretrain" in done.err  # did you mean
    assert dinov2("embed", "--outt", "x").code == 2
    assert dinov2("embed", "demo:photos").code == 2  # -o is missing


def test_commands_not_built_yet_are_absent(dinov2):
    assert dinov2("visualize", "--help").code == 2


def test_unexpected_errors_are_one_line(dinov2, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ValueError("no\nlines")

    monkeypatch.setattr("dinov2cli.data.source.open_source", broken)
    monkeypatch.delenv("DINOV2_DEBUG", raising=False)
    done = dinov2("embed", "demo:photos", "-m", "tiny", "-o", "never")
    assert done.code == 1
    assert done.err.strip() == (
        "error: unexpected ValueError: no lines; run again with DINOV2_DEBUG=1 for the traceback and report it"
    )


def test_dry_runs_write_nothing(dinov2, photos, tmp_path):
    out = tmp_path / "out"
    plans = {
        "embed": ["embed", photos, "-m", "tiny"],
        "dedup": ["dedup", photos],
        "curate": ["curate", photos, "-m", "tiny", "--target-size", "20"],
        "pack": ["pack", photos],
        "pretrain": ["pretrain", photos, *TINY],
        "distill": ["distill", photos, "-t", "tiny", *SMALL],
        "demo": ["demo"],
        "eval": ["eval", "knn", "tiny", "--train", f"{photos}?label=folder", "--test", f"{photos}?label=folder"],
    }
    for name, arguments in plans.items():
        done = dinov2(*arguments, "-o", out, "--dry-run")
        assert done.code == 0, done.err
        assert "dry run: nothing is written" in done.err
        assert done.out == ""
        plan = dinov2(*arguments, "-o", out, "--dry-run", "--json").json
        assert plan["plan"].startswith(name)
        assert not out.exists()
    plan = dinov2("pretrain", photos, *TINY, "-o", out, "--dry-run", "--json").json
    assert plan["steps"] == 6
    assert plan["parameters"] > 800_000
    assert "export/" in plan["files"]


def test_recipes_are_listed_shown_copied_and_checked(dinov2, tmp_path):
    listed = dinov2("recipes", "ls", "--json").json
    assert "tiny-cpu" in listed
    shown = dinov2("recipes", "show", "tiny-cpu").out
    copy = tmp_path / "mine.yaml"
    assert dinov2("recipes", "cp", "tiny-cpu", copy).code == 0
    assert copy.read_text() == shown
    assert dinov2("recipes", "cp", "tiny-cpu", copy).code == 2  # never over an existing file
    assert dinov2("recipes", "validate", copy).code == 0
    assert "valid, for `dinov2 distill`" in dinov2("recipes", "validate", "distill-vits14").err
    copy.write_text(shown + "\noptimm: {lr: 1}\n")
    done = dinov2("recipes", "validate", copy)
    assert done.code == 2
    assert "unknown key, did you mean optim.lr?" in done.err


def test_bench_refuses_unknown_names(dinov2):
    done = dinov2("bench", "nothing")
    assert done.code == 2
    assert re.search(r"no such benchmark; expected one of data, train, distill, attention, losses", done.err)
