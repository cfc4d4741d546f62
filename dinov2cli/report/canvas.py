"""What all charts share: an empty figure in the page's style, and its text as SVG. Imports matplotlib on first use."""

import io
from typing import TYPE_CHECKING, Any

from dinov2cli.report.palette import LIGHT, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = 9.4  # figure width; the page shows 72 points an inch, so about 900 CSS pixels


def new_figure(rows: int, columns: int, height: float, width: float = INCHES) -> "tuple[Figure, list[Axes]]":
    """An empty figure with plain axes: no box, light horizontal rules."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(LIGHT["rule"])
        axis.tick_params(colors=LIGHT["muted"], labelsize=9, length=0)
        axis.grid(axis="y", color=LIGHT["rule"], linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def heading(axis: "Axes", text: str) -> None:
    """Write a heading over the left end of a chart."""
    axis.set_title(text, loc="left", fontsize=10, color=LIGHT["ink"], pad=6)


def svg(figure: "Figure") -> str:
    """The figure as themed SVG text, the same bytes for the same data."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "dinov2", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return themed(text[text.index("<svg") :])
