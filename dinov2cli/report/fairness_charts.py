"""Charts of rates by group, drawn with matplotlib: dots with intervals, crossed groups, a curve over income."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dinov2cli.report.canvas import INCHES, heading, new_figure, svg
from dinov2cli.report.fairness_data import CROSS, Group
from dinov2cli.report.fairness_text import digits_for, share
from dinov2cli.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("accent", "warm", "good", "bad", "muted")
_MARKERS = ("o", "s", "D", "^", "v")
_MANY = 16  # groups; more are drawn closer together
_NAME = 30  # characters of a name beside a chart
_MOST = 0.99  # of the way to 0 or 100 %, where the whole scale is shown
_DARKEST = 0.55  # a cell that ink is still read on


@dataclass(frozen=True)
class Panel:
    """One chart of a row of charts: its heading, rows by model and group, and by model the unknown images."""

    title: str
    rows: Mapping[str, Mapping[str, Group]]
    unknown: Mapping[str, Group]


def dot_chart(panels: Sequence[Panel], groups: Sequence[str]) -> str:
    """Rates of groups as dots with intervals: a line for each group, models beside each other, best first as given.

    Groups too small are grey and hollow; unknown images come last; `expected` is a dotted tick. Raises ValueError if
    there is nothing to draw.
    """
    if not panels or not groups:
        raise ValueError("there is no group to draw")
    models = list(panels[0].rows)
    last = any(panel.unknown for panel in panels)
    lines = len(groups) + last
    many = lines > _MANY
    step = (0.17 if many else 0.27) + (0.11 if many else 0.13) * (len(models) - 1)
    extra = 0.75 + 0.25 * (len(models) > 1 or _expects(panels))
    figure, axes = new_figure(1, len(panels), extra + step * lines)
    for axis, panel in zip(axes, panels, strict=True):
        _frame(axis, panel, lines)
        _dots(axis, panel, groups, models, small=5 if many else 6)
        heading(axis, panel.title)
        if axis is not axes[0]:
            axis.set_yticks([])
    _names(axes[0], panels[0], groups, last, 8 if many else 10)
    if len(panels) == 1:
        _beside(axes[0], panels[0], groups, models, 8 if many else 9)
    _legend(figure, axes[0], models, expected=_expects(panels))
    return svg(figure)


def _expects(panels: Sequence[Panel]) -> bool:
    return any(row.expected is not None for panel in panels for rows in panel.rows.values() for row in rows.values())


def _dots(axis: "Axes", panel: Panel, groups: Sequence[str], models: Sequence[str], *, small: float) -> None:
    count = len(models)
    for index, model in enumerate(models):
        shift = 0.0 if count == 1 else (index / (count - 1) - 0.5) * 0.56
        for line, name in enumerate(groups):
            row = panel.rows[model].get(name)
            if row is not None:
                _dot(axis, row, line + shift, index, small, marked=row.marked)
        if model in panel.unknown:
            _dot(axis, panel.unknown[model], len(groups) + shift, index, small, marked=False)
    if panel.unknown:
        axis.axhline(len(groups) - 0.5, color=LIGHT["rule"], linewidth=0.9)


def _dot(axis: "Axes", row: Group, at: float, index: int, size: float, *, marked: bool) -> None:
    if row.value is None:
        return
    whole = row.enough and row.known
    left, right = axis.get_xlim()
    colour = LIGHT[_COLOURS[index % len(_COLOURS)]] if whole else LIGHT["soft"]
    if row.ci_low is not None and row.ci_high is not None:
        ends = [100 * row.ci_low, 100 * row.ci_high]
        axis.plot(ends, [at, at], color=colour, linewidth=1.6, solid_capstyle="butt")
        # The scale follows the groups that are compared: an interval that it cuts ends in an arrow.
        for edge, sign in [(left, "<")] * bool(ends[0] < left) + [(right, ">")] * bool(ends[1] > right):
            axis.plot([edge], [at], marker=sign, markersize=4, color=colour, linestyle="", clip_on=False)
    if not left <= 100 * row.value <= right:
        return
    fill = colour if whole else LIGHT["paper"]
    marker = "*" if marked else _MARKERS[index % len(_MARKERS)]
    axis.plot(
        [100 * row.value],
        [at],
        marker=marker,
        markersize=size * 1.9 if marked else size,
        color=colour,
        markerfacecolor=fill,
        markeredgewidth=1.2,
        zorder=3,
        linestyle="",
        clip_on=False,
    )
    if row.expected is not None:
        axis.plot([100 * row.expected] * 2, [at - 0.3, at + 0.3], color=LIGHT["ink"], linewidth=1.4, linestyle=":")


def _frame(axis: "Axes", panel: Panel, lines: int) -> None:
    """The scale: all of the groups that are compared, and what is near of the others."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for groups in panel.rows.values() for row in groups.values()]
    compared = [row for row in rows if row.enough] or rows
    ends = [end for row in compared for end in (row.value, row.ci_low, row.ci_high, row.expected) if end is not None]
    low, high = (100 * min(ends), 100 * max(ends)) if ends else (0.0, 100.0)
    reach = high - low
    others = [100 * row.value for row in [*rows, *panel.unknown.values()] if row.value is not None]
    near = [value for value in others if low - reach <= value <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    room = max(0.06 * (high - low), 0.05)
    low = 0.0 if low < 0.25 * high else low - room
    axis.set_xlim(max(0.0, low) - 0.012 * (high - low), 100.3 if high > 100 * _MOST else high + room)
    axis.set_ylim(lines - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color=LIGHT["rule"], linewidth=0.7)
    axis.spines["left"].set_visible(False)
    grid = axis.get_gridspec()
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8 if grid is None or grid.ncols == 1 else 3, min_n_ticks=2))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")


