"""Lloyd's iterations over rows read by blocks: exact sums, so that nobody can tell how the rows were shared out.

Every row is rounded to a multiple of one quantum (2^-24 of the largest coordinate) and summed in float64. Such sums
are exact up to 5 x 10^8 rows in one cluster, and exact sums do not depend on the order: blocks of any size, any
number of ranks and additions on a GPU come to the same centroids, bit for bit.
"""

import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import Ranks, noticing_lost_ranks
from dinov2cli.errors import UserError
from dinov2cli.search.nearest import TILE, WIDTH, bias_of, nearest
from dinov2cli.search.threads import Threads
from dinov2cli.search.vectors import Float32, Int64, Vectors

if TYPE_CHECKING:
    import torch

Float64 = npt.NDArray[np.float64]

EIGHTHS = 8
"""Parts that the rows are dealt into; the early iterations run over one, two or four of them."""

_LIBRARIES = 400 << 20  # resident after numpy, Faiss and torch are loaded
_HUGE_PAGES = 360 << 20  # what torch's large pages add to it, measured
_SCORES = 4 * TILE * WIDTH + (16 << 20)  # of a tile, per thread
_COPIES = 5  # of a block of rows, while it is read
_SMALLEST, _LARGEST = 1024, 8192  # rows of a block
_ASSUMED = 3 << 30  # bytes, where no limit is asked
_FINE = 2.0**-24


@dataclass(frozen=True)
class Room:
    """How rows are read within a memory limit: `block` rows at once, and whether they stay in memory (`keep`)."""

    block: int
    keep: bool


def least_memory(rows: int, dim: int, k: int, *, per_row: int = 0, threads: int = 1) -> int:
    """Bytes of a process that runs k-means with the smallest blocks; `room_for` refuses less."""
    huge = _HUGE_PAGES if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else 0
    blocks = threads * (_SCORES + _COPIES * 4 * dim * _SMALLEST)
    return _LIBRARIES + huge + 48 * k * dim + per_row * rows + blocks


def room_for(rows: int, dim: int, k: int, memory: int | None, *, per_row: int = 0, threads: int = 1) -> Room:
    """Block size and whether all rows are kept as float32, such that the process stays below `memory` bytes.

    per_row: further bytes held for every row; threads: blocks worked on at once. Raises UserError where not even the
    centroids and the smallest blocks fit.
    """
    limit = _ASSUMED if memory is None else memory
    need = least_memory(rows, dim, k, per_row=per_row, threads=threads)
    if memory is not None and memory < need:
        raise UserError(
            f"k-means of {rows} rows x {dim} into {k} clusters needs at least {need / 1e9:.2f} GB of memory, found "
            f"{memory / 1e9:.2f} GB allowed; raise --memory or ask for fewer clusters"
        )
    each = threads * _COPIES * 4 * dim
    left = limit - need + each * _SMALLEST
    block = _LARGEST
    while block > _SMALLEST and (16 * block > rows or 2 * each * block > left):
        block //= 2
    return Room(block, rows * (4 * dim + 16) <= left - each * block)


class Rows:
    """Rows of `source` that a fit runs over, block by block, some eighths of them at a time.

    Which eighth a row is in depends on its number and the seed alone, and the eighths nest: 1 of 8, 2 of 8, ...
    """

    def __init__(self, source: Vectors, room: Room, *, seed: int, device: str) -> None:
        self.source, self.room, self.seed, self.device = source, room, seed, device
        self._kept: dict[int, torch.Tensor] = {}

    @property
    def starts(self) -> range:
        return range(0, self.source.rows, self.room.block)

    def read(self, start: int, eighths: int) -> "torch.Tensor":
        """The rows [n, D] of the block at `start` that lie in the first `eighths`, float32 on the device."""
        import torch

        stop = min(start + self.room.block, self.source.rows)
        inside = None if eighths == EIGHTHS else np.flatnonzero(_eighth(start, stop, self.seed) < eighths)
        if not self.room.keep:
            # Whole blocks even for an eighth: single rows of a mapped file bring in all the pages between them as well.
            rows = self.source.block(start, stop)
            return torch.from_numpy(rows if inside is None else rows[inside]).to(self.device)
        if start not in self._kept:
            self._kept[start] = torch.from_numpy(self.source.block(start, stop)).to(self.device)
        block = self._kept[start]
        return block if inside is None else block[torch.from_numpy(inside).to(self.device)]


