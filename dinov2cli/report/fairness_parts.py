"""Sections of a page about differences between groups: one attribute, income, objects, kinds of error, models."""

from collections.abc import Mapping, Sequence
from typing import Any

from dinov2cli.report.examples import panel_grid
from dinov2cli.report.fairness_charts import Panel, crossed_table, dot_chart, income_curve
from dinov2cli.report.fairness_data import (
    CROSS,
    FALSE,
    RECALL,
    SAME,
    Concept,
    FairnessPage,
    ModelGap,
    Odds,
    in_order,
    is_main,
    is_same_attribute,
    rows_of,
)
from dinov2cli.report.fairness_tables import (
    change_table,
    class_table,
    concept_table,
    group_table,
    odds_table,
    same_table,
)
from dinov2cli.report.fairness_text import measure_name, metric_title
from dinov2cli.report.fairness_words import pictures, protocol_words
from dinov2cli.report.html import Report
from dinov2cli.report.results import plain_text

_CONCEPTS = 15
_ODDS = 24
_COLUMNS = 8  # groups of a table of classes
_MULTIPLES = 4  # charts in a row
_PANELS = 6
_CELL = 100  # characters of a cell; longer texts are folded away
_NOT_SETTINGS = ("unit", "lower_is_better", "statistic", "headline", "found", "notes", "axes")


def axis_section(report: Report, page: FairnessPage, axis: str) -> None:
    """Charts and tables of one attribute."""
    about = page.axes.get(axis, "")
    report.section(f"By {axis}", f"Groups: {about}." if about else "")
    metrics = page.metrics(axis)
    main = [metric for metric in metrics if is_main(metric)]
    titles = [_capital(metric_title(page.protocol, metric)) for metric in main]
    for first in range(0, len(main), _MULTIPLES):
        some = slice(first, first + _MULTIPLES)
        said = _directions(page, axis, main[some]) if len(main) > 1 else ""
        report.figure(_dots(page, axis, main[some], titles[some]), said)
    if CROSS in axis and main:
        _crossed(report, page, axis, main)
    if main:
        report.table(*group_table(page, axis, main), caption=titles[0] if len(main) == 1 else "")
    _same(report, page, axis, [metric for metric in metrics if is_same_attribute(metric)])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _dots(page: FairnessPage, axis: str, metrics: Sequence[str], titles: Sequence[str]) -> str:
    panels = [
        Panel(title, page.rows(axis, metric), page.unknown(axis, metric))
        for title, metric in zip(titles, metrics, strict=True)
    ]
    return dot_chart(panels, in_order(page, axis, metrics[0]))


def _directions(page: FairnessPage, axis: str, metrics: Sequence[str]) -> str:
    """Which way is better, of each metric."""
    words = {"high": "higher is better", "low": "lower is better", "neither": "neither way is better by itself"}
    found: dict[str, list[str]] = {}
    for metric in metrics:
        better = next(row.better for row in page.groups if row.axis == axis and row.metric == metric)
        found.setdefault(words[better], []).append(measure_name(page.protocol, metric))
    said = "; ".join(f"{', '.join(names)}: {word}" for word, names in found.items())
    return f"{_capital(said)}. Every chart has a scale of its own. An arrow leads to what lies outside of it."


def _crossed(report: Report, page: FairnessPage, axis: str, metrics: Sequence[str]) -> None:
    """Coloured tables: of one metric for all models, of several metrics for the only model."""
    said = "The more colour, the more often; without colour: too few images."
    if len(metrics) == 1:
        chart = crossed_table(page.rows(axis, metrics[0]))
    elif len(page.models) == 1:
        titles = {metric: _capital(metric_title(page.protocol, metric)) for metric in metrics[:_MULTIPLES]}
        tables = {title: page.rows(axis, metric)[page.models[0]] for metric, title in titles.items()}
        chart = crossed_table(tables, one_scale=False)
        said += " Every table has a scale of its own."
    else:
        return
    if chart:
        report.figure(chart, said)


def _same(report: Report, page: FairnessPage, axis: str, metrics: Sequence[str]) -> None:
    """How often nearest images share the attribute."""
    if not metrics:
        return
    above, count = _above_chance(page, axis, metrics[-1])
    match = SAME.fullmatch(metrics[-1])
    number = match[2] if match else ""
    report.text(
        f"Nearest images: how often those of other persons share the {axis}. More often than chance gives means that "
        "the features hold the attribute, or something that goes with it; that is neither good nor bad by itself. "
        f"Among the nearest {number} the whole interval lies above chance in {above} of {count} groups"
        f"{' (of all models together)' if len(page.models) > 1 else ''}."
    )
    titles = [f"Same {axis}, nearest {m[2]}" for m in map(SAME.fullmatch, metrics) if m]
    for first in range(0, len(metrics), _MULTIPLES - 1):
        some = slice(first, first + _MULTIPLES - 1)
        report.figure(_dots(page, axis, metrics[some], titles[some]))
    report.table(*same_table(page, axis, metrics), caption=f"Same {axis} among the nearest images")


def _above_chance(page: FairnessPage, axis: str, metric: str) -> tuple[int, int]:
    """Groups whose interval lies above chance, and all groups that are large enough."""
    rows = [row for found in page.rows(axis, metric).values() for row in found.values() if row.enough]
    above = [row for row in rows if row.expected is not None and row.ci_low is not None and row.ci_low > row.expected]
    return len(above), len(rows)