def _names(axis: "Axes", panel: Panel, groups: Sequence[str], last: bool, size: int) -> None:
    rows: dict[str, Group] = {}
    for found in panel.rows.values():
        rows.update({name: row for name, row in found.items() if name not in rows})
    texts = [shortened(name) for name in [*groups, *(["unknown"] if last else [])]]
    axis.set_yticks(range(len(texts)), texts, fontsize=size, color=LIGHT["ink"])
    for label, name in zip(axis.get_yticklabels(), groups, strict=False):
        if name in rows and not rows[name].enough:
            label.set_color(LIGHT["muted"])
    if last:
        axis.get_yticklabels()[-1].set_color(LIGHT["muted"])


def shortened(name: str, most: int = _NAME) -> str:
    """A name that fits beside a chart; whole names are in the tables."""
    return (
        textwrap.shorten(name, most, placeholder=" …") if " " in name else name[: most - 1] + "…" * (len(name) >= most)
    )


def _beside(axis: "Axes", panel: Panel, groups: Sequence[str], models: Sequence[str], size: int) -> None:
    """At the right, how many images a group has, and of one model its rate."""
    first = panel.rows[models[0]]
    digits = digits_for([row.value for row in first.values()])
    lines = [(line, first.get(name)) for line, name in enumerate(groups)]
    lines += [(len(groups), panel.unknown.get(models[0]))]
    for line, row in lines:
        if row is None:
            continue
        note = f"n = {row.images:,}{'' if row.enough or not row.known else ', too few'}"
        rate = [share(row.value, digits)] if len(models) == 1 and row.value is not None else []
        colour = LIGHT["ink" if row.enough and row.known else "muted"]
        for place, text in enumerate([*rate, note]):
            axis.annotate(
                text,
                (1.0, line),
                (10 + 5 * size * place, 0),
                xycoords=axis.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                fontsize=size,
                color=colour,
            )


def _legend(figure: "Figure", axis: "Axes", models: Sequence[str], *, expected: bool) -> None:
    """Say which colour and mark is whose model, and what a dotted tick is."""
    if len(models) < 2 and not expected:
        return
    if len(models) > 1:
        for index, name in enumerate(models):
            marker, colour = _MARKERS[index % len(_MARKERS)], LIGHT[_COLOURS[index % len(_COLOURS)]]
            axis.plot([], [], marker=marker, color=colour, linewidth=1.6, markersize=6, label=shortened(name, 40))
    if expected:
        axis.plot([], [], color=LIGHT["ink"], linewidth=1.4, linestyle=":", label="what chance gives")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        frameon=False,
        fontsize=9,
        labelcolor=LIGHT["ink"],
        handlelength=1.6,
    )


