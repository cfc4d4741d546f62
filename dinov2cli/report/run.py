"""Report of a training run: where the losses went, what the watch over collapse saw, crops and features in pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import LOSS_NAMES, loss_curves

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
_CROPS = (
    "One row per image of a first batch, after cropping and colour augmentation. The teacher sees both global crops; "
    "the student sees them with the grey patches hidden, and the local crops. Crops in which you cannot tell the "
    "subject any more teach little: then raise crops.local_scale or soften the augment section."
)
_MAPS = (
    "The three main directions in which the teacher's patch features differ, as red, green and blue. Patches of one "
    "colour look alike to the model; a map that follows the objects is a good sign, one that stays a smooth blur is "
    "not. Colours compare within one row of maps, not from one step to another."
)
_MESSAGES = 8


def run_report(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    messages: Sequence[str] = (),
    crops: bytes | None = None,
    maps: Sequence[tuple[int, bytes]] = (),
    recipe: str = "",
) -> str:
    """The page of a run, under way or finished, as HTML text; parts without data are left out.

    rows: lines of `metrics.jsonl`. messages: findings in words, oldest first. crops: PNG of `crops_sheet`. maps:
    (step, PNG of `FeatureMaps`) in order; the first and the last are shown. recipe: the settings as text.
    """
    report = Report(title, lead=_lead(rows))
    shown = [f"{len(messages) - _MESSAGES} earlier findings are in the log."] if len(messages) > _MESSAGES else []
    shown += messages[-_MESSAGES:]
    if rows:
        report.summary(shown, tiles=_tiles(rows))
        _curves(report, rows)
    else:
        report.summary([*shown, "No metrics were logged: the run was shorter than log.every steps."])
    if crops is not None:
        report.section("What it is trained on", _CROPS).figure(crops, "Augmented crops and masks.")
    if maps:
        report.section("What the patches see", _MAPS)
        first, last = maps[0], maps[-1]
        report.figure(first[1], f"First evaluation, step {first[0]:,}.")
        if last[0] != first[0]:
            report.figure(last[1], f"Newest evaluation, step {last[0]:,}.")
    if recipe:
        report.section("Recipe").details("All settings of this run", recipe)
    return report.html()


def _lead(rows: Sequence[Mapping[str, Any]]) -> str:
    lead = "Training of a DINOv2 backbone."
    if not rows or not rows[-1].get("total_steps"):
        return lead
    step, total = int(rows[-1]["step"]), int(rows[-1]["total_steps"])
    return lead if step >= total else f"{lead} Not finished: this page shows it at step {step:,} of {total:,}."


def _tiles(rows: Sequence[Mapping[str, Any]]) -> list[Tile]:
    last = rows[-1]
    total = last.get("total_steps")
    unfinished = total is not None and last["step"] < total
    tiles = [Tile("steps", f"{int(last['step']):,}", f"of {int(total or 0):,}" if unfinished else "")]
    if last.get("images") is not None:
        tiles.append(Tile("images seen", f"{int(last['images']):,}"))
    if last.get("loss/total") is not None:
        first = next(row for row in rows if row.get("loss/total") is not None)
        note = f"was {first['loss/total']:.2f} at step {int(first['step']):,}"
        tiles.append(Tile("total loss", f"{last['loss/total']:.2f}", note))
    for key in _online(rows):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            name = key.removeprefix("eval/").replace("_", " ")
            tiles.append(Tile(f"{name}, during training", f"{100 * values[-1]:.1f} %", f"was {100 * values[0]:.1f} %"))
    return tiles


def _online(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the evaluations during training."""
    return sorted({key for row in rows for key in row if key.startswith("eval/")})


def _curves(report: Report, rows: Sequence[Mapping[str, Any]]) -> None:
    keys = [key for key in LOSS_NAMES if any(row.get(key) is not None for row in rows)]
    if keys:
        report.section("Losses", _LOSSES)
        report.figure(loss_curves(rows), "Thin: the logged steps. Thick: their average.")
    watched = [key for key in [*WATCHED, *_online(rows)] if any(row.get(key) is not None for row in rows)]
    if not any(row.get("skipped") for row in rows):  # nothing to show where none was
        watched = [key for key in watched if key != "skipped"]
    if watched:
        report.section("Features and speed").figure(loss_curves(rows, keys=watched))
        report.table(["figure", "meaning"], [[key, WATCHED[key]] for key in watched if key in WATCHED])