def income_section(report: Report, page: FairnessPage) -> None:
    """The curve over income."""
    table = page.tables.get("curve")
    if table is None or not table.num_rows:
        return
    report.section(
        "Over income",
        "A smooth average over the income of homes, without cuts between groups. The band holds the curve at each "
        f"income with {100 * page.confidence:g} % confidence; at the ends there are few homes.",
    )
    curves: dict[str, list[tuple[float, float, float, float]]] = {model: [] for model in page.models}
    for row in table.to_pylist():
        curves[row["model"]].append((row["income"], row["value"], row["low"], row["high"]))
    report.figure(income_curve(curves))


def concept_section(report: Report, page: FairnessPage) -> None:
    """Objects with the largest gaps."""
    table = page.tables.get("concepts")
    concepts = rows_of(table, Concept) if table is not None else []
    headers, lines = concept_table(page.models, concepts, _CONCEPTS)
    if not lines:
        return
    count = len({row.concept for row in concepts})
    report.section(
        "Objects with the largest gaps (exploratory)",
        f"The {len(lines)} largest of {count} objects, picked because they are the largest: the intervals are not "
        "corrected for that choice, and some would leave out zero by chance alone. They are hints of where to look.",
    )
    first = concepts[0]
    words = f"Share recognised; a gap is {first.high_group} minus {first.low_group} income"
    words += "." if len(page.models) == 1 else f", in points; rates are those of {page.models[0]}."
    report.table(headers, lines, caption=words)


def odds_section(report: Report, page: FairnessPage) -> None:
    """True and false positives."""
    table = page.tables.get("odds")
    if table is None or not table.num_rows:
        return
    rows = rows_of(table, Odds)
    few = len({row.class_name for row in rows if row.gap is None and row.class_name is not None})
    left = f" {few} classes have too few images in some group for a figure." if few else ""
    shown = sum(row.gap is not None for row in rows)
    more = f" The first {_ODDS} of {shown} lines are shown." if shown > _ODDS else ""
    report.section(
        "Kinds of error",
        "True positives: images of a class that are recognised as such. False positives: images of other classes that "
        "are taken for it. Equalised odds is the larger of the two largest differences between groups; 0 points would "
        f"mean that a class is recognised and mistaken equally often in all groups.{left}{more}",
    )
    report.table(*odds_table(page.models, rows, _ODDS))
    for axis in page.axis_names():
        for prefix, words in ((RECALL, "Recall"), (FALSE, "False positives")):
            metrics = [metric for metric in page.metrics(axis) if metric.startswith(prefix)]
            if metrics and len(page.rows(axis, metrics[0])[page.models[0]]) <= _COLUMNS:
                said = f"{words} of every class by {axis}; empty where a group has too few images."
                report.table(*class_table(page, axis, metrics, prefix), caption=said)


def change_section(report: Report, page: FairnessPage) -> None:
    """How gaps differ between models."""
    table = page.tables.get("model_gaps")
    if table is None or not table.num_rows:
        return
    changes = [row for row in rows_of(table, ModelGap) if is_main(row.metric)]
    if not changes:
        return
    report.section(
        f"Changes of gaps against {changes[0].baseline}",
        "Both models saw the same images, which are resampled together. A minus means a smaller gap than that of "
        f"{changes[0].baseline}. A smaller gap can also come from a best group that became worse: look at the rates.",
    )
    words = f"Not corrected for the {len(changes)} comparisons of this table." if len(changes) > 1 else ""
    report.table(*change_table(page, changes), caption=words)


def picture_section(report: Report, page: FairnessPage) -> None:
    """Pictures, or why there are none."""
    report.section("Pictures")
    shown = [(model, panels) for model, panels in page.panels.items() if panels]
    if not shown:
        report.text(pictures(page))
    for model, panels in shown:
        rows = [(panel.title, panel.images, panel.labels) for panel in panels[:_PANELS]]
        report.figure(panel_grid(rows), f"Answers of {model}." if len(page.models) > 1 else "")


def protocol_section(report: Report, page: FairnessPage) -> None:
    """How everything was computed, with all settings and versions."""
    report.section("Exact protocol").summary(protocol_words(page))
    _values(report, "setting", {"value": page.settings})
    _values(report, "found or chosen", page.found)
    if page.environment:
        report.table(["version of", ""], [[name, version] for name, version in page.environment.items()])


def _values(report: Report, title: str, by_model: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each key, a column for each model; what is too long for a table is folded away."""
    lines: list[list[str]] = []
    long: list[tuple[str, str]] = []
    several = len(by_model) > 1
    keys = dict.fromkeys(key for found in by_model.values() for key in found if key not in _NOT_SETTINGS)
    for key in keys:
        texts = [plain_text(found[key]) if key in found else "" for found in by_model.values()]
        name = key.replace("_", " ")
        if max(map(len, texts)) <= _CELL:
            lines.append([name, *texts])
        else:
            pairs = zip(by_model, texts, strict=True)
            long += [(f"{model}: {name}" if several else name, text) for model, text in pairs if text]
    if lines:
        report.table([title, *(by_model if several else ["value"])], lines)
    for name, text in long:
        report.details(name, text)
