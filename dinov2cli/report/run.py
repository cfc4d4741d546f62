"""Report of a training run: where the losses went, what the watch over collapse saw, crops and features in pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import LOSS_NAMES, loss_curves, plain_key
from dinov2cli.report.side_by_side import SideBySide, add_side_by_side

# Figures of the features, and what is good, for people who have not met them.
WATCHED = {
    "rankme": "RankMe: how many directions the class tokens fill. Higher is better; a fall means collapse.",
    "feature_std": "Spread of class tokens over images: 1 is even, 0 is collapsed.",
    "target_entropy": "Entropy of teacher targets: 1 says nothing, near 0 is one prototype each.",
    "prototype_use": "Share of prototypes that win somewhere.",
    "koleo_distance": "Distance of a class token to the nearest other one.",
    "images_per_s": "Images per second.",
    "data_wait": "Share of time spent waiting for images.",
    "skipped": "Steps left out because loss or gradient was not finite. More than a few: lower optim.lr.",
}
_LOSSES = (
    "The loss of self-supervised training need not fall to mean progress: teacher and task change with the student. "
    "Judge a run by the benchmarks."
)
_LOSSES_DISTILLED = (
    "What the students still lack of their teacher, which stays as it is: these losses should fall. The terms of class "
    "tokens and patches are cross-entropies, which end at the entropy of the teacher's own answers, not at 0."
)
_CROPS = (
    "One row per image of a first batch, after cropping and colour augmentation. The teacher sees both global crops; "
    "the student sees them with the grey patches hidden, and the local crops. Crops in which you cannot tell the "
    "subject any more teach little: then raise crops.local_scale or soften the augment section."
)
_CROPS_DISTILLED = (
    "One row per image of a first batch, after cropping and colour augmentation. The teacher sees both global crops; "
    "the students see them too, and the local crops. Nothing is hidden from them."
)
_MAPS = (
    "The three main directions in which {whose} patch features differ, as red, green and blue. Patches of one "
    "colour look alike to the model; a map that follows the objects is a good sign, one that stays a smooth blur is "
    "not. Colours compare within one row of maps, not from one step to another."
)
_MESSAGES = 8


Maps = Sequence[tuple[int, bytes]]


def run_report(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    messages: Sequence[str] = (),
    crops: bytes | None = None,
    maps: Maps | Mapping[str, Maps] = (),
    recipe: str = "",
    distilled: bool = False,
    beside: tuple[SideBySide, str | None] | None = None,
) -> str:
    """The page of a run, under way or finished, as HTML text; parts without data are left out.

    rows: lines of `metrics.jsonl`. messages: findings in words, oldest first. crops: PNG of `crops_sheet`. maps:
    (step, PNG of `FeatureMaps`) in order; the first and the last are shown; of several students by name. recipe: the
    settings as text. distilled: whether the run learns from a teacher that is given; beside: how teacher and students
    compare at its end, and their maps (`add_side_by_side`).
    """
    students = student_names(rows)
    report = Report(title, lead=_lead(rows, distilled))
    shown = [f"{len(messages) - _MESSAGES} earlier findings are in the log."] if len(messages) > _MESSAGES else []
    shown += messages[-_MESSAGES:]
    if rows:
        report.summary(shown, tiles=_tiles(rows, students))
    else:
        report.summary([*shown, "No metrics were logged: the run was shorter than log.every steps."])
    if beside is not None:
        add_side_by_side(report, beside[0], maps=beside[1])
    if rows:
        _curves(report, rows, students, distilled)
    if crops is not None:
        caption = "Augmented crops." if distilled else "Augmented crops and masks."
        report.section("What it is trained on", _CROPS_DISTILLED if distilled else _CROPS).figure(crops, caption)
    _pictures(report, maps if isinstance(maps, Mapping) else {"": maps}, distilled)
    if recipe:
        report.section("Recipe").details("All settings of this run", recipe)
    return report.html()


def student_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the students of a run that has several, in the order of their metrics; [] of a run with one."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key.removesuffix("/loss/total") for key in keys if key.endswith("/loss/total")]


def _pictures(report: Report, maps: Mapping[str, Maps], distilled: bool) -> None:
    """First and newest maps of each student."""
    if not any(maps.values()):
        return
    report.section("What the patches see", _MAPS.format(whose="the student's" if distilled else "the teacher's"))
    for name, drawn in maps.items():
        whose = f" of {name}" if name else ""
        for number, (step, picture) in enumerate(dict([drawn[0], drawn[-1]]).items() if drawn else ()):
            report.figure(picture, f"{'Newest' if number else 'First'} evaluation{whose}, step {step:,}.")


def _lead(rows: Sequence[Mapping[str, Any]], distilled: bool) -> str:
    lead = "Distillation of a DINOv2 backbone from a teacher." if distilled else "Training of a DINOv2 backbone."
    if not rows or not rows[-1].get("total_steps"):
        return lead
    step, total = int(rows[-1]["step"]), int(rows[-1]["total_steps"])
    return lead if step >= total else f"{lead} Not finished: this page shows it at step {step:,} of {total:,}."


def _tiles(rows: Sequence[Mapping[str, Any]], students: Sequence[str]) -> list[Tile]:
    last = rows[-1]
    total = last.get("total_steps")
    unfinished = total is not None and last["step"] < total
    tiles = [Tile("steps", f"{int(last['step']):,}", f"of {int(total or 0):,}" if unfinished else "")]
    if last.get("images") is not None:
        tiles.append(Tile("images seen", f"{int(last['images']):,}"))
    for name in students or [""]:
        key = f"{name}/loss/total" if name else "loss/total"
        if last.get(key) is not None:
            first = next(row for row in rows if row.get(key) is not None)
            note = f"was {first[key]:.2f} at step {int(first['step']):,}"
            tiles.append(Tile(f"total loss{f' of {name}' if name else ''}", f"{last[key]:.2f}", note))
    for key in _online(rows, students):
        for name in students or [""]:
            full = f"{name}/{key}" if name else key
            values = [row[full] for row in rows if row.get(full) is not None]
            if values:
                what = f"{key.removeprefix('eval/').replace('_', ' ')}{f' of {name}' if name else ''}, during training"
                tiles.append(Tile(what, f"{100 * values[-1]:.1f} %", f"was {100 * values[0]:.1f} %"))
    return tiles


def _online(rows: Sequence[Mapping[str, Any]], students: Sequence[str]) -> list[str]:
    """Keys of the evaluations during training, without the names of students."""
    keys = {plain_key(key, students) for row in rows for key in row}
    return sorted(key for key in keys if key.startswith("eval/"))


def _curves(report: Report, rows: Sequence[Mapping[str, Any]], students: Sequence[str], distilled: bool) -> None:
    present = {plain_key(key, students) for row in rows for key, value in row.items() if value is not None}
    keys = [key for key in LOSS_NAMES if key in present]
    if keys:
        report.section("Losses", _LOSSES_DISTILLED if distilled else _LOSSES)
        report.figure(loss_curves(rows, students=students), "Thin: the logged steps. Thick: their average.")
    watched = [key for key in [*WATCHED, *_online(rows, students)] if key in present]
    counts = [key for row in rows for key, value in row.items() if value and plain_key(key, students) == "skipped"]
    if not counts:  # nothing to show where none was
        watched = [key for key in watched if key != "skipped"]
    if watched:
        report.section("Features and speed").figure(loss_curves(rows, keys=watched, students=students))
        report.table(["figure", "meaning"], [[key, WATCHED[key]] for key in watched if key in WATCHED])
