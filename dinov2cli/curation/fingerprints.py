"""Digests and perceptual hashes of the images of a source, in one pass over the files and a second one over a few."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.prints import Chunk, fingerprint_files, join_chunks
from dinov2cli.curation.tables import pool_from_metadata
from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.decode import decode_image
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.hamming import HashTable, near_twins, stack_hashes
from dinov2cli.search.hashing import pixel_digest

_CHUNK = 1024
_FILES = 16
"""Files that one thread takes at a time."""

_VERSION = 1  # raise it when fingerprints of the same file change


class Images(Protocol):
    """What of an image source is used here (see data/source.py)."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def paths(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def read(self, row: int, /) -> bytes: ...

    def origin(self, row: int, /) -> tuple[str, int]: ...


@dataclass(frozen=True)
class Fingerprints:
    """What tells the copies among N images: width, height [N] as displayed (0 if unreadable), sha256 of the files (None
    if unreadable), sharpness [N], hashes, and the reason for each unreadable row.

    pixels: digests of the decoded pixels, None for what cannot equal another image because no other of its size has a
    hash near its own; see `with_pixel_digests`.
    """

    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    sha256: list[str | None]
    pixels: list[str | None]
    sharpness: npt.NDArray[np.float32]
    hashes: HashTable
    unreadable: dict[int, str]

    def __len__(self) -> int:
        return len(self.sha256)

    def exact_only(self) -> "Fingerprints":
        """The same without perceptual hashes: only equal bytes and equal pixels will match."""
        return replace(self, hashes=stack_hashes([None] * len(self)))


def fingerprint_images(
    source: Images,
    *,
    workers: int = 1,
    bad: BadImages | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    store: Store | None = None,
    name: str = "fingerprints",
) -> Fingerprints:
    """Read every file once and keep its digest, size, sharpness and perceptual hash (about 0.7 KB an image), then
    decode in full, for their pixel digests, those that may be pixel by pixel another one.

    For the hash a JPEG is decoded at a quarter or an eighth of its size, which tells damage as well. Files are read in
    order by one thread and decoded by `workers` threads; the ranks share them, and all get the whole. An image that
    cannot be read is a row without fingerprints, named in `unreadable` and counted in `bad`, which may raise InputError
    when there are too many. `store` keeps what is finished, under `name`.
    """
    bad = bad if bad is not None else BadImages()
    total = len(source)
    stage = store.stage(name, {"images": total, "block": _CHUNK, "version": _VERSION}) if store else None
    chunks: list[Chunk] = []
    with ThreadPoolExecutor(max(1, workers)) as threads:

        def chunk(start: int) -> Arrays:
            files = (_read(source, i) for i in range(start, min(start + _CHUNK, total)))
            return join_chunks(list(_in_turn(threads, files, 2 * workers + 2)))

        start = 0
        for found in over_blocks(kept(chunk, stage), total, _CHUNK, progress=progress, ranks=ranks):
            chunks.append(dict(found))
            for i in np.flatnonzero(found["reason"] != "").tolist():
                bad.add(source.ids[start + i], str(found["reason"][i]))
            start += len(found["reason"])
            bad.check(total)
    prints = _assembled(join_chunks(chunks), total)
    return with_pixel_digests(prints, source, workers=workers, ranks=ranks, store=store, name=name)


def with_pixel_digests(
    prints: Fingerprints,
    source: Images,
    *,
    other: Fingerprints | None = None,
    workers: int = 1,
    ranks: Ranks = ALONE,
    store: Store | None = None,
    name: str = "fingerprints",
) -> Fingerprints:
    """Add the pixel digests of the images of `prints` that may equal one of `other`: of `prints` itself if None.

    Those are the images that have the width and height of another one and, with it, a hash within 16 bits (the same
    pixels may come from a reduced JPEG and from a PNG) and nearly the same thumbnail, or no hash at all. Of exact
    copies among them one is decoded. To compare two sets by pixels, each is completed with the other.
    """
    rows = _may_be_equal(prints, other)
    rows = rows[[prints.pixels[i] is None for i in rows.tolist()]]
    _, first, back = np.unique([prints.sha256[i] or "" for i in rows.tolist()], return_index=True, return_inverse=True)
    todo = rows[np.sort(first)]
    key = {"rows": todo.tolist(), "block": _CHUNK, "version": _VERSION}
    stage = store.stage(f"{name}-pixels", key) if store else None
    digests: list[str] = []
    with ThreadPoolExecutor(max(1, workers)) as threads:

        def chunk(start: int) -> Arrays:
            here = todo[start : start + _CHUNK].tolist()
            found: list[str] = []
            for first in range(0, len(here), 2 * workers):  # whole images: few are held at once
                files = [_read(source, i) for i in here[first : first + 2 * workers]]
                found += threads.map(_pixels, files)
            return {"digest": np.array(found, dtype="U64")}

        for block in over_blocks(kept(chunk, stage), len(todo), _CHUNK, ranks=ranks):
            digests += block["digest"].tolist()
    known = dict(zip(todo.tolist(), digests, strict=True))
    pixels = list(prints.pixels)
    for row, like in zip(rows.tolist(), rows[first][back].tolist(), strict=True):
        pixels[row] = known[like] or None
    return replace(prints, pixels=pixels)


