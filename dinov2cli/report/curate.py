"""The report of `curate`: the figures in words, and the images behind them."""

import numpy as np
import pyarrow as pa

from dinov2cli.curation.coverage import Balance, Coverage
from dinov2cli.curation.tables import Curated
from dinov2cli.data.source import ImageSource
from dinov2cli.report.coverage import cluster_shares, share_bars
from dinov2cli.report.grids import samples_per_cluster
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import cluster_sizes
from dinov2cli.report.query_sets import Opened, add_examples, add_query_sets
from dinov2cli.report.thumbnails import spread, thumbnails

_CLUSTERS = 8
_PER_CLUSTER = 8


def curate_report(
    found: Curated,
    images: ImageSource | None,
    *,
    title: str,
    coverage: Coverage | None = None,
    queries: Opened | None = None,
) -> str:
    """The page of a curate run as HTML text; `images` are the images that `found.rows` count in, `queries` open those
    of the query sets. Without `images` what needs their pixels is left out."""
    joined = found.summary.get("included", {}).get("images", 0)
    kept = found.kept.num_rows - joined
    total = kept + found.dropped.num_rows
    report = Report(title, lead=f"{kept:,} of {total:,} images chosen.")
    tiles = [Tile("images", f"{total:,}"), Tile("chosen", f"{kept:,}", f"{kept / max(1, total):.1%} of the images")]
    if joined:
        tiles.append(Tile("query images joined", f"{joined:,}", f"{kept + joined:,} images in all"))
    if coverage is not None:
        before, after = coverage.before, coverage.after
        tiles += [
            Tile("evenness over clusters", f"{after.evenness:.2f}", f"was {before.evenness:.2f}; 1 is all equal"),
            Tile("effective clusters", f"{after.effective:,.0f}", f"was {before.effective:,.0f}"),
            Tile("Gini over clusters", f"{after.gini:.2f}", f"was {before.gini:.2f}; 0 is all equal"),
        ]
    report.summary(found.messages, tiles=tiles)
    add_query_sets(report, found.summary)
    if images is not None:
        add_examples(report, found.hits, images, queries or {})
    if coverage is not None:
        _coverage(report, coverage)
    column = _cluster_column(found.kept)
    if column is None:
        if images is not None and kept:
            sample = thumbnails(images, spread(found.rows.tolist(), 4 * _PER_CLUSTER))
            rows = [("", sample[i : i + _PER_CLUSTER]) for i in range(0, len(sample), _PER_CLUSTER)]
            if rows:
                report.section("Chosen images").figure(samples_per_cluster(rows), "An even sample of what was chosen.")
        return report.html()
    labels = _labels(found.kept, column)
    sizes = np.unique(labels[labels >= 0], return_counts=True)[1]
    if len(sizes):
        report.section("Chosen images per cluster").figure(cluster_sizes(sizes))
    clusters = cluster_samples(labels, found.rows, images) if images is not None else []
    if clusters:
        report.section(
            "Samples per cluster",
            "Each row is one cluster, from the largest to the smallest. Rows that mix subjects mean that the features "
            "do not tell them apart yet.",
        ).figure(samples_per_cluster(clusters))
    return report.html()


def _coverage(report: Report, found: Coverage) -> None:
    report.section(
        "Coverage and balance",
        f"All images were put into {found.clusters:,} clusters, the same whatever chose the images. Evenness is the "
        "entropy of the images over the clusters as a share of its maximum; the effective number of clusters is that "
        "of equally large ones with the same entropy.",
    ).figure(cluster_shares(found))
    names = ["entropy, nats", "evenness", "effective clusters", "Gini coefficient", "empty clusters"]
    rows = zip(names, *(_balance_cells(each) for each in (found.before, found.after)), strict=True)
    report.table(["over clusters", "all images", "chosen"], [list(row) for row in rows])
    near = [share for share, value in zip(found.near, found.thresholds, strict=True) if np.isfinite(value)]
    if near:
        report.figure(
            share_bars(near, "Images near each query set"),
            "An image is near a set when it lies closer to one of its images than half of them do to each other "
            f"(estimated on {found.sample:,} images at most).",
        )
    if found.sources:
        title = "Where images come from" if found.source_column == "source" else "Images per label"
        report.figure(share_bars(found.sources, title))


def _balance_cells(found: Balance) -> list[str]:
    return [
        f"{found.entropy:.3f}",
        f"{found.evenness:.3f}",
        f"{found.effective:,.1f}",
        f"{found.gini:.3f}",
        f"{found.empty:,}",
    ]


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
