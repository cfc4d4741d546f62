"""Pairs of images whose perceptual hashes differ in few bits, in any of 8 orientations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Progress, over_blocks
from dinov2cli.search.edges import Edges, join_edges, make_edges
from dinov2cli.search.hashing import HASH_BYTES, ORIENTATIONS, THUMB, VIEWS, PerceptualHash, Uint8, oriented
from dinov2cli.search.vectors import Float32, Int64

BITS = 8 * HASH_BYTES
RADIUS = 31
"""Bits of 256 that may differ: what PDQ recommends, and the most for which the lookup below misses nothing."""

MIN_CORRELATION = 0.92
"""Of 8 x 8 colour thumbnails: copies lie above 0.97 but for one in a hundred, chance matches mostly below."""

_GREY = 4  # largest difference of channels in a grey image, in grey levels
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_FLAT_BELOW = 200_000
_TABLES = 16
_QUERY_ROWS = 8192


@dataclass(frozen=True)
class HashTable:
    """Hashes of N images: bits [N, 2, 8, 32] uint8, valid [N, 2] bool, thumbs [N, 2, 8, 8, 3] uint8.

    See `PerceptualHash`; 900 bytes an image.
    """

    bits: Uint8
    valid: npt.NDArray[np.bool_]
    thumbs: Uint8

    def __len__(self) -> int:
        return int(self.valid.shape[0])


def stack_hashes(hashes: Sequence[PerceptualHash | None]) -> HashTable:
    """Hashes of many images as one table; None (an unreadable image) is a row that matches nothing."""
    bits = np.zeros((len(hashes), VIEWS, ORIENTATIONS, HASH_BYTES), dtype=np.uint8)
    valid = np.zeros((len(hashes), VIEWS), dtype=bool)
    thumbs = np.zeros((len(hashes), VIEWS, THUMB, THUMB, 3), dtype=np.uint8)
    for row, one in enumerate(hashes):
        if one is not None:
            bits[row], valid[row], thumbs[row] = one.bits, one.valid, one.thumbs
    return HashTable(bits, valid, thumbs)


def hash_edges(
    table: HashTable, *, radius: int = RADIUS, progress: Progress | None = None, ranks: Ranks = ALONE
) -> Edges:
    """Pairs of images one of whose views, in some orientation, is within `radius` bits of a view of the other, and
    whose thumbnails agree there.

    The bits alone join images that show little but one soft edge; their thumbnails in colour tell them apart.
    Similarity is 1 - bits / 256. Images with the very same hash are joined in a star and searched once, so that a
    thousand copies make a thousand edges, not half a million. The ranks share the search, and all get all edges.
    """
    first, star = _identical(table)
    ones = np.flatnonzero(first == np.arange(len(table)))
    small = HashTable(table.bits[ones], table.valid[ones], table.thumbs[ones])
    parts = [star]
    for a, b, bits in _matches(small, small, radius, progress, ranks):
        parts.append(make_edges(ones[a], ones[b], 1 - bits / BITS))
    return join_edges(parts)


def best_hash_match(
    table: HashTable,
    reference: HashTable,
    *,
    radius: int = RADIUS,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Float32, Int64]:
    """For every image the reference image with the nearest hash: similarity [N], row [N].

    Row is -1 and similarity -inf where none lies within `radius` bits; of equally near ones the first is taken.
    """
    similarity = np.full(len(table), -np.inf, dtype=np.float32)
    row = np.full(len(table), -1, dtype=np.int64)
    for a, b, bits in _matches(table, reference, radius, progress, ranks):
        order = np.lexsort((b, bits, a))
        who, where = np.unique(a[order], return_index=True)
        value = (1 - bits[order][where] / BITS).astype(np.float32)
        better = value > similarity[who]
        similarity[who[better]] = value[better]
        row[who[better]] = b[order][where][better]
    return similarity, row


def _identical(table: HashTable) -> tuple[Int64, Edges]:
    """For every row the first row with the same hash of the whole image, and the edges from it to the others."""
    rows = np.arange(len(table), dtype=np.int64)
    first = rows.copy()
    valid = np.flatnonzero(table.valid[:, 0])
    if len(valid):
        keys = table.bits[valid, 0, 0].view(f"V{HASH_BYTES}").ravel()
        _, where, back = np.unique(keys, return_index=True, return_inverse=True)
        first[valid] = valid[where][back]
    copies = np.flatnonzero(first != rows)
    same = _look_alike(table.thumbs[copies, 0], table.thumbs[first[copies], 0], np.zeros(len(copies), np.int64))
    first[copies[~same]] = copies[~same]
    copies = copies[same]
    return first, make_edges(first[copies], copies, np.ones(len(copies)))


def _matches(
    table: HashTable, reference: HashTable, radius: int, progress: Progress | None, ranks: Ranks
) -> Iterator[tuple[Int64, Int64, Float32]]:
    """Yields (row of table [M], row of reference [M], differing bits [M]) by blocks of queries, on every rank."""
    owner, view = np.nonzero(reference.valid)
    query_owner, query_view = np.nonzero(table.valid)
    if not len(owner) or not len(query_owner):
        return
    index = _binary_index(np.ascontiguousarray(reference.bits[owner, view, 0]), radius)
    step = max(1, _QUERY_ROWS // ORIENTATIONS)

    def search(start: int) -> tuple[Int64, Int64, Float32]:
        who, seen = query_owner[start : start + step], query_view[start : start + step]
        queries = table.bits[who, seen].reshape(-1, HASH_BYTES)
        # Faiss takes the radius as exclusive.
        limits, bits, found = index.range_search(np.ascontiguousarray(queries), radius + 1)
        limits = np.asarray(limits, dtype=np.int64)
        query = np.repeat(np.arange(len(queries)), limits[1:] - limits[:-1])
        one, orientation = np.divmod(query, ORIENTATIONS)
        alike = _look_alike(table.thumbs[who[one], seen[one]], reference.thumbs[owner[found], view[found]], orientation)
        return who[one][alike], owner[found][alike], np.asarray(bits, dtype=np.float32)[alike]

    yield from over_blocks(search, len(query_owner), step, progress=progress, ranks=ranks)


def _look_alike(a: Uint8, b: Uint8, orientation: Int64) -> npt.NDArray[np.bool_]:
    """Whether thumbnails a [M, S, S, 3], each in its orientation, and b [M, S, S, 3] correlate.

    Brightness and contrast may differ, and where one of the two has no colour the other's does not count.
    """
    first = np.empty(a.shape, dtype=np.float32)
    for number in range(ORIENTATIONS):
        here = orientation == number
        first[here] = oriented(a[here], number)
    second = b.astype(np.float32)
    grey = (np.ptp(first, axis=3).max(axis=(1, 2)) <= _GREY) | (np.ptp(second, axis=3).max(axis=(1, 2)) <= _GREY)
    for thumbs in (first, second):
        thumbs[grey] = (thumbs[grey] @ _LUMINANCE)[..., None]
    first -= first.mean(axis=(1, 2), keepdims=True)
    second -= second.mean(axis=(1, 2), keepdims=True)
    product = np.einsum("mijc,mijc->m", first, second)
    scale = np.einsum("mijc,mijc->m", first, first) * np.einsum("mijc,mijc->m", second, second)
    return product > MIN_CORRELATION * np.sqrt(scale)


def _binary_index(bits: Uint8, radius: int) -> "faiss.IndexBinary":
    index: faiss.IndexBinary
    if len(bits) < _FLAT_BELOW:
        index = faiss.IndexBinaryFlat(BITS)
    else:
        # 16 tables of 16 bits: two hashes within 31 bits agree in some table up to one bit (pigeonhole), so looking
        # into every bucket one flip away misses nothing; each further flip per table covers 16 bits more.
        tables = faiss.IndexBinaryMultiHash(BITS, _TABLES, BITS // _TABLES)
        tables.nflip = radius // _TABLES
        index = tables
    index.add(bits)
    return index
