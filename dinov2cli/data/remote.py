"""Parquet files on disk or behind a URL (`hf://…`, whatever fsspec knows): footers, row groups, single columns.

Only byte ranges that are needed are read. Files are opened anew for every use: nothing here is tied to a process.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import datasets
import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2cli.data.columns import choose_columns
from dinov2cli.data.tables import first_line, is_no_space, not_parquet
from dinov2cli.errors import InputError, WorkError

logger = logging.getLogger(__name__)

PAUSES = (1.0, 5.0, 25.0)
"""Seconds to wait before each further try of a read that failed."""

_THREADS = 16
_ROWS_AT_ONCE = 64
_HUGE_BYTES = 2 << 30
# What the file systems of fsspec call the thing that changes with a file.
_STAMPS = ("blob_id", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "modified", "created")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Footer:
    """What the footer of one file says. url: path or URL. rows: of each row group. stamp: changes with the file."""

    url: str
    rows: tuple[int, ...]
    schema: pa.Schema
    stamp: str
    largest: int
    """Bytes of the largest column chunk of images, decompressed."""

    def names_leaf(self, column: str) -> str | None:
        """What to read for the names of the files that a column of images holds or points to; None if it has none."""
        kind = self.schema.field(column).type
        if pa.types.is_struct(kind):
            return f"{column}.path" if kind.get_field_index("path") >= 0 else None
        return column if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def is_remote(url: str) -> bool:
    """Whether this is a URL rather than a path."""
    return "://" in url


def describe_files(urls: Sequence[str], options: dict[str, str], location: str) -> list[Footer]:
    """Read the footers of files that make up one set; `options` may name the image column.

    Raises:
        InputError: unreadable, no image column, no rows, or the columns differ between files.
        WorkError: a remote file cannot be reached.
    """

    def describe(url: str) -> Footer:
        return patiently(url, None, lambda: _describe(url, options, system))

    system = _system(urls[0])
    files = _in_threads(describe, urls)
    first = files[0]
    for file in files:
        if set(file.schema.names) != set(first.schema.names):
            raise InputError(
                f"{file.url}: its columns are {', '.join(file.schema.names)}, those of {first.url} are "
                f"{', '.join(first.schema.names)}; the files of one set must have the same columns"
            )
    if not any(sum(file.rows) for file in files):
        raise InputError(f"{location}: {len(files)} Parquet files without a row; give files that have some")
    largest = max(files, key=lambda file: file.largest)
    if largest.largest > _HUGE_BYTES:
        logger.warning(
            "%s: a row group holds %.1f GB of images and is fetched and kept whole; write the file with smaller ones",
            largest.url,
            largest.largest / 1e9,
        )
    return files


def copy_row_group(file: Footer, group: int, column: str, target: BinaryIO) -> None:
    """Write one column of one row group as an Arrow IPC file, uncompressed, over whatever `target` holds.

    Raises:
        InputError: the file changed since its footer was read.
    """
    target.seek(0)
    target.truncate()
    rows = 0
    with _opened(file.url, _system(file.url)) as (parquet, stamp):
        if stamp != file.stamp:
            raise InputError(f"{file.url}: changed while it was in use; start the command again")
        schema = pa.schema([parquet.schema_arrow.field(column)])
        # In small batches: a column of structs cannot be read in one piece beyond 2 GB, and memory stays low. Without
        # threads: this may run in a worker that was forked.
        batches = parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False)
        with pa.ipc.new_file(target, schema) as writer:
            for batch in batches:
                rows += batch.num_rows
                writer.write_batch(batch)
    if rows != file.rows[group]:
        raise InputError(f"{file.url}: row group {group} has {rows} rows, its footer says {file.rows[group]}")


def read_columns(files: Sequence[Footer], names: list[str]) -> list[pa.Table]:
    """Some columns of every file, whole; 'image.path' reads one member of a column of structs.

    Raises:
        WorkError: a file cannot be read.
    """

    def read(file: Footer) -> pa.Table:
        with _opened(file.url, system) as (parquet, _):
            return parquet.read(columns=names)

    system = _system(files[0].url)
    return _in_threads(lambda file: patiently(file.url, None, lambda: read(file)), files)


def patiently(url: str, folder: str | None, action: Callable[[], Result]) -> Result:
    """Try `action` again after pauses when it fails, for networks do; errors for the user pass at once.

    Args:
        url: what is read. folder: where it is written to, if anywhere.

    Raises:
        WorkError: it failed every time, or the disk under `folder` is full.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except (InputError, WorkError):
            raise
        except Exception as error:
            if is_no_space(error):
                raise WorkError(
                    f"{url}: no space left for its row groups in {folder}; "
                    "free some, keep fewer with stream=N, or set HF_DATASETS_CACHE to a larger disk"
                ) from error
            if pause is None or _is_final(error, url):
                raise WorkError(
                    f"{url}: cannot be read ({first_line(error)}); check the file and the connection, "
                    "then give the same command again"
                ) from error
            logger.warning("%s: cannot be read (%s); trying again in %g s", url, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("the last pause is None")


def _is_final(error: Exception, url: str) -> bool:
    """Whether trying again is of no use; what looks damaged may be only cut off if it came through a network."""
    return isinstance(error, FileNotFoundError | PermissionError) or (
        isinstance(error, pa.ArrowInvalid) and not is_remote(url)
    )


def _describe(url: str, options: dict[str, str], system: Any) -> Footer:
    try:
        with _opened(url, system) as (parquet, stamp):
            metadata, schema = parquet.metadata, parquet.schema_arrow
            leaves = [metadata.schema.column(j).path.split(".")[0] for j in range(metadata.num_columns)]
    except pa.ArrowInvalid as error:
        raise not_parquet(url, error) from error
    except OSError as error:
        if is_remote(url):
            raise
        raise not_parquet(url, error) from error
    image = choose_columns(datasets.Features.from_arrow_schema(schema), options, url)["image"]
    rows, largest = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows.append(group.num_rows)
        chunks = [group.column(j).total_uncompressed_size for j, leaf in enumerate(leaves) if leaf == image]
        largest = max(largest, sum(chunks))
    return Footer(url, tuple(rows), schema, stamp, largest)


@contextmanager
def _opened(url: str, system: Any) -> Iterator[tuple[pq.ParquetFile, str]]:
    """(open file, stamp); system: of `_system`."""
    if system is not None:
        path = system._strip_protocol(url)
        # Without fsspec's own read-ahead: Arrow knows which ranges it needs and asks for no others.
        with system.open(path, "rb", cache_type="none") as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
            yield parquet, _stamp(system.info(path))
    else:
        status = os.stat(url)
        with pq.ParquetFile(url) as parquet:
            yield parquet, f"{status.st_size} {status.st_mtime_ns}"


def _system(url: str) -> Any:
    """File system behind a URL, None for a path. Several threads may use one; after a fork fsspec makes another."""
    return fsspec.core.url_to_fs(url)[0] if is_remote(url) else None


def _stamp(info: dict[str, Any]) -> str:
    return " ".join([str(info["size"]), *(f"{key}={info[key]}" for key in _STAMPS if info.get(key) is not None)])


def _in_threads(action: Callable[[Any], Result], items: Sequence[Any]) -> list[Result]:
    if len(items) == 1:
        return [action(items[0])]
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        return list(pool.map(action, items))
