"""Sources that point to the images of other sources: selections and embeddings directories."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from dinov2cli.artifacts.embeddings import open_embeddings
from dinov2cli.artifacts.selection import KEPT_COLUMNS, Selection, open_selection
from dinov2cli.data.columns import integer_labels, is_lists, list_labels
from dinov2cli.data.source import ImageSource, LabelLists, open_source
from dinov2cli.data.spec import DataSpec, suggestion
from dinov2cli.errors import InputError

_STRUCTURE = ("id", "image_path", "source", "row", "width", "height", "sha256", "label")


class DerivedSource(ImageSource):
    """Rows that lie in one or more other sources.

    table: one row per image with `id`, `image_path` and any other columns.
    which, rows: int64 [n] each: number of the source in `sources`, and the row there.
    """

    def __init__(
        self, spec: DataSpec, table: pa.Table, sources: list[ImageSource], which: np.ndarray, rows: np.ndarray
    ) -> None:
        super().__init__(spec, spec.kind)
        self._sources = sources
        self._which = which
        self._rows = rows
        self._table = table

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        return self._sources[self._which[row]].name(int(self._rows[row]))

    @property
    def behind(self) -> Sequence[ImageSource]:
        return self._sources

    def has_role(self, role: str) -> bool:
        return all(source.has_role(role) for source in self._sources)

    def read(self, row: int, role: str = "image") -> bytes:
        return self._sources[self._which[row]].read(int(self._rows[row]), role)

    def origin(self, row: int) -> tuple[str, int]:
        return self._sources[self._which[row]].origin(int(self._rows[row]))

    @property
    def blocks(self) -> np.ndarray | None:
        return None if self._block_map is None else self._block_map[0]

    @property
    def keep(self) -> int | None:
        return min((source.keep for source in self._sources if source.keep is not None), default=None)

    def fetch(self, block: int) -> None:
        if self._block_map is not None:
            source, number = self._block_map[1][block]
            self._sources[source].fetch(int(number))

    @cached_property
    def _block_map(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Boundaries of the rows here that share a block of a source, and (source, block) of each; None where a source
        has no blocks, or where the rows do not follow them."""
        found = [source.blocks for source in self._sources]
        place = np.stack([self._which, np.empty_like(self._rows)], axis=1)
        for number, boundaries in enumerate(found):
            if boundaries is None:
                return None
            here = self._which == number
            place[here, 1] = np.searchsorted(boundaries, self._rows[here], side="right") - 1
        step = np.diff(place, axis=0)
        if ((step[:, 0] < 0) | ((step[:, 0] == 0) & (step[:, 1] < 0))).any():
            return None
        starts = np.concatenate(([0], np.flatnonzero(step.any(axis=1)) + 1)).astype(np.int64)
        return np.append(starts, len(self._rows)), place[starts]

    @cached_property
    def ids(self) -> list[str]:
        return [str(value) for value in self._table.column("id").to_pylist()]

    @cached_property
    def paths(self) -> list[str]:
        return [str(value) for value in self._table.column("image_path").to_pylist()]

    @cached_property
    def columns(self) -> pa.Table:
        names = [name for name in self._table.column_names if name not in _STRUCTURE]
        return self._table.select(names) if names else super().columns

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None] | None:
        asked = self._options.get("label")
        names = self._table.column_names
        if asked and asked not in names:
            raise InputError(
                f"{self.spec}: no column '{asked}' for labels{suggestion(asked, names)}; "
                f"its columns are {', '.join(names)}"
            )
        own = [source.labels for source in self._sources]
        # The sources know the names of their labels, a column of numbers does not; several sources must agree on them.
        if not asked and own and all(values is not None for values in own):
            label_names = self._sources[0].label_names
            if all(source.label_names == label_names for source in self._sources):
                labels = np.empty(len(self), dtype=np.int64)
                for number, values in enumerate(own):
                    here = self._which == number
                    labels[here] = np.asarray(values)[self._rows[here]]
                return labels, label_names
        if not asked and "label" not in names:
            return None
        if is_lists(self._table.column(asked or "label").type):
            return None
        return integer_labels(self._table.column(asked or "label"), None, f"{self.spec}, column '{asked or 'label'}'")

    def _own_label_lists(self) -> LabelLists | None:
        name = self._options.get("label") or "label"
        if name in self._table.column_names:
            column = self._table.column(name)
            return list_labels(column, None, f"{self.spec}, column '{name}'") if is_lists(column.type) else None
        own = [found for source in self._sources if (found := source.label_lists) is not None]
        if name != "label" or not own or len(own) < len(self._sources):
            return None
        if any(found.names != own[0].names for found in own):
            return None
        rows = zip(self._which.tolist(), self._rows.tolist(), strict=True)
        return LabelLists([own[which].lists[row] for which, row in rows], own[0].names)

    def content_hash(self) -> str:
        digest = hashlib.sha256(json.dumps([source.content_hash() for source in self._sources]).encode())
        digest.update(self._which.tobytes())
        digest.update(self._rows.tobytes())
        return digest.hexdigest()


