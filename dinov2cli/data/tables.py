"""Sources whose rows lie in a `datasets.Dataset`: Parquet files and datasets of the Hugging Face hub.

`datasets` keeps an Arrow copy of them in its cache (HF_DATASETS_CACHE), which is what gives random access to rows.
"""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinov2cli.data.bad import BadImage
from dinov2cli.data.columns import choose_columns, integer_labels, is_pixels
from dinov2cli.data.source import ImageSource, hash_files
from dinov2cli.data.spec import DataSpec, is_local_hub, suggestion
from dinov2cli.errors import InputError, WorkError

_LABEL_NAMES = ("label", "cls")
_SPLITS = ("train", "test", "val", "valid", "validation", "dev")


class TableSource(ImageSource):
    """Rows of a `datasets.Dataset` with one image column, and any others.

    base: folder against which relative paths in the table are read.
    """

    def __init__(self, spec: DataSpec, kind: str, dataset: datasets.Dataset, *, base: str, content_hash: str) -> None:
        super().__init__(spec, kind)
        self._base = base
        self._hash = content_hash
        roles = choose_columns(dataset.features, spec.options, spec.location)
        self._roles = roles
        pixels = {name for name, feature in dataset.features.items() if is_pixels(feature)} | set(roles.values())
        # One single-column view per role: reading a row must not fetch its neighbours' pixels.
        self._pixels = {role: _undecoded(dataset.select_columns([name]), name) for role, name in roles.items()}
        self._rest = dataset.select_columns([name for name in dataset.column_names if name not in pixels])

    def __len__(self) -> int:
        return len(self._rest) if self._rest.column_names else len(self._pixels["image"])

    def has_role(self, role: str) -> bool:
        return role in self._roles

    def read(self, row: int, role: str = "image") -> bytes:
        value = self._pixels[role][int(row)][self._roles[role]]
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if value is None:
            raise BadImage(self.name(row), "empty cell")
        return read_file(os.path.join(self._base, value), self.name(row)) if isinstance(value, str) else bytes(value)

    def name(self, row: int) -> str:
        return f"{self.spec}#{row}"

    @cached_property
    def ids(self) -> list[str]:
        for values in self._id_candidates():
            names = [str(value) for value in values if value is not None and value != ""]
            if len(names) == len(self) == len(set(names)):
                return names
        return [f"{row:08d}" for row in range(len(self))]

    def _id_candidates(self) -> Iterator[list[Any]]:
        for name in ("id", "__key__", "key"):
            if name in self._rest.column_names:
                yield self._arrow(name).to_pylist()
        column = self._pixels["image"].data.column(self._roles["image"])
        if pa.types.is_struct(column.type):
            yield pc.struct_field(column, "path").to_pylist()
        elif pa.types.is_string(column.type):
            yield column.to_pylist()

    @cached_property
    def paths(self) -> list[str]:
        location = self.spec.partition("?")[0]
        return [f"{location}#{row}" for row in range(len(self))]

    @cached_property
    def columns(self) -> pa.Table:
        drop = [name for name in ("id", "label") if name in self._rest.column_names]
        names = [name for name in self._rest.column_names if name not in drop]
        if not names:
            return super().columns
        return pa.table({name: self._arrow(name) for name in names})

    def _arrow(self, name: str) -> pa.ChunkedArray:
        return self._rest.with_format("arrow")[:].column(name)

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None] | None:
        asked = self._options.get("label")
        names = self._rest.column_names
        if asked and asked not in names:
            raise InputError(
                f"{self.spec}: no column '{asked}' for labels{suggestion(asked, names)}; "
                f"its columns are {', '.join(names)}"
            )
        name = asked or next((name for name in _LABEL_NAMES if name in names), None)
        if name is None:
            return None
        feature = self._rest.features[name]
        known = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        return integer_labels(self._arrow(name), known, f"{self.spec}, column '{name}'")

    def content_hash(self) -> str:
        return self._hash


