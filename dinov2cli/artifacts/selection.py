"""Selections on disk: which rows of which sources were kept and dropped, and why.

Rows point back to the images; where they were packed, the directory holds them too (see `packed.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2cli.artifacts.manifest import Manifest, require_kind
from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.packed import FOLDER, PackedFacts, packed_facts, pointing_to_packed
from dinov2cli.errors import InputError

KEPT_COLUMNS = ("id", "image_path", "source", "row")
DROPPED_COLUMNS = ("id", "reason", "duplicate_of", "similarity", "group")
GROUP_COLUMNS = ("id", "image_path", "group", "keep")


@dataclass(frozen=True)
class Selection:
    """A finished selection. `groups` is None for selections that `dedup` did not make, `packed` for those that hold no
    pixels of their own. `source` and `row` of `kept` lead to the packed images where there are any; in the file they
    lead to the originals."""

    path: Path
    manifest: Manifest
    kept: pa.Table
    dropped: pa.Table
    groups: pa.Table | None
    packed: PackedFacts | None = None

    @property
    def packed_path(self) -> Path:
        """The folder of the packed images."""
        return self.path / FOLDER

    def missing_shards(self) -> list[str]:
        """Names of the packed shards that are not there in the size in which they were written (not for loose files,
        each of which may be missing on its own)."""
        if self.packed is None or self.packed.format == "folder":
            return []
        shards = {name: entry["size"] for name, entry in self.manifest.files.items() if name.startswith(f"{FOLDER}/")}
        return [name for name, size in shards.items() if _size(self.path / name) != size]


def write_selection(
    out: Output,
    *,
    kept: pa.Table,
    dropped: pa.Table,
    groups: pa.Table | None = None,
    hits: pa.Table | None = None,
    report: str | None = None,
    before_finish: Callable[[], None] | None = None,
    **extra: Any,
) -> Manifest:
    """Write the tables (and the HTML report) of a selection and finish the output; `rows` counts the kept images.

    `hits` holds every (query, image) pair behind a retrieval. `before_finish` is called when all is written and only
    the manifest is left: to remove what a run that continues would need.

    Raises ValueError when a table lacks a column of the format.
    """
    tables = [
        ("kept", kept, KEPT_COLUMNS),
        ("dropped", dropped, DROPPED_COLUMNS),
        ("groups", groups, GROUP_COLUMNS),
    ]
    for name, table, columns in tables:
        if table is None:
            continue
        absent = [column for column in columns if column not in table.column_names]
        if absent:
            raise ValueError(f"{name} table lacks {absent}")
        out.write_table(f"{name}.parquet", table)
    if hits is not None:
        out.write_table("hits.parquet", hits)
    if report is not None:
        out.write_text("report.html", report)
    if before_finish is not None:
        before_finish()
    return out.finish(rows=kept.num_rows, kept=kept.num_rows, dropped=dropped.num_rows, **extra)


def open_selection(path: Path | str) -> Selection:
    """Open a finished selection; InputError when it is another kind, unfinished or damaged."""
    path = Path(path)
    manifest = require_kind(path, "selection")
    tables = {}
    for name in ("kept", "dropped", "groups"):
        file = path / f"{name}.parquet"
        if name == "groups" and not file.is_file():
            continue
        try:
            tables[name] = pq.read_table(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{file} cannot be read ({type(error).__name__}); make the selection again with --overwrite"
            ) from None
    packed = packed_facts(path, manifest.extra, tables["kept"])
    kept = tables["kept"] if packed is None else pointing_to_packed(tables["kept"], path)
    return Selection(path, manifest, kept, tables["dropped"], tables.get("groups"), packed)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
