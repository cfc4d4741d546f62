"""`recipes/ablations.sh`: the commands of every study are valid, a study runs, and what fails is told."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from dinov2cli.artifacts.selection import open_selection
from dinov2cli.data.source import open_source
from dinov2cli.evaluation.comparison import compare_results
from tests.served import served

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "recipes" / "ablations.sh"
DATA, TEST = "demo:photos?count=72", "demo:photos?split=test&count=40"
SHORT = [
    *("--budget", "3 steps", "--device", "cpu", "--workers", "0", "--set", "data.batch_size=16"),
    *("--set", "heads.hidden=32", "--set", "crops.local_number=2", "--set", "log.every=1"),
    *("--set", "log.pictures=false"),
]
ARMS = {
    "loss": "full no-koleo no-ibot no-dino softmax-centring tied-heads",
    "resolution": "low high low-then-high",
    "size": "vitt8-64x4x1 vitt8 vitt8-192x6x3",
    "ladder": "baseline layerscale-drop-path prototypes koleo swiglu patch momentum warmup batch sinkhorn untied-heads",
}
POOL, QUERY = "demo:photos?count=200", "demo:photos?count=50"
SETS = ["--study", "data", "--pool", POOL, "--query", QUERY, "--test", TEST, "-o", "out dir", "--size", "60"]
# Stands in for `dinov2` where only the script is tested: ends with the code that the arm's name carries.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
trap 'exit 75' TERM
case "$*" in
  *no-koleo* | embed*count=50* | pretrain*teacher-s0* | distill*learned*) exit "$CODE" ;;
  *sleep*) sleep 20 & wait ;;
esac
"""


def environment(**more: str) -> dict[str, str]:
    """The environment of a shell where `dinov2` is this installation's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def ablations(tmp_path):
    """Run the script in a directory of its own."""

    def call(*arguments, **more) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(SCRIPT), *map(str, arguments)],
            cwd=tmp_path,
            env=environment(**more),
            capture_output=True,
            text=True,
            check=False,
        )

    return call


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A PATH on which `dinov2` starts at once."""
    with served(tmp_path_factory.mktemp("program")) as program:
        yield f"{program.parent}{os.pathsep}{environment()['PATH']}"


@pytest.fixture
def stub(tmp_path):
    """The environment in which `dinov2` is STUB."""
    program = tmp_path / "bin" / "dinov2"
    program.parent.mkdir()
    program.write_text(STUB)
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "CODE": "1"}


def study(name: str, *more) -> list:
    return ["--study", name, "--data", DATA, "--test", TEST, "-o", "out dir", *more]


