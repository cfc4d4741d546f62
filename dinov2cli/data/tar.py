"""WebDataset shards: samples in .tar files, a sample being consecutive members that share a name up to the first dot.

The shards are indexed once (names, offsets and the small text members) through `datasets`, which caches the index;
pixels are read in place by offset. `datasets`' own webdataset builder would copy every pixel into its cache, unpack
.npy and .pth members on the way, and refuse shards in which the samples differ in their extensions.

Nothing is unpacked, so no member name can do harm; ids are relative all the same ('../x.jpg' and '/x.jpg' are 'x'), for
what is later written under them. What is an image by its name but no plain member is a sample that cannot be read.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.data.bad import BadImage
from dinov2cli.data.columns import integer_labels
from dinov2cli.data.files import printable
from dinov2cli.data.source import PIXEL_ROLES, ImageSource, hash_files
from dinov2cli.data.spec import IMAGE_EXTENSIONS, DataSpec, suggestion
from dinov2cli.data.tables import reading
from dinov2cli.errors import InputError

_MAX_OPEN_FILES = 64
_MAX_TEXT_BYTES = 1 << 20
_TEXT = ("txt", "text", "cls", "json")
_INDEX_VERSION = 2  # of what `_index` yields: an index that `datasets` cached for an earlier one is not used
# In place of the offset of a member without pixels of its own; -1 is for no member at all.
_LINK, _SPARSE, _SPECIAL = -2, -3, -4
_NO_PIXELS = {
    _LINK: "a link inside the tar; pack the files themselves with `tar --dereference --hard-dereference`",
    _SPARSE: "a sparse member, which cannot be read in place; pack it without `--sparse`",
    _SPECIAL: "not a file but a pipe or a device",
}
_FEATURES = datasets.Features(
    {
        "shard": datasets.Value("int32"),
        "key": datasets.Value("string"),
        "members": datasets.List(
            {
                "extension": datasets.Value("string"),
                "offset": datasets.Value("int64"),
                "size": datasets.Value("int64"),
            }
        ),
        **{name: datasets.Value("string") for name in _TEXT},
    }
)


class TarSource(ImageSource):
    """Samples of tar shards that have an image; `?image=jpg` picks the member, else the first image of a sample."""

    def __init__(self, spec: DataSpec, files: Sequence[str], index: datasets.Dataset) -> None:
        super().__init__(spec, "tar")
        self._files = list(files)
        roles = {role: spec.options[role] for role in PIXEL_ROLES if role in spec.options}
        self._roles: dict[str, str | None] = dict.fromkeys(["image", *roles])
        self._roles.update(roles)
        table = index.data.table if hasattr(index.data, "table") else index.data
        offsets = {role: _locate(table, extension, roles) for role, extension in self._roles.items()}
        has_image = offsets["image"][:, 1] >= 0
        if not has_image.any():
            _raise_no_images(spec, table)
        self._offsets = {role: found[has_image] for role, found in offsets.items()}
        self._table = table.filter(pa.array(has_image)).drop_columns(["members"])
        self._shards = self._table.column("shard").to_numpy()
        self._handles: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def blocks(self) -> np.ndarray:
        return np.searchsorted(self._shards, np.arange(len(self._files) + 1))

    def has_role(self, role: str) -> bool:
        return role in self._roles

    def name(self, row: int) -> str:
        return f"{self._files[self._shards[row]]}/{self._table.column('key')[int(row)]}"

    def read(self, row: int, role: str = "image") -> bytes:
        offset, size = (int(value) for value in self._offsets[role][row])
        if size < 0:
            raise BadImage(self.name(row), f"the sample has no {role}")
        if offset < 0:
            raise BadImage(self.name(row), _NO_PIXELS[offset])
        try:
            data = os.pread(self._handle(int(self._shards[row])), size, offset)
        except OSError as error:
            raise BadImage(self.name(row), f"cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise BadImage(self.name(row), "truncated file")
        return data

    def _handle(self, shard: int) -> int:
        if shard not in self._handles:
            if len(self._handles) >= _MAX_OPEN_FILES:
                os.close(self._handles.pop(next(iter(self._handles))))
            self._handles[shard] = os.open(self._files[shard], os.O_RDONLY)
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_handles": {}}  # file descriptors belong to one process

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    @cached_property
    def ids(self) -> list[str]:
        keys = self._table.column("key").to_pylist()
        if len(set(keys)) == len(keys):
            return keys
        shards = [os.path.splitext(os.path.basename(file))[0] for file in self._files]
        names = [f"{shards[shard]}/{key}" for shard, key in zip(self._shards, keys, strict=True)]
        if len(set(names)) == len(names):
            return names
        return [f"{name}#{row}" for row, name in enumerate(names)]

    @cached_property
    def paths(self) -> list[str]:
        return [self.name(row) for row in range(len(self))]

    @cached_property
    def columns(self) -> pa.Table:
        """`key`, `txt` where present, and the top-level plain values of each sample's JSON (img2dataset's layout)."""
        table = pa.table({"key": self._table.column("key")})
        for name in ("txt", "text"):
            if self._table.column(name).null_count < len(self):
                table = table.append_column(name, self._table.column(name))
        for name, values in _json_columns(self._table.column("json").to_pylist()).items():
            if name not in (*table.column_names, "id", "label"):
                table = table.append_column(name, values)
        return table

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None] | None:
        asked = self._options.get("label")
        if asked not in (None, "cls"):
            names = ["cls", *_json_columns(self._table.column("json").to_pylist())]
            if asked not in names:
                raise InputError(
                    f"{self.spec}: no column '{asked}' for labels{suggestion(asked, names)}; "
                    f"its columns are {', '.join(names)}"
                )
            values = _json_columns(self._table.column("json").to_pylist())[asked]
            return integer_labels(pa.chunked_array([values]), None, f"{self.spec}, column '{asked}'")
        texts = self._table.column("cls").to_pylist()
        if all(text is None for text in texts):
            return None
        try:
            return np.array([-1 if text is None else int(text) for text in texts], dtype=np.int64), None
        except ValueError:
            return integer_labels(pa.chunked_array([pa.array(texts)]), None, self.spec)

    def content_hash(self) -> str:
        return hash_files((os.path.basename(file), file) for file in self._files)


def open_tar(spec: DataSpec, files: Sequence[str]) -> ImageSource:
    """Tar shards, in the order given, as one source.

    Raises:
        InputError: not a tar, cut short, damaged, compressed, or without images.
    """
    absolute = [os.path.abspath(file) for file in files]
    for file in absolute:
        if file.lower().endswith((".gz", ".tgz")):
            raise InputError(
                f"{file}: compressed shards cannot be read at random; unpack it first with `gunzip {file}`"
            )
        if not os.path.isfile(file):
            raise InputError(f"{file}: not a file; shards are read at random, a pipe or a folder cannot be")
    # One entry per shard; size and time are in it only so that the cached index of a changed file is not used.
    shards = [(number, file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for number, file in enumerate(absolute)]
    with reading(spec.location, "WebDataset shards", "fetch or write them again"):
        index = datasets.Dataset.from_generator(
            _index, features=_FEATURES, gen_kwargs={"shards": shards, "version": _INDEX_VERSION}
        )
    return TarSource(spec, absolute, index)


def _index(shards: list[tuple[int, str, int, int]], version: int) -> Iterator[dict[str, Any]]:
    """One row per sample. `datasets` may call this with any part of the shards: each carries its number."""
    del version
    for number, path, _, _ in shards:
        empty = True
        try:
            with tarfile.open(path, "r:") as tar:
                for sample in _samples(number, path, tar):
                    empty = False
                    yield sample
        except tarfile.ReadError as error:
            raise InputError(f"{path}: not a whole tar file ({error}); fetch or write it again") from error
        if empty:
            raise InputError(
                f"{path}: no files in the tar; expected WebDataset samples such as 000001.jpg + 000001.json"
            )


def _samples(shard: int, path: str, tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    size = os.path.getsize(path)
    sample: dict[str, Any] = {}
    current = None
    seen: set[str] = set()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        if member.isdir():
            continue
        folder, _, base = printable(member.name.encode("utf-8", "surrogateescape")).rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or "__MACOSX" in folder:
            continue
        offset = _offset(member)
        if offset >= 0 and offset + member.size > size:
            raise tarfile.ReadError(f"it ends inside {member.name}")
        extension = extension.lower()
        # The same name again is another image: tar files may be appended to.
        if current != (folder, stem) or extension in seen:
            if sample:
                yield sample
            sample = {"shard": shard, "key": _key(folder, stem), "members": [], **dict.fromkeys(_TEXT)}
            current, seen = (folder, stem), set()
        seen.add(extension)
        if extension in _TEXT and offset >= 0 and member.size <= _MAX_TEXT_BYTES:
            content = tar.extractfile(member)
            assert content is not None
            sample[extension] = content.read().decode("utf-8", "replace").strip()
        kept_size = member.size if offset >= 0 else 0
        sample["members"].append({"extension": extension, "offset": offset, "size": kept_size})
    _check_end(tar)
    if sample:
        yield sample


def _offset(member: tarfile.TarInfo) -> int:
    if member.islnk() or member.issym():
        return _LINK
    if not member.isfile():
        return _SPECIAL
    return _SPARSE if member.issparse() else member.offset_data


def _key(folder: str, stem: str) -> str:
    return "/".join([*(part for part in folder.split("/") if part not in ("", ".", "..")), stem])


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end of the archive, which would lose all images behind it in silence."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")


def _locate(table: pa.Table, extension: str | None, roles: dict[str, str]) -> np.ndarray:
    """int64 [n, 2]: offset and size of the member of every sample with that extension; (-1, -1) where it has none.

    Without an extension: the first member that is an image and plays no other role; 'jpg' before 'mask.jpg'.
    """
    found = np.full((len(table), 2), -1, dtype=np.int64)
    members = table.column("members").combine_chunks()
    if isinstance(members, pa.ChunkedArray):  # no rows at all
        return found
    sample = pc.list_parent_indices(members).to_numpy()
    flat = members.flatten()
    codes = flat.field("extension").dictionary_encode()
    rank_of = np.array([_rank(name, extension, roles) for name in codes.dictionary.to_pylist()], dtype=np.int64)
    if not len(rank_of):
        return found
    rank = rank_of[codes.indices.to_numpy()]
    order = np.lexsort((np.arange(len(rank)), rank, sample))
    order = order[rank[order] >= 0]
    first = np.unique(sample[order], return_index=True)[1]
    chosen = order[first]
    found[sample[chosen], 0] = flat.field("offset").to_numpy()[chosen]
    found[sample[chosen], 1] = flat.field("size").to_numpy()[chosen]
    return found


def _rank(name: str, asked: str | None, roles: dict[str, str]) -> int:
    if asked is not None:
        return 0 if name == asked.lower() else -1
    if name in roles.values() or "." + name.rpartition(".")[2] not in IMAGE_EXTENSIONS:
        return -1
    return name.count(".")


def _raise_no_images(spec: DataSpec, table: pa.Table) -> None:
    extensions = Counter(name for row in table.column("members").to_pylist() for name in (m["extension"] for m in row))
    found = ", ".join(f"{count} .{name}" for name, count in extensions.most_common(5))
    asked = spec.options.get("image")
    wanted = f"no member '.{asked}' (asked by ?image={asked})" if asked else "no images"
    raise InputError(
        f"{spec.location}: {wanted} in the tar, found {found}; expected samples such as 000001.jpg + 000001.json"
    )


def _json_columns(texts: list[str | None]) -> dict[str, pa.Array]:
    """Top-level values of JSON objects as columns; what is nested or of mixed types stays as JSON text."""
    if all(text is None for text in texts):
        return {}
    rows: list[dict[str, Any]] = []
    for text in texts:
        try:
            value = json.loads(text) if text is not None else {}
        except ValueError:
            value = {}
        rows.append(value if isinstance(value, dict) else {})
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        plain = len(kinds) == 1 and kinds <= {str, int, float, bool}
        try:
            columns[name] = pa.array(values if plain else [None if v is None else json.dumps(v) for v in values])
        except (pa.ArrowInvalid, OverflowError):
            columns[name] = pa.array([None if v is None else json.dumps(v) for v in values])
    return columns
