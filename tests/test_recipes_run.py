"""The README's commands, the quick-start script and the demo, run as a user runs them (only shorter)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2cli.artifacts.results import read_results
from dinov2cli.data.source import open_source

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    *("--set", "train.steps=4", "--set", "data.batch_size=8", "--set", "heads.hidden=32", "--set", "log.every=2"),
    *("--set", "crops.local_number=2", "--set", "heads.prototypes=32"),
]


@pytest.fixture(scope="module")
def environment():
    """The environment of a shell where `dinov2` is this installation's."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def test_readme_commands_run_in_order(environment, tmp_path):
    """Every line of the bash blocks, in one shell and one folder of photographs, with a shorter budget."""
    source = open_source("demo:photos?count=72")
    for row, name in enumerate(source.ids):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(row))
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 7
    assert any("300 steps" in line for line in lines)
    script = "\n".join(lines).replace("300 steps", "4 steps").replace("steps: 100", "steps: 2")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_readme_python_loads_the_export(environment, tmp_path):
    from dinov2cli.models.export import save_hf
    from dinov2cli.models.registry import build

    save_hf(build("tiny"), tmp_path / "run" / "export", resize=64, crop=64)
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_readme_names_real_commands_and_recipes(environment):
    """Lines outside the bash blocks are not run; their commands, options and recipes must exist."""
    from dinov2cli.cli.main import run
    from dinov2cli.recipe import recipe_names

    for line in re.findall(r"^dinov2 .*$", "\n".join(blocks("")), flags=re.M):
        words = shlex.split(line.split("#")[0])
        assert run([words[1], "--help"]) == 0
    assert set(re.findall(r"--config ([\w-]+)", "\n".join(blocks("")))) <= set(recipe_names())


def test_readme_figures_are_those_of_the_files():
    """Figures of the benchmark table are read from the file beside it."""
    figures = json.loads((ROOT / "benchmarks" / "cpu.json").read_text())
    text = (ROOT / "README.md").read_text()
    demo = json.loads((ROOT / "benchmarks" / "demo.json").read_text())
    for name, found in demo["seeds"]["0"].items():
        assert re.search(rf"{name} rose from {100 * found['before']:.1f} % .* to {100 * found['after']:.1f} %", text)
    assert f"({demo['seconds']['0']} s in all)" in text
    for name, bench in figures["benches"].items():
        assert f"| `{name}`" in text
        assert f"{bench['speedup']:.1f}×" in text


def test_readme_plan_is_what_the_dry_run_says(capsys):
    """Its lines are those that do not depend on the machine."""
    from dinov2cli.cli.main import run

    (shown,) = [block for block in blocks("text") if "(dry run: nothing is written)" in block]
    (line,) = re.findall(r"^dinov2 .*--dry-run$", (ROOT / "README.md").read_text(), flags=re.M)
    words = shlex.split(line.replace("pretrain unique", "pretrain demo:photos?count=1000"))[1:]
    assert run([*words, "--set", "train.precision=bf16"]) == 0
    said = {" ".join(text.split()) for text in capsys.readouterr().err.splitlines()}
    assert {" ".join(text.split()) for text in shown.splitlines()[1:]} <= said


def test_half_hour_figures_are_those_of_the_file():
    figures = json.loads((ROOT / "benchmarks" / "half_hour.json").read_text())["runs"]
    text = (ROOT / "README.md").read_text()
    for name, run in figures.items():
        cells = [f"{100 * run[key]['20']:.1f} %" for key in ("random", "raw_pixels", "trained")]
        assert f"{run['images']:,} | " + " | ".join(cells) + " |" in text, name
        header = (ROOT / "recipes" / f"{run['recipe']}.yaml").read_text().split("model:")[0]
        assert all(cell in header for cell in cells)
        assert f"{run['images_seen']:,} images" in header


def test_quickstart_runs_and_continues(environment, tmp_path):
    command = ["bash", str(ROOT / "recipes" / "quickstart.sh"), "demo:photos?count=60", str(tmp_path / "out"), "30"]
    options = {
        "PRETRAIN_OPTIONS": shlex.join(SHORT),
        "TRAIN": "demo:photos?count=60",
        "TEST": "demo:photos?split=test&count=40",
    }
    for _ in range(2):
        done = subprocess.run(command, env=environment | options, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("already done") == 6
    rows = read_results(tmp_path / "out" / "knn")
    assert rows[0].n == 40


def test_demo_runs_stops_and_continues(environment, tmp_path, monkeypatch):
    """The demo on few tiles: every part of the report is there, and a rerun finds it done."""
    from dinov2cli.cli import demo
    from dinov2cli.cli.main import run

    for name, spec in (("TRAIN", "demo:photos?count=60"), ("TEST", "demo:photos?split=test&count=40")):
        monkeypatch.setattr(demo, name, spec)
    digits = ("demo:digits?count=100", "demo:digits?split=test&count=60")
    names = [name for name, *_ in demo._BENCHMARKS]
    tiles = (demo.TRAIN, demo.TEST)
    monkeypatch.setattr(demo, "DIGITS_TRAIN", digits[0])
    monkeypatch.setattr(demo, "DIGITS_TEST", digits[1])
    tasks = [
        ("knn", *tiles, "top1_k20"),
        ("linear", *tiles, "top1"),
        ("knn", *digits, "top1_k20"),
        ("linear", *digits, "top1"),
    ]
    monkeypatch.setattr(demo, "_BENCHMARKS", tuple((name, *task) for name, task in zip(names, tasks, strict=True)))
    out = tmp_path / "demo"
    arguments = ["demo", "-o", str(out), "--target-size", "30", "--device", "cpu", "--workers", "0", *SHORT]
    assert run(arguments) == 0
    page = (out / "report.html").read_text()
    for heading in ("Before and after training", "Nearest neighbours", "What the patches see", "Duplicates removed"):
        assert heading in page
    assert page.count("<svg") >= 6
    assert len(json.loads((out / "summary.json").read_text())) == 4
    before = (out / "report.html").stat().st_mtime_ns
    assert run(arguments) == 0  # already done
    assert (out / "report.html").stat().st_mtime_ns == before
    assert run([*arguments, "--seed", "1"]) == 2
