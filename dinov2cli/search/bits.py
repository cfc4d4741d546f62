"""Indexes over 256-bit hashes that find all within a radius: by comparing all, or by hash tables over some of the bits.

The tables take from every hash the same 8 to 20 bits, drawn at random for each of 32 tables, and compare in full only
those that agree in them (locality-sensitive hashing, Indyk and Motwani 1998). Two hashes that differ in d of 256 bits
agree in one table of b bits with p = (1 - d / 256)^b, and meet in none of 32 with (1 - p)^32. b grows with the number
of hashes, so that a query meets about 16 chance hashes per table whatever their number.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import faiss
import numpy as np
import numpy.typing as npt

Uint8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Pairs = tuple[Int64, Int64, Int64]
"""query [M], row [M], differing bits [M]."""

T = TypeVar("T")

BITS = 256
_FLAT_BELOW = 20_000
_TABLES = 32
_PER_BUCKET = 16
_KEY_BITS = (8, 20)
_PAIRS = 1 << 19
_SEED = 0xB175


class BitIndex(Protocol):
    """Hashes that can be searched."""

    def within(self, queries: Uint8, radius: int) -> Pairs:
        """All pairs of a query [Q, 32] and a row that differ in at most `radius` bits."""


def bit_index(bits: Uint8) -> BitIndex:
    """An index of hashes [N, 32]: exact below 20,000, tables from there on."""
    return AllBits(bits) if len(bits) < _FLAT_BELOW else BitTables(bits)


def expected_recall(rows: int, differing: int) -> float:
    """Share of pairs at a distance that an index of so many hashes finds, if errors fall on the bits at random."""
    if rows < _FLAT_BELOW:
        return 1.0
    return float(1 - (1 - (1 - differing / BITS) ** _key_bits(rows)) ** _TABLES)


class AllBits:
    """Compares every query with every hash."""

    def __init__(self, bits: Uint8) -> None:
        self._index = faiss.IndexBinaryFlat(BITS)
        self._index.add(np.ascontiguousarray(bits))

    def within(self, queries: Uint8, radius: int) -> Pairs:
        """See `BitIndex`."""
        # Faiss takes the radius as exclusive.
        limits, differ, found = self._index.range_search(np.ascontiguousarray(queries), radius + 1)
        limits = np.asarray(limits, dtype=np.int64)
        query = np.repeat(np.arange(len(queries), dtype=np.int64), limits[1:] - limits[:-1])
        return query, np.asarray(found, dtype=np.int64), np.asarray(differ, dtype=np.int64)


class BitTables:
    """Compares what agrees in the key of one of 32 tables; 4 bytes a hash and table, 0.13 KB a hash in all."""

    def __init__(self, bits: Uint8) -> None:
        self._words = np.ascontiguousarray(bits).view(np.uint64)
        key_bits = _key_bits(len(bits))
        rng = np.random.Generator(np.random.Philox(key=_SEED))
        self._places = [np.sort(rng.permutation(BITS)[:key_bits]) for _ in range(_TABLES)]
        self._threads = max(1, faiss.omp_get_max_threads())
        self._tables = self._each(lambda table: self._table(bits, table))

    def within(self, queries: Uint8, radius: int) -> Pairs:
        """See `BitIndex`; finds a pair at distance d with `expected_recall`."""
        words = np.ascontiguousarray(queries).view(np.uint64)
        parts = self._each(lambda table: self._search(queries, words, table, radius))
        pair, differ = (np.concatenate([part[i] for part in parts]) for i in range(2))
        pair, first = np.unique(pair, return_index=True)
        query, row = np.divmod(pair, len(self._words))
        return query, row, differ[first]

    def _table(self, bits: Uint8, table: int) -> tuple[npt.NDArray[np.int32], Int64]:
        """Rows sorted by key, and where each key begins."""
        keys = _keys(bits, self._places[table])
        order = np.argsort(keys, kind="stable").astype(np.int32)
        counts = np.bincount(keys, minlength=1 << len(self._places[table]))
        return order, np.concatenate([[0], np.cumsum(counts)])

    def _search(
        self, queries: Uint8, words: npt.NDArray[np.uint64], table: int, radius: int
    ) -> tuple[Int64, npt.NDArray[np.int64]]:
        order, begins = self._tables[table]
        keys = _keys(queries, self._places[table])
        start, count = begins[keys], begins[keys + 1] - begins[keys]
        total = np.concatenate([[0], np.cumsum(count)])
        pairs, differ = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        first = 0
        while first < len(keys):  # however full the buckets are, few pairs at a time
            last = max(first + 1, int(np.searchsorted(total, total[first] + _PAIRS, side="right")) - 1)
            query = np.repeat(np.arange(first, last), count[first:last])
            shift = np.repeat(start[first:last] - total[first:last], count[first:last])
            row = order[np.arange(total[first], total[last]) + shift]
            distance = np.bitwise_count(words[query] ^ self._words[row]).sum(axis=1, dtype=np.int64)
            near = distance <= radius
            pairs.append(query[near] * len(self._words) + row[near])
            differ.append(distance[near])
            first = last
        return np.concatenate(pairs), np.concatenate(differ)

    def _each(self, work: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(self._threads) as threads:
            return list(threads.map(work, range(_TABLES)))


def _key_bits(rows: int) -> int:
    low, high = _KEY_BITS
    return min(max(round(math.log2(max(rows, 1) / _PER_BUCKET)), low), high)


def _keys(bits: Uint8, places: Int64) -> Int64:
    """The bits at some places [K] of hashes [N, 32], as numbers [N]."""
    keys = np.zeros(len(bits), dtype=np.int64)
    for place in places.tolist():
        keys = keys << 1 | (bits[:, place >> 3] >> (7 - (place & 7)) & 1)
    return keys