def open_parquet(spec: DataSpec, files: Sequence[str]) -> ImageSource:
    """Parquet files, in the order given, as one source.

    Raises:
        InputError: unreadable file, no image column.
    """
    for path in files:
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path}: not a readable Parquet file ({_first_line(error)}); fetch or write it again"
            ) from error
        choose_columns(datasets.Features.from_arrow_schema(schema), spec.options, path)  # before anything is copied
    absolute = [os.path.abspath(path) for path in files]
    with reading(spec.location, "Parquet", "the files of one set must be whole and have the same columns"):
        dataset = datasets.load_dataset(
            "parquet", data_files={"data": [_escape(path) for path in absolute]}, split="data"
        )
    digest = hash_files((os.path.basename(path), path) for path in absolute)
    return TableSource(spec, "parquet", dataset, base=os.path.dirname(absolute[0]), content_hash=digest)


def split_files(files: Sequence[str], split: str | None, location: str) -> list[str]:
    """Of the Parquet files of a folder, those of one split by their names ('train-00000.parquet', 'train/0.parquet').

    Raises:
        InputError: no file belongs to the split, or several splits lie together and none was asked for.
    """
    found: dict[str, list[str]] = {}
    for path in files:
        words = [os.path.basename(path).lower(), os.path.basename(os.path.dirname(path)).lower()]
        name = next((s for w in words for s in _SPLITS if w == s or w.startswith((f"{s}-", f"{s}.", f"{s}_"))), "")
        found.setdefault(name, []).append(path)
    if split is not None:
        if split not in found:
            have = ", ".join(sorted(name for name in found if name)) or "none"
            raise InputError(f"{location}: no Parquet file of split '{split}'; splits found by file name: {have}")
        return found[split]
    if len(found) > 1 and "" not in found:
        names = sorted(found)
        raise InputError(
            f"{location}: holds the splits {', '.join(names)} side by side; choose one, "
            f"as {location}?split={'train' if 'train' in names else names[0]}, or give one file"
        )
    return list(files)


def open_hub(spec: DataSpec) -> ImageSource:
    """A dataset of the Hugging Face hub, or a local copy of one (`hf:./copy`).

    Raises:
        InputError: not found, not reachable, unknown split, no image column.
    """
    name, options = spec.location, spec.options
    local = is_local_hub(name)
    wanted = options.get("split", "train")
    cure = "check name, split and connection; private sets need `hf auth login`"
    with reading(f"hf:{name}", "a dataset of the Hugging Face hub", cure):
        dataset = datasets.load_dataset(
            os.path.abspath(name) if local else name,
            options.get("config"),
            split=wanted,
            revision=options.get("revision"),
        )
    # The cache file lies under config/version/commit: the last parts of its path identify the data on any machine.
    cached = [os.sep.join(Path(file["filename"]).parts[-4:]) for file in dataset.cache_files]
    digest = hashlib.sha256(repr((cached, len(dataset), dataset.info.dataset_size)).encode()).hexdigest()
    return TableSource(spec, "hub", dataset, base=name if local else ".", content_hash=digest)


def read_file(path: str | bytes, name: str) -> bytes:
    """Bytes of a file; a missing or unreadable one is a BadImage, for one file must not stop a run."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadImage(name, "the file does not exist") from error
    except OSError as error:
        raise BadImage(name, f"cannot be opened ({error.strerror})") from error


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep the progress bars of `datasets` off stderr, which belongs to our own."""
    was_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            datasets.enable_progress_bars()


@contextmanager
def reading(location: str, expected: str, cure: str) -> Iterator[None]:
    """Turn whatever `datasets` raises into one line for the user; an InputError raised inside a builder passes."""
    try:
        with quiet_datasets():
            yield
    except Exception as error:
        chain: BaseException | None = error
        while chain is not None:
            if isinstance(chain, InputError):
                raise chain from None
            if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
                raise WorkError(
                    f"{location}: no space left for the Arrow copy in {datasets.config.HF_DATASETS_CACHE}; "
                    "free some, or set HF_DATASETS_CACHE to a larger disk"
                ) from error
            chain = chain.__cause__ or chain.__context__
        raise InputError(f"{location}: could not be read as {expected} ({_first_line(error)}); {cure}") from error


def _undecoded(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    if isinstance(dataset.features[column], datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _escape(path: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)  # `datasets` globs what it is given
