"""The report of `dedup`: the figures in words, and the images behind them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.curation.profile import SimilarityProfile
from dinov2cli.curation.tables import Curated
from dinov2cli.data.source import ImageSource
from dinov2cli.report.grids import Cell, DuplicatePair, duplicate_pairs, image_grid, pair_grid
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.plots import cluster_sizes, similarity_histogram
from dinov2cli.report.thumbnails import spread, thumbnail, thumbnails

if TYPE_CHECKING:
    from dinov2cli.curation.calibrate import Calibration

_PAIRS = 12
_GROUPS = 6
_PER_GROUP = 8
_BESIDE_THRESHOLD = 6


def dedup_report(
    found: Curated,
    pool: pa.Table,
    images: ImageSource | None,
    *,
    title: str,
    references: Mapping[str, ImageSource | None] | None = None,
    profile: SimilarityProfile | None = None,
    calibration: "Calibration | None" = None,
) -> str:
    """The page of a dedup run as HTML text.

    `images` are the images behind the pool, `references` those of the sets it was compared with, by name,
    all found by id.
    `profile` is how similar the rows of the pool are to their nearest neighbours, `calibration` how its thresholds were
    measured. Without `images` what needs their pixels is left out.
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
    _reasons(report, found.dropped, pool)
    _rules(report, found)
    if profile is not None and profile.sampled:
        _threshold(report, profile, images)
    if calibration is not None:
        from dinov2cli.report.calibration import calibration_section  # it needs what makes copies

        calibration_section(report, calibration)
    against, within = _parted(found.dropped)
    if against.num_rows:
        _against(report, against, images, references or {})
    pairs = duplicate_pair_samples(within, images) if images is not None else []
    if pairs:
        text = "A sample of what was dropped, from the most to the least similar, each beside the image kept instead."
        report.section("Duplicate pairs", text).figure(duplicate_pairs(pairs), "Kept image and dropped copy.")
    if found.groups is not None and found.groups.num_rows:
        _groups(report, found.groups, images)
    return report.html()


def _reasons(report: Report, dropped: pa.Table, pool: pa.Table) -> None:
    """How many images, and how many megapixels, each reason removed."""
    if not dropped.num_rows:
        return
    headers, parts = ["reason", "images", "share"], dropped.select(["id", "reason"])
    if "width" in pool.column_names and "height" in pool.column_names:
        headers.append("megapixels")
        area = pc.multiply(pool.column("width").cast(pa.float64()), pool.column("height").cast(pa.float64()))
        parts = parts.join(pa.table({"id": pool.column("id"), "area": area}), "id")
    else:
        parts = parts.append_column("area", pa.repeat(0.0, parts.num_rows))
    sums = parts.group_by("reason").aggregate([("id", "count"), ("area", "sum")]).sort_by([("id_count", "descending")])
    report.section("Why images were dropped")
    rows = [
        [row["reason"].replace("_", " "), f"{row['id_count']:,}", f"{row['id_count'] / pool.num_rows:.2%}"]
        + [f"{(row['area_sum'] or 0) / 1e6:,.1f}"] * (len(headers) - 3)
        for row in sums.to_pylist()
    ]
    report.table(headers, rows)


def _rules(report: Report, found: Curated) -> None:
    """What each comparison asks for, in words."""
    rules = found.summary.get("rules")
    if rules:
        rows = [[rule["tier"], f"{rule['edges']:,}", rule["rule"]] for rule in rules]
        report.section("What counts as a copy").table(["comparison", "pairs found", "rule"], rows)


def _threshold(report: Report, profile: SimilarityProfile, images: ImageSource | None) -> None:
    text = (
        "Where there are two heaps, copies are the right one, and a threshold between them parts them well. Where the "
        "threshold cuts through one heap, look at the pairs on both sides of it."
    )
    report.section("The threshold", text)
    report.figure(
        similarity_histogram(profile.counts, profile.edges, profile.threshold, profile.gap),
        "How similar the sampled images are to their nearest neighbour, of all images.",
    )
    if profile.gap is not None:
        report.text(f"The emptiest stretch lies around {profile.gap:.2f} (dotted).")
    else:
        report.text("The histogram has no gap that would suggest a threshold; `--calibrate` measures one.")
    if images is None:
        return
    for pairs, words in ((profile.above, "Just above: taken for copies."), (profile.below, "Just below: kept both.")):
        cells = _pictures(pairs[:_BESIDE_THRESHOLD], images)
        if cells:
            report.figure(pair_grid(cells), words)


def _pictures(pairs: Sequence[tuple[int, int, float]], images: ImageSource) -> list[tuple[Cell, Cell]]:
    cells = []
    for a, b, cosine in pairs:
        left, right = thumbnail(images, a), thumbnail(images, b)
        if left is not None and right is not None:
            cells.append((Cell(left, [f"cosine {cosine:.3f}"]), Cell(right)))
    return cells


