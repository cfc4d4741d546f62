"""The table of an ablation study, made from what is on disk: OUT/STUDY/table.md and table.csv.

`ablations.sh` calls it at its end; `python recipes/ablations_table.py OUT/STUDY` makes it again. Standard library only.
"""

import csv
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

PAIRED = ("change_low", "change_high")  # of studies that compare images one by one
HEADLINE = {"knn": "top1_k20"}  # of a task's figures the one shown in table.md, where it is there; else the first
NOTE = (
    "In brackets: with one seed the 95 % interval over the test images, with several the lowest and the highest seed. "
    "Change: points against {other}, over the seeds that both have."
)

NOTE_PAIRED = (
    " Its brackets: with one seed the 95 % interval of the paired bootstrap, with several the lowest and the highest."
)


@dataclass
class Arm:
    """One row: what is on disk of its seeds. `figures` holds {figure: {seed: (value, low, high)}}, `differences` the
    intervals of the change, {figure: {seed: (low, high)}}, where images were compared one by one."""

    name: str
    asked: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)  # what was trained on: spec, rows, hash …
    seeds: list[int] = field(default_factory=list)
    figures: dict[str, dict[int, tuple[float, float, float]]] = field(default_factory=dict)
    differences: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    costs: list[tuple[float, float, float]] = field(default_factory=list)  # steps, images, seconds of each run
    state: list[str] = field(default_factory=list)


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def complete(place: Path) -> bool:
    """Whether a directory of the program is there and finished: then all its files are whole."""
    try:
        return bool(json.loads((place / "manifest.json").read_text(encoding="utf-8"))["complete"])
    except (OSError, ValueError, KeyError):
        return False


def read_seed(arm: Arm, seed: int, place: Path, expected: list[str], *, trained: bool = True) -> None:
    """Add one run and its results to `arm`; of a step that failed, nothing but that it did.

    Not `trained`: the arm is a model that was there before the study.
    """
    mark = place / "failed"
    failed = dict(line.split(" ", 1) for line in mark.read_text().splitlines()) if mark.is_file() else {}
    arm.state += [f"seed {seed}: {step} failed ({code})" for step, code in failed.items()]
    nothing = failed.keys() & {"images", "teacher", "pretrain", "distill"}  # of the rest there can be nothing then
    run = ["run"] if trained else []
    for step in [] if nothing else [*run, *expected]:
        if step not in failed and not complete(place / step):
            arm.state.append(f"seed {seed}: {step} unfinished")
    if nothing or not all(complete(place / name) for name in run):
        return
    arm.seeds.append(seed)
    if trained:
        read_run(arm, place)
    for file in sorted(place.glob("*/results.json")):
        if file.parent.name not in failed and complete(file.parent):
            for row in json.loads(file.read_text(encoding="utf-8")):
                found = arm.figures.setdefault(f"{file.parent.name}/{row['metric']}", {})
                found[seed] = (row["value"], row["ci_low"], row["ci_high"])
    for file in sorted(place.glob("*-difference/comparison.json")):
        if file.parent.name not in failed and complete(file.parent):
            for row in json.loads(file.read_text(encoding="utf-8")):
                if row["difference"] is not None:
                    name = f"{file.parent.name.removesuffix('-difference')}/{row['metric']}"
                    ends = (row["difference_low"], row["difference_high"])
                    arm.differences.setdefault(name, {})[seed] = ends


