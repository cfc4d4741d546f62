"""One shard of packed images: Parquet with a Hugging Face `Image` column, or a WebDataset tar. No times, no users."""

import io
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_GROUP_ROWS = 64
_GROUP_BYTES = 16 << 20
# What leads back to the originals stays in the selection: it means nothing where the shard is copied to.
_LEFT_OUT = ("image_path", "source", "row", "packed_path", "width", "height", "sha256")
_OWN = {"width": pa.int32(), "height": pa.int32(), "sha256": pa.string()}


@dataclass(frozen=True)
class PackedImage:
    """One image ready to be stored. `extension` begins with a dot; width, height (upright, pixels), sha256 and
    bytes_before are those of the original file; `copied` says that `data` is that file."""

    data: bytes
    extension: str
    width: int
    height: int
    sha256: str
    bytes_before: int
    copied: bool

    def facts(self) -> dict[str, Any]:
        """Everything but the pixels, for the index."""
        names = ("width", "height", "sha256", "bytes_before", "copied")
        return {name: getattr(self, name) for name in names} | {"bytes_after": len(self.data)}


@dataclass(frozen=True)
class PackedRow:
    """An image on its way into a shard: its row in the table, and its file name (relative, '/' between parts)."""

    row: int
    file: str
    image: PackedImage


def stored_columns(table: pa.Table) -> pa.Table:
    """The columns of a selection's table that go into shards, in types that `datasets` knows; `label` -1 is null.

    A column that is called `image` becomes `source_image`.
    """
    columns = {}
    for name in table.column_names:
        if name in _LEFT_OUT:
            continue
        column = _portable(table.column(name))
        if name == "label" and pa.types.is_integer(column.type):
            column = pc.if_else(pc.less(column, 0), pa.scalar(None, column.type), column)
        columns["source_image" if name == "image" else name] = column
    return pa.table(columns)


def write_parquet(path: Path, rows: Iterator[PackedRow], beside: pa.Table, label_names: list[str] | None) -> None:
    """Write rows as Parquet: `image` (bytes, path), the columns of `beside`, then width, height and sha256.

    Row groups are small (64 rows, about 16 MB at most), so that one row is read without its thousand neighbours.
    Labels carry `label_names` where those are given.
    """
    schema = _schema(beside, label_names)
    searchable = [name for name in schema.names if name != "image"]
    # JPEG bytes neither compress nor repeat.
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_statistics=searchable
    ) as writer:
        for group in _groups(rows):
            writer.write_table(_table(group, beside, schema), row_group_size=len(group))


def write_tar(path: Path, rows: Iterator[PackedRow], beside: pa.Table, label_names: list[str] | None) -> None:
    """Write rows as a WebDataset shard: KEY.jpg (.png, .webp), KEY.json with every column, KEY.cls for a label."""
    with tarfile.open(path, "w") as tar:
        for found in rows:
            image, key = found.image, found.file.removesuffix(found.image.extension)
            facts = {name: _json_value(beside.column(name)[found.row].as_py()) for name in beside.column_names}
            facts |= {name: getattr(image, name) for name in _OWN}
            label = facts.get("label")
            if label_names is not None and label is not None:
                facts["label_name"] = label_names[label]
            _add(tar, found.file, image.data)
            _add(tar, f"{key}.json", json.dumps(facts, ensure_ascii=False, default=str).encode())
            if label is not None:
                _add(tar, f"{key}.cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults hold neither a time nor a user
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _groups(rows: Iterator[PackedRow]) -> Iterator[list[PackedRow]]:
    group: list[PackedRow] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row.image.data)
        if len(group) >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _schema(beside: pa.Table, label_names: list[str] | None) -> pa.Schema:
    """The Arrow schema with the metadata by which `datasets` shows images and names labels."""
    import datasets

    features = {"image": datasets.Image(), **datasets.Features.from_arrow_schema(beside.schema.remove_metadata())}
    if label_names and "label" in features:
        features["label"] = datasets.ClassLabel(names=label_names)
    features |= datasets.Features.from_arrow_schema(pa.schema(_OWN))
    return datasets.Features(features).arrow_schema


def _table(group: list[PackedRow], beside: pa.Table, schema: pa.Schema) -> pa.Table:
    images = [{"bytes": row.image.data, "path": row.file} for row in group]
    columns: dict[str, Any] = {"image": pa.array(images, schema.field("image").type)}
    there = beside.take(pa.array([row.row for row in group], pa.int64()))
    columns |= {name: there.column(name) for name in there.column_names}
    columns |= {name: pa.array([getattr(row.image, name) for row in group], kind) for name, kind in _OWN.items()}
    return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)


def _portable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in a type that `datasets` has; what it has none for becomes text."""
    import datasets

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        datasets.Features.from_arrow_schema(pa.schema({"column": column.type}))
    except ValueError:
        return pa.chunked_array([pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string())])
    return column


def _json_value(value: Any) -> Any:
    """A value as JSON has it, where not a number is nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple | np.ndarray):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    return value
