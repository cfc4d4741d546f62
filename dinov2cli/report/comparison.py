"""A comparison of models as tables of text (in the paper's style: a row per model, the best in bold) and as a page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from dinov2cli.evaluation.comparison import Change, Column, Comparison
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import Estimate, comparison_bars
from dinov2cli.report.results import metric_name

_TILES = 4
_BARS = 24  # figures in a chart of two models
_CHARTS = 6  # charts of several models


@dataclass(frozen=True)
class Cell:
    """A place of a table; best: to be shown in bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text: headers, and rows as long."""

    headers: list[str]
    rows: list[list[Cell]]


def column_title(column: Column, *, unit: bool = True) -> str:
    """'knn imagenette top-1, k = 20 (%)'; an arrow down where less is better."""
    name = metric_name(column.metric)
    shown = {"share": " (%)", "metres": " (m)"}.get(column.unit, "") if unit else ""
    return f"{column.task} {column.data}: {name}{shown}{' ↓' if column.lower_is_better else ''}"


def number_text(value: float, column: Column, *, signed: bool = False) -> str:
    """A value of a column without its unit; shares in per cent."""
    if value != value:
        return "–"
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if column.unit == "share" else f"{value:{sign}.3f}"


def _estimate(value: float, low: float, high: float, column: Column, *, signed: bool = False) -> str:
    first, *ends = (number_text(number, column, signed=signed) for number in (value, low, high))
    return f"{first} [{', '.join(ends)}]"


def figures_table(comparison: Comparison, *, transposed: bool = False, intervals: bool = True) -> Table:
    """A row per model and a column per figure; `transposed` the other way round."""
    cells: dict[tuple[str, Column], Cell] = {}
    for column in comparison.columns:
        best = comparison.best(column)
        for model in comparison.models:
            row = comparison.rows.get((model, column))
            text = ""
            if row is not None:
                text = number_text(row.value, column)
                if intervals:
                    text = _estimate(row.value, row.ci_low, row.ci_high, column)
            cells[model, column] = Cell(text, model in best)
    if transposed:
        rows = [
            [Cell(column_title(column)), *(cells[model, column] for model in comparison.models)]
            for column in comparison.columns
        ]
        return Table(["", *comparison.models], rows)
    rows = [[Cell(model), *(cells[model, column] for column in comparison.columns)] for model in comparison.models]
    return Table(["model", *(column_title(column) for column in comparison.columns)], rows)


def differences_table(comparison: Comparison) -> Table:
    """A row per model and figure: its difference to the baseline with the interval, n and what that says."""
    rows = [
        [
            Cell(change.model),
            Cell(column_title(change.column)),
            Cell(_difference(change), best=bool(change.verdict)),
            Cell(f"{change.change.n:,}"),
            Cell(change.verdict or "–"),
        ]
        for change in comparison.changes
    ]
    return Table(["model", "figure", f"difference to {comparison.baseline}", "n", "verdict"], rows)


def _difference(change: Change) -> str:
    found = change.change
    return _estimate(found.value, found.low, found.high, change.column, signed=True) + (" *" if change.verdict else "")


def as_markdown(tables: Sequence[Table], notes: Sequence[str] = ()) -> str:
    """Tables and notes as Markdown."""

    def cell(text: str, bold: bool) -> str:
        text = text.replace("|", "\\|").replace("*", "\\*")
        return f"**{text}**" if bold and text else text

    parts = []
    for table in tables:
        lines = [[cell(text, False) for text in table.headers], ["---"] * len(table.headers)]
        lines += [[cell(one.text, one.best) for one in row] for row in table.rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, *(["\n".join(f"- {note}" for note in notes)] if notes else [])]) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "–": "--", "↓": r"$\downarrow$", "~": r"\textasciitilde{}"}
_LATEX |= {"^": r"\textasciicircum{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"}}


def as_latex(tables: Sequence[Table], notes: Sequence[str] = ()) -> str:
    """Tables for the package booktabs; notes as comments."""

    def cell(text: str, bold: bool) -> str:
        safe = "".join(_LATEX.get(sign, sign) for sign in text)
        # A cell that begins with a bracket would be taken for an argument of the line break before it.
        safe = "{" + safe + "}" if safe.startswith("[") else safe
        return rf"\textbf{{{safe}}}" if bold and safe else safe

    parts = []
    for table in tables:
        lines = [" & ".join(cell(text, False) for text in table.headers) + r" \\", r"\midrule"]
        lines += [" & ".join(cell(one.text, one.best) for one in row) + r" \\" for row in table.rows]
        body = "\n".join(lines)
        columns = "l" * len(table.headers)
        parts.append(f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}")
    return "\n\n".join([*parts, *(["\n".join(f"% {note}" for note in notes)] if notes else [])]) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line for each model and figure, in plain numbers, with the difference to the baseline."""
    records = comparison.records()
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def sentences(comparison: Comparison) -> list[str]:
    """What the differences say, in words: how many figures of each model are above and below the baseline."""
    found = []
    for model in comparison.models:
        changes = [change for change in comparison.changes if change.model == model]
        if not changes:
            continue
        better, worse = (sum(change.verdict == word for change in changes) for word in ("better", "worse"))
        rest = len(changes) - better - worse
        parts = [f"better in {better}"] * (better > 0) + [f"worse in {worse}"] * (worse > 0)
        parts += [f"within chance in {rest}"] * (rest > 0)
        noun = "figure" if len(changes) == 1 else "figures"
        found.append(f"{model} against {comparison.baseline}, of {len(changes)} {noun}: {', '.join(parts)}.")
    return found


