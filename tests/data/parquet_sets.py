"""Parquet files with images for the tests of streams."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2cli.data.source import open_source
from dinov2cli.data.stream import StreamSource


def write_shards(root: Path, encode) -> Path:
    """Three files 'part-0.parquet' … of 7, 5 and 8 rows in row groups of 3, with masks, labels and columns."""
    root.mkdir()
    start = 0
    for part, count in enumerate((7, 5, 8)):
        rows = range(start, start + count)
        write(root / f"part-{part}.parquet", [encode(row) for row in rows], rows, encode)
        start += count
    return root


def write(path, images, rows, encode, group=3, features=True):
    table = {
        "image": [{"bytes": image, "path": f"{row}.png"} for row, image in zip(rows, images, strict=True)],
        "mask": [{"bytes": encode(100 + row), "path": None} for row in rows],
        "label": [row % 2 for row in rows],
        "place": [f"p{row % 3}" if row % 4 else None for row in rows],
    }
    schema = datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "place": datasets.Value("string"),
        }
    ).arrow_schema
    if not features:
        schema = schema.remove_metadata()
    pq.write_table(pa.Table.from_pydict(table, schema=schema), path, row_group_size=group)


def stream(path: object, options: str = "stream=true") -> StreamSource:
    source = open_source(f"{path}?{options}")
    assert isinstance(source, StreamSource)
    return source


def cached(source: StreamSource) -> list[str]:
    """Block numbers that lie in the cache for images."""
    folder = Path(source._folder) / "image"
    return sorted(path.name for path in folder.glob("*.arrow")) if folder.exists() else []
