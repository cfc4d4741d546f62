"""Report of a training run: where the losses went, and what the watch over collapse saw."""

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
}


def run_report(rows: Sequence[Mapping[str, Any]], *, title: str, messages: Sequence[str] = ()) -> str:
    """The page of a run as HTML text, from the rows of `metrics.jsonl`; `messages` are findings in words."""
    report = Report(title, lead="Training of a DINOv2 backbone.")
    if not rows:
        return report.summary([*messages, "No metrics were logged: the run was shorter than log.every steps."]).html()
    last = rows[-1]
    tiles = [Tile("steps", f"{int(last['step']):,}")]
    if last.get("images") is not None:
        tiles.append(Tile("images seen", f"{int(last['images']):,}"))
    if last.get("loss/total") is not None:
        first = next((row["loss/total"] for row in rows if row.get("loss/total") is not None), None)
        note = f"was {first:.2f} at step {int(rows[0]['step']):,}" if first is not None else ""
        tiles.append(Tile("total loss", f"{last['loss/total']:.2f}", note))
    online = [key for key in last if key.startswith("eval/")] or sorted(
        {key for row in rows for key in row if key.startswith("eval/")}
    )
    for key in online:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            name = key.removeprefix("eval/").replace("_", " ")
            tiles.append(Tile(f"{name}, during training", f"{100 * values[-1]:.1f} %", f"was {100 * values[0]:.1f} %"))
    report.summary(messages, tiles=tiles)
    keys = [key for key in LOSS_NAMES if any(row.get(key) is not None for row in rows)]
    if keys:
        report.section(
            "Losses",
            "The loss of self-supervised training need not fall to mean progress: teacher and task change with the "
            "student. Judge a run by the benchmarks.",
        )
        report.figure(loss_curves(rows), "Thin: every logged step. Thick: their average.")
    watched = [key for key in [*WATCHED, *online] if any(row.get(key) is not None for row in rows)]
    if watched:
        report.section("Features and speed").figure(loss_curves(rows, keys=watched))
        report.table(["figure", "meaning"], [[key, WATCHED[key]] for key in watched if key in WATCHED])
    return report.html()