def _parted(dropped: pa.Table) -> tuple[pa.Table, pa.Table]:
    """What the reference holds, and the rest of what was dropped."""
    leaked = pc.equal(dropped.column("reason"), "against")
    return dropped.filter(leaked), dropped.filter(pc.invert(leaked))


def _against(
    report: Report, leaked: pa.Table, images: ImageSource | None, references: Mapping[str, ImageSource | None]
) -> None:
    """What each reference set holds already: how many images, found how, with the matched pairs."""
    report.section(
        "What the reference sets hold already",
        f"{leaked.num_rows:,} images match. Only direct matches are dropped for this, unless whole groups were asked "
        "for.",
    )
    counts = leaked.group_by(["reference", "tier"]).aggregate([("id", "count"), ("duplicate_of", "count_distinct")])
    counts = counts.sort_by([("reference", "ascending"), ("id_count", "descending")])
    rows = [
        [r["reference"], r["tier"], f"{r['id_count']:,}", f"{r['duplicate_of_count_distinct']:,}"]
        for r in counts.to_pylist()
    ]
    report.table(["reference set", "matched by", "images dropped", "images matched"], rows)
    for name, reference in references.items():
        here = leaked.filter(pc.equal(leaked.column("reference"), name))
        cells = [] if images is None or reference is None else _matched_pairs(here, reference, images)
        if cells:
            report.figure(pair_grid(cells), f"Image of {name} and dropped image.")


def _matched_pairs(leaked: pa.Table, reference: ImageSource, images: ImageSource) -> list[tuple[Cell, Cell]]:
    cells = []
    for record, kept_row, row in _most_similar_first(leaked, reference, images):
        left, right = thumbnail(reference, kept_row), thumbnail(images, row)
        if left is not None and right is not None:
            by = f"by {record['tier']}"
            cells.append((Cell(left, ["reference", _similarity(record)]), Cell(right, ["dropped", by])))
    return cells


def _groups(report: Report, groups: pa.Table, images: ImageSource | None) -> None:
    group = groups.column("group").to_numpy()
    sizes = np.bincount(group)
    report.section("Groups").figure(
        cluster_sizes(sizes, unit="groups"), "How many images of one and the same picture there are."
    )
    if images is None:
        return
    member_rows = _rows_of(groups.column("id"), images)
    rows, titles = [], []
    for number in np.argsort(-sizes, kind="stable")[:_GROUPS]:
        members = member_rows[(group == number) & (member_rows >= 0)].tolist()
        pictures = thumbnails(images, members[:1] + spread(members[1:], _PER_GROUP - 1), size=180)
        if pictures:
            rows.append([Cell(picture) for picture in pictures])
            titles.append(f"{sizes[number]:,} images")
    if rows:
        report.figure(image_grid(rows, size=88, titles=titles), "The largest groups; the first image is kept.")


def duplicate_pair_samples(dropped: pa.Table, images: ImageSource, *, count: int = _PAIRS) -> list[DuplicatePair]:
    """Some pairs of kept and dropped images out of a selection's `dropped` table, most similar first."""
    pairs = []
    for record, kept_row, row in _most_similar_first(dropped, images, images, count):
        kept, copy = thumbnail(images, kept_row), thumbnail(images, row)
        if kept is not None and copy is not None:
            by = record.get("tier") or record["reason"]
            pairs.append(DuplicatePair(kept, copy, record["similarity"], f"by {str(by).replace('_', ' ')}"))
    return pairs


def _most_similar_first(
    dropped: pa.Table, kept: ImageSource, copies: ImageSource, count: int = _PAIRS
) -> list[tuple[dict[str, Any], int, int]]:
    """A spread of the records whose two images are known, with the rows of both, most similar first."""
    first, second = _rows_of(dropped.column("duplicate_of"), kept), _rows_of(dropped.column("id"), copies)
    known = np.flatnonzero((first >= 0) & (second >= 0))
    records = dropped.take(pa.array(known))
    # Exact copies have no similarity, or one that rounds to 1: they come first.
    keys = {"similarity": pc.fill_null(records.column("similarity"), 2.0), "id": records.column("id")}
    order = pc.sort_indices(pa.table(keys), [("similarity", "descending"), ("id", "ascending")]).to_numpy()
    chosen = order[spread(range(len(order)), count)] if len(order) else order
    shown = records.take(pa.array(chosen)).to_pylist()
    return [(record, int(first[known[i]]), int(second[known[i]])) for record, i in zip(shown, chosen, strict=True)]


def _rows_of(names: pa.ChunkedArray, images: ImageSource) -> np.ndarray:
    """The row of every name among the images, -1 for one that is not there."""
    found = pc.index_in(names, value_set=pa.array(images.ids, pa.string()), skip_nulls=True)
    return np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)


def _similarity(record: dict[str, Any]) -> str:
    return "" if record["similarity"] is None else f"similarity {record['similarity']:.3f}"
