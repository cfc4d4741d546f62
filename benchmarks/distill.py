"""Measure what docs/distillation.md shows: python benchmarks/distill.py --data FOLDER -o OUT ARM=RUN…

RUN are finished runs, as `recipes/ablations.sh --study distill` leaves them: teacher=…, scratch=…, distill-heads=… and
so on; FOLDER holds train.parquet and val.parquet with a column `label`. All are measured together by `dinov2 eval knn`
and `linear`, and compared with `scratch` image by image; figures, costs and commands go into distill.json beside this
file (with --bench also those of `dinov2 bench distill`); `python tests/bench/test_distillation_page.py` then brings the
page up to date. A few minutes on two cores; run again after a stop, it goes on.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from dinov2cli.artifacts.manifest import read_manifest
from dinov2cli.artifacts.run import read_metrics
from dinov2cli.errors import DinoError, InputError, UserError
from dinov2cli.models.load import load_model

FILE = Path(__file__).with_suffix(".json")
SCRATCH, TASKS = "scratch", ("knn", "linear")
KEPT = ("value", "ci_low", "ci_high", "difference", "difference_low", "difference_high")


def main() -> None:
    """Measure, compare, and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="ARM=RUN", help="finished runs by arm; scratch among them")
    parser.add_argument("--data", type=Path, help="folder with train.parquet and val.parquet")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--recipe", help="whose header shows the figures, by name")
    parser.add_argument("--bench", action="store_true", help="run `dinov2 bench distill` as well, or alone")
    parser.add_argument("--file", type=Path, default=FILE, help="where to write")
    given = parser.parse_args()
    record = json.loads(given.file.read_text()) if given.file.exists() else {}
    record["machine"] = f"two virtual cores shared with others, torch {torch.__version__}"
    if given.bench:
        record["bench"] = json.loads(program("bench", "distill", "--json", "-q"))
    if given.runs:
        if given.data is None or given.out is None:
            raise UserError("runs are measured on data: expected --data FOLDER and -o OUT")
        found = measured(named(given.runs), given.data.resolve(), given.out)
        record |= {"data": given.data.name, "arms": found}
    record |= {"recipe": given.recipe} if given.recipe else {}
    given.file.write_text(json.dumps(record, indent=1) + "\n")


def named(runs: list[str]) -> dict[str, Path]:
    """Runs by arm. Raises UserError for a word that is no ARM=RUN, or without what others are compared with."""
    found = {arm: Path(path) for arm, _, path in (word.partition("=") for word in runs)}
    for arm, path in found.items():
        if not arm or not path.name:
            raise UserError(f"{arm or path}: expected ARM=RUN, as scratch=ablations/distill/scratch-s0/run")
    if SCRATCH not in found:
        raise UserError(
            f"found {', '.join(found)}; expected {SCRATCH}=RUN among them, which the others are compared with"
        )
    return found


def measured(runs: dict[str, Path], data: Path, out: Path) -> dict[str, dict]:
    """Size, cost, command and figures of every arm."""
    models = {arm: model_of(arm, run, out / "models" / arm) for arm, run in runs.items()}
    arms = {arm: facts(run, models[arm]) for arm, run in runs.items()}
    sources = ["--train", f"{data}/train.parquet?label=label", "--test", f"{data}/val.parquet?label=label"]
    for task in TASKS:
        program("eval", task, *map(str, models.values()), *sources, "-o", str(out / task), "-q")
        rows = json.loads(program("eval", "compare", str(out / task), "--baseline", SCRATCH, "--json", "-q"))["results"]
        for row in rows:
            arms[row["model"]][task] = {"metric": row["metric"], **{key: row[key] for key in KEPT}}
    return arms


def model_of(arm: str, run: Path, place: Path) -> Path:
    """A copy of a run's model under the arm's name, by which the results call it. Raises InputError without one."""
    if not (run / "export" / "config.json").is_file():
        raise InputError(f"{arm}={run}: holds no export/, expected a finished run with one model")
    if not place.exists():
        shutil.copytree(run / "export", place)
    return place


def facts(run: Path, model: Path) -> dict:
    """What a run was and cost."""
    manifest, last = read_manifest(run), read_metrics(run)[-1]
    return {
        "parameters": sum(p.numel() for p in load_model(str(model)).backbone.parameters()),
        "steps": last["step"],
        "images": last["images"],
        "seconds": round(last["seconds"]),
        # Of paths the last two names: where they lie on one machine tells nobody anything.
        "command": re.sub(r"/(?:[^/\s'=]+/)+(?=[^/\s']+/[^/\s']+)", "", manifest.command),
    }


def program(*words: str) -> str:
    """What `dinov2` prints."""
    return subprocess.run(
        [sys.executable, "-m", "dinov2cli", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


if __name__ == "__main__":
    try:
        main()
    except DinoError as error:
        sys.exit(f"error: {error}")
