"""What the search room accepts as a set of vectors: an array in memory, or an object that reads blocks of rows."""

import mmap
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import InputError

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@runtime_checkable
class Vectors(Protocol):
    """Rows of float32 vectors, read by blocks, so that a set larger than memory can be searched.

    An embeddings directory, opened, is one; `as_vectors` makes one of an array.
    """

    @property
    def rows(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def block(self, start: int, stop: int) -> Float32: ...

    def gather(self, index: Int64) -> Float32: ...


_MAPPED_BYTES = 64 << 20
_AROUND = 64 << 10  # what Linux maps around a row that is read by itself
_GATHERED = _MAPPED_BYTES // _AROUND
_TINY, _HUGE = 1e-20, 1e20  # squares of lengths that float32 adds up without loss


class ArrayVectors:
    """An array [N, D] (in memory or memory-mapped, any float type) as `Vectors`.

    Pages of a mapped file count as memory of the process for as long as they are mapped, so they are let go after
    every 64 MB read; the system may keep them cached.
    """

    def __init__(self, array: npt.NDArray[np.floating]) -> None:
        if array.ndim != 2:
            raise ValueError(f"vectors: expected an array [rows, dim], found shape {array.shape}")
        self._array = array
        # Read-only maps alone: letting go of a private one would undo what was written to it.
        shared = getattr(array, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED")
        self._mapped = getattr(array, "_mmap", None) if shared else None
        self._touched = 0

    @property
    def rows(self) -> int:
        return int(self._array.shape[0])

    @property
    def dim(self) -> int:
        return int(self._array.shape[1])

    def block(self, start: int, stop: int) -> Float32:
        return self._read(self._array[start:stop])

    def gather(self, index: Int64) -> Float32:
        if self._mapped is None:
            return self._read(self._array[index])
        result = np.empty((len(index), self.dim), dtype=np.float32)
        for start in range(0, len(index), _GATHERED):
            part = slice(start, start + _GATHERED)
            result[part] = self._read(self._array[index[part]], around=_AROUND)
        return result

    def _read(self, rows: npt.NDArray[np.floating], around: int = 0) -> Float32:
        block = np.ascontiguousarray(rows, dtype=np.float32)
        if self._mapped is not None:
            if np.may_share_memory(block, self._array):
                block = block.copy()  # float32 as it lies in the file: the caller keeps it
            self._touched += len(rows) * max(around, rows.strides[0])
            if self._touched > _MAPPED_BYTES:
                self._mapped.madvise(mmap.MADV_DONTNEED)
                self._touched = 0
        return block


class SubsetVectors:
    """Some rows [M] of other `Vectors`, in the order given, without copying them."""

    def __init__(self, inner: Vectors, index: Int64) -> None:
        self._inner, self._index = inner, index

    @property
    def rows(self) -> int:
        return len(self._index)

    @property
    def dim(self) -> int:
        return self._inner.dim

    def block(self, start: int, stop: int) -> Float32:
        return self._inner.gather(self._index[start:stop])

    def gather(self, index: Int64) -> Float32:
        return self._inner.gather(self._index[index])


class RangeVectors:
    """The rows start .. stop of other `Vectors`, without copying them."""

    def __init__(self, inner: Vectors, start: int, stop: int) -> None:
        self._inner, self._start, self._stop = inner, start, stop

    @property
    def rows(self) -> int:
        return self._stop - self._start

    @property
    def dim(self) -> int:
        return self._inner.dim

    def block(self, start: int, stop: int) -> Float32:
        return self._inner.block(self._start + start, min(self._start + stop, self._stop))

    def gather(self, index: Int64) -> Float32:
        return self._inner.gather(index + self._start)


class CheckedVectors:
    """A view of `Vectors` that refuses rows which are not finite and, with `unit`, makes every row of length 1.

    Unit length turns inner products into cosines. Rows stored as float16 have lengths off by about 1e-3, which
    would move a pair across a threshold; a row of zeros stays zero and is similar to nothing.
    """

    def __init__(self, inner: Vectors, *, unit: bool) -> None:
        self.inner, self.unit = inner, unit

    @property
    def rows(self) -> int:
        return self.inner.rows

    @property
    def dim(self) -> int:
        return self.inner.dim

    def block(self, start: int, stop: int) -> Float32:
        return self._checked(self.inner.block(start, stop), lambda i: start + i)

    def gather(self, index: Int64) -> Float32:
        return self._checked(self.inner.gather(index), lambda i: int(index[i]))

    def _checked(self, block: Float32, row_of: Callable[[int], int]) -> Float32:
        # The square of the length is finite only if every element is, and costs no array of the block's size. In
        # float32 first, five times as fast; what it cannot hold is done again in float64.
        with np.errstate(over="ignore", invalid="ignore"):
            square = np.einsum("nd,nd->n", block, block)
        if not ((square > _TINY) & (square < _HUGE)).all():
            square = np.einsum("nd,nd->n", block, block, dtype=np.float64)
        if not np.isfinite(square).all():
            bad = ~np.isfinite(block).all(axis=1)
            raise InputError(
                f"embeddings: row {row_of(int(np.argmax(bad)))} holds NaN or infinity ({int(bad.sum())} such rows in "
                "this block); expected finite numbers; embed the images again in float32"
            )
        if not self.unit:
            return block
        norm = np.sqrt(square)
        norm[norm == 0] = 1.0
        return np.ascontiguousarray(block / norm[:, None].astype(np.float32))


def as_vectors(vectors: Vectors | npt.NDArray[np.floating], *, unit: bool = True) -> Vectors:
    """`vectors` as something to read blocks from, of unit length unless `unit` is false.

    Raises ValueError for an array that is not [rows, dim]; reading raises InputError for rows that are not finite.
    """
    if isinstance(vectors, CheckedVectors):
        if vectors.unit == unit:
            return vectors
        vectors = vectors.inner
    inner = ArrayVectors(vectors) if isinstance(vectors, np.ndarray) else vectors
    return CheckedVectors(inner, unit=unit)


def iterate(vectors: Vectors, size: int) -> Iterator[tuple[int, Float32]]:
    """Pairs (start, block [n, D]) over all rows in order, n <= size."""
    for start in range(0, vectors.rows, size):
        yield start, vectors.block(start, min(start + size, vectors.rows))


def sample_rows(rows: int, size: int, seed: int) -> Int64:
    """`size` distinct rows of `rows`, sorted (so that reading them is sequential), the same for the same seed."""
    if size >= rows:
        return np.arange(rows, dtype=np.int64)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5A3]))
    return np.sort(rng.choice(rows, size=size, replace=False, shuffle=False)).astype(np.int64)
