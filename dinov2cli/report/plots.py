"""Charts as SVG text, drawn with matplotlib (imported on first use, no display, no global state)."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2cli.report.canvas import INCHES, heading, new_figure, svg
from dinov2cli.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_NAMES = {
    "loss/total": "Total loss",
    "loss/dino_local": "DINO, local crops",
    "loss/dino_global": "DINO, global crops",
    "loss/ibot": "iBOT, masked patches",
    "loss/koleo": "KoLeo, spread of features",
    "loss/feature": "Features of the teacher",
    "loss/gram": "Gram, patch similarities",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
}
_LINES = ("accent", "warm", "good", "bad", "muted")
_SMOOTH_FROM = 60  # points; shorter curves are shown as they are
_POINTS = 3000  # more than a chart has pixels; longer curves are averaged in groups

# (value, low, high)
Estimate = tuple[float, float, float]


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian average of a curve [n], width a fortieth of its length; centred, so that it does not lag behind."""
    width = len(values) / 40
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # Dividing by the weight that lies inside keeps the ends unbiased by what is missing beyond them.
    inside = np.convolve(np.ones(len(values)), kernel)[reach:-reach]
    return np.convolve(values, kernel)[reach:-reach] / inside


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric, averaged in groups of neighbours where there are very many."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    if len(table) > _POINTS:
        starts = np.linspace(0, len(table), _POINTS, endpoint=False).astype(int)
        table = np.add.reduceat(table, starts) / np.diff([*starts, len(table)])[:, None]
    return table[:, 0], table[:, 1]


def loss_curves(
    rows: Sequence[Mapping[str, Any]], *, keys: Sequence[str] | None = None, students: Sequence[str] = ()
) -> str:
    """One small chart per metric of `metrics.jsonl` over the steps: the loss and its terms, learning rate, gradients.

    `keys` picks metrics, else every `loss/…` present, then `lr` and `grad_norm`. Of several `students` a chart shows
    what each has of a metric (`NAME/KEY`), one line for each, else what they share. Long curves get an average over
    the raw line. Raises ValueError if no row has any of them.
    """
    if keys is None:
        terms = {plain_key(key, students) for row in rows for key in row}
        terms = {key for key in terms if key.startswith("loss/")}
        known = [key for key in LOSS_NAMES if key in terms]
        keys = [*known, *sorted(terms - set(known)), "lr", "grad_norm"]
    charts = [(key, _lines(rows, key, students)) for key in keys]
    charts = [(key, lines) for key, lines in charts if lines]
    if not charts:
        raise ValueError(f"no finite value of {', '.join(keys)} in {len(rows)} rows of metrics")
    columns = 4 if len(charts) in (4, 7, 8) else min(3, len(charts))
    height = math.ceil(len(charts) / columns)
    figure, axes = new_figure(height, columns, (1.7 if columns == 4 else 2.0) * height, INCHES * min(1, columns / 3))
    for axis, (key, lines) in zip(axes, charts, strict=False):
        for number, (steps, values) in lines.items():
            _draw_line(axis, steps, values, None if number is None else _LINES[number % len(_LINES)], raw=key == "lr")
        heading(axis, LOSS_NAMES.get(key, key))
        axis.margins(x=0.01)
        axis.locator_params(axis="both", nbins=4)
        if key == "lr":
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in axes[len(charts) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(charts) - columns) : len(charts)]:
        axis.set_xlabel("step", fontsize=9, color=LIGHT["muted"])
    if students:
        _name_lines(figure, axes[0], students)
    return svg(figure)


def plain_key(key: str, students: Sequence[str]) -> str:
    """A metric without the name of one of these students in front of it."""
    return next((key.removeprefix(f"{name}/") for name in students if key.startswith(f"{name}/")), key)


