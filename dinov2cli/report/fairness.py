"""The page about differences between groups: the answer first, then charts and tables, limits and the protocol."""

from dinov2cli.report.fairness_data import FairnessPage, Gap, is_main, is_same_attribute
from dinov2cli.report.fairness_parts import (
    axis_section,
    change_section,
    concept_section,
    income_section,
    odds_section,
    picture_section,
    protocol_section,
)
from dinov2cli.report.fairness_tables import gap_table, overall_table
from dinov2cli.report.fairness_text import answers, digits_for, metric_title, points, share, span, tied
from dinov2cli.report.fairness_words import TITLES, licence, limits, question, reading
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.results import interval_text, metric_name, value_text

__all__ = ["FairnessPage", "fairness_report"]

_TILES = 4
_COMPARISONS = 60


def fairness_report(page: FairnessPage) -> str:
    """The page as HTML text.

    Raises ValueError if a table lacks a column (`rows_of`).
    """
    report = Report(TITLES.get(page.protocol, TITLES["audit"]), lead=_lead(page))
    report.text(question(page.protocol))
    report.summary([tied(sentence) for sentence in answers(page)], tiles=_tiles(page))
    if sum(len(rows) for rows in page.overall.values()) > 1:
        report.table(*overall_table(dict(page.overall)))
    if page.notes:
        report.section("About this data").summary(list(page.notes))
    report.section("How to read what follows", reading(page))
    for axis in page.axis_names():
        axis_section(report, page, axis)
    income_section(report, page)
    concept_section(report, page)
    odds_section(report, page)
    change_section(report, page)
    _comparisons(report, page)
    picture_section(report, page)
    report.section("What these figures do not say").summary(limits(page.protocol))
    report.section("Licence of the data and consent", licence(page.protocol))
    protocol_section(report, page)
    return report.html()


def _lead(page: FairnessPage) -> str:
    models = page.models[0] if len(page.models) == 1 else f"{len(page.models)} models"
    images = max((row.n for rows in page.overall.values() for row in rows), default=0)
    return f"{models} on {page.dataset}{f': {images:,} images' if images else ''}."


def _tiles(page: FairnessPage) -> list[Tile]:
    """The figure over all images and the first gaps; of several models one tile each."""
    gaps = [gap for gap in page.gaps if gap.gap is not None and is_main(gap.metric)]
    gaps.sort(key=lambda gap: not gap.significant)
    if len(page.models) > 1:
        # The same comparison for all models: the first in which any of them has a gap.
        family = gaps[0] if gaps else None
        return [_model_tile(page, model, family) for model in page.models][: 2 * _TILES]
    tiles = []
    for rows in page.overall.values():
        if rows:
            note = tied(f"{metric_name(rows[0].metric)}, {interval_text(rows[0])}")
            tiles.append(Tile("All images", value_text(rows[0]), note))
    return [*tiles, *(_gap_tile(page.protocol, gap) for gap in gaps)][:_TILES]


def _gap_tile(protocol: str, gap: Gap) -> Tile:
    digits = digits_for([gap.worst_value, gap.best_value])
    note = f"{span(gap.gap_low, gap.gap_high, digits)}, {_verdict(gap)}. {gap.worst} {share(gap.worst_value, digits)}, "
    note += f"{gap.best} {share(gap.best_value, digits)}"
    return Tile(_gap_name(protocol, gap), f"{points(gap.gap, digits)} points", tied(note))


def _gap_name(protocol: str, gap: Gap) -> str:
    return f"Gap by {gap.axis}" + ("" if protocol == "geo" else f", {metric_title(protocol, gap.metric)}")


def _verdict(gap: Gap) -> str:
    return "beyond chance" if gap.significant else "within chance"


def _model_tile(page: FairnessPage, model: str, family: Gap | None) -> Tile:
    rows = page.overall.get(model) or ()
    value = value_text(rows[0]) if rows else "–"
    note = f"{metric_name(rows[0].metric)}, {interval_text(rows[0])}. " if rows else ""
    gap = page.gap(model, family.axis, family.metric) if family else None
    if gap is not None and gap.gap is not None:
        digits = digits_for([gap.worst_value, gap.best_value])
        note += f"{_gap_name(page.protocol, gap)}: {points(gap.gap, digits)} points, {_verdict(gap)}"
    return Tile(model, value, tied(note))


def _comparisons(report: Report, page: FairnessPage) -> None:
    gaps = [gap for gap in page.gaps if not is_same_attribute(gap.metric)]
    if not gaps:
        return
    if len(gaps) > _COMPARISONS:
        gaps = sorted(gaps, key=lambda gap: (not is_main(gap.metric), not gap.significant, -(gap.gap or 0)))
    shown = f"The first {_COMPARISONS} of {len(gaps)}." if len(gaps) > _COMPARISONS else ""
    report.section("All comparisons", shown)
    report.table(
        *gap_table(page, gaps[:_COMPARISONS]),
        caption="Best and worst: of the groups that are compared; where neither way is better, highest and lowest.",
    )
