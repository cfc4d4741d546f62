"""Tables of a page about differences between groups, as headers and rows of text."""

from collections.abc import Sequence

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.report.fairness_data import SAME, Concept, FairnessPage, Gap, Group, ModelGap, Odds, in_order
from dinov2cli.report.fairness_text import digits_for, estimate, measure_name, p_text, points, share, span, tied
from dinov2cli.report.results import interval_text, metric_name, value_text

Lines = tuple[list[str], list[list[str]]]
_INTERVALS = 3  # groups of a table of classes; with more there is no room for intervals
_LONG = 20  # groups of several models; beyond, a row per group and a column per model


def rate(value: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """'61.2 % [58.0, 64.3]'; empty where there is none."""
    return "" if value is None else f"{share(value, digits)} {span(low, high, digits)}".strip()


def group_table(page: FairnessPage, axis: str, metrics: Sequence[str]) -> Lines:
    """One axis: a row for each metric, group and model; unknown images last."""
    names = in_order(page, axis, metrics[0])
    several = len(page.models) > 1
    if several and len(names) > _LONG:
        return _wide(page, axis, metrics[0], names)
    rows = [row for row in page.groups if row.axis == axis and row.metric in metrics]
    drops = any(row.drop is not None for row in rows)
    reference = {"neither": "highest"}.get(rows[0].better, "best") if len(metrics) == 1 else "best"
    headers = ["measure"] * (len(metrics) > 1) + ["group"] + ["model"] * several + ["images"]
    headers += [f"{page.unit}s" if page.unit in ("household", "person") else "clusters"] * (
        page.clustered and not several
    )
    headers += ["rate", f"to {reference}, points", *["drop"] * drops, "p, corrected"]
    lines = []
    for metric in metrics:
        found = _of_metric(page, axis, metric, names)
        digits = digits_for([row.value for row, _ in found if row.enough])
        for place, (row, first) in enumerate(found):
            title = measure_name(page.protocol, metric) if place == 0 else ""
            lines.append([*[title] * (len(metrics) > 1), *_cells(page, row, first, digits, drops)])
    return headers, lines


def _of_metric(page: FairnessPage, axis: str, metric: str, names: Sequence[str]) -> list[tuple[Group, bool]]:
    """Rows in the order to be shown, each with whether it is the first of its group."""
    rows, unknown = page.rows(axis, metric), page.unknown(axis, metric)
    by_group = [[found[name] for found in rows.values() if name in found] for name in names]
    return [(row, place == 0) for found in [*by_group, list(unknown.values())] for place, row in enumerate(found)]


def _cells(page: FairnessPage, row: Group, first: bool, digits: int, drops: bool) -> list[str]:
    several = len(page.models) > 1
    cells = [_group_name(row, first=first), *[row.model] * several, f"{row.images:,}"]
    cells += [f"{row.clusters:,}"] * (page.clustered and not several)
    cells.append(rate(row.value, row.ci_low, row.ci_high, digits))
    cells.append(estimate(row.difference, row.difference_low, row.difference_high, digits, signed=True))
    cells += [share(row.drop) if row.drop is not None else ""] * drops
    return [*cells, p_text(row.p_corrected)]


def _group_name(row: Group, *, first: bool) -> str:
    if not row.known:
        return "unknown" if first else ""
    star = "★" if row.marked else ""
    if not first:
        return star
    few = "" if row.enough else " (too\N{NO-BREAK SPACE}few)"
    return f"{row.group}\N{NO-BREAK SPACE}{star}" if star else row.group + few


def _wide(page: FairnessPage, axis: str, metric: str, names: Sequence[str]) -> Lines:
    """A row for each group, a column for each model."""
    rows = page.rows(axis, metric)
    digits = digits_for([row.value for found in rows.values() for row in found.values()])
    lines = []
    for name in names:
        found = [rows[model].get(name) for model in page.models]
        first = next(row for row in found if row is not None)
        cells = [rate(row.value, row.ci_low, row.ci_high, digits) if row else "" for row in found]
        lines.append([name if first.enough else f"{name} (too few)", f"{first.images:,}", *cells])
    return ["group", "images", *page.models], lines


def same_table(page: FairnessPage, axis: str, metrics: Sequence[str]) -> Lines:
    """Shared attributes: a row for each group and model, a column for each number of neighbours, and chance."""
    several = len(page.models) > 1
    numbers = [match[2] for match in map(SAME.fullmatch, metrics) if match]
    headers = ["group", *["model"] * several, "images", *[f"nearest {k}" for k in numbers], "by chance"]
    found = {metric: page.rows(axis, metric) for metric in metrics}
    lines = []
    for name in in_order(page, axis, metrics[0]):
        of_group = [(model, [found[metric][model].get(name) for metric in metrics]) for model in page.models]
        for place, (model, rows) in enumerate(of_group):
            known = next((row for row in rows if row is not None), None)
            if known is None:
                continue
            cells = [_group_name(known, first=place == 0), *[model] * several, f"{known.images:,}"]
            cells += [rate(row.value, row.ci_low, row.ci_high) if row else "" for row in rows]
            lines.append([*cells, share(known.expected) if known.expected is not None else ""])
    return headers, lines


def class_table(page: FairnessPage, axis: str, metrics: Sequence[str], prefix: str) -> Lines:
    """One measure of single classes: a row for each class and model, a column for each group."""
    several = len(page.models) > 1
    # The same columns in every table of an axis, as the groups are given.
    names = list(dict.fromkeys(row.group for row in page.groups if row.axis == axis and row.known))
    lines = []
    for metric in metrics:
        rows = page.rows(axis, metric)
        for place, model in enumerate(page.models):
            found = [rows[model].get(name) for name in names]
            cells = [_class_rate(row, intervals=len(names) <= _INTERVALS) for row in found]
            lines.append([metric.removeprefix(prefix) if place == 0 else "", *[model] * several, *cells])
    return ["class", *["model"] * several, *names], lines


def _class_rate(row: Group | None, *, intervals: bool) -> str:
    if row is None or not row.enough:
        return ""
    return rate(row.value, row.ci_low, row.ci_high) if intervals else share(row.value)


def gap_table(page: FairnessPage, gaps: Sequence[Gap]) -> Lines:
    """All comparisons: which groups lie farthest apart, how far, and whether that is beyond chance."""
    several, measures = len(page.models) > 1, len({gap.metric for gap in page.gaps}) > 1
    headers = ["model"] * several + ["groups of"] + ["measure"] * measures + ["groups", "best", "worst", "gap, points"]
    headers += ["drop, %"] * (not several) + ["p, corrected", "beyond chance"]
    lines = []
    for gap in gaps:
        digits = digits_for([gap.worst_value, gap.best_value])
        cells = [*[gap.model] * several, gap.axis, *[measure_name(page.protocol, gap.metric)] * measures]
        cells += [f"{gap.groups}", gap.best or "", gap.worst or ""]
        cells += [estimate(gap.gap, gap.gap_low, gap.gap_high, digits)]
        cells += [estimate(gap.drop, gap.drop_low, gap.drop_high)] * (not several)
        verdict = "" if gap.gap is None else "yes" if gap.significant else "no"
        lines.append([*cells, p_text(gap.p_corrected), verdict])
    return headers, lines


def overall_table(overall: dict[str, Sequence[ResultRow]]) -> Lines:
    """Figures over all images: a row for each metric, a column for each model."""
    metrics = list(dict.fromkeys(row.metric for rows in overall.values() for row in rows))
    lines = []
    for metric in metrics:
        found = [next((row for row in rows if row.metric == metric), None) for rows in overall.values()]
        images = next(row.n for row in found if row is not None)
        cells = [f"{value_text(row)} {interval_text(row)}" if row is not None else "" for row in found]
        lines.append([metric_name(metric), f"{images:,}", *cells])
    return ["over all images", "images", *(overall if len(overall) > 1 else ["value"])], lines


def concept_table(models: Sequence[str], concepts: Sequence[Concept], most: int) -> Lines:
    """The concepts with the largest gaps of the first model; of further models the gap alone."""
    of = {(row.model, row.concept): row for row in concepts}
    first = sorted((row for row in concepts if row.model == models[0]), key=lambda row: -abs(row.gap))[:most]
    if not first:
        return [], []
    headers = ["object", "images", f"{first[0].low_group} (n)", f"{first[0].high_group} (n)"]
    headers += ["gap, points"] if len(models) == 1 else models
    lines = []
    for row in first:
        cells = [row.concept, f"{row.images:,}", tied(f"{share(row.low_value, 0)} ({row.low_images:,})")]
        cells += [tied(f"{share(row.high_value, 0)} ({row.high_images:,})")]
        for model in models:
            one = of.get((model, row.concept))
            cells.append(estimate(one.gap, one.ci_low, one.ci_high, 0, signed=True) if one else "")
        lines.append(cells)
    return headers, lines


def odds_table(models: Sequence[str], odds: Sequence[Odds], most: int) -> Lines:
    """How far groups differ in true and false positives: the largest of each axis first, then classes by their gap."""
    known = [row for row in odds if row.gap is not None]
    rows = sorted(known, key=lambda row: (row.class_name is not None, row.class_name is not None and -(row.gap or 0)))
    several = len(models) > 1
    headers = [*["model"] * several, "groups of", "measure", "class", "best", "worst", "gap, points"]
    lines = []
    for row in rows[:most]:
        cells = [*[row.model] * several, row.axis, row.measure, row.class_name or "largest of all"]
        lines.append([*cells, row.best or "", row.worst or "", estimate(row.gap, row.gap_low, row.gap_high)])
    return headers, lines


def change_table(page: FairnessPage, changes: Sequence[ModelGap]) -> Lines:
    """How gaps change from the baseline to each other model."""
    measures = len({row.metric for row in changes}) > 1
    headers = ["model", "groups of", *["measure"] * measures, f"gap of {changes[0].baseline}", "gap, points"]
    headers += ["change, points", "verdict"]
    lines = []
    for row in changes:
        digits = digits_for([row.gap_before, row.gap_after])
        verdict = "smaller gap" if row.high < 0 else "larger gap" if row.low > 0 else "within chance"
        cells = [row.model, row.axis, *[measure_name(page.protocol, row.metric)] * measures]
        cells += [points(row.gap_before, digits), points(row.gap_after, digits)]
        lines.append([*cells, estimate(row.change, row.low, row.high, digits, signed=True), verdict])
    return headers, lines
