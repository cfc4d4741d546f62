"""Pairs of images whose perceptual hashes differ in few bits, in any of 8 orientations."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.bits import BITS, BitIndex, bit_index
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.edges import Edges, join_edges, make_edges
from dinov2cli.search.hashing import (
    FRAMED,
    HASH_BYTES,
    INNER,
    ORIENTATIONS,
    THUMB,
    WHOLE,
    PerceptualHash,
    Uint8,
    turn_bits,
)
from dinov2cli.search.lookalike import agreement
from dinov2cli.search.vectors import Float32, Int64

RADIUS = 44
"""Bits of 256 that may differ. Copies that were only saved again or resized differ in up to 12, those that were drawn
over in 20 to 50; two photographs in 90 to 160."""

SURE_RADIUS = 31
"""Up to here copies are many and chance matches few (PDQ recommends it); beyond, pictures must look more alike."""

MIN_CORRELATION = 0.92
"""Of 12 x 12 colour thumbnails within SURE_RADIUS; of two whole images that each have a picture inside, see below."""

MIN_CORRELATION_BEYOND = 0.95
"""Where one of the two shows a picture without any frame; others must be within SURE_RADIUS."""

MIN_CORRELATION_OF_PAGES = 0.96
"""Two pages of one layout are not copies: they must be more alike than two photographs."""

_QUERY_ROWS = 8192
_TWIN_BITS = 16
_PAIRS = 1 << 16
_TWIN_LEVELS = 6.0


@dataclass(frozen=True)
class HashTable:
    """Hashes of `rows` images, view by view: owner [V] int64 (rising); kind [V], bits [V, 32], thumbs [V, 12, 12, 3].

    See `PerceptualHash`; 473 bytes a view, and most images have one.
    """

    rows: int
    owner: Int64
    kind: Uint8
    bits: Uint8
    thumbs: Uint8

    def __len__(self) -> int:
        return self.rows

    def views(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "HashTable":
        """Some views, of the same images."""
        return HashTable(self.rows, self.owner[index], self.kind[index], self.bits[index], self.thumbs[index])

    def digest(self) -> str:
        """SHA-256 of the hashes and whose they are, in hex: another table has another one."""
        digest = hashlib.sha256(np.ascontiguousarray(self.owner).data)
        digest.update(np.ascontiguousarray(self.bits).data)
        return digest.hexdigest()

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """Which views are whole images, [V]."""
        return self.kind != INNER


def stack_hashes(hashes: Sequence[PerceptualHash | None]) -> HashTable:
    """Hashes of many images as one table; None (an unreadable image) is a row that matches nothing."""
    counts = [0 if one is None else len(one) for one in hashes]
    owner = np.repeat(np.arange(len(hashes), dtype=np.int64), counts)
    some = [one for one in hashes if one is not None]
    kind = [np.zeros(0, np.uint8), *(one.kind for one in some)]
    bits = [np.zeros((0, HASH_BYTES), np.uint8), *(one.bits for one in some)]
    thumbs = [np.zeros((0, THUMB, THUMB, 3), np.uint8), *(one.thumbs for one in some)]
    return HashTable(len(hashes), owner, np.concatenate(kind), np.concatenate(bits), np.concatenate(thumbs))


def hash_edges(
    table: HashTable,
    *,
    radius: int = RADIUS,
    priority: Int64 | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
    ranks: Ranks = ALONE,
) -> Edges:
    """Pairs of images one of whose views, in some orientation, is within `radius` bits of a view of the other, and
    whose thumbnails agree there.

    The bits alone join images that show little but one soft edge; their thumbnails in colour tell them apart.
    Similarity is 1 - bits / 256. Images with the very same hash are joined in a star and searched once, so that a
    thousand copies make a thousand edges, not half a million; its centre is the image of the lowest `priority` [N].
    The ranks share the search, and all get all edges.
    """
    first, star = _identical(table, priority)
    small = table.views(first == np.arange(len(first)))
    parts = [star]
    for a, b, bits in _matches(small, small, radius, progress, store, ranks):
        parts.append(make_edges(a, b, 1 - bits / BITS))
    return join_edges(parts)


def best_hash_match(
    table: HashTable,
    reference: HashTable,
    *,
    radius: int = RADIUS,
    progress: Progress | None = None,
    store: Store | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Float32, Int64]:
    """For every image the reference image with the nearest hash: similarity [N], row [N].

    Row is -1 and similarity -inf where none lies within `radius` bits; of equally near ones the first is taken.
    """
    similarity = np.full(len(table), -np.inf, dtype=np.float32)
    row = np.full(len(table), -1, dtype=np.int64)
    for a, b, bits in _matches(table, reference, radius, progress, store, ranks):
        order = np.lexsort((b, bits, a))
        who, where = np.unique(a[order], return_index=True)
        value = (1 - bits[order][where] / BITS).astype(np.float32)
        better = value > similarity[who]
        similarity[who[better]] = value[better]
        row[who[better]] = b[order][where][better]
    return similarity, row


def near_twins(table: HashTable, reference: HashTable, *, itself: bool) -> tuple[Int64, Int64]:
    """Pairs (row of table, row of reference) of whole images that may be decoded from the same pixels, as they are:
    hashes within 16 bits, thumbnails within a few grey levels. With `itself` the two tables are one."""
    ours = table.views(table.whole)
    theirs = reference.views(reference.whole)
    if not len(ours.owner) or not len(theirs.owner):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    index = bit_index(theirs.bits)
    rows, found = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(ours.owner), _QUERY_ROWS):
        bits = ours.bits[start : start + _QUERY_ROWS]
        one, _, other, _ = _within(index, bits, _TWIN_BITS, orientations=1)
        one += start
        near = ours.owner[one] != theirs.owner[other] if itself else np.ones(len(one), bool)
        one, other = one[near], other[near]
        for first in range(0, len(one), _PAIRS):
            x, y = one[first : first + _PAIRS], other[first : first + _PAIRS]
            differ = np.abs(ours.thumbs[x].astype(np.int16) - theirs.thumbs[y]).mean(axis=(1, 2, 3))
            rows.append(ours.owner[x[differ <= _TWIN_LEVELS]])
            found.append(theirs.owner[y[differ <= _TWIN_LEVELS]])
    return np.concatenate(rows), np.concatenate(found)


def _identical(table: HashTable, priority: Int64 | None) -> tuple[Int64, Edges]:
    """For every view the first view with the same hash, by the priority of its image [N] or its row, and the edges from
    that image to those of the others."""
    views = np.arange(len(table.owner), dtype=np.int64)
    if not len(views):
        return views, make_edges([], [], [])
    keys = table.bits.view(f"V{HASH_BYTES}").ravel()
    order = views if priority is None else np.argsort(priority[table.owner], kind="stable")
    _, where, back = np.unique(keys[order], return_index=True, return_inverse=True)
    first = np.empty_like(views)
    first[order] = order[where[back]]
    copies = np.flatnonzero(first != views)
    same = _look_alike(table, copies, table, first[copies], *np.zeros((2, len(copies)), np.int64))
    first[copies[~same]] = copies[~same]
    copies = copies[same]
    return first, make_edges(table.owner[first[copies]], table.owner[copies], np.ones(len(copies)))


def _matches(
    table: HashTable,
    reference: HashTable,
    radius: int,
    progress: Progress | None,
    store: Store | None,
    ranks: Ranks,
) -> Iterator[tuple[Int64, Int64, Float32]]:
    """Yields (row of table [M], row of reference [M], differing bits [M]) by blocks of queries, on every rank."""
    if not len(table.owner) or not len(reference.owner):
        return
    index = bit_index(reference.bits)
    step = max(1, _QUERY_ROWS // ORIENTATIONS)

    def search(start: int) -> Arrays:
        one, orientation, found, bits = _within(index, table.bits[start : start + step], radius)
        one += start
        alike = _look_alike(table, one, reference, found, orientation, bits)
        return {"row": table.owner[one][alike], "found": reference.owner[found][alike], "bits": bits[alike]}

    key = {"radius": radius, "block": step, "queries": table.digest(), "base": reference.digest(), "version": 1}
    stage = store.stage("hashes", key) if store else None
    for block in over_blocks(kept(search, stage), len(table.owner), step, progress=progress, ranks=ranks):
        yield tuple(np.asarray(block[name]) for name in ("row", "found", "bits"))  # type: ignore[misc]


def _within(
    index: BitIndex, bits: Uint8, radius: int, orientations: int = ORIENTATIONS
) -> tuple[Int64, Int64, Int64, Int64]:
    """(query, orientation, row, differing bits) of all pairs within a radius."""
    queries = np.stack([turn_bits(bits, o) for o in range(orientations)], axis=1).reshape(-1, HASH_BYTES)
    query, found, differ = index.within(queries, radius)
    one, orientation = np.divmod(query, orientations)
    return one, orientation, found, differ


def _look_alike(
    table: HashTable, one: Int64, reference: HashTable, found: Int64, orientation: Int64, bits: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Whether views `one` [M] of table, in an orientation each, and `found` [M] of reference agree to the eye."""
    whole, drawn = (np.zeros(len(one), np.float32) for _ in range(2))
    for first in range(0, len(one), _PAIRS):
        part = slice(first, first + _PAIRS)
        whole[part], drawn[part] = agreement(table.thumbs[one[part]], reference.thumbs[found[part]], orientation[part])
    sure = bits <= SURE_RADIUS
    pages = (table.kind[one] == FRAMED) & (reference.kind[found] == FRAMED)
    plain = (table.kind[one] == WHOLE) | (reference.kind[found] == WHOLE)
    least = np.where(pages, MIN_CORRELATION_OF_PAGES, np.where(sure, MIN_CORRELATION, MIN_CORRELATION_BEYOND))
    return np.asarray((whole > least) & (drawn > least) & (sure | plain))
