"""`dinov2 eval` as a whole: several models, features once, tasks of one's own, suites, and what goes wrong."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2cli.artifacts.results import read_results
from dinov2cli.config import task_config
from dinov2cli.config.suite import SuiteConfig
from dinov2cli.evaluation.tasks.registry import TASKS, find_task
from dinov2cli.models.export import save_hf
from dinov2cli.models.registry import build
from dinov2cli.recipe import load_config

ROOT = Path(__file__).resolve().parents[2]

TOY = '''
"""Is the picture bright?"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Task, setting


@dataclass(frozen=True, kw_only=True)
class Bright(Task):
    """Tell bright pictures from dark ones by one number of the features."""

    name: ClassVar[str] = "bright"
    train: ClassVar[bool] = False

    column: Annotated[int, Ge(0)] = setting(0, "which number of the features", flag="--column")
    share: Annotated[float, Ge(0), Le(1)] = setting(0.5, "share of the pictures that count as bright")

    def check(self, trial):
        from dinov2cli.errors import UserError

        if self.column >= trial.model.network.embed_dim:
            raise UserError(f"column is {self.column}, the features have {trial.model.network.embed_dim}")

    def collect(self, trial):
        return trial.features(trial.test)

    def judge(self, trial, features):
        import numpy as np

        from dinov2cli.evaluation import statistics

        values = features.pooled[:, self.column]
        bright = values > np.quantile(values, 1 - self.share)
        units = [trial.test.ids[row] for row in features.index]
        return Judged([Figure("bright", statistics.mean(bright))], units, settings={"cut": 1.5}, notes=["a toy"])