def crossed_table(rows: Mapping[str, Mapping[str, Group]], *, one_scale: bool = True) -> str | None:
    """Rates of crossed groups as tables of coloured cells with numbers and n: one for each model, or each metric.

    The more colour a cell has, the higher its rate, on `one_scale` for all tables or each on its own; groups too small
    have none. None if no group is large enough, or a table would be too large.
    """
    names = list(dict.fromkeys(name for groups in rows.values() for name in groups))
    pairs = [name.split(CROSS) for name in names]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return None
    down, across = ([*dict.fromkeys(pair[i] for pair in pairs)] for i in range(2))
    if not any(row.enough for groups in rows.values() for row in groups.values()) or len(across) > 8 or len(down) > 24:
        return None
    everyone = [row for groups in rows.values() for row in groups.values()]
    columns = min(len(rows), 4 if len(across) <= 2 else 3 if len(across) <= 4 else 1)
    lines = math.ceil(len(rows) / columns)
    width = INCHES * min(1.0, (0.22 + 0.1 * len(across)) * columns + 0.05)
    figure, axes = new_figure(lines, columns, lines * (0.65 + 0.42 * len(down)), width)
    for axis, (model, groups) in zip(axes, rows.items(), strict=False):
        _cells(axis, groups, down, across, _scale(everyone if one_scale else list(groups.values())))
        if len(rows) > 1:
            heading(axis, shortened(model, 34))
        shown = axis is axes[0] or columns == 1
        axis.set_yticks(range(len(down)), [shortened(name) for name in down] if shown else [""] * len(down), fontsize=9)
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    return svg(figure)


def _scale(rows: Sequence[Group]) -> tuple[float, float]:
    values = [row.value for row in rows if row.enough and row.value is not None]
    return (min(values), max(values)) if values else (0.0, 1.0)


def _cells(
    axis: "Axes",
    groups: Mapping[str, Group],
    down: Sequence[str],
    across: Sequence[str],
    scale: tuple[float, float],
) -> None:
    from matplotlib.patches import Rectangle

    digits = digits_for([row.value for row in groups.values()])
    for line, first in enumerate(down):
        for column, second in enumerate(across):
            row = groups.get(f"{first}{CROSS}{second}")
            if row is None or row.value is None:
                axis.text(column, line, "–", ha="center", va="center", fontsize=9, color=LIGHT["muted"])
                continue
            place = (column - 0.48, line - 0.46)
            if row.enough:
                share_of_scale = (row.value - scale[0]) / max(scale[1] - scale[0], 1e-9)
                alpha = 0.06 + (_DARKEST - 0.06) * share_of_scale
                axis.add_patch(Rectangle(place, 0.96, 0.92, facecolor=LIGHT["accent"], alpha=alpha, linewidth=0))
            else:
                axis.add_patch(Rectangle(place, 0.96, 0.92, facecolor="none", edgecolor=LIGHT["rule"], linewidth=0.9))
            colour = LIGHT["ink" if row.enough else "muted"]
            axis.text(column, line - 0.14, share(row.value, digits), ha="center", va="center", fontsize=9, color=colour)
            few = "" if row.enough else ", too few"
            note = f"n = {row.images:,}{few}"
            axis.text(column, line + 0.23, note, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xlim(-0.5, len(across) - 0.5)
    axis.set_ylim(len(down) - 0.5, -0.5)
    axis.grid(visible=False)
    axis.set_xticks(range(len(across)), [shortened(name, 16) for name in across], fontsize=9)
    axis.tick_params(axis="x", labeltop=True, labelbottom=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def income_curve(curves: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """Share recognised over income on a logarithmic axis, with a band: by model points (income, value, low, high)."""
    if not any(curves.values()):
        raise ValueError("there is no point of a curve")
    figure, (axis,) = new_figure(1, 1, 3.1 + 0.25 * (len(curves) > 1))
    for index, points in enumerate(curves.values()):
        income, value, low, high = np.array(sorted(points), dtype=np.float64).reshape(-1, 4).T
        colour = LIGHT[_COLOURS[index % len(_COLOURS)]]
        axis.fill_between(income, 100 * low, 100 * high, color=colour, alpha=0.16, linewidth=0)
        axis.plot(income, 100 * value, color=colour, linewidth=1.8)
        every = max(1, len(income) // 8)
        if len(curves) > 1:
            axis.plot(income, 100 * value, color=colour, linestyle="", marker=_MARKERS[index % 5], markevery=every)
    axis.set_xscale("log")
    axis.minorticks_off()
    least, most = (math.log10(edge) for edge in axis.get_xlim())
    ticks = [m * 10.0**e for e in range(math.floor(least), math.ceil(most) + 1) for m in (1, 2, 5)]
    axis.set_xticks([tick for tick in ticks if least <= math.log10(tick) <= most])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.margins(x=0.01)
    low_end, high_end = axis.get_ylim()
    axis.set_ylim(max(0.0, low_end), min(100.5, high_end))
    axis.set_xlabel("income, logarithmic scale, in the unit of the data", fontsize=9, color=LIGHT["muted"])
    heading(axis, "Objects recognised")
    _legend(figure, axis, list(curves), expected=False)
    return svg(figure)
