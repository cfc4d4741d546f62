"""Measure what docs/evaluation.md shows of real data: python benchmarks/evaluation.py --model RUN --data FOLDER -o OUT

RUN is a finished run, as of the recipe photos-cpu on imagenette. FOLDER holds imagenette/, holidays/ and nyuv2/ with
Parquet files. Every task of `dinov2 eval` runs on the trained model, on the same architecture with random weights, and
on raw pixels or colours; the outcome, with paired differences from the random one, goes into evaluation.json beside it;
`python tests/bench/test_evaluation_page.py` then brings the page up to date. Half an hour on two cores; run again
after a stop, it goes on.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from dinov2cli.artifacts.results import read_results
from dinov2cli.models.export import save_hf
from dinov2cli.models.load import load_model

FILE = Path(__file__).with_suffix(".json")
RANDOM, TRAINED = "random", "trained"


def entries(data: Path) -> list[dict]:
    """The suite: every task on its real case."""
    nette = {
        "train": f"{data}/imagenette/train.parquet?label=label",
        "test": f"{data}/imagenette/val.parquet?label=label",
        "name": "imagenette",
    }
    rooms = {"name": "nyuv2"}
    for split in ("train", "val"):
        role = "train" if split == "train" else "test"
        rooms[role] = f"{data}/nyuv2/{split}.parquet?mask=segmentation&depth=depth"
    metres = {"units_per_metre": 25.5, "size": 120, "steps": 400, "train_batch_size": 8}
    # 39 is the unlabelled rest.
    scenes = {"ignore": [39, 255], "size": 120, "steps": 1000}
    return [
        {"task": "knn", **nette},
        {"task": "knn", **nette, "name": "imagenette-few", "settings": {"shots": [1, 5, 20], "neighbours": [1, 5]}},
        {"task": "linear", **nette},
        {"task": "logreg", **nette},
        {"task": "retrieval", "test": f"{data}/holidays/images.parquet", "name": "holidays"},
        {"task": "segmentation", **rooms, "settings": scenes},
        {
            "task": "segmentation",
            **rooms,
            "name": "nyuv2-ms",
            "settings": {**scenes, "head": "ms", "scales": [1, 1.5, 2]},
        },
        {"task": "depth", **rooms, "settings": metres},
        {"task": "depth", **rooms, "name": "nyuv2-lin4", "settings": {**metres, "head": "lin4"}},
        {"task": "depth", **rooms, "name": "nyuv2-dpt", "settings": {**metres, "head": "dpt", "channels": 32}},
        {"task": "robustness", **nette, "settings": {"severities": [3]}},
        {"task": "finetune", **nette, "settings": {"epochs": 10}},
    ]


def random_model(run: Path, place: Path) -> Path:
    """The architecture of a run with weights drawn afresh, in a directory."""
    loaded = load_model(run)
    loaded.backbone.init_weights(torch.Generator().manual_seed(0))
    size = loaded.preprocess
    save_hf(loaded.backbone, place, resize=size.resize, crop=size.crop, card="Random weights.")
    return place


def main() -> None:
    """Run the suite, compare, and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--only", help="tasks to run, or bench, as knn,depth; the others keep what is recorded")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    floor = given.out / RANDOM
    if not floor.exists():
        random_model(given.model, floor)
    trained = given.out / TRAINED
    if not trained.exists():
        shutil.copytree(given.model / "export", trained)
    record = json.loads(FILE.read_text()) if FILE.exists() else {"machine": machine(), "tasks": {}}
    if not given.only or "bench" in given.only.split(","):
        command = [sys.executable, "-m", "dinov2cli", "bench", "eval", "--json", "-q"]
        record["bench"] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for entry in entries(given.data.resolve()):
        if given.only and entry["task"] not in given.only.split(","):
            continue
        name = f"{entry['task']}-{entry['name']}"
        measured(entry, [floor, trained], given.out / name)
        record["tasks"][name] = outcome(given.out / name, entry, given.data.resolve())
        FILE.write_text(json.dumps(record, indent=1) + "\n")
    FILE.write_text(json.dumps(record, indent=1) + "\n")


def measured(entry: dict, models: list[Path], place: Path) -> None:
    """One task on all models, as a user runs it. Pixels serve where nothing is trained through them."""
    baseline = "baseline:histogram" if entry["task"] == "retrieval" else "baseline:pixels"
    others = [] if entry["task"] in ("finetune", "robustness") else [baseline]
    settings = [f"--set={key}={json.dumps(value)}" for key, value in entry.get("settings", {}).items()]
    sources = [part for role in ("train", "test") if role in entry for part in (f"--{role}", entry[role])]
    command = ["eval", entry["task"], *map(str, models), *others, *sources, *settings, "-o", str(place)]
    subprocess.run([sys.executable, "-m", "dinov2cli", *command], check=True, stdout=subprocess.DEVNULL)


def outcome(place: Path, entry: dict, data: Path) -> dict:
    """Headline figures of one task, and how far each model is from the random one."""
    command = ["eval", "compare", str(place), "--baseline", RANDOM, "--all", "--json", "-q"]
    done = subprocess.run([sys.executable, "-m", "dinov2cli", *command], check=True, stdout=subprocess.PIPE)
    keep = ("model", "metric", "value", "ci_low", "ci_high", "n", "difference", "difference_low", "difference_high")
    found = [{key: row[key] for key in keep if key in row} for row in json.loads(done.stdout)["results"]]
    rows = read_results(place)
    return {
        "settings": entry.get("settings", {}),
        "data": {role: entry[role].removeprefix(f"{data}/") for role in ("train", "test") if role in entry},
        "headline": next(row.metric for row in rows if row.settings["headline"]),
        "unit": rows[0].settings["unit"],
        "lower_is_better": rows[0].settings["lower_is_better"],
        "seconds": {row.model: row.seconds for row in rows},
        "rows": found,
    }


def machine() -> str:
    """What it was measured on."""
    return f"two virtual cores shared with others, torch {torch.__version__}"


if __name__ == "__main__":
    main()