def _lines(
    rows: Sequence[Mapping[str, Any]], key: str, students: Sequence[str]
) -> dict[int | None, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of a metric by the number of the student; None: of no one in particular."""
    own = {number: _series(rows, f"{name}/{key}") for number, name in enumerate(students)}
    found: dict[int | None, tuple[np.ndarray, np.ndarray]] = {n: line for n, line in own.items() if len(line[1])}
    if not found and len((line := _series(rows, key))[1]):
        found[None] = line
    return found


def _draw_line(axis: "Axes", steps: np.ndarray, values: np.ndarray, name: str | None, *, raw: bool) -> None:
    """One curve; a long one as its average over the raw line. Several in a chart have a colour each."""
    long = len(values) >= _SMOOTH_FROM and not raw
    # One point makes no line: a run that has just begun shows it as a dot.
    marker = "o" if len(values) == 1 else ""
    colour = LIGHT["soft" if long and name is None else name or "accent"]
    alpha = 0.35 if long and name is not None else None
    axis.plot(steps, values, color=colour, linewidth=0.8 if long else 1.6, marker=marker, markersize=4, alpha=alpha)
    if long:
        axis.plot(steps, smooth(values), color=LIGHT[name or "accent"], linewidth=1.6)


def _name_lines(figure: "Figure", axis: "Axes", students: Sequence[str]) -> None:
    """Say which colour is whose."""
    for number, name in enumerate(students):
        axis.plot([], [], color=LIGHT[_LINES[number % len(_LINES)]], linewidth=1.6, label=name)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(students),
        frameon=False,
        fontsize=9,
        labelcolor=LIGHT["ink"],
        handlelength=1.4,
    )


def comparison_bars(
    names: Sequence[str], series: Mapping[str, Sequence[Estimate]], *, chance: Sequence[float] | None = None
) -> str:
    """Horizontal bars of fractions, in per cent, with confidence intervals: one group per name, one bar per series.

    `series` maps a label ("before training") to one (value, low, high) per name, the last series being the subject;
    `chance` marks the accuracy of guessing for each name. Raises ValueError if the lengths differ.
    """
    if any(len(values) != len(names) for values in series.values()) or (chance and len(chance) != len(names)):
        raise ValueError(f"every series needs one estimate for each of the {len(names)} names")
    count = len(series)
    thick = 0.8 / count
    colours = [LIGHT["soft"]] * (count - 1) + [LIGHT["accent"]]
    figure, (axis,) = new_figure(1, 1, 0.75 + 0.27 * len(names) * (count + 0.6))
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color=LIGHT["rule"], linewidth=0.7)
    for index, (label, values) in enumerate(series.items()):
        where = np.arange(len(names)) + (index - (count - 1) / 2) * thick
        value, low, high = (100 * np.array([estimate[i] for estimate in values]) for i in range(3))
        axis.barh(where, value, height=thick * 0.86, color=colours[index], label=label)
        errors = np.maximum(0, [value - low, high - value])
        axis.errorbar(value, where, xerr=errors, fmt="none", ecolor=LIGHT["ink"], elinewidth=1.1, capsize=2.5)
        for at, number, end in zip(where, value, high, strict=True):
            axis.text(end + 1.2, at, f"{number:.1f} %", va="center", fontsize=9, color=LIGHT["ink"])
    if chance:
        for at, guess in enumerate(chance):
            axis.plot([100 * guess] * 2, [at - 0.45, at + 0.45], color=LIGHT["warm"], linewidth=1.3, linestyle=":")
        axis.plot([], [], color=LIGHT["warm"], linewidth=1.3, linestyle=":", label="guessing")
    axis.set_yticks(range(len(names)), list(names), fontsize=10, color=LIGHT["ink"])
    axis.invert_yaxis()
    axis.set_xlim(0, 108)
    axis.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axis.spines["left"].set_visible(False)
    figure.legend(
        loc="outside upper left",
        ncols=count + bool(chance),
        frameon=False,
        fontsize=9,
        labelcolor=LIGHT["ink"],
        handlelength=1.4,
    )
    return svg(figure)


def cluster_sizes(sizes: Sequence[int] | np.ndarray, *, unit: str = "clusters") -> str:
    """Histogram of the numbers of images in clusters or groups, on a logarithmic axis where sizes differ widely."""
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(sizes, dtype=np.float64)
    values = values[values > 0]
    if not len(values):
        raise ValueError("there is no cluster with an image in it")
    low, high = values.min(), values.max()
    wide = high > 30 * low
    whole = np.arange(low, high + 2) - 0.5
    bins = np.geomspace(low, high * 1.001, 25) if wide else whole if len(whole) <= 41 else np.linspace(low, high, 31)
    figure, (axis,) = new_figure(1, 1, 2.3, 6.4)
    axis.hist(values, bins=bins.tolist(), color=LIGHT["accent"], rwidth=0.92)
    if wide:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    elif len(bins) <= 12:
        axis.set_xticks(np.arange(low, high + 1))
    axis.minorticks_off()
    axis.set_xlabel("images in it", fontsize=9, color=LIGHT["muted"])
    heading(axis, f"Number of {unit} by size: {len(values):,} {unit}, median {np.median(values):,.0f} images")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return svg(figure)


def similarity_histogram(
    counts: Sequence[int] | np.ndarray, edges: Sequence[float] | np.ndarray, threshold: float, gap: float | None = None
) -> str:
    """Counts [B] of cosines between edges [B + 1], on a logarithmic scale.

    What lies above the threshold has another colour, the `gap` a dotted line. ValueError where all counts are 0.
    """
    heights, bounds = np.asarray(counts), np.asarray(edges, dtype=np.float64)
    filled = np.flatnonzero(heights)
    if not len(filled):
        raise ValueError("there is no similarity to show")
    first = min(filled[0], int(np.searchsorted(bounds, threshold)) - 1)
    heights, bounds = heights[max(0, first) :], bounds[max(0, first) :]
    width = np.diff(bounds)
    figure, (axis,) = new_figure(1, 1, 2.4, 6.4)
    above = bounds[:-1] + width / 2 > threshold
    for chosen, colour in ((~above, LIGHT["soft"]), (above, LIGHT["accent"])):
        axis.bar(bounds[:-1][chosen], heights[chosen], width=width[chosen] * 0.92, align="edge", color=colour)
    axis.set_yscale("log")
    axis.set_ylim(0.7, max(heights.max() * 2, 2))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.minorticks_off()
    axis.axvline(threshold, color=LIGHT["warm"], linewidth=1.3)
    if gap is not None:
        axis.axvline(gap, color=LIGHT["muted"], linewidth=1.3, linestyle=":")
    axis.set_xlabel("cosine to the nearest other image", fontsize=9, color=LIGHT["muted"])
    total, over = heights.sum(), heights[above].sum()
    heading(axis, f"{over:,} of {total:,} ({over / total:.1%}) above {threshold:.2f}")
    return svg(figure)
