"""Parquet files read in place, by row group: nothing is copied first, and only what is needed is fetched.

For sets too large for an Arrow copy, or that shall begin at once: `x.parquet?stream=true`, folders and braces of
Parquet files, `hf:owner/name?split=train&stream=true`, `hf:./copy?stream=true`. The source stays map-style (any row,
any time, any process), so positions and shuffles are exact as everywhere. Opening reads the footers alone; labels, ids
and other columns without pixels are read when they are asked for, column-wise.

A row is read through its block, a row group: its image column is fetched once per machine, decompressed, into
`HF_DATASETS_CACHE/dinov2-streams/<fingerprint of the files>-<keep>/`, and mapped from there by every process, which
share its pages. At most `keep` blocks (64, or `?stream=N`) stay per role (image, mask, depth); so the disk needed is
`keep` times the largest row group. With N as large as the number of row groups every block is fetched once and for
all; with less, once per epoch, which also writes as much to that disk. The folder may be removed at any time, and
killed runs leave nothing in it that counts beyond the bound.

Reading in exact random order works, but fetches a row group for almost every row unless all are kept: use
`dinov2cli.data.order.block_order` with windows of at most keep / 2 blocks. Row groups of 100 to 1000 images are good
blocks: of one whole file each they are slow to begin with, of a few rows each they need wide windows to mix.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa

from dinov2cli.data.block_cache import BlockCache
from dinov2cli.data.remote import Footer, copy_row_group, describe_files, is_remote, patiently, read_columns
from dinov2cli.data.source import hash_files
from dinov2cli.data.spec import PARQUET_EXTENSIONS, DataSpec, is_local_hub
from dinov2cli.data.tables import HUB_CURE, ColumnSource, names_in_cells, reading
from dinov2cli.errors import InputError, WorkError

DEFAULT_KEEP = 64
_MAX_MAPPED = 64
_OPEN_TRIES = 32


class StreamSource(ColumnSource):
    """Rows of Parquet files that stay where they are.

    files: what `describe_files` found in each, in order. features: of all columns. keep: blocks in the cache per role.
    """

    def __init__(
        self,
        spec: DataSpec,
        kind: str,
        files: Sequence[Footer],
        features: datasets.Features,
        *,
        base: str,
        content_hash: str,
        keep: int,
    ) -> None:
        super().__init__(spec, kind, features, base=base)
        self._files = list(files)
        self._hash = content_hash
        self._keep = keep
        rows = [count for file in files for count in file.rows]
        self._boundaries = np.concatenate(([0], np.cumsum(rows, dtype=np.int64))).astype(np.int64)
        self._first_blocks = np.cumsum([0] + [len(file.rows) for file in files])
        self._columns_at = {name: number for number, name in enumerate(features)}
        locations = "\0".join([content_hash, *(file.url for file in files)])
        fingerprint = hashlib.sha256(locations.encode()).hexdigest()[:32]
        # A run that keeps few blocks must not empty the cache of one that keeps many.
        folder = f"{fingerprint}-{keep}"
        self._folder = os.path.join(str(datasets.config.HF_DATASETS_CACHE), "dinov2-streams", folder)
        # One bound per role: masks must not push out the images they belong to.
        self._caches = {role: BlockCache(os.path.join(self._folder, role), keep) for role in self._roles}
        self._mapped: dict[tuple[int, str], tuple[str, pa.ChunkedArray]] = {}

    def __len__(self) -> int:
        return int(self._boundaries[-1])

    @property
    def blocks(self) -> np.ndarray:
        return self._boundaries

    @property
    def keep(self) -> int:
        return self._keep

    def fetch(self, block: int) -> None:
        self._path(block, "image")

    def content_hash(self) -> str:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mapped": {}}

    def _cell(self, row: int, role: str) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        block = int(np.searchsorted(self._boundaries, row, side="right")) - 1
        return self._column(block, role)[row - int(self._boundaries[block])].as_py()

    def _column(self, block: int, role: str) -> pa.ChunkedArray:
        key = block, role
        found = self._mapped.pop(key, None)
        if found is None:
            # Other processes remove files that this one has mapped: let go of them, for they still take disk space.
            self._mapped = {other: kept for other, kept in self._mapped.items() if os.path.exists(kept[0])}
            while len(self._mapped) >= min(self._keep, _MAX_MAPPED):
                del self._mapped[next(iter(self._mapped))]
            found = self._open(block, role)
        self._mapped[key] = found  # again at the end: the first in the dict is the least recently used
        return found[1]

    def _open(self, block: int, role: str) -> tuple[str, pa.ChunkedArray]:
        for _ in range(_OPEN_TRIES):
            path = self._path(block, role)
            try:
                return path, pa.ipc.open_file(pa.memory_map(path)).read_all().column(0)
            except FileNotFoundError:  # removed in between by a process that fetched another block
                continue
            except (pa.ArrowInvalid, OSError):  # damaged, for example by a disk that ran full
                self._caches[role].discard(os.path.basename(path))
        raise WorkError(
            f"{self._caches[role].folder}: block {block} was removed or damaged {_OPEN_TRIES} times before it could be "
            f"opened; keep more blocks than {self._keep} with stream=N, and check the disk"
        )

    def _path(self, block: int, role: str) -> str:
        """Path of a block in the cache, fetched if it is not there."""
        number = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        file, group = self._files[number], block - int(self._first_blocks[number])
        column = self._roles[role]

        def write(target: BinaryIO) -> None:
            patiently(file.url, self._folder, lambda: copy_row_group(file, group, column, target))

        return self._caches[role].get(f"{block:07d}-{self._columns_at[column]}.arrow", write)

    def _arrow(self, names: list[str]) -> pa.Table:
        schema = datasets.Features({name: self._others[name] for name in names}).arrow_schema
        tables = read_columns(self._files, names)
        with reading(self.spec, "Parquet", "the files of one set must be whole and have the same columns"):
            return pa.concat_tables(datasets.table.table_cast(table.select(names), schema) for table in tables)

    def _image_names(self) -> list[str | None]:
        name = self._roles["image"]
        leaf = self._files[0].names_leaf(name)
        if leaf is None or any(file.names_leaf(name) != leaf for file in self._files):
            return []  # no names, or not in all files: nothing that could serve as ids
        return [value for table in read_columns(self._files, [leaf]) for value in names_in_cells(table.column(name))]


def asked_blocks(spec: DataSpec) -> int:
    """Blocks to keep, by `?stream=`; 0 for false.

    Raises:
        InputError: neither true, false nor a number of blocks.
    """
    value = spec.options["stream"].lower()
    if value in ("true", "false"):
        return DEFAULT_KEEP if value == "true" else 0
    if not value.isdecimal() or int(value) < 1:
        raise InputError(
            f"{spec.location}: stream={spec.options['stream']}; expected true, false, or how many row groups are kept "
            f"on disk (true keeps {DEFAULT_KEEP})"
        )
    return int(value)


def open_parquet_stream(spec: DataSpec, files: Sequence[str], keep: int) -> StreamSource:
    """Parquet files on disk as a stream.

    Raises:
        InputError: unreadable file, no image column, files with different columns.
    """
    absolute = [os.path.abspath(path) for path in files]
    digest = hash_files((os.path.basename(path), path) for path in absolute)
    described = describe_files(absolute, spec.options, spec.location)
    features = datasets.Features.from_arrow_schema(described[0].schema)
    base = os.path.dirname(absolute[0])
    return StreamSource(spec, "parquet", described, features, base=base, content_hash=digest, keep=keep)


def open_hub_stream(spec: DataSpec, keep: int) -> StreamSource:
    """One split of a dataset of the hub, or of a local copy of one, as a stream; its files must be Parquet.

    Raises:
        InputError: not found, not reachable, unknown split, not Parquet, no image column.
        WorkError: the connection failed for good while the footers were read.
    """
    name, options = spec.location, spec.options
    local = is_local_hub(name)
    with reading(f"hf:{name}", "a dataset of the Hugging Face hub", HUB_CURE):
        builder = datasets.load_dataset_builder(
            os.path.abspath(name) if local else name, options.get("config"), revision=options.get("revision")
        )
    urls = _split_urls(f"hf:{name}", builder.config.data_files or {}, options.get("split", "train"))
    described = describe_files(urls, options, f"hf:{name}")
    features = builder.info.features or datasets.Features.from_arrow_schema(described[0].schema)
    stamps = [(file.url.rpartition("/")[2], file.stamp) for file in described]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()
    base = name if local else "."
    return StreamSource(spec, "hub", described, features, base=base, content_hash=digest, keep=keep)


def _split_urls(where: str, data_files: Any, split: str) -> list[str]:
    names = [str(name) for name in data_files]
    if not names:
        raise InputError(
            f"{where}: no data files could be listed (offline, or made by a script); "
            "stream=true needs the hub's own files: leave it out to use the Arrow copy"
        )
    if split not in names:
        raise InputError(
            f"{where}: no split '{split}'; with stream=true one whole split is read, its splits are {', '.join(names)}"
        )
    urls = [str(url) for url in data_files[split]]
    other = [url for url in urls if not url.lower().endswith(PARQUET_EXTENSIONS)]
    if other:
        kind = "tar shards" if other[0].lower().endswith((".tar", ".tar.gz", ".tgz")) else "files"
        raise InputError(
            f"{where}: split '{split}' consists of {len(other)} {kind} such as {other[0].rpartition('/')[2]}, "
            "stream=true reads Parquet only; fetch them and give the files themselves as DATA, or leave out stream=true"
        )
    return [url if is_remote(url) else os.path.abspath(url) for url in urls]
