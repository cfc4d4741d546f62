"""The report of `dedup`: the figures in words, and the images behind them."""

from collections import Counter

import numpy as np
import pyarrow as pa

from dinov2cli.curation.tables import Curated
from dinov2cli.data.source import ImageSource
from dinov2cli.report.grids import DuplicatePair, duplicate_pairs
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import cluster_sizes, similarity_histogram
from dinov2cli.report.thumbnails import spread, thumbnail

_PAIRS = 12


def dedup_report(
    found: Curated,
    pool: pa.Table,
    images: ImageSource,
    *,
    title: str,
    threshold: float | None = None,
    figures: bool = True,
) -> str:
    """The page of a dedup run as HTML text.

    `images` are the images behind the pool, found by id. `threshold` is the cosine above which pairs are copies.
    `figures=False` leaves out what needs pixels.
    """
    kept, total = found.kept.num_rows, pool.num_rows
    report = Report(title, lead=f"{total:,} images compared with each other.")
    share = (total - kept) / max(1, total)
    tiles = [
        Tile("images", f"{total:,}"),
        Tile("kept", f"{kept:,}", f"{1 - share:.1%} of the images"),
        Tile("dropped", f"{total - kept:,}", f"{share:.1%} of the images"),
    ]
    report.summary(found.messages, tiles=tiles)
    reasons = Counter(found.dropped.column("reason").to_pylist())
    if reasons:
        report.section("Why images were dropped")
        report.table(["reason", "images"], [[name.replace("_", " "), f"{n:,}"] for name, n in reasons.most_common()])
    pairs = duplicate_pair_samples(found.dropped, images) if figures else []
    if pairs:
        text = "A sample of what was dropped, from the most to the least similar, each beside the image kept instead."
        report.section("Duplicate pairs", text).figure(duplicate_pairs(pairs), "Kept image and dropped copy.")
    if found.groups is not None and found.groups.num_rows:
        sizes = list(Counter(found.groups.column("group").to_pylist()).values())
        report.section("Groups").figure(
            cluster_sizes(sizes, unit="groups"), "How many images of one and the same picture there are."
        )
    cosines = _cosines(found.dropped)
    if threshold is not None and len(cosines) > 1:
        report.section("Similarity of dropped images to what removed them").figure(
            similarity_histogram(cosines, threshold),
            "Many values just above the line mean that the threshold cuts through look-alikes: check the pairs above.",
        )
    return report.html()


def _cosines(dropped: pa.Table) -> np.ndarray:
    """Similarities of the rows that were dropped by their embedding."""
    similarity = dropped.column("similarity").to_numpy(zero_copy_only=False).astype(np.float64)
    if "tier" in dropped.column_names:
        similarity = similarity[np.array([tier == "embedding" for tier in dropped.column("tier").to_pylist()], bool)]
    return similarity[np.isfinite(similarity)]


def duplicate_pair_samples(dropped: pa.Table, images: ImageSource, *, count: int = _PAIRS) -> list[DuplicatePair]:
    """Some pairs of kept and dropped images out of a selection's `dropped` table, most similar first."""
    row_of = {name: row for row, name in enumerate(images.ids)}
    records = [record for record in dropped.to_pylist() if record["duplicate_of"] in row_of and record["id"] in row_of]
    # Exact copies have no similarity, or one that rounds to 1: they come first.
    records.sort(key=lambda r: (-(2.0 if r["similarity"] is None else r["similarity"]), r["id"]))
    pairs = []
    for index in spread(range(len(records)), count):
        record = records[index]
        kept = thumbnail(images, row_of[record["duplicate_of"]])
        copy = thumbnail(images, row_of[record["id"]])
        if kept is not None and copy is not None:
            by = record.get("tier") or record["reason"]
            pairs.append(DuplicatePair(kept, copy, record["similarity"], f"by {str(by).replace('_', ' ')}"))
    return pairs
