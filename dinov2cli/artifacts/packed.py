"""Packed images of a selection on disk: shards below `packed/`, and beside each an index of what became of its rows.

A shard holds consecutive rows and is closed by the image that fills it, so where it ends depends on nothing but the
images: not on workers, ranks or restarts. Its index is written after it and tells a later run that it is whole.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.packed_names import safe_names
from dinov2cli.artifacts.packed_shards import PackedImage, PackedRow, stored_columns, write_parquet, write_tar
from dinov2cli.errors import InputError, WorkError

FOLDER = "packed"
FORMATS = ("parquet", "webdataset", "folder")
PATH_COLUMN = "packed_path"

_EXTENSIONS = {"parquet": ".parquet", "webdataset": ".tar"}
_LABEL_NAMES = b"label_names"
_INDEX = pa.schema(
    {
        "id": pa.string(),
        PATH_COLUMN: pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "sha256": pa.string(),
        "bytes_before": pa.int64(),
        "bytes_after": pa.int64(),
        "copied": pa.bool_(),
        "unreadable": pa.string(),
    }
)


@dataclass(frozen=True)
class PackedFacts:
    """What a selection says of its packed images: their format, the name of each label if known, and of each row the
    file below `packed/` (with its key, in a tar)."""

    format: str
    label_names: list[str] | None
    files: pa.ChunkedArray


def packed_facts(path: Path, extra: dict[str, Any], kept: pa.Table) -> PackedFacts | None:
    """The facts of the selection `path`, from its manifest's `extra` and its kept images; None if nothing was packed.

    Raises InputError when the table does not say where the images are.
    """
    if FOLDER not in extra:
        return None
    if PATH_COLUMN not in kept.column_names:
        raise InputError(f"{path}/kept.parquet: no column {PATH_COLUMN}; make the selection again with --overwrite")
    names = (kept.schema.metadata or {}).get(_LABEL_NAMES)
    label_names = None if names is None else json.loads(names)
    return PackedFacts(str(extra[FOLDER]["format"]), label_names, kept.column(PATH_COLUMN))


def pointing_to_packed(kept: pa.Table, place: Path) -> pa.Table:
    """The table of kept images as what is made from it must see it: its rows lie in the packed selection `place` itself
    (`source`, `row`), not in the originals, which may be gone."""
    here = {
        "source": pa.array([os.path.abspath(place)] * kept.num_rows, pa.string()),
        "row": pa.array(range(kept.num_rows), pa.int64()),
    }
    for name, column in here.items():
        kept = kept.set_column(kept.schema.get_field_index(name), name, column)
    return kept.drop_columns([PATH_COLUMN]).replace_schema_metadata(None)


def with_label_names(kept: pa.Table, names: list[str] | None) -> pa.Table:
    """The table with the name of each label in its metadata, where `packed_facts` finds them: a manifest, which people
    read, is no place for ten thousand names."""
    return kept.replace_schema_metadata(None if names is None else {_LABEL_NAMES: json.dumps(names)})


class PackWriter:
    """Writes the images of a table of N rows into an `Output`, and goes on after the shards that are there already.

    table: `id` and whatever else is to lie beside the images (see `stored_columns`).
    shard_bytes: a shard is closed by the image with which it reaches this size; the same is the part of the work that
    a stopped run of format 'folder' loses at most.

    Raises WorkError when the shards on disk were written for other rows.
    """

    def __init__(
        self, out: Output, table: pa.Table, *, format: str, label_names: list[str] | None, shard_bytes: int
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"format {format!r}, expected one of {FORMATS}")
        self._out = out
        self._format = format
        self._label_names = label_names
        self._shard_bytes = shard_bytes
        self._ids = table.column("id")
        self._names = safe_names(self._ids.to_pylist())
        self._beside = stored_columns(table)
        self._parts: list[pa.Table] = []
        self._read_parts()

    @property
    def rows(self) -> int:
        """Number of rows, from the first on, that are in finished shards or known to be unreadable."""
        return sum(part.num_rows for part in self._parts)

    @property
    def index(self) -> pa.Table:
        """One row for each so far: packed_path below `packed/`, original width, height and sha256, bytes before and
        after, whether it was copied as it is; or why it is `unreadable`, all else being null."""
        return pa.concat_tables([_INDEX.empty_table(), *self._parts])

    def write(self, images: Iterator[PackedImage | str]) -> None:
        """Write the remaining rows. `images` gives one item for each, in order: the image, or why there is none."""
        while self.rows < len(self._ids):
            self._write_shard(images)

    def summary(self) -> dict[str, Any]:
        """Format, counts and bytes for the manifest. `bytes_before` is that of the images that were packed."""
        index = self.index
        return {
            "format": self._format,
            "images": index.num_rows - index.column("unreadable").drop_null().length(),
            "copied": pc.sum(index.column("copied")).as_py() or 0,
            "bytes_before": pc.sum(index.column("bytes_before")).as_py() or 0,
            "bytes_after": pc.sum(index.column("bytes_after")).as_py() or 0,
            "shards": sum(part.column(PATH_COLUMN).null_count < part.num_rows for part in self._parts),
        }

    def _write_shard(self, images: Iterator[PackedImage | str]) -> None:
        number = len(self._parts)
        shard = f"pack-{number:05d}{_EXTENSIONS.get(self._format, '')}"
        entries: list[dict[str, Any]] = []
        content = self._until_full(images, shard, entries)
        first = next(content, None)
        if first is not None:  # else a shard of nothing but unreadable images, which is none
            self._write_content(shard, chain([first], content))
        if not entries:
            raise ValueError(f"images end at row {self.rows} of {len(self._ids)}")
        part = pa.Table.from_pylist(entries, schema=_INDEX)
        self._out.write_table(_index_name(number), part)
        self._parts.append(part)

    def _until_full(
        self, images: Iterator[PackedImage | str], shard: str, entries: list[dict[str, Any]]
    ) -> Iterator[PackedRow]:
        """The images of one shard; notes each, and the unreadable ones between them, in `entries`."""
        start, size = self.rows, 0
        for item in images:
            row = start + len(entries)
            if isinstance(item, str):
                entries.append({"id": self._ids[row].as_py(), "unreadable": item})
            else:
                file = self._names[row] + item.extension
                found = PackedRow(row, file, item)
                entries.append({"id": self._ids[row].as_py(), PATH_COLUMN: self._place(shard, file), **item.facts()})
                yield found
                size += len(item.data)
            if size >= self._shard_bytes or start + len(entries) == len(self._ids):
                return

    def _place(self, shard: str, file: str) -> str:
        return {"parquet": shard, "webdataset": f"{shard}/{file}", "folder": file}[self._format]

    def _write_content(self, shard: str, rows: Iterator[PackedRow]) -> None:
        if self._format == "folder":
            for row in rows:
                self._write_file(row)
            return
        write = write_parquet if self._format == "parquet" else write_tar
        self._out.write(f"{FOLDER}/{shard}", lambda path: write(path, rows, self._beside, self._label_names))

    def _write_file(self, row: PackedRow) -> None:
        def write(path: Path) -> None:
            path.write_bytes(row.image.data)

        self._out.write(f"{FOLDER}/{row.file}", write)

    def _read_parts(self) -> None:
        while (path := self._out.path / _index_name(len(self._parts))).is_file():
            part = pq.read_table(path, schema=_INDEX)
            if part.column("id").combine_chunks() != self._ids.slice(self.rows, part.num_rows).combine_chunks():
                raise WorkError(
                    f"{path} lists other images than are to be packed now; start over with --overwrite, "
                    "or give another directory"
                )
            if not all((self._out.path / FOLDER / file).is_file() for file in self._files(part)):
                return  # lost since: written again from here on
            self._parts.append(part)

    def _files(self, part: pa.Table) -> set[str]:
        """Names of the files below `packed/` that hold the images of one part."""
        places = part.column(PATH_COLUMN).drop_null().to_pylist()
        return set(places) if self._format == "folder" else {place.partition("/")[0] for place in places}


def _index_name(number: int) -> str:
    return f"packed_index/pack-{number:05d}.parquet"
