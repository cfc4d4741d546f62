"""Digests and perceptual hashes of the images of a source, read once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.tables import pool_from_metadata
from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.decode import decode_image
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Progress, over_blocks
from dinov2cli.search.hamming import HashTable, stack_hashes
from dinov2cli.search.hashing import PerceptualHash, bytes_digest, perceptual_hash, pixel_digest, sharpness

_CHUNK = 256


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
    """What tells the copies among N images: width, height [N] (0 if unreadable), sha256 and pixel digests (None if
    unreadable), sharpness [N], hashes, and the reason for each unreadable row."""

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


@dataclass(frozen=True)
class _One:
    width: int
    height: int
    sha256: str
    pixels: str
    sharpness: float
    hash: PerceptualHash


def fingerprint_images(
    source: Images,
    *,
    workers: int = 1,
    bad: BadImages | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Fingerprints:
    """Decode every image once and keep its digests, size, sharpness and perceptual hash (about 600 bytes an image).

    Files are read in order by one thread, decoded by `workers` threads; the ranks share them, and all get the whole.
    An image that cannot be read is a row without fingerprints, named in `unreadable` and counted in `bad`, which may
    raise InputError when there are too many.
    """
    bad = bad if bad is not None else BadImages()
    total = len(source)
    results: list[_One | None] = []
    unreadable: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, workers)) as threads:

        def chunk(start: int) -> list[_One | BadImage]:
            files = [_read(source, i) for i in range(start, min(start + _CHUNK, total))]
            return list(threads.map(_fingerprint, files))

        for found in over_blocks(chunk, total, _CHUNK, progress=progress, ranks=ranks):
            for i, one in enumerate(found, start=len(results)):
                if isinstance(one, BadImage):
                    unreadable[i] = one.reason
                    bad.add(source.ids[i], one.reason)
            results += [None if isinstance(one, BadImage) else one for one in found]
            bad.check(total)
    return Fingerprints(
        width=np.array([r.width if r else 0 for r in results], dtype=np.int32),
        height=np.array([r.height if r else 0 for r in results], dtype=np.int32),
        sha256=[r.sha256 if r else None for r in results],
        pixels=[r.pixels if r else None for r in results],
        sharpness=np.array([r.sharpness if r else 0 for r in results], dtype=np.float32),
        hashes=stack_hashes([r.hash if r else None for r in results]),
        unreadable=unreadable,
    )


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


def _read(source: Images, i: int) -> tuple[str, bytes | BadImage]:
    name = source.ids[i]
    try:
        return name, source.read(i)
    except BadImage as error:
        return name, error


def _fingerprint(file: tuple[str, bytes | BadImage]) -> _One | BadImage:
    name, data = file
    if isinstance(data, BadImage):
        return data
    try:
        image = decode_image(data, name=name)
    except BadImage as error:
        return error
    height, width = image.shape[:2]
    return _One(width, height, bytes_digest(data), pixel_digest(image), sharpness(image), perceptual_hash(image))