def _eighth(start: int, stop: int, seed: int) -> npt.NDArray[np.uint64]:
    """The eighth (0 .. 7) of every row from `start` to `stop`: the top bits of a hash (splitmix64, Steele 2014)."""
    x = np.arange(start, stop, dtype=np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x5851) % 2**64)
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((x ^ (x >> np.uint64(31))) >> np.uint64(61))


@dataclass
class Sums:
    """What a pass over rows comes to: per cluster the sum of its rows and their number, and over all the distances.

    total [K, D] float64 in quanta, count [K] float64, error [1] float64 in `quantum`^2 x 16: whole numbers all.
    """

    total: "torch.Tensor"
    count: "torch.Tensor"
    error: "torch.Tensor"

    def add_over(self, ranks: Ranks) -> "Sums":
        """The sums of all ranks, on every rank: K x (D + 1) float64 in each direction."""
        if ranks.world_size == 1:
            return self
        import torch.distributed as dist

        parts = [part.cpu().clone() for part in (self.total, self.count, self.error)]
        with noticing_lost_ranks(ranks):
            for part in parts:
                dist.all_reduce(part, group=ranks.host)
        return Sums(*parts)


@dataclass
class _Seen:
    """Label [n] and score [n] of the rows of a block at the last pass."""

    label: "torch.Tensor"
    score: "torch.Tensor"


@dataclass
class Passes:
    """Passes over `rows` that assign every row to its nearest centroid and sum up the clusters.

    With `remember` (rows that are kept in memory, a fit of seconds) a pass looks again only at what can have changed:
    a row whose centroid stands still is compared with the centroids that moved, and only rows that changed clusters
    are taken from one sum and put into another.
    """

    rows: Rows
    spherical: bool
    scale: float
    ranks: Ranks
    remember: bool
    threads: Threads
    eighths: int = EIGHTHS
    _turn: Lock = field(default_factory=Lock)
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _sums: Sums | None = None
    _last: "torch.Tensor | None" = None

    def run(self, centroids: Float32, eighths: int) -> tuple[Float64, Int64, float]:
        """Sum of the rows of every cluster [K, D], their number [K], and the sum of squared distances."""
        import torch

        if eighths != self.eighths:
            self.eighths, self._seen, self._sums, self._last = eighths, {}, None, None
        table = torch.from_numpy(centroids).to(self.rows.device)
        sums = self.ranks.together(lambda: self._own(table)).add_over(self.ranks)
        total = sums.total.cpu().numpy() * (self.scale * _FINE)
        return total, sums.count.cpu().numpy().astype(np.int64), float(sums.error) * self._error_quantum

    @property
    def _error_quantum(self) -> float:
        return self.scale * self.scale * 2.0**-20

    def _own(self, table: "torch.Tensor") -> Sums:
        """The sums over this rank's blocks."""
        import torch

        moved = None if self._last is None else (table != self._last).any(dim=1)
        if self._sums is None:
            parts = [torch.zeros(n, dtype=torch.float64, device=table.device) for n in (table.shape, len(table), 1)]
            self._sums = Sums(*parts)
        bias = bias_of(table, self.spherical)
        self._sums.error.zero_()
        if not self.remember:
            self._sums.total.zero_()
            self._sums.count.zero_()

        def block(start: int) -> None:
            x = self.rows.read(start, self.eighths)
            old = self._seen.get(start)
            if old is None or moved is None:
                score, label = nearest(x, table, bias)
            else:
                score, label = _again(x, table, bias, old, moved)
            self._add(x, score, label, old)
            if self.remember:
                self._seen[start] = _Seen(label, score)

        for _ in self.threads.map(block, self.ranks.share(self.rows.starts)):
            pass
        if self.remember:
            self._last = table
        return self._sums

    def _add(self, x: "torch.Tensor", score: "torch.Tensor", label: "torch.Tensor", old: _Seen | None) -> None:
        import torch

        sums = self._sums
        assert sums is not None
        error = torch.zeros(1, dtype=torch.float64, device=x.device)
        for at in range(0, len(x), TILE):
            # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), or 2 - 2 x.c where both are of unit length.
            length = 2.0 if self.spherical else x[at : at + TILE].double().square_().sum(dim=1)
            far = (length - 2 * score[at : at + TILE].double()).clamp_(min=0)
            error += (far / self._error_quantum).round_().sum()
        for rows, which, sign in _changes(label, old):
            for at in range(0, len(which), TILE):
                here = which[at : at + TILE]
                picked = x[at : at + TILE] if rows is None else x[rows[at : at + TILE]]
                quanta = (picked.double() * (sign / (self.scale * _FINE))).round_()
                with self._turn:
                    sums.total.index_add_(0, here, quanta)
                    sums.count.index_add_(0, here, torch.full((len(here),), sign, dtype=torch.float64, device=x.device))
        with self._turn:
            sums.error += error