def comparison_report(comparison: Comparison, *, title: str = "Comparison", confidence: float = 0.95) -> str:
    """The page of a comparison as HTML text."""
    counts = {"model": len(comparison.models), "figure": len(comparison.columns)}
    lead = ", ".join(f"{count} {noun}{'s' * (count > 1)}" for noun, count in counts.items()) + "."
    report = Report(title, lead=lead).summary(sentences(comparison), tiles=_tiles(comparison))
    report.section(
        "Figures",
        f"In brackets the interval that holds the true value with {confidence:.0%} confidence over the choice of test "
        "images; it does not cover the luck of another training run.",
    )
    _bars(report, comparison)
    table = figures_table(comparison, transposed=len(comparison.columns) > 3)
    report.table(
        table.headers,
        [[f"{cell.text} ★" if cell.best else cell.text for cell in row] for row in table.rows],
        caption="★ the best, which need not be so beyond chance." + _arrow(comparison),
    )
    _differences(report, comparison, confidence)
    if comparison.notes:
        report.section("Notes").summary(comparison.notes)
    return report.html()


def _arrow(comparison: Comparison) -> str:
    return " ↓ less is better." if any(column.lower_is_better for column in comparison.columns) else ""


def _tiles(comparison: Comparison) -> list[Tile]:
    """The best model of the first figures."""
    tiles: list[Tile] = []
    for column in comparison.columns:
        best = comparison.best(column)
        if best and len(tiles) < _TILES:
            row = comparison.rows[best[0], column]
            value = number_text(row.value, column) + {"share": " %", "metres": " m"}.get(column.unit, "")
            tiles.append(Tile(column_title(column, unit=False), value, f"best: {', '.join(best)}"))
    return tiles


def _bars(report: Report, comparison: Comparison) -> None:
    """Charts of the shares that all models were measured by: of two models in one, of several one for each figure."""
    columns = [
        column
        for column in comparison.columns
        if column.unit == "share" and all(_measured(comparison, model, column) for model in comparison.models)
    ]
    # The last bar of a group stands out: not the baseline, but what is compared with it.
    order = sorted(comparison.models, key=lambda model: model != comparison.baseline)

    def estimate(model: str, column: Column) -> Estimate:
        row = comparison.rows[model, column]
        return row.value, row.ci_low, row.ci_high

    if len(order) <= 2:
        if columns := columns[:_BARS]:
            names = [column_title(column, unit=False) for column in columns]
            report.figure(
                comparison_bars(names, {model: [estimate(model, column) for column in columns] for model in order})
            )
        return
    for column in columns[:_CHARTS]:
        title = column_title(column, unit=False)
        report.figure(comparison_bars(order, {title: [estimate(model, column) for model in order]}))


def _measured(comparison: Comparison, model: str, column: Column) -> bool:
    row = comparison.rows.get((model, column))
    return row is not None and row.value == row.value


def _differences(report: Report, comparison: Comparison, confidence: float) -> None:
    if not comparison.changes:
        return
    chance = 1 - confidence
    report.section(
        f"Differences to {comparison.baseline}",
        "Both models are resampled together, on the same test images, so that what is common to both cancels: these "
        "intervals are sharper than two of the table above beside each other.",
    )
    table = differences_table(comparison)
    report.table(
        table.headers,
        [[cell.text for cell in row] for row in table.rows],
        caption=f"* the {confidence:.0%} interval leaves out zero. Of many figures without any difference {chance:.0%} "
        "would do so too. Differences of shares are in points.",
    )
