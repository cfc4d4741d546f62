"""Sources whose rows lie in tables: Parquet files and datasets of the Hugging Face hub.

`datasets` keeps an Arrow copy of them in its cache (HF_DATASETS_CACHE), which is what gives random access to rows.
`dinov2cli.data.stream` reads the same files without that copy, by row group.
"""

import errno
import hashlib
import os
from abc import abstractmethod
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
from dinov2cli.data.columns import choose_columns, integer_labels, is_lists, is_pixels, list_labels
from dinov2cli.data.files import read_file
from dinov2cli.data.source import ImageSource, LabelLists, hash_files
from dinov2cli.data.spec import DataSpec, is_local_hub, suggestion
from dinov2cli.errors import InputError, WorkError

_LABEL_NAMES = ("label", "cls")
HUB_CURE = "check name, split and connection; private sets need `hf auth login`"
_SPLITS = ("train", "test", "val", "valid", "validation", "dev")


class ColumnSource(ImageSource):
    """Rows of a table with one image column, and any others: what they mean, wherever the table lies.

    features: `datasets.Features` of all columns. base: folder against which relative paths in the table are read.
    """

    def __init__(self, spec: DataSpec, kind: str, features: datasets.Features, *, base: str) -> None:
        super().__init__(spec, kind)
        self._base = base
        self._roles = choose_columns(features, spec.options, spec.location)
        pixels = {name for name, feature in features.items() if is_pixels(feature)} | set(self._roles.values())
        self._others = {name: feature for name, feature in features.items() if name not in pixels}

    @abstractmethod
    def _cell(self, row: int, role: str) -> Any:
        """The cell that plays a role: bytes, a path, a dict of both, or None."""

    @abstractmethod
    def _arrow(self, names: list[str]) -> pa.Table:
        """Some of the columns without pixels, whole."""

    @abstractmethod
    def _image_names(self) -> list[str | None]:
        """File names that the image column gives beside or instead of the pixels; [] where it has none."""

    def has_role(self, role: str) -> bool:
        return role in self._roles

    def read(self, row: int, role: str = "image") -> bytes:
        value = self._cell(int(row), role)
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
            if name in self._others:
                yield self._arrow([name]).column(name).to_pylist()
        yield self._image_names()

    @cached_property
    def paths(self) -> list[str]:
        location = self.spec.partition("?")[0]
        return [f"{location}#{row}" for row in range(len(self))]

    @cached_property
    def columns(self) -> pa.Table:
        names = [name for name in self._others if name not in ("id", "label")]
        return self._arrow(names) if names else super().columns

    def _label_column(self) -> str | None:
        """Name of the column with the labels, if there is one. InputError if the one asked for is not there."""
        asked = self._options.get("label")
        names = list(self._others)
        if asked and asked not in names:
            raise InputError(
                f"{self.spec}: no column '{asked}' for labels{suggestion(asked, names)}; "
                f"its columns are {', '.join(names)}"
            )
        return asked or next((name for name in _LABEL_NAMES if name in names), None)

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None] | None:
        name = self._label_column()
        if name is None:
            return None
        column = self._arrow([name]).column(name)
        if is_lists(column.type):
            return None
        return integer_labels(column, _class_names(self._others[name]), f"{self.spec}, column '{name}'")

    def _own_label_lists(self) -> LabelLists | None:
        name = self._label_column()
        if name is None:
            return None
        column = self._arrow([name]).column(name)
        if not is_lists(column.type):
            return None
        feature = self._others[name]
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return list_labels(column, _class_names(inner), f"{self.spec}, column '{name}'")


def _class_names(feature: Any) -> list[str] | None:
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


class TableSource(ColumnSource):
    """Rows of a `datasets.Dataset`."""

    def __init__(self, spec: DataSpec, kind: str, dataset: datasets.Dataset, *, base: str, content_hash: str) -> None:
        super().__init__(spec, kind, dataset.features, base=base)
        self._hash = content_hash
        # One single-column view per role: reading a row must not fetch its neighbours' pixels.
        self._pixels = {role: _undecoded(dataset.select_columns([name]), name) for role, name in self._roles.items()}
        self._rest = dataset.select_columns(list(self._others))

    def __len__(self) -> int:
        return len(self._pixels["image"])

    def _cell(self, row: int, role: str) -> Any:
        return self._pixels[role][row][self._roles[role]]

    def _arrow(self, names: list[str]) -> pa.Table:
        return self._rest.with_format("arrow")[:].select(names)

    def _image_names(self) -> list[str | None]:
        return names_in_cells(self._pixels["image"].data.column(self._roles["image"]))

    def content_hash(self) -> str:
        return self._hash if not self._outside else hash_files([(self._hash, ""), *self._outside])

    @cached_property
    def _outside(self) -> list[tuple[str, str]]:
        """(path, file) of the images that the table only names: they may change while it stays as it is."""
        column = self._pixels["image"].data.column(self._roles["image"])
        if pa.types.is_struct(column.type):
            stored, column = (pc.struct_field(column, name) for name in ("bytes", "path"))
            column = pc.filter(column, pc.is_null(stored)) if stored.null_count else column.slice(0, 0)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return []
        return [(path, os.path.join(self._base, path)) for path in column.to_pylist() if path]


def open_parquet(spec: DataSpec, files: Sequence[str]) -> ImageSource:
    """Parquet files, in the order given, as one source: through an Arrow copy, or in place with `?stream=`.

    Raises:
        InputError: unreadable file, no image column.
    """
    if "stream" in spec.options:
        from dinov2cli.data.stream import asked_blocks, open_parquet_stream

        if keep := asked_blocks(spec):
            return open_parquet_stream(spec, files, keep)
    rows = 0
    for path in files:
        try:
            footer = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise not_parquet(path, error) from error
        features = datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
        choose_columns(features, spec.options, path)  # before anything is copied
        rows += footer.num_rows
    if not rows:
        raise InputError(f"{spec.location}: {len(files)} Parquet files without a row; give files that have some")
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
    """A dataset of the Hugging Face hub, or a local copy of one (`hf:./copy`); read in place with `?stream=`.

    Raises:
        InputError: not found, not reachable, unknown split, no image column.
    """
    if "stream" in spec.options:
        from dinov2cli.data.stream import asked_blocks, open_hub_stream

        if keep := asked_blocks(spec):
            return open_hub_stream(spec, keep)
    name, options = spec.location, spec.options
    local = is_local_hub(name)
    wanted = options.get("split", "train")
    with reading(f"hf:{name}", "a dataset of the Hugging Face hub", HUB_CURE):
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
            if is_no_space(chain):
                raise WorkError(
                    f"{location}: no space left for the Arrow copy in {datasets.config.HF_DATASETS_CACHE}; "
                    "free some, or set HF_DATASETS_CACHE to a larger disk"
                ) from error
            chain = chain.__cause__ or chain.__context__
        raise InputError(f"{location}: could not be read as {expected} ({first_line(error)}); {cure}") from error


def is_no_space(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def not_parquet(path: str, error: BaseException) -> InputError:
    """The error for a file that cannot be read as Parquet."""
    return InputError(f"{path}: not a readable Parquet file ({first_line(error)}); fetch or write it again")


def names_in_cells(column: pa.ChunkedArray) -> list[str | None]:
    """File names in an image column: the `path` of its structs or the strings themselves; [] where it has neither."""
    if pa.types.is_struct(column.type):
        return pc.struct_field(column, "path").to_pylist()
    return column.to_pylist() if pa.types.is_string(column.type) else []


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _undecoded(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    if isinstance(dataset.features[column], datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _escape(path: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)  # `datasets` globs what it is given