class PackedSource(DerivedSource):
    """The kept rows of a selection that holds its images itself: pixels from there, all else as in the table.

    packed: the images below the selection, rows: int64 [n], where each row of the table is among them.
    label_names: name of each value of the column `label`, when known.
    """

    def __init__(
        self, spec: DataSpec, table: pa.Table, packed: ImageSource, rows: np.ndarray, label_names: list[str] | None
    ) -> None:
        super().__init__(spec, table, [packed], np.zeros(len(rows), dtype=np.int64), rows)
        self._label_names = label_names

    @property
    def behind(self) -> Sequence[ImageSource]:
        return self._sources

    def has_role(self, role: str) -> bool:
        return role == "image"

    def origin(self, row: int) -> tuple[str, int]:
        return self.spec, row  # what is made from it must not need the originals either

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None] | None:
        if self._options.get("label"):
            return super()._own_labels()
        if "label" not in self._table.column_names:
            return None
        return integer_labels(self._table.column("label"), self._label_names, f"{self.spec}, column 'label'")


def open_selected(spec: DataSpec) -> ImageSource:
    """The kept images of a selection, read from the sources it points to, or from its own packed images if it has any.

    Raises:
        InputError: unfinished, empty, a source has moved or changed since, or packed images are missing.
    """
    path = Path(spec.location)
    selection = open_selection(path)
    kept = selection.kept
    absent = [name for name in KEPT_COLUMNS if name not in kept.column_names]
    if absent:
        raise InputError(
            f"{path}/kept.parquet: no column {', '.join(absent)}; make the selection again with --overwrite"
        )
    if not kept.num_rows:
        raise InputError(f"{path}: the selection kept no image; make it again with a wider choice")
    return (
        _pointing(spec, kept, path, "make the selection again")
        if selection.packed is None
        else _packed(spec, selection)
    )


def open_embedded(spec: DataSpec) -> ImageSource:
    """The images behind an embeddings directory: its rows, read from the input that its manifest names.

    Raises:
        InputError: unfinished, no input recorded, or the input has moved or changed since.
    """
    path = Path(spec.location)
    embeddings = open_embeddings(path)
    table = embeddings.metadata()
    if {"source", "row"} <= set(table.column_names):
        return _pointing(spec, table, path, "run `dinov2 embed` again")
    # Made by another program or an older version: the rows are found by their ids in the input of the manifest.
    recorded = [str(entry["spec"]) for entry in embeddings.manifest.inputs if "rows" in entry and "spec" in entry]
    if not recorded:
        raise InputError(f"{path}: its manifest names no images; give the images themselves as DATA")
    source = _open_behind(recorded[0], path)
    row_of = {name: row for row, name in enumerate(source.ids)}
    names = [str(value) for value in table.column("id").to_pylist()]
    gone = [name for name in names if name not in row_of]
    if gone:
        raise InputError(
            f"{path}: {len(gone)} of its {len(names)} images are no longer in {recorded[0]} (first: {gone[0]}); "
            "the images changed since: run `dinov2 embed` again"
        )
    rows = np.array([row_of[name] for name in names], dtype=np.int64)
    return DerivedSource(spec, table, [source], np.zeros(len(rows), dtype=np.int64), rows)


def _packed(spec: DataSpec, selection: Selection) -> PackedSource:
    assert selection.packed is not None
    kept, place = selection.kept, selection.packed_path
    cure = "copy it there again, or make the selection again with --overwrite"
    if not place.is_dir():
        raise InputError(f"{place} is missing, which holds the packed images of {selection.path}; {cure}")
    if missing := selection.missing_shards():
        raise InputError(f"{selection.path / missing[0]} is missing or not as long as it was written; {cure}")
    packed = open_source(DataSpec("folder", str(place)))
    if len(packed) != kept.num_rows:
        raise InputError(f"{place} holds {len(packed)} images, expected the {kept.num_rows} of the selection; {cure}")
    rows = np.arange(kept.num_rows, dtype=np.int64)
    if selection.packed.format == "folder":  # loose files come in the order of their names
        row_of = {name: row for row, name in enumerate(packed.ids)}
        names = selection.packed.files.to_pylist()
        if absent := [name for name in names if name not in row_of]:
            raise InputError(f"{place}: {len(absent)} packed images are missing (first: {absent[0]}); {cure}")
        rows = np.array([row_of[name] for name in names], dtype=np.int64)
    return PackedSource(spec, kept, packed, rows, selection.packed.label_names)


def _open_behind(text: str, path: Path) -> ImageSource:
    try:
        return open_source(text)
    except InputError as error:
        raise InputError(f"{path} points to images that cannot be opened: {error}") from error


def _pointing(spec: DataSpec, table: pa.Table, path: Path, cure: str) -> DerivedSource:
    """A table with `source` and `row` as a source of images, after a look at whether those still are what they were."""
    encoded = table.column("source").combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    sources = [_open_behind(str(text), path) for text in encoded.dictionary.to_pylist()]
    which = encoded.indices.to_numpy().astype(np.int64)
    rows = table.column("row").to_numpy().astype(np.int64)
    recorded = table.column("image_path").to_pylist()
    names = [source.paths for source in sources]
    # A row number means nothing once files were added or removed: compare the recorded paths with today's.
    for number, row, was in zip(which.tolist(), rows.tolist(), recorded, strict=True):
        now = names[number][row] if 0 <= row < len(names[number]) else "nothing"
        if now != was:
            raise InputError(
                f"{path}: row {row} of {sources[number].spec} was {was} and is {now} now; "
                f"the images changed since: {cure}"
            )
    return DerivedSource(spec, table, sources, which, rows)
