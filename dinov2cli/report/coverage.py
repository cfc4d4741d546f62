"""Charts of how evenly a choice covers its pool, before and after."""

from collections.abc import Sequence

import numpy as np

from dinov2cli.curation.coverage import Coverage, Share
from dinov2cli.report.canvas import heading, new_figure, svg
from dinov2cli.report.palette import LIGHT

_BEFORE, _AFTER = "all images", "chosen"


def cluster_shares(found: Coverage) -> str:
    """Share of the images in each cluster, the pool's largest cluster first: what was there, and what was chosen."""
    before, after = (counts / max(1, counts.sum()) for counts in found.counts)
    order = np.argsort(-before, kind="stable")
    where = np.arange(1, len(order) + 1)
    figure, (axis,) = new_figure(1, 1, 2.6)
    axis.bar(where, 100 * before[order], width=1.0, color=LIGHT["soft"], label=_BEFORE)
    axis.step(where, 100 * after[order], where="mid", color=LIGHT["accent"], linewidth=1.3, label=_AFTER)
    axis.axhline(100 / len(order), color=LIGHT["warm"], linewidth=1.1, linestyle=":", label="all equal")
    axis.set_xlim(0.5, len(order) + 0.5)
    axis.set_xlabel("clusters, the largest of the pool first", fontsize=9, color=LIGHT["muted"])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.locator_params(axis="y", nbins=5)
    heading(axis, f"Share of the images in each of {found.clusters:,} clusters")
    figure.legend(frameon=False, fontsize=9, labelcolor=LIGHT["ink"], loc="outside lower left", ncols=3)
    return svg(figure)


def share_bars(shares: Sequence[Share], title: str) -> str:
    """Two bars per name: its share before and after, in per cent. Raises ValueError for none."""
    if not shares:
        raise ValueError("there is no share to show")
    figure, (axis,) = new_figure(1, 1, 1.1 + 0.42 * len(shares))
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color=LIGHT["rule"], linewidth=0.7)
    where = np.arange(len(shares))
    top = 1.0
    for name, offset, colour in ((_BEFORE, -0.19, "soft"), (_AFTER, 0.19, "accent")):
        values = 100 * np.array([share.before if name == _BEFORE else share.after for share in shares])
        top = max(top, float(values.max()))
        axis.barh(where + offset, values, height=0.34, color=LIGHT[colour], label=name)
        for at, value in zip(where + offset, values, strict=True):
            axis.annotate(
                f"{value:.1f} %",
                (value, at),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=LIGHT["ink"],
            )
    axis.set_yticks(where, [_short(share.name) for share in shares], fontsize=9, color=LIGHT["ink"])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * top)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.spines["left"].set_visible(False)
    heading(axis, title)
    figure.legend(frameon=False, fontsize=9, labelcolor=LIGHT["ink"], loc="outside lower left", ncols=2)
    return svg(figure)


def _short(name: str, room: int = 34) -> str:
    """The end of a long name, which for a path says most."""
    return name if len(name) <= room else "…" + name[-(room - 1) :]
