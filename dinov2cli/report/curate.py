"""The report of `curate`: the figures in words, and the images behind them."""

import numpy as np
import pyarrow as pa

from dinov2cli.curation.tables import Curated
from dinov2cli.data.source import ImageSource
from dinov2cli.report.grids import samples_per_cluster
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import cluster_sizes
from dinov2cli.report.thumbnails import spread, thumbnails

_CLUSTERS = 8
_PER_CLUSTER = 8


def curate_report(found: Curated, images: ImageSource, *, title: str, figures: bool = True) -> str:
    """The page of a curate run as HTML text; `images` are the images behind the pool, row by row."""
    total = found.kept.num_rows + found.dropped.num_rows
    kept = found.kept.num_rows
    report = Report(title, lead=f"{kept:,} of {total:,} images chosen.")
    tiles = [Tile("images", f"{total:,}"), Tile("chosen", f"{kept:,}", f"{kept / max(1, total):.1%} of the images")]
    before, after = found.summary.get("evenness_before"), found.summary.get("evenness_after")
    if before is not None and after is not None:
        tiles.append(Tile("evenness over clusters", f"{after:.2f}", f"was {before:.2f}; 1 is all equal"))
    report.summary(found.messages, tiles=tiles)
    column = _cluster_column(found.kept)
    if column is None:
        if figures and kept:
            sample = thumbnails(images, spread(found.rows.tolist(), 4 * _PER_CLUSTER))
            rows = [("", sample[i : i + _PER_CLUSTER]) for i in range(0, len(sample), _PER_CLUSTER)]
            if rows:
                report.section("Chosen images").figure(samples_per_cluster(rows), "An even sample of what was chosen.")
        return report.html()
    labels = _labels(found.kept, column)
    sizes = np.unique(labels[labels >= 0], return_counts=True)[1]
    if len(sizes):
        report.section("Chosen images per cluster").figure(cluster_sizes(sizes))
    clusters = cluster_samples(labels, found.rows, images) if figures else []
    if clusters:
        report.section(
            "Samples per cluster",
            "Each row is one cluster, from the largest to the smallest. Rows that mix subjects mean that the features "
            "do not tell them apart yet.",
        ).figure(samples_per_cluster(clusters))
    return report.html()


def cluster_samples_of(kept: pa.Table, images: ImageSource) -> list[tuple[str, list[np.ndarray]]]:
    """Title and some images of a spread of clusters of a selection; [] when it has none. `images` are found by id."""
    column = _cluster_column(kept)
    if column is None:
        return []
    row_of = {name: row for row, name in enumerate(images.ids)}
    rows = np.array([row_of[name] for name in kept.column("id").to_pylist()], dtype=np.int64)
    return cluster_samples(_labels(kept, column), rows, images)


def _cluster_column(kept: pa.Table) -> str | None:
    return next((name for name in ("cluster_top", "cluster") if name in kept.column_names), None)


def _labels(kept: pa.Table, column: str) -> np.ndarray:
    return np.array([-1 if label is None else int(label) for label in kept.column(column).to_pylist()], dtype=np.int64)


def cluster_samples(
    labels: np.ndarray,
    rows: np.ndarray,
    images: ImageSource,
    *,
    clusters: int = _CLUSTERS,
    per_cluster: int = _PER_CLUSTER,
) -> list[tuple[str, list[np.ndarray]]]:
    """Title and some images of a spread of clusters, largest first; `labels` [K] (negative = none) of `rows` [K]."""
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = names[np.argsort(-counts, kind="stable")].tolist()
    found = []
    for name in spread(order, clusters):
        members = rows[labels == name].tolist()
        sample = thumbnails(images, spread(members, per_cluster), size=180)
        if sample:
            word = "image" if len(members) == 1 else "images"
            found.append((f"cluster {name}: {len(members):,} {word} chosen", sample))
    return found
