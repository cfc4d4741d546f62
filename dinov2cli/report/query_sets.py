"""Query sets in the report of `curate`: their counts, and what some of their images found."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.curation.retrieval_tables import table_cells
from dinov2cli.data.source import ImageSource
from dinov2cli.report.grids import Cell, image_grid
from dinov2cli.report.html import Report
from dinov2cli.report.thumbnails import spread, thumbnail

_PAIRS = 20
_SETS = 6
_QUERIES = 3
_FOUND = 6
_SIZE = 105

Opened = Mapping[str, Callable[[], ImageSource]]
"""What opens the images of each query set, by its name."""


def add_query_sets(report: Report, summary: dict[str, Any]) -> None:
    """The counts of a retrieval, set by set, and what the sets share; nothing for a choice without query sets."""
    cells = table_cells(summary)
    if not cells:
        return
    report.section(
        "Query sets",
        "Retrieved: images found for a set before its limits. Final: those of them that were chosen; an image that "
        "several sets found counts for each of them here, and once in the last line.",
    )
    report.table(cells[0], cells[1:])
    shared = sorted((pair for pair in summary["overlap"] if pair["images"]), key=lambda pair: -pair["images"])
    if shared:
        rows = [[" and ".join(pair["sets"]), f"{pair['images']:,}"] for pair in shared[:_PAIRS]]
        report.table(["two sets", "chosen for both"], rows)


def add_examples(report: Report, hits: pa.Table | None, images: ImageSource, queries: Opened) -> None:
    """For some images of every set what they brought: a row of neighbours each, or a row of the set's clusters."""
    if hits is None:
        return
    rows: list[list[Cell]] = []
    titles: list[str] = []
    for name, opened in list(queries.items())[:_SETS]:
        mine = hits.filter(pc.equal(hits.column("query_source"), name))
        if not mine.num_rows:
            continue
        source = opened()
        found = _neighbours(mine, images, source) if _ranked(mine) else _of_clusters(mine, images, source)
        rows += [cells for _, cells in found]
        titles += [f"{name}: {what}" for what, _ in found]
    if rows:
        caption = "Left an image of the query set, right images chosen for it, the nearest first; for a set looked for "
        caption += "by clusters, images of the clusters that hold most of it."
        section = report.section("What the query sets brought")
        section.figure(image_grid(rows, size=_SIZE, titles=titles, break_after=1), caption)


def _ranked(mine: pa.Table) -> bool:
    return "rank" in mine.column_names and mine.column("rank").null_count < mine.num_rows


def _neighbours(mine: pa.Table, images: ImageSource, source: ImageSource) -> list[tuple[str, list[Cell]]]:
    """A title and a row for each of some queries: the query, then the chosen images it found."""
    asked = set(mine.column("query_id").to_pylist())
    names = source.ids
    result = []
    for query in spread([row for row, name in enumerate(names) if name in asked], _QUERIES):
        name = names[query]
        found = mine.filter(pc.equal(mine.column("query_id"), name)).sort_by("rank").slice(0, _FOUND)
        pairs = zip(found.column("row").to_pylist(), found.column("similarity").to_pylist(), strict=True)
        cells = [_cell(source, query, "query")]
        cells += [_cell(images, row, f"similarity {similarity:.3f}") for row, similarity in pairs]
        if cells[0] is not None and any(cells[1:]):
            result.append((name, [cell for cell in cells if cell is not None]))
    return result


def _of_clusters(mine: pa.Table, images: ImageSource, source: ImageSource) -> list[tuple[str, list[Cell]]]:
    """A title and a row for each of the clusters with most images of the set: one of those, then chosen images."""
    table = mine.group_by("cluster").aggregate([("query_count", "max")]).sort_by([("query_count_max", "descending")])
    result = []
    queries = spread(range(len(source)), _QUERIES)
    for number, (cluster, count) in enumerate(
        zip(table.column("cluster").to_pylist(), table.column("query_count_max").to_pylist(), strict=True)
    ):
        if number >= len(queries):
            break
        rows = mine.filter(pc.equal(mine.column("cluster"), cluster)).column("row").to_pylist()
        cells = [_cell(source, queries[number], "of the set")]
        cells += [_cell(images, row, "chosen") for row in spread(rows, _FOUND)]
        if cells[0] is not None and any(cells[1:]):
            title = f"cluster {cluster}, which holds {count:,} of its images"
            result.append((title, [cell for cell in cells if cell is not None]))
    return result


def _cell(source: ImageSource, row: int, caption: str) -> Cell | None:
    image: np.ndarray | None = thumbnail(source, row)
    return None if image is None else Cell(image, [caption])