def pool_from_images(source: Images, fingerprints: Fingerprints | None = None) -> pa.Table:
    """The pool table of an image source: id, image_path, source, row, then its labels and own columns, and sizes
    and sharpness where fingerprints are given."""
    origins = [source.origin(i) for i in range(len(source))]
    columns: dict[str, pa.Array] = {
        "id": pa.array(list(source.ids), pa.string()),
        "image_path": pa.array(list(source.paths), pa.string()),
        "source": pa.array([o[0] for o in origins], pa.string()),
        "row": pa.array([o[1] for o in origins], pa.int64()),
    }
    if fingerprints is not None:
        columns["width"] = pa.array(fingerprints.width)
        columns["height"] = pa.array(fingerprints.height)
        columns["sha256"] = pa.array(fingerprints.sha256, pa.string())
        columns["sharpness"] = pa.array(fingerprints.sharpness)
    labels = getattr(source, "labels", None)
    if labels is not None:
        columns["label"] = pa.array(np.asarray(labels), pa.int64())
    rest = getattr(source, "columns", None)
    if rest is not None:
        for name in rest.column_names:
            columns.setdefault(name, rest.column(name))
    return pool_from_metadata(pa.table(columns), source="")


def _assembled(rows: Chunk, total: int) -> Fingerprints:
    readable = rows["reason"] == ""
    hexes = rows["sha256"].tobytes().hex()
    owner = np.repeat(np.arange(total, dtype=np.int64), rows["views"])
    return Fingerprints(
        width=rows["width"],
        height=rows["height"],
        sha256=[hexes[64 * i : 64 * i + 64] if ok else None for i, ok in enumerate(readable.tolist())],
        pixels=[None] * total,
        sharpness=rows["sharpness"],
        hashes=HashTable(total, owner, rows["kind"], rows["bits"], rows["thumbs"]),
        unreadable={i: str(rows["reason"][i]) for i in np.flatnonzero(~readable).tolist()},
    )


def _may_be_equal(prints: Fingerprints, other: Fingerprints | None) -> npt.NDArray[np.int64]:
    """Rows of `prints` that some (other) row of `other` may equal pixel by pixel, sorted."""
    size, theirs = (p.width.astype(np.int64) << 32 | p.height for p in (prints, other or prints))
    code, ours = _distinct(prints)
    single = ours if other is None else _distinct(other)[1]
    flat, flat_theirs = _without_hash(prints, ours), _without_hash(other or prints, single)
    tables = [p.hashes.views(np.isin(p.hashes.owner, s)) for p, s in ((prints, ours), (other or prints, single))]
    rows, found = near_twins(*tables, itself=other is None)
    rows = rows[size[rows] == theirs[found]]
    sizes, counts = np.unique(theirs[flat_theirs], return_counts=True)
    common = sizes[counts > (1 if other is None else 0)]
    rows = np.union1d(rows, flat[np.isin(size[flat], common)])
    return np.flatnonzero(np.isin(code, code[rows]) & (prints.width > 0))


def _distinct(prints: Fingerprints) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A number for every content of a file [N], and the first row of each: what is equal byte by byte, be it ten
    thousand files, need not be compared by its pixels."""
    _, first, code = np.unique([digest or "" for digest in prints.sha256], return_index=True, return_inverse=True)
    return code.astype(np.int64), np.sort(first).astype(np.int64)


def _without_hash(prints: Fingerprints, among: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Those rows `among` others that can be read but have no hash of the whole image."""
    none = np.zeros(len(prints), dtype=bool)
    none[among] = True
    none[prints.hashes.owner[prints.hashes.whole]] = False
    return np.flatnonzero(none & (prints.width > 0))


File = tuple[str, bytes | BadImage]


def _in_turn(threads: ThreadPoolExecutor, files: Iterator[File], ahead: int) -> Iterator[Chunk]:
    """Fingerprints of a few files after a few others, in order; at most `ahead` lots are read and not yet done."""
    waiting: deque[Future[Chunk]] = deque()
    lot: list[File] = []
    for file in files:
        lot.append(file)
        if len(lot) == _FILES:
            waiting.append(threads.submit(fingerprint_files, lot))
            lot = []
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    if lot:
        waiting.append(threads.submit(fingerprint_files, lot))
    while waiting:
        yield waiting.popleft().result()


def _read(source: Images, i: int) -> File:
    name = source.ids[i]
    try:
        return name, source.read(i)
    except BadImage as error:
        return name, error


def _pixels(file: File) -> str:
    """Digest of the pixels of one file; empty where it cannot be decoded."""
    name, data = file
    if isinstance(data, BadImage):
        return ""
    try:
        return pixel_digest(decode_image(data, name=name))
    except BadImage:
        return ""
