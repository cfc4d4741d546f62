"""The report of `dinov2 demo`: what training changed, in figures and in pictures, from plain arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2cli.evaluation.intervals import Difference
from dinov2cli.report.grids import DuplicatePair, Neighbour, duplicate_pairs, knn_neighbours, samples_per_cluster
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.pca import pca_maps
from dinov2cli.report.plots import Estimate, comparison_bars, loss_curves
from dinov2cli.report.results import percent, with_interval

BEFORE, AFTER = "before training", "after training"
_RESULTS = (
    "The same images, the same classifier; only the backbone differs: random weights, or trained without any label."
)
_TRAINING = (
    "The loss of self-supervised training need not fall to mean progress, for teacher and task change with the "
    "student; the table above is what counts."
)
_NEIGHBOURS = (
    "Each row is a test image the model never saw, then the training images it finds most similar. A tick marks one "
    "of the same class."
)
_PATCHES = (
    "The three main directions in which patch features differ, as red, green and blue, over all images shown. Patches "
    "of one colour look alike to the model."
)


@dataclass(frozen=True)
class Comparison:
    """One benchmark before and after training on the same test images.

    name: 'k-NN accuracy on held-out tiles'. before, after: (value, low, high), fractions. change: the paired
    difference. n: test images. chance: accuracy of guessing.
    """

    name: str
    before: Estimate
    after: Estimate
    change: Difference
    n: int
    chance: float | None = None


def points(fraction: float) -> str:
    """A difference of fractions in signed percentage points, '+21.8'."""
    return f"{100 * fraction:+.1f}"


def change_sentence(comparison: Comparison) -> str:
    """Say in one sentence whether and by how much the benchmark changed, and whether chance explains it."""
    change = comparison.change
    moved = f"from {with_interval(*comparison.before)} to {with_interval(*comparison.after)}"
    size = f"{points(change.value)} points, interval {points(change.low)} to {points(change.high)}"
    if not change.significant:
        return f"{comparison.name} went {moved} ({size}): the interval holds zero, so this may be chance."
    verb = "rose" if change.value > 0 else "fell"
    return f"{comparison.name} {verb} {moved}: {size}, outside the confidence interval."


def demo_report(
    *,
    title: str,
    lead: str,
    comparisons: Sequence[Comparison],
    metrics: Sequence[Mapping[str, Any]],
    pairs: Sequence[DuplicatePair] = (),
    duplicates: str = "",
    clusters: Sequence[tuple[str, Sequence[np.ndarray]]] = (),
    curation: str = "",
    neighbours: Mapping[str, Sequence[tuple[np.ndarray, str, Sequence[Neighbour]]]] | None = None,
    pca_images: Sequence[np.ndarray] = (),
    pca_tokens: Mapping[str, np.ndarray] | None = None,
    sentences: Sequence[str] = (),
    settings: Mapping[str, object] | None = None,
    footer: str = "",
) -> Report:
    """Build the page; parts without data are left out.

    comparisons: benchmarks before and after. metrics: rows of `metrics.jsonl`. pairs, duplicates: duplicate pairs, and
    a sentence on how many were found. clusters, curation: (title, images) per cluster, and a sentence. neighbours: for
    each label ("after training") its rows for `knn_neighbours`. pca_images, pca_tokens: images, and per label their
    patch tokens [M, h, w, D]. sentences: more for the summary. settings: what was run, as a table at the end.
    """
    report = Report(title, lead=lead)
    tiles = [
        Tile(c.name, percent(c.after[0]), f"was {percent(c.before[0])}: {points(c.change.value)} points")
        for c in comparisons
    ]
    report.summary([*map(change_sentence, comparisons), *sentences], tiles=tiles)
    if comparisons:
        _results(report, comparisons)
    if metrics:
        report.section("Training", _TRAINING)
        report.figure(loss_curves(metrics), "Each chart is one term over the training steps.")
    explained = _NEIGHBOURS
    for label, rows in (neighbours or {}).items():
        if rows:
            report.section(f"Nearest neighbours {label}", explained).figure(knn_neighbours(rows))
            explained = ""
    if pca_tokens and len(pca_images):
        report.section("What the patches see", _PATCHES)
        report.figure(pca_maps(pca_images, pca_tokens), "Colours compare within a column, not between columns.")
    if pairs:
        report.section("Duplicates removed", duplicates)
        report.figure(duplicate_pairs(pairs), "The image kept, beside the copy dropped.")
    if clusters:
        report.section("Balanced choice of images", curation)
        report.figure(samples_per_cluster(clusters), "One row per cluster.")
    if settings:
        report.section("How it was made").table(["setting", "value"], [[k, str(v)] for k, v in settings.items()])
    return report.footer(footer) if footer else report


def _results(report: Report, comparisons: Sequence[Comparison]) -> None:
    report.section("Before and after training", _RESULTS)
    chance = [c.chance for c in comparisons]
    bars = {BEFORE: [c.before for c in comparisons], AFTER: [c.after for c in comparisons]}
    known = [guess for guess in chance if guess is not None]
    report.figure(
        comparison_bars([c.name for c in comparisons], bars, chance=known if len(known) == len(chance) else None),
        "Whiskers are 95 % confidence intervals over the test images.",
    )
    report.table(
        ["benchmark", BEFORE, AFTER, "change in points", "test images"],
        [
            [
                c.name,
                with_interval(*c.before),
                with_interval(*c.after),
                f"{points(c.change.value)} [{points(c.change.low)}, {points(c.change.high)}]",
                f"{c.n:,}",
            ]
            for c in comparisons
        ],
        caption="Brackets hold 95 % intervals; that of the change comes from a paired bootstrap over the test images.",
    )