'''
PLAIN = ("--workers", "0", "--device", "cpu")


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path / "toy.py"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_task_of_ones_own_is_one_file(dinov2, toy, photos, tmp_path):
    done = dinov2("eval", toy, "tiny", "--test", photos, "--column", "1", "-o", tmp_path / "r", *PLAIN, "--json")
    assert done.code == 0, done.err
    (row,) = done.json["results"]
    assert (row["task"], row["metric"], row["n"], row["value"]) == ("bright", "bright", 72, 0.5)
    assert row["ci_low"] < 0.5 < row["ci_high"]
    assert row["settings"]["column"] == 1 and row["settings"]["share"] == 0.5
    assert row["settings"]["found"] == {"cut": 1.5} and "warning: a toy" in done.err
    page = (tmp_path / "r" / "report.html").read_text()
    assert "bright of tiny" in page and "50.0 %" in page and "a toy" in page
    again = dinov2("eval", toy, "tiny", "--test", photos, "--set", "column=2", "-o", tmp_path / "r", *PLAIN)
    assert again.code == 2 and "column: 1 → 2" in again.err
    help_text = dinov2("eval", toy, "--help").out
    assert "--column" in help_text and "Tell bright pictures" in help_text and "share" in help_text
    assert "--train" not in help_text


def test_settings_of_ones_own_task_are_checked_before_anything_is_done(dinov2, toy, photos, tmp_path):
    arguments = ["eval", toy, "tiny", "--test", photos, "-o", tmp_path / "r", *PLAIN]
    done = dinov2(*arguments, "--set", "share=2", "--set", "colum=3")
    assert done.code == 2 and "share" in done.err and "did you mean column?" in done.err
    done = dinov2(*arguments, "--column", "1000")
    assert done.code == 2 and "column is 1000, the features have" in done.err
    assert not (tmp_path / "r").exists()


def test_files_that_hold_no_task(dinov2, photos, tmp_path):
    arguments = ["tiny", "--test", photos, "-o", tmp_path / "r"]
    assert dinov2("eval", tmp_path / "none.py", *arguments).code == 3
    (tmp_path / "empty.py").write_text("x = 1\n")
    done = dinov2("eval", tmp_path / "empty.py", *arguments)
    assert done.code == 3 and "holds 0 subclasses" in done.err
    (tmp_path / "broken.py").write_text("x = = 1\n")
    done = dinov2("eval", tmp_path / "broken.py", *arguments)
    assert done.code == 3 and "cannot be imported (SyntaxError" in done.err
    done = dinov2("eval", "knm", *arguments)
    assert done.code == 2 and "Did you mean 'knn'?" in done.err


def test_several_models_and_features_once(dinov2, photos, tmp_path, own_cache):
    data = ["--train", f"{photos}?label=folder", "--test", f"{photos}?label=folder"]
    done = dinov2("eval", "knn", "tiny", "baseline:pixels", *data, "--k", "5", "-o", tmp_path / "knn", *PLAIN, "--json")
    assert done.code == 0, done.err
    assert {row["model"] for row in done.json["results"]} == {"tiny", "baseline:pixels"}
    assert "features of" in done.err and any(own_cache.rglob("*.npz"))
    table = pq.read_table(tmp_path / "knn" / "predictions.parquet")
    assert table.column("model").to_pylist() == ["tiny"] * 72 + ["baseline:pixels"] * 72
    page = (tmp_path / "knn" / "report.html").read_text()
    assert "★" in page and "Nearest neighbours" in page and "What the patches see" in page
    few = ["--set", "steps=20", "--set", "learning_rates=[0.01]"]
    other = dinov2("eval", "linear", "tiny", *data, "-o", tmp_path / "linear", *few, *PLAIN)
    assert other.code == 0, other.err
    assert "features of" not in other.err
    alone = dinov2("eval", "linear", "tiny", *data, "-o", tmp_path / "alone", *few, *PLAIN, "--cache", "none")
    assert alone.code == 0 and "features of" in alone.err
    assert (tmp_path / "alone" / "scores.parquet").read_bytes() == (tmp_path / "linear" / "scores.parquet").read_bytes()
    twice = dinov2("eval", "knn", "tiny", "tiny", *data, "-o", tmp_path / "twice", *PLAIN)
    assert twice.code == 2 and "given twice" in twice.err


def test_test_images_in_the_training_set_are_told_loudly(dinov2, photos, tmp_path):
    first = sorted(path.name for path in photos.iterdir())[0]
    part = tmp_path / "part"
    (part / first).mkdir(parents=True)
    for file in list((photos / first).iterdir())[:3]:
        (part / first / f"again-{file.name}").write_bytes(file.read_bytes())
    arguments = ["--train", f"{photos}?label=folder", "--test", f"{part}?label=folder", "--k", "3", *PLAIN, "--json"]
    done = dinov2("eval", "knn", "tiny", *arguments, "-o", tmp_path / "r")
    assert done.code == 0, done.err
    assert "3 of 3 test images (100.0%) are in the training set too" in " ".join(done.err.split())
    assert done.json["results"][0]["settings"]["found"]["test_images_in_train"] == 3


def suite_file(path, photos, **entry):
    data = {"train": f"{photos}?label=folder", "test": f"{photos}?label=folder", "name": "photos"}
    tasks = [
        {"task": "knn", **data, "settings": {"neighbours": [5]}},
        {"task": "linear", **data, "settings": {"steps": 20, "learning_rates": [0.01]}, **entry},
    ]
    path.write_text(json.dumps({"settings": {"resamples": 200}, "tasks": tasks}))
    return path


def test_a_suite_runs_all_and_compares(dinov2, photos, tmp_path, own_cache):
    file = suite_file(tmp_path / "suite.yaml", photos)
    out = tmp_path / "r"
    plan = dinov2("eval", "--suite", file, "tiny", "-o", out, "--dry-run")
    assert plan.code == 0 and "knn on" in plan.err and not out.exists()
    done = dinov2("eval", "tiny", "baseline:pixels", "--suite", file, "-o", out, *PLAIN, "--json")
    assert done.code == 0, done.err
    assert done.err.count("features of") == 2  # two models, one set, whatever the number of tasks
    rows = read_results(out)
    assert {(row.task, row.dataset, row.model) for row in rows} == {
        (task, "photos", model) for task in ("knn", "linear") for model in ("tiny", "baseline:pixels")
    }
    assert all(row.settings["resamples"] == 200 for row in rows)
    assert read_results(out / "knn-photos")[0].metric == "top1_k5"
    assert done.json["results"] == json.loads((out / "results.json").read_text())
    assert "baseline:pixels" in (out / "report.html").read_text()
    again = dinov2("eval", "--suite", file, "tiny", "baseline:pixels", "-o", out, *PLAIN)
    assert again.code == 0 and "already done" in again.err


def test_a_failing_entry_does_not_keep_the_others(dinov2, photos, tmp_path):
    file, out, damaged = tmp_path / "suite.yaml", tmp_path / "r", tmp_path / "damaged"
    shutil.copytree(photos, damaged)
    files = [path for path in sorted(damaged.rglob("*.*")) if path.is_file()]
    for one in files[: len(files) // 2]:
        one.write_bytes(b"no image")
    suite_file(file, photos, train=f"{damaged}?label=folder")
    tasks = json.loads(file.read_text())
    tasks["tasks"].reverse()  # the one that fails comes first
    file.write_text(json.dumps(tasks))
    done = dinov2("eval", "--suite", file, "tiny", "-o", out, *PLAIN)
    assert done.code == 1 and "1 of 2 tasks failed (linear-photos: " in " ".join(done.err.split())
    assert read_results(out / "knn-photos") and not (out / "results.json").exists()
    stamp = (out / "knn-photos" / "results.json").stat().st_mtime_ns
    done = dinov2("eval", "--suite", file, "tiny", "-o", out, *PLAIN)
    assert done.code == 1 and (out / "knn-photos" / "results.json").stat().st_mtime_ns == stamp
    suite_file(file, photos)  # mended in the file, in another order too
    done = dinov2("eval", "--suite", file, "tiny", "-o", out, *PLAIN)
    assert done.code == 0, done.err
    assert (out / "knn-photos" / "results.json").stat().st_mtime_ns == stamp
    assert {row.task for row in read_results(out)} == {"knn", "linear"}
    suite_file(file, photos, settings={"steps": 30, "learning_rates": [0.01]})
    done = dinov2("eval", "--suite", file, "tiny", "-o", out, *PLAIN)
    assert done.code == 2 and "suite.linear-photos.settings.steps: 20 → 30" in " ".join(done.err.split())


def test_a_suite_looks_at_all_tasks_first(dinov2, photos, tmp_path):
    lone = tmp_path / "lone" / "a"
    lone.mkdir(parents=True)
    one = next(path for path in photos.rglob("*.*") if path.is_file())
    (lone / one.name).write_bytes(one.read_bytes())
    file = suite_file(tmp_path / "suite.yaml", photos, train=f"{lone.parent}?label=folder")
    for dry in ([], ["--dry-run"]):
        done = dinov2("eval", "--suite", file, "tiny", "-o", tmp_path / "r", *PLAIN, *dry)
        assert done.code == 3 and "suite, linear-photos: " in done.err and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"task": "linaer"}, "task 'linaer' is not known"),
        ({"settings": {"step": 20}}, "did you mean steps?"),
        ({"train": None}, "task linear needs train: DATA"),
        ({"others": {"x": "demo:photos"}}, "task linear takes no others"),
        ({"task": "knn"}, "two entries would both write knn-photos"),
        ({"name": "../x"}, "tasks.1.name"),
        ({"test": "nowhere"}, "nowhere"),
    ],
)
def test_a_suite_is_checked_before_anything_is_done(dinov2, photos, tmp_path, change, text):
    file = suite_file(tmp_path / "suite.yaml", photos, **change)
    done = dinov2("eval", "--suite", file, "tiny", "-o", tmp_path / "r", *PLAIN)
    assert done.code in (2, 3) and text in " ".join(done.err.split()), done.err
    assert not (tmp_path / "r").exists()


def test_a_suite_that_is_no_file_or_no_yaml(dinov2, tmp_path):
    done = dinov2("eval", "--suite", "tiny-cpu", "tiny", "-o", tmp_path / "r")  # which is the name of a recipe
    assert done.code == 2 and "--suite tiny-cpu: there is no such file" in done.err
    (tmp_path / "x.yaml").write_text("tasks: [a: b: c]")
    done = dinov2("eval", "--suite", tmp_path / "x.yaml", "tiny", "-o", tmp_path / "r")
    assert done.code == 2 and "is not YAML at line 1" in " ".join(done.err.split())
    (tmp_path / "x.yaml").write_text("tasks: []")
    assert dinov2("eval", "--suite", tmp_path / "x.yaml", "tiny", "-o", tmp_path / "r").code == 2


def test_kill_and_run_again_gives_the_same(photos, tmp_path):
    """Killed while the heads are trained: what was kept is gone on from, and the result is that of one run."""
    data = [*("--train", f"{photos}?label=folder"), *("--test", f"{photos}?label=folder"), *PLAIN, "--cache", "none"]
    command = [sys.executable, "-m", "dinov2cli", "eval", "linear", "tiny", *data, "--set", "steps=3000"]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "r")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "r").glob("parts/*/*.npz")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = list((tmp_path / "r").glob("parts/*/*.npz"))
    assert kept
    for place in ("r", "whole"):
        done = subprocess.run([*command, "-o", str(tmp_path / place)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("continuing where" in done.stderr) == (place == "r")
    one, other = (pq.read_table(tmp_path / place / "scores.parquet") for place in ("r", "whole"))
    assert one.equals(other) and not (tmp_path / "r" / "parts").exists()
    values = [row.value for row in read_results(tmp_path / "r")]
    assert np.isfinite(values).all()


def test_what_the_page_shows_works(dinov2, photos, tmp_path):
    """docs/evaluation.md: its task runs, its suite is one, its commands and their options exist."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "spread.py").write_text(code)
    arguments = ["--test", photos, "--power", "2", "-o", tmp_path / "r", *PLAIN, "--json"]
    done = dinov2("eval", tmp_path / "spread.py", "tiny", *arguments)
    assert done.code == 0, done.err
    assert done.json["results"][0]["settings"]["power"] == 2 and done.json["results"][0]["value"] > 0
    (suite,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    (tmp_path / "suite.yaml").write_text(suite)
    config = load_config(SuiteConfig, recipe=str(tmp_path / "suite.yaml"), option="--suite")
    assert [find_task(entry.task).name for entry in config.tasks] == ["knn", "segmentation"]
    for entry in config.tasks:
        load_config(task_config(find_task(entry.task)), flags={**config.settings, **entry.settings})
    for task in TASKS:
        assert f"| `{task}` |" in page
    for option in set(re.findall(r"`(--[a-z-]+)", page)):
        assert any(option in dinov2("eval", task, "--help").out for task in (*TASKS, "suite", "compare")), option


def test_what_figures_depend_on_makes_another_output(dinov2, toy, photos, tmp_path):
    """The task's own file, and the configuration beside the weights."""
    model, other = tmp_path / "model", tmp_path / "other"
    save_hf(build("tiny"), model, resize=32, crop=32)
    arguments = ["eval", toy, model, "--test", photos, "-o", tmp_path / "r", *PLAIN]
    assert dinov2(*arguments).code == 0
    assert "already done" in dinov2(*arguments).err
    toy.write_text(TOY.replace("bright = values >", "bright = values <"))
    again = dinov2(*arguments)
    assert again.code == 2 and "toy.py has changed since" in " ".join(again.err.split())
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    data = ["--train", f"{photos}?label=folder", "--test", f"{photos}?label=folder", "--k", "1"]
    for number, place in enumerate((model, other)):
        done = dinov2("eval", "knn", place, *data, "-o", tmp_path / f"knn{number}", *PLAIN)
        assert done.code == 0 and ("features of" in done.err) == (place == other)  # the toy has seen the first model


def test_images_without_a_label_are_counted(dinov2, photos, tmp_path):
    """Files beside the folders of the classes have no label."""
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    for number, file in enumerate(sorted(path for path in photos.rglob("*.*") if path.is_file())[:3]):
        (mixed / f"loose{number}{file.suffix}").write_bytes(file.read_bytes())
    data = ["--train", f"{photos}?label=folder", "--test", f"{mixed}?label=folder", "--k", "3", *PLAIN]
    done = dinov2("eval", "knn", "tiny", *data, "-o", tmp_path / "r")
    assert done.code == 0 and "3 of 75 test images have no label and are left out" in " ".join(done.err.split())
    assert read_results(tmp_path / "r")[0].n == 72


def test_what_models_keep_is_their_own(dinov2, toy, photos, tmp_path):
    """A task that keeps its work under a key of its own must not find that of another model."""
    toy.write_text(
        TOY.replace(
            "        values = features.pooled[:, self.column]\n",
            "        values = features.pooled[:, self.column]\n"
            '        stage = trial.store.stage("values", {})\n'
            "        kept = stage.load(0)\n"
            "        if kept is None:\n"
            '            stage.save(0, {"values": values})\n'
            "        else:\n"
            '            raise AssertionError("of another model")\n',
        )
    )
    done = dinov2("eval", toy, "tiny", "baseline:pixels", "--test", photos, "-o", tmp_path / "r", *PLAIN)
    assert done.code == 0, done.err


def test_a_figure_without_a_value_is_null_in_json(dinov2, toy, photos, tmp_path):
    toy.write_text(TOY.replace("statistics.mean(bright)", "statistics.ratio(bright * 0, bright * 0)"))
    done = dinov2("eval", toy, "tiny", "--test", photos, "-o", tmp_path / "r", *PLAIN, "--json")
    assert done.code == 0 and done.json["results"][0]["value"] is None and "NaN" not in done.out
    assert "NaN" not in (tmp_path / "r" / "results.json").read_text()
    (row,) = read_results(tmp_path / "r")
    assert np.isnan(row.value) and row.n == 0