def read_run(arm: Arm, place: Path) -> None:
    """Add what a finished run was and cost."""
    manifest = json.loads((place / "run" / "manifest.json").read_text(encoding="utf-8"))
    arm.config = arm.config or flat(manifest["config"])
    arm.images = arm.images or next(iter(manifest.get("inputs", [])), {})
    last = json.loads((place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    arm.costs.append((last["step"], last["images"], last["seconds"]))


def read_study(study: Path) -> tuple[str, list[Arm]]:
    """The command of the study and its arms, in order, with what is on disk of each."""
    rows = [line.split("\t") for line in (study / "study.tsv").read_text(encoding="utf-8").splitlines()]
    facts = {kind: rest for kind, *rest in rows if kind != "arm"}
    arms = [Arm(name, [s for s in asked if s]) for kind, name, *asked in rows if kind == "arm"]
    for arm in arms:
        ends = {place.name.removeprefix(f"{arm.name}-s"): place for place in study.iterdir()}
        for seed in sorted(int(end) for end in ends if end.isdecimal()):
            trained = arm.name not in facts.get("given", [])
            read_seed(arm, seed, ends[str(seed)], facts["results"], trained=trained)
    return facts["command"][0], arms


def changed(arm: Arm, other: Arm | None, study: str) -> str:
    """The settings in which a run differs from the one it is compared with; before there are both, those asked for.

    In a study of data, which has the same settings everywhere, the images; in one of distillation, whose runs have
    other settings than those of pretraining, what was asked for.
    """
    asked = ", ".join(arm.asked) or "the recipe"
    if study == "distill":
        return asked
    if study == "data":
        return asked + (f": {arm.images['rows']:,}" if "rows" in arm.images else "")
    if other is None or not arm.config or not other.config:
        return asked
    keys = [key for key in arm.config if key != "seed" and arm.config[key] != other.config.get(key)]
    return ", ".join(f"{key}={json.dumps(arm.config[key]).strip(chr(34))}" for key in keys) or f"nothing ({asked})"


def row_of(arm: Arm, other: Arm | None, figures: list[str], study: str) -> dict[str, Any]:
    """One row of table.csv; what is not known is left empty."""
    row: dict[str, Any] = {
        "arm": arm.name,
        "changed": changed(arm, other, study),
        "seeds": ",".join(map(str, arm.seeds)),
    }
    for name in figures:
        found, before = arm.figures.get(name, {}), other.figures.get(name, {}) if other else {}
        values = [value for value, _, _ in found.values()]
        if values:
            low, high = next(iter(found.values()))[1:] if len(values) == 1 else (min(values), max(values))
            row |= {name: fmean(values), f"{name}/low": low, f"{name}/high": high}
        both = {seed: found[seed][0] - before[seed][0] for seed in found if seed in before}
        row |= {f"{name}/change": fmean(both.values())} if both else {}
        ends = arm.differences.get(name, {})
        if both and both.keys() <= ends.keys():
            low, high = next(iter(ends.values())) if len(both) == 1 else (min(both.values()), max(both.values()))
            row |= {f"{name}/change_low": low, f"{name}/change_high": high}
    if arm.costs:
        steps, images, seconds = (fmean(column) for column in zip(*arm.costs, strict=True))
        row |= {"steps": round(steps), "images": round(images)}
        row |= {"images_per_s": images / max(seconds, 1e-9), "minutes": seconds / 60}
    return row | {"state": "; ".join(arm.state) or "done"}


def markdown(rows: list[dict[str, Any]], figures: list[str]) -> list[str]:
    """The lines of the readable table: of every task its headline."""
    shown: dict[str, str] = {}
    for name in figures:
        task, _, metric = name.partition("/")
        if task not in shown or metric == HEADLINE.get(task.split("-")[0]):
            shown[task] = name
    heads = [cell for name in shown.values() for cell in (name.replace("/", " "), "change")]
    table = [["arm", "what changed", "seeds", *heads, "steps", "images", "images/s", "minutes", "state"]]
    for row in rows:
        cells = [row["arm"], row["changed"], row["seeds"]]
        for name in shown.values():
            low, high, change = (row.get(f"{name}/{part}") for part in ("low", "high", "change"))
            ends = [100 * row[f"{name}/{part}"] for part in PAIRED if f"{name}/{part}" in row]
            cells.append("" if low is None else f"{row[name]:.1%} [{low:.1%}, {high:.1%}]")
            between = f" [{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else ""
            cells.append("" if change is None else f"{100 * change:+.1f}{between}")
        for name, form in (("steps", ",d"), ("images", ",d"), ("images_per_s", ",.0f"), ("minutes", ".1f")):
            cells.append(format(row[name], form) if name in row else "")
        table.append([*cells, row["state"]])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    return [lines[0], "| " + " | ".join("---" for _ in table[0]) + " |", *lines[1:]]


def main(study: Path) -> None:
    """Write both tables of a study directory and print the readable one."""
    command, arms = read_study(study)
    paired = study.name == "distill"
    figures = list(dict.fromkeys(name for arm in arms for name in arm.figures))
    first = next((arm for arm in arms if arm.name == "scratch"), arms[0]) if paired else arms[0]
    others = [None if arm is first else first for arm in arms]
    if study.name == "ladder":
        others = [None, *arms[:-1]]
    rows = [row_of(a, b, figures, study.name) for a, b in zip(arms, others, strict=True) if a.seeds or a.state]
    note = NOTE.format(other="the row before" if study.name == "ladder" else f"`{first.name}`")
    note += NOTE_PAIRED if paired else ""
    text = "\n".join([f"# Ablation: {study.name}", "", f"`{command}`", "", *markdown(rows, figures), "", note, ""])
    (study / "table.md").write_text(text, encoding="utf-8")
    more = [f"/{part}" for part in PAIRED] if paired else []
    parts = [f"{name}{part}" for name in figures for part in ("", "/low", "/high", "/change", *more)]
    columns = ["arm", "changed", "seeds", *parts, "steps", "images", "images_per_s", "minutes", "state"]
    with open(study / "table.csv", "w", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, columns).writerows([dict(zip(columns, columns, strict=True)), *rows])
    sys.stdout.write(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
