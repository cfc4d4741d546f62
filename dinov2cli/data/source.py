"""`ImageSource`: a set of images with ids, labels and columns, and `open_source`, which makes one from a DATA string.

A source is map-style: any row can be read at any time from any process, so shuffles are exact and resumable. It
pickles (for loader workers), leaving behind the lists that only the main process needs.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from dinov2cli.data.spec import DataSpec, parse_spec
from dinov2cli.errors import InputError

PIXEL_ROLES = ("image", "mask", "depth")


@dataclass(frozen=True)
class LabelLists:
    """Labels of images that may have several, or none of those there are: one list per row, None where a row was never
    labelled; class c is `names[c]`, where names are known."""

    lists: list[list[int] | None]
    names: list[str] | None

    def take(self, rows: Iterable[int]) -> "LabelLists":
        """The lists of some rows, in the order asked for."""
        return LabelLists([self.lists[row] for row in rows], self.names)

    @property
    def given(self) -> np.ndarray:
        """bool [n]: whether a row was labelled."""
        return np.array([some is not None for some in self.lists], dtype=bool)


class ImageSource(ABC):
    """Base of every source. Subclasses give `__len__`, `read`, `ids`, `paths` and what else they know.

    spec: the DATA string that opens this source again from any directory.
    kind: folder | tar | parquet | list | hub | selection | embeddings | demo.
    """

    def __init__(self, spec: DataSpec, kind: str) -> None:
        self.spec = spec.canonical()
        self.kind = kind
        self._options = dict(spec.options)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int, role: str = "image") -> bytes:
        """Bytes of the image file of one row; `role` may also be 'mask' or 'depth' where `has_role` says so.

        Raises:
            BadImage: the file is missing, unreadable or empty.
        """

    @property
    @abstractmethod
    def ids(self) -> list[str]:
        """Unique stable names of the rows."""

    @property
    @abstractmethod
    def paths(self) -> list[str]:
        """Where each image is, for people to read (`image_path` in outputs)."""

    def name(self, row: int) -> str:
        """Id of one row without building the list of all; used in messages from workers."""
        return self.ids[row]

    @cached_property
    def _labelling(self) -> tuple[np.ndarray, list[str] | None] | None:
        if self._options.get("label") == "folder":
            return labels_from_folders(self.ids, self.spec)
        return self._own_labels()

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None] | None:
        return None

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [n], -1 where a row has none; None when the source has no labels."""
        return None if self._labelling is None else self._labelling[0]

    @property
    def label_names(self) -> list[str] | None:
        """Name of each label, when known."""
        return None if self._labelling is None else self._labelling[1]

    @cached_property
    def label_lists(self) -> LabelLists | None:
        """Several labels per image, where the labels are a column of lists; `labels` is None then."""
        return None if self._options.get("label") == "folder" else self._own_label_lists()

    def _own_label_lists(self) -> LabelLists | None:
        return None

    @cached_property
    def columns(self) -> pa.Table:
        """The remaining columns (no pixels, no `id`, no `label`), row by row beside the images."""
        return pa.table({"_": pa.nulls(len(self))}).drop_columns(["_"])

    def column(self, role: str) -> pa.ChunkedArray | None:
        """The column playing a role ('group', 'is_query', …): the one named by `?role=name`, else one of that name.

        Raises:
            InputError: the column named in the spec does not exist.
        """
        asked = self._options.get(role)
        name = asked or role
        if name in self.columns.column_names:
            return self.columns.column(name)
        if asked:
            raise InputError(
                f"{self.spec}: no column '{asked}' for {role}; "
                f"its columns are {', '.join(self.columns.column_names) or 'none'}"
            )
        return None

    def has_role(self, role: str) -> bool:
        """Whether `read(row, role)` has something to read."""
        return role == "image"

    def origin(self, row: int) -> tuple[str, int]:
        """(DATA string, row) of the image where it really lies; for a selection that is the source behind it."""
        return self.spec, row

    @property
    def options(self) -> dict[str, str]:
        """What stands after the question mark of its DATA string."""
        return dict(self._options)

    @property
    def behind(self) -> Sequence["ImageSource"]:
        """The sources whose images these are, where they are not its own."""
        return ()

    @property
    def blocks(self) -> np.ndarray | None:
        """int64 [b+1], from 0 to n: boundaries of rows that lie together and are read cheaply one after another.

        Tar shards, row groups of a stream; None where any order of reading costs the same. See `dinov2cli.data.order`.
        """
        return None

    @property
    def keep(self) -> int | None:
        """Number of blocks that stay ready for reading at once; None where all do."""
        return None

    def fetch(self, block: int) -> None:
        """Make the rows of one block ready ahead of their use; `read` does the same when it finds them not ready.

        May be called from a thread in the background, beside `read` in any process.

        Raises:
            WorkError: the block cannot be fetched. `read` of its rows will say the same.
        """
        del block  # rows of most sources are always ready

    @abstractmethod
    def content_hash(self) -> str:
        """Hex digest that changes when the data change; cheap: reads names, sizes and times, not pixels."""

    def fingerprint(self) -> dict[str, Any]:
        """What a manifest records about an input: spec, kind, rows and hash."""
        return {"spec": self.spec, "kind": self.kind, "rows": len(self), "hash": self.content_hash()}

    def __getstate__(self) -> dict[str, Any]:
        heavy = ("ids", "paths", "columns", "_labelling", "label_lists")
        return {key: value for key, value in self.__dict__.items() if key not in heavy}


