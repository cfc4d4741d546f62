"""`recipes/lvd142m.sh`: copies and leaked images go, curated sets bring their like, and a kill loses no step."""

import json
import os
import shlex
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2cli.artifacts.selection import open_selection
from dinov2cli.data.demo import demo_truth
from dinov2cli.data.source import open_source
from tests.served import served

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "recipes" / "lvd142m.sh"
POOL, OTHER = "demo:photos?count=240&copies=0.1", "demo:photos?split=test&count=200"
SHOWN = {"sample": "hubble_deep_field", "cluster": "retina"}  # the photograph that each of the two curated sets shows
KINDS = {"jpeg", "resize", "flip"}  # planted copies that hashes find; crops need a model or local features
OPTIONS = [
    *("--pool", "pool", "--against", "evaluation", "-m", "tiny", "-o", "out dir", "--clusters", "12"),
    *("--query", "sample?neighbours=3"),
    *("--query", "mine=cluster?mode=cluster&more_than=2&per_cluster=20&per_set=30"),
]
MACHINE = ["--set", "embeddings.pool=mean", "--device", "cpu", "--workers", "0"]


def photograph(path: str) -> str:
    """The photograph that a tile was cut from, as its folder says."""
    return Path(path).parent.name


def is_evaluation(row: int) -> bool:
    return row % 5 == 0


def leaked() -> dict[str, str]:
    """Images of the pool that are images of evaluation/, encoded again: id there → id in evaluation/."""
    names = [name for row, name in enumerate(open_source(OTHER).ids) if is_evaluation(row)]
    return {f"leaked/{number}.jpg": name for number, name in enumerate(names[::7])}


def write(spec: str, folder: Path, wanted=lambda name, row: True) -> None:
    """Store images of a demo set as files, in folders by photograph."""
    source = open_source(spec)
    for row, name in enumerate(source.ids):
        if wanted(name, row):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read(row))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """pool/ with planted copies and leaked images of evaluation/, and the two curated sets."""
    place = tmp_path_factory.mktemp("curation")
    write(POOL, place / "pool")
    write(OTHER, place / "evaluation", lambda _, row: is_evaluation(row))
    for folder, photo in SHOWN.items():
        write(OTHER, place / folder, lambda name, row, p=photo: photograph(name) == p and not is_evaluation(row))
    (place / "pool" / "leaked").mkdir()
    for copy, original in leaked().items():
        with Image.open(place / "evaluation" / original) as image:
            image.convert("RGB").save(place / "pool" / copy, quality=85)
    return place


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with served(tmp_path_factory.mktemp("program")) as program:
        yield os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def call(place: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=place, capture_output=True, text=True, check=False, env=env)


