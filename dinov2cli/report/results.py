"""Report of an evaluation: every figure with its confidence interval, and how it was got."""

import json
from collections.abc import Sequence

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import comparison_bars

_TILES = 3


def percent(value: float) -> str:
    """A fraction as '63.0 %'."""
    return f"{100 * value:.1f} %"


def with_interval(value: float, low: float, high: float) -> str:
    """A fraction with its interval, '63.0 % [60.1, 65.8]'."""
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def metric_name(metric: str) -> str:
    """'top1_k20' as 'top-1, k = 20'."""
    words = metric.split("_")
    words = [f"top-{w[3:]}" if w.startswith("top") and w[3:].isdigit() else w for w in words]
    words = [f"k = {w[1:]}" if w.startswith("k") and w[1:].isdigit() else w for w in words]
    return ", ".join(words)


def results_report(rows: Sequence[ResultRow], *, title: str) -> str:
    """The page of an evaluation as HTML text."""
    first = rows[0] if rows else None
    lead = "" if first is None else f"{first.model} on {first.dataset}: {first.n:,} test images."
    report = Report(title, lead=lead)
    if not rows:
        return report.summary(["There are no results."]).html()
    confidence = rows[0].settings.get("confidence", 0.95)
    best = [row for row in rows if row.metric.startswith("top1")][:_TILES] or list(rows[:_TILES])
    report.summary(
        [], tiles=[Tile(f"{row.task}, {metric_name(row.metric)}", percent(row.value), _interval(row)) for row in best]
    )
    report.section(
        "Results",
        f"Intervals hold the true value with {confidence:.0%} confidence over the choice of test images; "
        "they do not cover the luck of another training run.",
    )
    names = [f"{row.task}, {metric_name(row.metric)}" for row in rows]
    report.figure(comparison_bars(names, {"accuracy": [(row.value, row.ci_low, row.ci_high) for row in rows]}))
    report.table(
        ["task", "metric", "value", "interval", "test images", "seconds"],
        [
            [row.task, metric_name(row.metric), percent(row.value), _interval(row), f"{row.n:,}", f"{row.seconds:.1f}"]
            for row in rows
        ],
    )
    report.section("Settings")
    shared = {k: v for k, v in rows[0].settings.items() if all(row.settings.get(k) == v for row in rows)}
    report.table(["setting", "value"], [[key.replace("_", " "), _plain(value)] for key, value in shared.items()])
    return report.html()


def _interval(row: ResultRow) -> str:
    return f"[{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