def table(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a table.csv by arm."""
    with open(path, newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def test_help_names_every_option(ablations):
    done = ablations("--help")
    assert done.returncode == 0
    options = {word for word in SCRIPT.read_text().split() if word.startswith("--ladder-") and word[-1].isalpha()}
    assert len(options) == 8
    assert all(option in done.stdout for option in {"--study", "--dry-run", "--phase-budget", *options})
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (study("depth"), "loss, resolution, size, ladder, data or distill"),
        (study("loss", "--sedes", "1"), "unknown option --sedes"),
        (study("loss", "--ladder-steps=1,2"), "unknown option --ladder-steps"),
        (study("loss", "--only", "full,koleo"), "the arms of loss are full no-koleo"),
        (study("loss", "--seeds", "one"), "--seeds one"),
        (study("loss", "--tasks", "knn,depth"), "--tasks knn,depth"),
        (study("ladder", "--ladder-patch", "16"), "--ladder-patch 16"),
        (study("size", "--archs", "vitt8:64"), "--archs vitt8:64"),
        (["--study", "loss", "--data"], "--data needs a value"),
        (["--study", "loss", "--data", "x", "-o", "y"], "--test is missing"),
        (study("data"), f"--data {DATA}: the study of data takes --pool and --query"),
        (SETS[:-2], "--size is missing"),
        ([*SETS, "--size", "many"], "--size many"),
        ([*SETS, "--budget", "2 epochs"], "--budget '2 epochs': the sets may differ in size"),
        (study("distill", "--student", "model.arch"), "--student model.arch: expected KEY=VALUE,KEY=VALUE"),
        (study("distill", "--only", "heads"), "the arms of distill are teacher scratch distill-heads"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(ablations, tmp_path, arguments, told):
    done = ablations(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ARMS)
def test_every_command_of_a_study_is_valid(ablations, tmp_path, monkeypatch, capsys, name):
    """What `--dry-run` prints is given to the program with its own `--dry-run`: settings, sizes and model."""
    from dinov2cli.cli.main import run

    arms = ARMS[name].split()
    done = ablations(*study(name, "--seeds", "3", "--device", "cpu", "--dry-run"))
    assert done.returncode == 0
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    pretrain = [words for words in commands if words[1] == "pretrain"]
    assert [Path(words[words.index("-o") + 1]).parent.name for words in pretrain] == [f"{arm}-s3" for arm in arms]
    assert len(commands) == len(arms) * (3 if name == "resolution" else 2)
    monkeypatch.chdir(tmp_path)
    for words in pretrain:
        assert run([*words[1:], "--dry-run"]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"


def test_resolution_ends_with_a_phase_at_high_resolution(ablations):
    done = ablations(*study("resolution", "--low=224,98", "--high=518,224", "--phase-budget", "10 epochs", "--dry-run"))
    (phase,) = [line for line in done.stdout.splitlines() if "phases=" in line]
    assert "'phases=[{budget: 10 epochs, global_size: 518, local_size: 224}]'" in phase
    assert "--set crops.global_size=224 --set crops.local_size=98" in phase
    sizes = [line.split("image_size=")[1].split()[0] for line in done.stdout.splitlines() if " eval " in line]
    assert sizes == ["224", "518"] * 3


def test_ladder_adds_to_the_row_before(ablations):
    done = ablations(*study("ladder", "--ladder-patch", "16,14", "--ladder-local", "96,98", "--dry-run"))
    rows = []
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        if words[1] == "pretrain":
            settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            rows.append(dict(setting.split("=", 1) for setting in settings))
            assert len(rows[-1]) == len(settings)  # no key twice
    changed = [{key for key in row if before.get(key) != row[key]} for before, row in pairwise(rows)]
    assert changed[4] == {"model.patch_size", "crops.local_size"}
    assert [len(keys) for keys in changed] == [2, 1, 1, 1, 2, 1, 2, 1, 1, 1]
    assert all(before.keys() == row.keys() for before, row in pairwise(rows))


def test_study_runs_and_a_rerun_does_nothing_again(ablations, tmp_path, quick):
    arguments = study("loss", *SHORT, "--only", "full,no-ibot")
    done = ablations(*arguments, PATH=quick)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out dir/loss/table.md\n"
    rows = table(tmp_path / "out dir" / "loss" / "table.csv")
    assert list(rows) == ["full", "no-ibot"]
    full, other = rows["full"], rows["no-ibot"]
    assert full["changed"] == "the recipe"
    assert other["changed"] == "loss.ibot_weight=0.0, masks.probability=0.0"
    assert (full["seeds"], full["steps"], full["images"], full["state"]) == ("0", "3", "48", "done")
    name = "knn/top1_k20"
    assert float(full[f"{name}/low"]) <= float(full[name]) <= float(full[f"{name}/high"])
    assert full[f"{name}/change"] == ""
    assert float(other[f"{name}/change"]) == pytest.approx(float(other[name]) - float(full[name]))
    readable = (tmp_path / "out dir" / "loss" / "table.md").read_text()
    assert readable in done.stderr
    assert f"| full | the recipe | 0 | {float(full[name]):.1%} [" in readable
    again = ablations(*study("loss", *SHORT, "--only", "no-ibot"), PATH=quick)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already done") == 2
    assert table(tmp_path / "out dir" / "loss" / "table.csv") == rows


def test_failing_arm_is_told_and_the_others_go_on(ablations, tmp_path, stub):
    done = ablations(*study("loss", "--only", "no-koleo,no-ibot", "--tasks", "knn,linear"), **stub)
    assert done.returncode == 1
    assert "no-koleo-s0: pretrain failed with exit code 1" in done.stderr
    calls = Path(stub["CALLS"]).read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [["pretrain", DATA]] * 2 + [["eval", "knn"], ["eval", "linear"]]
    rows = table(tmp_path / "out dir" / "loss" / "table.csv")
    assert rows["no-koleo"]["state"] == "seed 0: pretrain failed (exit 1)"
    assert rows["no-koleo"]["changed"] == "loss.koleo_weight=0"
    assert "unfinished" in rows["no-ibot"]["state"]  # the stand-in writes no run


@pytest.mark.parametrize("code", [75, 130])
def test_stopped_arm_stops_the_study(ablations, tmp_path, stub, code):
    done = ablations(*study("loss", "--only", "no-koleo,no-ibot"), **stub | {"CODE": str(code)})
    assert done.returncode == code
    assert len(Path(stub["CALLS"]).read_text().splitlines()) == 1
    assert (tmp_path / "out dir" / "loss" / "table.md").is_file()


def test_sigterm_to_the_script_alone_reaches_the_command(tmp_path, stub):
    command = ["bash", str(SCRIPT), *study("loss", "--set", "sleep=1")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environment(**stub), stdout=pipe, stderr=pipe) as process:
        deadline = time.monotonic() + 10
        while not Path(stub["CALLS"]).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # for the stand-in to set its trap
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75
    assert len(Path(stub["CALLS"]).read_text().splitlines()) == 1
    assert (tmp_path / "out dir" / "loss" / "table.md").is_file()


def test_table_averages_seeds_and_compares_those_both_have(tmp_path):
    """Seeds 0 and 1 of the first arm, seed 1 alone of the second; a third whose measuring failed."""
    place = tmp_path / "size"
    found = {("a", 0): 0.2, ("a", 1): 0.4, ("b", 1): 0.5, ("c", 0): 0.9}
    for (arm, seed), value in found.items():
        run, result = place / f"{arm}-s{seed}" / "run", place / f"{arm}-s{seed}" / "knn"
        for folder in (run, result):
            folder.mkdir(parents=True)
            manifest = {"complete": True, "config": {"seed": seed, "model": {"arch": arm, "depth": 4}}}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 6, "images": 60, "seconds": 30.0}\n')
        row = {"metric": "top1_k20", "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        (result / "results.json").write_text(json.dumps([row]))
    (place / "c-s0" / "failed").write_text("knn exit 3\n")
    (place / "study.tsv").write_text("command\tx\nresults\tknn\n" + "".join(f"arm\t{a}\tm={a}\n" for a in "abcd"))
    subprocess.run([sys.executable, str(ROOT / "recipes" / "ablations_table.py"), str(place)], check=True)
    rows = table(place / "table.csv")
    assert list(rows) == ["a", "b", "c"]
    name = "knn/top1_k20"
    figures = {arm: [row[key] and float(row[key]) for key in (name, f"{name}/low", f"{name}/high", f"{name}/change")]
               for arm, row in rows.items()}  # fmt: skip
    assert figures["a"][:3] == pytest.approx([0.3, 0.2, 0.4])
    assert figures["b"] == pytest.approx([0.5, 0.4, 0.6, 0.1])
    assert figures["c"] == [""] * 4
    assert (rows["a"]["seeds"], rows["a"]["images_per_s"], rows["a"]["minutes"]) == ("0,1", "2.0", "0.5")
    assert (rows["b"]["changed"], rows["c"]["state"]) == ("model.arch=b", "seed 0: knn failed (exit 3)")
    assert "| b | model.arch=b | 1 | 50.0% [40.0%, 60.0%] | +10.0 | 6 | 60 | 2 | 0.5 | done |" in (
        (place / "table.md").read_text()
    )


def test_study_of_data_chooses_sets_of_one_size_once(ablations, tmp_path):
    done = ablations(*SETS, "--seeds", "0,1", "--embed", "run", "--embed-pool", "mean", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
    lines = [shlex.split(line.replace("python -m dinov2cli", "dinov2"))[1:] for line in done.stdout.splitlines()]
    pool, query = (f"out dir/data/sets/{name}-embeddings" for name in ("pool", "query"))
    draw = ["--mode", "random"]
    assert [words for words in lines if words[0] == "embed"] == [
        ["embed", POOL, "-m", "run", "--pool", "mean", "-o", pool],
        ["embed", QUERY, "-m", "run", "--pool", "mean", "-o", query],
    ]
    assert [words for words in lines if words[0] == "curate"] == [
        ["curate", pool, "--target-size", "60", *draw, "-o", "out dir/data/sets/uncurated"],
        ["curate", pool, "--query", query, "--target-size", "60", "-o", "out dir/data/sets/curated"],
        ["curate", pool, "--target-size", "60", "-o", "out dir/data/sets/balanced"],
        ["curate", query, "--target-size", "60", *draw, "-o", "out dir/data/sets/query-only"],
    ]
    trained = [words for words in lines if words[0] == "pretrain"]
    arms = ["uncurated", "curated", "balanced", "query-only"]
    assert [(words[1], words[3]) for words in trained] == [
        (f"out dir/data/sets/{arm}", f"out dir/data/{arm}-s{seed}/run") for seed in (0, 1) for arm in arms
    ]
    assert {tuple(words[4:6]) for words in trained} == {("--config", "tiny-cpu")}
    assert not any("--set" in words for words in trained)
    assert sum(words[:2] == ["eval", "knn"] and QUERY in words for words in lines) == 8


def test_study_of_data_runs(ablations, tmp_path, quick):
    """All four sets: their sizes, where they come from, and one table of runs that saw as many images."""
    done = ablations(*SETS, *SHORT, PATH=quick)
    assert done.returncode == 0, done.stderr
    place = tmp_path / "out dir" / "data"
    pool, query = (list(open_source(name).ids) for name in (POOL, QUERY))
    rows = {}
    for arm, among, count in (("uncurated", pool, 60), ("curated", pool, 60), ("balanced", pool, 60),
                              ("query-only", query, 50)):  # fmt: skip
        kept = open_selection(place / "sets" / arm).kept.column("id").to_pylist()
        assert len(kept) == len(set(kept)) == count
        assert set(kept) <= set(among)
        rows[arm] = [among.index(name) for name in kept]
    assert 75 < fmean(rows["uncurated"]) < 125  # drawn from all over the pool: 99.5 on average, by 6 either way
    pool_vectors, query_vectors = (
        np.load(place / "sets" / f"{name}-embeddings" / "img_emb" / "img_emb_0000.npy").astype(np.float64)
        for name in ("pool", "query")
    )
    lengths = np.linalg.norm(pool_vectors, axis=1)  # 1 but for float16
    nearest = (query_vectors @ pool_vectors.T / lengths).argmax(axis=1)
    assert len(set(nearest)) > 20
    assert set(nearest) <= set(rows["curated"])
    assert not set(nearest) <= set(rows["balanced"])
    found = table(place / "table.csv")
    assert list(found) == list(rows)
    assert {(row["steps"], row["images"], row["state"]) for row in found.values()} == {("3", "48", "done")}
    assert found["curated"]["changed"] == "images of the pool nearest to the query images: 60"
    assert found["query-only"]["changed"] == "the query images: 50"
    name = "knn/top1_k20"
    change = float(found["balanced"][name]) - float(found["uncurated"][name])
    assert float(found["balanced"][f"{name}/change"]) == pytest.approx(change)


def test_set_that_cannot_be_chosen_fails_its_arms_alone(ablations, tmp_path, stub):
    done = ablations(*SETS, **stub)
    assert done.returncode == 1
    assert "curated-s0: images failed with exit code 1; the other arms go on" in done.stderr
    calls = Path(stub["CALLS"]).read_text()
    assert re.findall(r"^pretrain .* -o out dir/data/(\S+)/run", calls, flags=re.M) == ["uncurated-s0", "balanced-s0"]
    rows = table(tmp_path / "out dir" / "data" / "table.csv")
    assert rows["query-only"]["state"] == "seed 0: images failed (exit 1)"
    assert rows["query-only"]["changed"] == "the query images"


STUDENT = "model.arch=tiny,model.embed_dim=64,model.depth=2,model.num_heads=1"
DISTILLED = ["distill-heads", "distill-learned", "features-cosine", "features-smooth-l1", "gram"]


def test_study_of_distillation_gives_all_small_models_the_same(ablations, tmp_path):
    """One teacher a seed; from scratch and distilled have the same data, length, seed and architecture."""
    more = ["--budget", "9 steps", "--distill-budget", "5 steps", "--student", STUDENT, "--distill-config", "mine.yaml"]
    done = ablations(*study("distill", *more, "--seeds", "0,1", "--tasks", "knn,linear", "--dry-run"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
    lines = [shlex.split(line.replace("python -m dinov2cli", "dinov2"))[1:] for line in done.stdout.splitlines()]
    small = [word for setting in STUDENT.split(",") for word in ("--set", setting)]
    for seed in "01":
        place = "out dir/distill/{}-s" + seed
        runs = [
            words for words in lines if words[0] in ("pretrain", "distill") and words[words.index("--seed") + 1] == seed
        ]
        arms = ["teacher", "scratch", *DISTILLED]
        assert [words[words.index("-o") + 1] for words in runs] == [f"{place}/run".format(arm) for arm in arms]
        assert {words[1] for words in runs} == {DATA}
        assert [words[words.index("--budget") + 1] for words in runs] == ["9 steps", *["5 steps"] * 6]
        teacher, scratch, *distilled = runs
        assert "--set" not in teacher and scratch[-8:] == small
        assert all(words[words.index("--teacher") + 1] == f"{place}/run".format("teacher") for words in distilled)
        assert all(words[words.index("--config") + 1] == "mine.yaml" for words in distilled)
        own = {arm: words[words.index(small[-1]) + 1 :][1::2] for arm, words in zip(DISTILLED, distilled, strict=True)}
        assert own["distill-heads"] == ["teacher.heads=run"] and own["distill-learned"] == ["teacher.heads=learned"]
        assert own["gram"] == ["loss.gram_weight=1"]
        assert own["features-smooth-l1"][-2:] == ["loss.feature_weight=1", "loss.feature=smooth_l1"]
        compared = [
            words[2:] for words in lines if words[:2] == ["eval", "compare"] and place.format("scratch") in words[2]
        ]
        assert [words[1] for words in compared] == [
            f"{place}/{task}".format(arm) for arm in arms if arm != "scratch" for task in ("knn", "linear")
        ]
        assert all(Path(words[0]).name == Path(words[1]).name and words[1] in words[-1] for words in compared)


def test_teacher_that_is_there_is_measured_only(ablations):
    done = ablations(*study("distill", "--teacher", "large model", "--only", "teacher,gram", "--dry-run"))
    lines = [shlex.split(line.replace("python -m dinov2cli", "dinov2"))[1:] for line in done.stdout.splitlines()]
    assert [words[:3] for words in lines[:3]] == [
        ["eval", "knn", "large model"],
        ["distill", DATA, "--teacher"],
        ["eval", "knn", "out dir/distill/gram-s0/run"],
    ]
    assert lines[1][3] == "large model"


def test_students_of_a_teacher_that_failed_are_not_trained(ablations, tmp_path, stub):
    done = ablations(*study("distill"), **stub)
    assert done.returncode == 1
    calls = [call.split()[0] for call in Path(stub["CALLS"]).read_text().splitlines()]
    assert calls == ["pretrain", "pretrain", "eval"]  # the teacher, and what needs none
    rows = table(tmp_path / "out dir" / "distill" / "table.csv")
    assert rows["teacher"]["state"] == "seed 0: pretrain failed (exit 1)"
    assert rows["gram"]["state"] == "seed 0: teacher failed (not made)"
    assert "unfinished" in rows["scratch"]["state"]


def test_form_of_distillation_that_fails_leaves_the_others(ablations, tmp_path, stub):
    done = ablations(*study("distill", "--teacher", "x", "--only", "distill-learned,gram"), **stub)
    assert done.returncode == 1
    calls = [call.split()[:2] for call in Path(stub["CALLS"]).read_text().splitlines()]
    assert calls == [["distill", DATA], ["distill", DATA], ["eval", "knn"]]
    rows = table(tmp_path / "out dir" / "distill" / "table.csv")
    assert rows["distill-learned"]["state"] == "seed 0: distill failed (exit 1)"


DISTILL_RECIPE = """
heads: {bottleneck: 16}
crops: {global_size: 32, local_size: 16}
report: {images: 0}
"""


def test_study_of_distillation_runs(ablations, tmp_path, quick, monkeypatch, capsys):
    """Differences from scratch with intervals; every form of distillation is a valid command on that teacher."""
    from dinov2cli.cli.main import run

    (tmp_path / "mine.yaml").write_text(DISTILL_RECIPE)
    given = ["--student", STUDENT, "--distill-config", "mine.yaml", *SHORT]
    done = ablations(*study("distill", *given, "--only", "teacher,scratch,features-cosine"), PATH=quick)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "out dir" / "distill" / "table.csv")
    assert list(rows) == ["teacher", "scratch", "features-cosine"]
    assert {(row["steps"], row["images"], row["state"]) for row in rows.values()} == {("3", "48", "done")}
    assert rows["scratch"]["changed"] == "pretrained from scratch by tiny-cpu"
    assert rows["features-cosine"]["changed"].endswith("loss.feature_weight=1, loss.feature=cosine")
    name = "knn/top1_k20"
    for arm in ("teacher", "features-cosine"):
        change, low, high = (float(rows[arm][f"{name}/{part}"]) for part in ("change", "change_low", "change_high"))
        assert change == pytest.approx(float(rows[arm][name]) - float(rows["scratch"][name]))
        found = compare_results([tmp_path / "out dir" / "distill" / f"{one}-s0" / "knn" for one in ("scratch", arm)])
        assert (low, high) == (found.changes[0].change.low, found.changes[0].change.high)
        assert low < change < high or arm != "teacher"  # so short a run leaves a student almost where it began
    assert rows["scratch"][f"{name}/change_low"] == ""
    assert f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" in (
        (tmp_path / "out dir" / "distill" / "table.md").read_text()
    )
    monkeypatch.chdir(tmp_path)
    shown = ablations(*study("distill", *given, "--only", ",".join(DISTILLED), "--dry-run"))
    commands = [shlex.split(line)[1:] for line in shown.stdout.splitlines()]
    for words in (words for words in commands if words[0] == "distill" and "features-cosine-s0" not in str(words)):
        assert run([*words, "--dry-run"]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"


def test_table_shows_paired_intervals_and_the_range_of_seeds(tmp_path):
    place = tmp_path / "distill"
    found = {("scratch", 0): 0.2, ("scratch", 1): 0.3, ("gram", 0): 0.4, ("gram", 1): 0.6, ("teacher", 0): 0.7}
    for (arm, seed), value in found.items():
        run, result, paired = (place / f"{arm}-s{seed}" / name for name in ("run", "knn", "knn-difference"))
        for folder in (run, result, paired) if arm != "teacher" else (result, paired):
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"complete": True, "config": {"seed": seed}}))
        if arm != "teacher":
            (run / "metrics.jsonl").write_text('{"step": 6, "images": 60, "seconds": 30.0}\n')
        row = {"metric": "top1_k20", "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        (result / "results.json").write_text(json.dumps([row]))
        both = [{"metric": "top1_k20", "difference": None}]
        both += [{"metric": "top1_k20", "difference": 0.5, "difference_low": 0.45, "difference_high": 0.55}]
        if arm != "scratch":
            (paired / "comparison.json").write_text(json.dumps(both))
    lines = [
        "command\tx",
        "results\tknn",
        "given\tteacher",
        *(f"arm\t{arm}\tm={arm}" for arm in ("teacher", "scratch", "gram")),
    ]
    (place / "study.tsv").write_text("\n".join(lines) + "\n")
    subprocess.run([sys.executable, str(ROOT / "recipes" / "ablations_table.py"), str(place)], check=True)
    rows, name = table(place / "table.csv"), "knn/top1_k20"
    ends = {arm: [float(row[f"{name}/{part}"] or "nan") for part in ("change", "change_low", "change_high")]
            for arm, row in rows.items()}  # fmt: skip
    assert ends["teacher"] == pytest.approx([0.5, 0.45, 0.55])  # one seed: the interval over images
    assert ends["gram"] == pytest.approx([0.25, 0.2, 0.3])  # two: the lowest and the highest
    assert rows["scratch"][f"{name}/change"] == ""
    assert (rows["teacher"]["state"], rows["teacher"]["steps"]) == ("done", "")
    text = (place / "table.md").read_text()
    assert "+50.0 [+45.0, +55.0]" in text and "paired bootstrap" in text
