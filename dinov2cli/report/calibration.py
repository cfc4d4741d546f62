"""The part of the report of `dedup` that shows how thresholds were measured."""

import numpy as np

from dinov2cli.curation.calibrate import Calibration
from dinov2cli.curation.calibrate_tiers import TierCalibration
from dinov2cli.report.canvas import new_figure, svg
from dinov2cli.report.html import Report
from dinov2cli.report.palette import LIGHT


def calibration_section(report: Report, calibration: Calibration) -> None:
    """Add what was measured: a sentence and a chart per threshold, and the copies found by kind of edit."""
    report.section(
        "Calibration",
        f"{calibration.images:,} different images of yours were compared with each other, and altered copies of "
        f"{calibration.copied:,} of them with their originals. The thresholds aim at a share of "
        f"{calibration.target:.2%} of {calibration.pool:,} images joined to a different one.",
    )
    tiers = list(calibration.tiers.values())
    for tier in tiers:
        report.text(tier.reason)
        report.figure(separation(tier), "Pairs of different images, and copies with their originals.")
    kinds = sorted({kind for tier in tiers for kind in tier.recall})
    rows = [[kind, *(_share(tier.recall.get(kind)) for tier in tiers)] for kind in kinds]
    report.table(
        ["edit", *(f"found by {tier.tier}" for tier in tiers)],
        [*rows, ["mean", *(_share(tier.mean_recall) for tier in tiers)]],
        caption="Share of the altered copies above the threshold; the mean is over the kinds a comparison can see.",
    )


def separation(tier: TierCalibration) -> str:
    """Shares of pairs of different images and of copies by score, on a logarithmic scale, with the threshold."""
    figure, (axis,) = new_figure(1, 1, 2.4, 6.4)
    for name, colour, histogram in (
        ("different images", LIGHT["soft"], tier.negatives),
        ("copies", LIGHT["accent"], tier.positives),
    ):
        edges, counts = np.asarray(histogram.edges), np.asarray(histogram.counts, dtype=np.float64)
        if counts.sum():
            axis.stairs(counts / counts.sum(), edges, fill=name == "copies", color=colour, alpha=0.8, label=name)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.axvline(tier.threshold, color=LIGHT["warm"], linewidth=1.3)
    axis.set_xlabel(tier.unit, fontsize=9, color=LIGHT["muted"])
    axis.legend(frameon=False, fontsize=9, labelcolor=LIGHT["ink"])
    return svg(figure)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