def script(place: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return call(place, "bash", str(SCRIPT), *arguments, env=env)


def complete(place: Path) -> bool:
    try:
        return bool(json.loads((place / "manifest.json").read_text())["complete"])
    except (OSError, ValueError):
        return False


@pytest.fixture(scope="module")
def finished(place, environment):
    """The recipe, killed when its second step was done, and started again; what the second call said."""
    second = place / "out dir" / "clean-evaluation"
    line, silent = ["bash", str(SCRIPT), *OPTIONS, *MACHINE], subprocess.DEVNULL
    with subprocess.Popen(
        line, cwd=place, env=environment, stdout=silent, stderr=silent, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not complete(second) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert complete(second)
    assert not complete(place / "out dir" / "curated")
    done = call(place, *line, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_a_kill_in_the_middle_loses_no_finished_step(place, finished, environment):
    assert finished.stderr.count("already done") == 2
    assert finished.stdout == "out dir/curated\n"
    table = (place / "out dir" / "table.md").read_text()
    again = script(place, *OPTIONS, *MACHINE, env=environment)
    assert again.returncode == 0
    assert again.stderr.count("already done") == 6
    assert again.stdout == finished.stdout
    assert (place / "out dir" / "table.md").read_text() == table


def test_planted_copies_are_gone(place, finished):
    unique = open_selection(place / "out dir" / "unique")
    kept = set(unique.kept.column("id").to_pylist())
    planted = [copy for copy in demo_truth(POOL) if copy.kind in KINDS]
    assert len(planted) >= 12
    assert [copy for copy in planted if {copy.copy_id, copy.original_id} <= kept] == []
    assert unique.dropped.num_rows <= len(demo_truth(POOL)) + 3  # and hardly anything else


def test_leaked_images_are_gone_with_what_they_match(place, finished):
    assert set(leaked()) <= set(open_selection(place / "out dir" / "unique").kept.column("id").to_pylist())
    dropped = open_selection(place / "out dir" / "clean-evaluation").dropped.to_pylist()
    assert {row["id"]: row["duplicate_of"] for row in dropped if row["id"] in leaked()} == leaked()
    assert len(dropped) <= len(leaked()) + 3


def test_curated_sets_bring_their_like_and_themselves(place, finished):
    kept = open_selection(place / "out dir" / "curated").kept.to_pylist()
    own = [row for row in kept if row["origin"] == "query"]
    assert Counter(Path(row["source"]).name for row in own) == {
        name: len(list((place / name).rglob("*.png"))) for name in SHOWN
    }
    pool = open_selection(place / "out dir" / "clean-evaluation").kept.to_pylist()
    brought = {}
    for folder, name in (("sample", "sample"), ("cluster", "mine")):
        asked = f"out dir/queries/{name}"
        rows = [row for row in kept if row["origin"] == "retrieved" and asked in row["query_source"].split(";")]
        alike, before = (
            sum(photograph(row["image_path"]) == SHOWN[folder] for row in among) / len(among) for among in (rows, pool)
        )
        assert alike > 2.5 * before
        brought[name] = {row["id"] for row in rows}
    assert len(brought["mine"]) == 30  # its limit
    assert len(kept) == len(own) + len(brought["mine"] | brought["sample"])
    # What the sample set must bring, compared one by one: the three nearest of each of its images.
    vectors = {}
    for name in ("embeddings", "queries/sample"):
        found = np.load(place / "out dir" / name / "img_emb" / "img_emb_0000.npy").astype(np.float64)
        vectors[name] = found / np.linalg.norm(found, axis=1, keepdims=True)
    nearest = np.argsort(-vectors["queries/sample"] @ vectors["embeddings"].T, axis=1)[:, :3]
    names = open_source(str(place / "out dir" / "embeddings")).ids
    assert brought["sample"] == {names[row] for row in nearest.ravel()}


def test_training_opens_what_was_curated(place, finished, environment):
    source = open_source(str(place / "out dir" / "curated"))
    assert len(source) == open_selection(place / "out dir" / "curated").kept.num_rows
    assert all(source.read(row) for row in range(len(source)))
    training = ["pretrain", "out dir/curated", "-o", "run", "--config", "tiny-cpu", "--device", "cpu", "--dry-run"]
    done = call(place, "dinov2", *training, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"{len(source)}" in done.stderr


def test_table_counts_every_step_and_set(place, finished):
    text = (place / "out dir" / "table.md").read_text()
    assert text in finished.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    steps = {row[0]: row[1:4] for row in rows[2:8]}
    assert list(steps) == ["unique", "clean-evaluation", "embeddings", "queries/sample", "queries/mine", "curated"]
    left = {
        name: open_selection(place / "out dir" / name).kept.num_rows
        for name in ("unique", "clean-evaluation", "curated")
    }
    assert steps["unique"] == ["246", f"{left['unique']}", f"{1 - left['unique'] / 246:.1%}"]
    assert steps["clean-evaluation"][:2] == [f"{left['unique']}", f"{left['clean-evaluation']}"]
    assert steps["embeddings"] == [f"{left['clean-evaluation']}"] * 2 + [""]
    own = sum(int(steps[f"queries/{name}"][0]) for name in ("sample", "mine"))
    gone = 1 - (left["curated"] - own) / left["clean-evaluation"]
    assert steps["curated"] == [f"{left['clean-evaluation']}", f"{left['curated']}", f"{gone:.1%}"]
    sets = {(name, how.split(":")[0]): final for name, _, how, _, final in rows[10:]}
    assert sets.keys() == {("sample", "sample"), ("mine", "cluster"), ("sample", "as it is"), ("mine", "as it is")}
    assert sets["mine", "cluster"] == "30"
    assert sets["sample", "as it is"] == steps["queries/sample"][0]


def test_copy_model_and_no_query(place, environment):
    """The other way through: features for both searches, and an even choice instead of curated sets."""
    options = [
        *("--pool", "sample", "--against", "held=cluster", "-m", "tiny", "-o", "other", "--copy-model", "tiny"),
        *("--threshold", "0.9999", "--against-threshold", "0.9998", "--against-components", "--memory", "1GB"),
        *("--set", "unique.tiers=[exact,embedding]", "--set", "clean.tiers=[exact,embedding]"),
        *("--no-query", "--target-size", "10", "--levels", "6,2", "--pack", "folder", "--pack-size", "32"),
    ]
    done = script(place, *options, *MACHINE, env=environment)
    assert done.returncode == 0, done.stderr
    source = open_source(str(place / "other" / "curated"))
    assert len(source) == 10
    assert {photograph(name) for name in source.paths} == {SHOWN["sample"]}
    manifest = json.loads((place / "other" / "clean-held" / "manifest.json").read_text())
    settings = manifest["config"]
    assert (settings["threshold"], settings["against_threshold"], settings["neighbours"]) == (0.9999, 0.9998, 64)
    assert settings["against_components"]
    assert json.loads((place / "other" / "curated" / "manifest.json").read_text())["config"]["levels"] == [6, 2]


def test_commands_of_the_paper(tmp_path):
    """Its thresholds, neighbours and limits, in the order of its pipeline."""
    options = [
        *("--pool", "crawl/{00000..12799}.tar", "--copy-model", "sscd:sscd.pt", "--against", "sets/imagenet1k/val"),
        *("--against", "oxford=sets/oxford5k", "-m", "vith16", "--query", "sets/imagenet22k"),
        *("--query", "imagenet1k=sets/imagenet1k/train?neighbours=32&label=folder"),
        *("--query", "sets/pets/?mode=cluster", "--clusters", "100000", "-n", "8", "-o", "lvd"),
    ]
    done = script(tmp_path, *options, "--launch", "accelerate launch --config_file nodes.yaml", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
    start = "accelerate launch --config_file nodes.yaml -m dinov2cli "
    lines = done.stdout.splitlines()
    assert all(line.startswith(start) and line.endswith(" -n 8") for line in lines)
    copies, search = "-m sscd:sscd.pt", "--threshold 0.6 --set neighbours=64"
    against = "--threshold 0.6 --set against_threshold=0.45 --set neighbours=64"
    queries = "--query lvd/queries/imagenet22k --query lvd/queries/imagenet1k?neighbours=32 "
    queries += "--query lvd/queries/pets?mode=cluster --include-queries"
    assert [" ".join(shlex.split(line.removeprefix(start).removesuffix(" -n 8"))) for line in lines] == [
        f"embed crawl/{{00000..12799}}.tar {copies} -o lvd/copies",
        f"dedup lvd/copies {search} -o lvd/unique",
        f"embed sets/imagenet1k/val {copies} -o lvd/evaluation/val",
        f"dedup lvd/unique --against lvd/evaluation/val {against} -o lvd/clean-val",
        f"embed sets/oxford5k {copies} -o lvd/evaluation/oxford",
        f"dedup lvd/clean-val --against lvd/evaluation/oxford {against} -o lvd/clean-oxford",
        "embed lvd/clean-oxford -m vith16 -o lvd/embeddings",
        "embed sets/imagenet22k -m vith16 -o lvd/queries/imagenet22k",
        "embed sets/imagenet1k/train?label=folder -m vith16 -o lvd/queries/imagenet1k",
        "embed sets/pets/ -m vith16 -o lvd/queries/pets",
        f"curate lvd/embeddings {queries} --set clusters=100000 -o lvd/curated",
    ]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--qurey", "x"], "unknown option --qurey"),
        (["--query"], "--query needs a value"),
        (["--no-query"], "--no-query and --query: expected one of the two"),
        (
            ["--query", "other/sample"],
            "--query other/sample: a second set named sample; name it, as --query OTHER=DATA",
        ),
        (["--query", "a="], "--query a=: expected NAME=DATA"),
        (["--set", "dedup.threshold=1"], "--set dedup.threshold=1: expected STEP.KEY=VALUE"),
        (["--levels", "3,2"], "--levels belongs to --no-query"),
        (["-m", ""], "-m needs a value"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, more, told):
    done = script(tmp_path, *OPTIONS, *more)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [1, 3, 75])
def test_failing_step_ends_the_recipe_with_its_code(tmp_path, code):
    program = tmp_path / "bin" / "dinov2"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$1" >>{tmp_path}/calls\n[ "$1" != embed ] || exit {code}\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = script(tmp_path, *OPTIONS, env=os.environ | {"PATH": path})
    assert done.returncode == code
    assert ("embeddings failed with exit code" in done.stderr) == (code != 75)
    assert (tmp_path / "calls").read_text().split() == ["dedup", "dedup", "embed"]


def test_help_names_every_option():
    done = script(ROOT, "--help")
    assert done.returncode == 0
    line = next(line for line in SCRIPT.read_text().split("case $option in\n") if "--pool |" in line)
    options = [word for word in line.split(")")[0].replace("|", " ").split() if word.startswith("-")]
    assert len(options) > 20
    assert [option for option in options if option not in done.stdout] == []