def _changes(label: "torch.Tensor", old: _Seen | None) -> "Iterator[tuple[torch.Tensor | None, torch.Tensor, float]]":
    """What to add to the sums: (rows or None for all, their clusters, 1 or -1)."""
    if old is None:
        yield None, label, 1.0
        return
    rows = (label != old.label).nonzero()[:, 0]
    yield rows, old.label[rows], -1.0
    yield rows, label[rows], 1.0


def _again(
    x: "torch.Tensor", table: "torch.Tensor", bias: "torch.Tensor", old: _Seen, moved: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """As `nearest`, knowing the scores before the centroids in `moved` [K] did."""
    which = moved.nonzero()[:, 0]
    if len(which) > 0.7 * len(table):
        return nearest(x, table, bias)
    score, label = old.score.clone(), old.label.clone()
    astray = moved[label]
    lost, safe = astray.nonzero()[:, 0], (~astray).nonzero()[:, 0]
    score[lost], label[lost] = nearest(x[lost], table, bias)
    if len(which):
        value, found = nearest(x[safe], table[which], bias[which])
        found = which[found]
        # As a comparison with all would have it: of equal scores the lower centroid.
        better = (value > score[safe]) | ((value == score[safe]) & (found < label[safe]))
        score[safe[better]], label[safe[better]] = value[better], found[better]
    return score, label


def power_above(centroids: Float32) -> float:
    """The power of two at or above the largest coordinate: what the quantum of the sums is measured against."""
    return float(2.0 ** np.ceil(np.log2(max(float(np.abs(centroids).max()), 2.0**-64))))


def moved_centroids(total: Float64, count: Int64, *, spherical: bool) -> tuple[Float32, int]:
    """The means of the clusters, of unit length if `spherical`, and how many clusters were empty.

    An empty cluster gets half of what is then the largest one: a copy of its mean, moved by a thousandth. A cluster
    whose rows cancel out to zeros has no direction and stays at zero.
    """
    mean = total / np.maximum(count, 1)[:, None]
    empty = np.flatnonzero(count == 0)
    largest = [(-int(n), i) for i, n in enumerate(count) if n > 0]
    heapq.heapify(largest)
    sign = np.where(np.arange(mean.shape[1]) % 2 == 0, 1.0, -1.0)
    for cluster in empty:
        size, donor = largest[0]
        mean[cluster] = mean[donor] * (1 + 1e-3 * sign)
        half = -(size // 2)  # sizes are negative; the donor keeps the smaller part
        heapq.heapreplace(largest, (size + half, donor))
        heapq.heappush(largest, (-half, int(cluster)))
    if spherical:
        length = np.linalg.norm(mean, axis=1, keepdims=True)
        mean /= np.where(length == 0, 1.0, length)
    return np.ascontiguousarray(mean, dtype=np.float32), len(empty)
