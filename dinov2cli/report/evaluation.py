"""Report of an evaluation: every figure with its interval, answers class by class, examples, and how it was got."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.errors import UserError
from dinov2cli.evaluation.tasks.interface import Panel
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.report.classes import class_answers, class_table, confusion_chart, has_classes
from dinov2cli.report.examples import neighbour_rows, panel_grid, patch_maps, surest_mistakes
from dinov2cli.report.grids import knn_neighbours
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.pca import pca_maps
from dinov2cli.report.plots import comparison_bars
from dinov2cli.report.results import interval_text, is_share, metric_name, plain_text, value_text

_TILES = 4
_CLASSES = 20
_PANELS = 6
_BARS = 16
_CELL = 100  # characters
_NOT_SETTINGS = ("unit", "lower_is_better", "statistic", "headline", "found", "notes")


@dataclass(frozen=True)
class ModelResult:
    """What one model came to: its rows, headline first; its answers per image; pictures that the task made."""

    rows: Sequence[ResultRow]
    predictions: pa.Table | None = None
    panels: Sequence[Panel] = ()


def evaluation_report(models: Mapping[str, ModelResult], *, title: str, trial: Trial | None = None) -> str:
    """The page of an evaluation as HTML text.

    models: by name; examples are those of the best (`best_of`). trial: of that model, to show images and its patches.
    """
    rows = [row for found in models.values() for row in found.rows]
    if not rows:
        return Report(title).summary(["There are no results."]).html()
    first = rows[0]
    report = Report(title, lead=f"On {first.dataset}: {first.n:,} {'test images' if trial else 'units'}.")
    report.summary(_notes(models), tiles=_tiles(models))
    _figures(report, models)
    _classes(report, models)
    if trial is not None:
        name = best_of(models)
        _examples(report, (name, models[name]), trial)
    _settings(report, models)
    return report.html()


def best_of(models: Mapping[str, ModelResult]) -> str:
    """The name of the model that is best in the figure to quote; the first of equals."""
    first = next(iter(models.values())).rows[0]
    sign = -1 if first.settings.get("lower_is_better") else 1
    return max(models, key=lambda name: sign * models[name].rows[0].value)


def _notes(models: Mapping[str, ModelResult]) -> list[str]:
    """Warnings of all models, each once."""
    return list(dict.fromkeys(note for found in models.values() for note in found.rows[0].settings.get("notes", [])))


def _tiles(models: Mapping[str, ModelResult]) -> list[Tile]:
    if len(models) > 1:
        return [
            Tile(name, value_text(found.rows[0]), f"{metric_name(found.rows[0].metric)} {interval_text(found.rows[0])}")
            for name, found in models.items()
        ][: 2 * _TILES]
    (found,) = models.values()
    return [
        Tile(f"{row.task}, {metric_name(row.metric)}", value_text(row), interval_text(row))
        for row in found.rows[:_TILES]
    ]


def _figures(report: Report, models: Mapping[str, ModelResult]) -> None:
    confidence = next(iter(models.values())).rows[0].settings.get("confidence", 0.95)
    report.section(
        "Results",
        f"Intervals hold the true value with {confidence:.0%} confidence over the choice of test images; they do not "
        "cover the luck of another training run. Two models on the same images are compared by `dinov2 eval compare`, "
        "which is sharper than two intervals that overlap.",
    )
    if len(models) == 1:
        (found,) = models.values()
        # One chart has one direction: errors and drops are in the table.
        lower = found.rows[0].settings.get("lower_is_better", False)
        shares = [row for row in found.rows if is_share(row) and row.settings.get("lower_is_better", False) == lower]
        if shares:
            names = [f"{row.task}, {metric_name(row.metric)}" for row in shares[:_BARS]]
            values = [(row.value, row.ci_low, row.ci_high) for row in shares[:_BARS]]
            more = f"The first {_BARS} of {len(shares)}; all are in the table." if len(shares) > _BARS else ""
            report.figure(comparison_bars(names, {"share": values}), more)
    elif all(is_share(found.rows[0]) for found in models.values()):
        values = [(row.value, row.ci_low, row.ci_high) for row in (found.rows[0] for found in models.values())]
        report.figure(comparison_bars(list(models), {metric_name(next(iter(models.values())).rows[0].metric): values}))
    if len(models) > 1:
        _side_by_side(report, models)
        return
    report.table(
        ["task", "metric", "value", "interval", "n", "seconds"],
        [
            [row.task, metric_name(row.metric), value_text(row), interval_text(row), f"{row.n:,}", f"{row.seconds:.1f}"]
            for found in models.values()
            for row in found.rows
        ],
    )


def _side_by_side(report: Report, models: Mapping[str, ModelResult]) -> None:
    """A row per figure, a column per model, the best marked."""
    by_metric: dict[str, dict[str, ResultRow]] = {}
    for name, found in models.items():
        for row in found.rows:
            by_metric.setdefault(row.metric, {})[name] = row
    lines = []
    for metric, row_of in by_metric.items():
        lower = next(iter(row_of.values())).settings.get("lower_is_better", False)
        best = (min if lower else max)(row.value for row in row_of.values())
        cells = {
            name: f"{value_text(row)} {interval_text(row)}{' ★' if row.value == best else ''}"
            for name, row in row_of.items()
        }
        lines.append([metric_name(metric), *(cells.get(name, "") for name in models)])
    report.table(["metric", *models], lines, caption="★ the best of the row, which need not be better beyond chance.")


def _classes(report: Report, models: Mapping[str, ModelResult]) -> None:
    answers = {
        name: class_answers(found.predictions)
        for name, found in models.items()
        if found.predictions is not None and has_classes(found.predictions)
    }
    if not answers:
        return
    name = best_of({name: found for name, found in models.items() if name in answers})
    answers = {name: answers[name], **answers}
    count = len(answers[name])
    shown = f"The {_CLASSES} worst of {count} classes." if count > _CLASSES else f"All {count}, the worst first."
    report.section("Classes", shown)
    report.table(*class_table(answers, _CLASSES))
    predictions = models[name].predictions
    chart = confusion_chart(predictions) if predictions is not None else None
    if chart is not None:
        report.figure(chart, f"Confusions of {name}. A row is a class; the area of a square is its share of the row.")


def _examples(report: Report, first: tuple[str, ModelResult], trial: Trial) -> None:
    name, found = first
    table = found.predictions
    if found.panels:
        report.section("Pictures", f"Answers of {name}.")
        rows = [(panel.title, panel.images, panel.labels) for panel in found.panels[:_PANELS]]
        report.figure(panel_grid(rows))
    if table is not None and has_classes(table):
        wrong = surest_mistakes(table, trial.test)
        if wrong is not None:
            report.section("Worst examples", f"Where {name} is wrong and surest: its answer above, the truth below.")
            report.figure(wrong)
        if trial.train is not None and "neighbours" in table.column_names:
            report.section("Nearest neighbours", f"Test images and the training images that are nearest for {name}.")
            report.figure(knn_neighbours(neighbour_rows(table, trial.train, trial.test)))
    _maps(report, name, trial)


def _maps(report: Report, name: str, trial: Trial) -> None:
    if isinstance(trial.model.network, Descriptor):
        return
    try:
        shown = patch_maps(trial.model.network, trial.model.preprocess, trial.test)
    except UserError:  # an encoder that takes one size only
        shown = None
    if shown is not None:
        images, tokens = shown
        report.section(
            "What the patches see",
            "The three main directions in which patch features differ, as red, green and blue; one colour means the "
            "same in all maps.",
        )
        report.figure(pca_maps(images, {name: tokens}, images_per_row=3))


def _settings(report: Report, models: Mapping[str, ModelResult]) -> None:
    report.section("Settings")
    rows = [row for found in models.values() for row in found.rows]
    shared = {
        key: value
        for key, value in rows[0].settings.items()
        if key not in _NOT_SETTINGS and all(row.settings.get(key) == value for row in rows)
    }
    report.table(["setting", "value"], [[key.replace("_", " "), plain_text(value)] for key, value in shared.items()])
    _found(report, {name: found.rows[0].settings.get("found") or {} for name, found in models.items()})


def _found(report: Report, models: Mapping[str, Mapping[str, object]]) -> None:
    """What was found or chosen, a column for each model; what is too long for a table is folded away."""
    lines, long = [], []
    for key in dict.fromkeys(key for found in models.values() for key in found):
        texts = [plain_text(found[key]) if key in found else "" for found in models.values()]
        if max(map(len, texts)) <= _CELL:
            lines.append([key.replace("_", " "), *texts])
        else:
            long += [(name, key, text) for name, text in zip(models, texts, strict=True) if text]
    if lines:
        report.table(["found or chosen", *(models if len(models) > 1 else ["value"])], lines)
    for name, key, text in long:
        report.details(f"{name}: {key.replace('_', ' ')}" if len(models) > 1 else key.replace("_", " "), text)