def open_source(spec: str | DataSpec, *, label_from: str | None = None) -> ImageSource:
    """Open the images that a DATA string names.

    Args:
        spec: DATA string, see `dinov2cli.data.spec`.
        label_from: 'folder' takes labels from folder names, as `?label=folder` does.

    Raises:
        InputError: nothing there, no images in it, or a column that does not exist.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    if label_from is not None:
        if label_from != "folder":
            raise ValueError(f"label_from is None or 'folder', not {label_from!r}")
        parsed = DataSpec(parsed.kind, parsed.location, {**parsed.options, "label": "folder"})
    return _open(parsed)


def _open(spec: DataSpec) -> ImageSource:
    # Imported here so that each kind loads only what it needs: `datasets` takes a second to import.
    if spec.kind == "demo":
        from dinov2cli.data.demo import open_demo

        return open_demo(spec)
    if spec.kind in ("selection", "embeddings"):
        from dinov2cli.data.derived import open_embedded, open_selected

        return open_selected(spec) if spec.kind == "selection" else open_embedded(spec)
    if spec.kind == "tar":
        from dinov2cli.data.tar import open_tar

        return open_tar(spec, spec.files())
    if spec.kind == "hub":
        from dinov2cli.data.tables import open_hub

        return open_hub(spec)
    if spec.kind == "parquet":
        from dinov2cli.data.tables import open_parquet

        return open_parquet(spec, spec.files())
    from dinov2cli.data.files import open_folder, open_list

    return open_folder(spec) if spec.kind == "folder" else open_list(spec)


def labels_from_folders(ids: Sequence[str], where: str) -> tuple[np.ndarray, list[str]]:
    """Labels from the first folder of each id ('cat/1.jpg' → 'cat'); -1 for images outside any folder.

    Raises:
        InputError: no id has a folder.
    """
    folders = [name.split("/", 1)[0] if "/" in name else None for name in ids]
    names = sorted({folder for folder in folders if folder is not None})
    if not names:
        raise InputError(
            f"{where}: label=folder was asked but no image lies in a sub-folder; make one folder per label"
        )
    number = {folder: index for index, folder in enumerate(names)}
    return np.array([-1 if folder is None else number[folder] for folder in folders], dtype=np.int64), names


def hash_files(files: Iterable[tuple[str, str | bytes]]) -> str:
    """Digest of (name, path) pairs with size and modification time; a missing file counts as such."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            status = os.stat(path)
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{name}\0missing\n".encode())
    return digest.hexdigest()
