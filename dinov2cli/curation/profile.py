"""How similar images are to their nearest neighbours: where a threshold lies among them, and where a gap is."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.index import build_index
from dinov2cli.search.neighbours import neighbour_blocks
from dinov2cli.search.vectors import Float32, Int64, SubsetVectors, Vectors, as_vectors, sample_rows

BINS = 100
_FLOPS = 1e12  # a few seconds on two cores
_LEAST = 256
_MOST = 20_000
_SMOOTH = 2.0  # bins
_DEPTH = np.log(2.0)  # a valley must lie a factor of 2 below the lower of its two sides


@dataclass(frozen=True)
class SimilarityProfile:
    """Cosines of a sample of images to their nearest neighbours.

    counts [BINS] of the nearest cosine of each of `sampled` images, over bins from 0 to 1, negative ones in the first.
    below and above: pairs (row, row, cosine) just below and just above the threshold, nearest to it first. gap: a
    cosine in the emptiest stretch between two heaps of the histogram, None where there is no such stretch.
    """

    threshold: float
    sampled: int
    counts: Int64
    below: list[tuple[int, int, float]]
    above: list[tuple[int, int, float]]
    gap: float | None

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Edges of the bins [BINS + 1]."""
        return np.linspace(0, 1, BINS + 1)


def similarity_profile(
    vectors: Vectors | npt.NDArray[np.floating],
    threshold: float,
    *,
    pairs: int = 12,
    neighbours: int = 8,
    seed: int = 0,
    memory: int | None = None,
    ranks: Ranks = ALONE,
) -> SimilarityProfile:
    """Compare a sample of rows with all others, exactly, as many as a bounded amount of work allows.

    vectors: [N, D]. Up to N = 20,000 every row is sampled where D is small; at least 256 rows always. The result is the
    same on all `ranks`, which share the search.
    """
    source = as_vectors(vectors)
    rows = source.rows
    if rows < 2:
        return SimilarityProfile(threshold, 0, np.zeros(BINS, dtype=np.int64), [], [], None)
    size = int(np.clip(_FLOPS / (2 * rows * max(1, source.dim)), _LEAST, _MOST))
    chosen = sample_rows(rows, size, seed)
    index = build_index(source, index="flat", memory=memory)
    found: list[tuple[Int64, Int64, Float32]] = []
    best = np.full(len(chosen), -1.0, dtype=np.float32)
    # One more than asked, for each row finds itself.
    for block in neighbour_blocks(index, SubsetVectors(source, chosen), neighbours + 1, ranks=ranks):
        own = chosen[block.start : block.start + len(block.row)]
        other = (block.row >= 0) & (block.row != own[:, None])
        best[block.start : block.start + len(own)] = np.where(other, block.similarity, -1.0).max(axis=1)
        offset, rank = np.nonzero(other)
        found.append((own[offset], block.row[offset, rank], block.similarity[offset, rank]))
    first, second, cosine = (np.concatenate(part) for part in zip(*found, strict=True))
    counts = np.histogram(np.clip(best, 0, 1), bins=BINS, range=(0, 1))[0].astype(np.int64)
    is_above = cosine > threshold
    return SimilarityProfile(
        threshold,
        len(chosen),
        counts,
        _nearest_pairs(first[~is_above], second[~is_above], cosine[~is_above], threshold, pairs),
        _nearest_pairs(first[is_above], second[is_above], cosine[is_above], threshold, pairs),
        histogram_gap(counts),
    )


def histogram_gap(counts: npt.NDArray[np.integer]) -> float | None:
    """The middle of the deepest valley of a histogram [B] over 0 .. 1, None where it has no two heaps.

    Counts are smoothed on a logarithmic scale. A valley is a stretch that lies below half of the lower of the highest
    counts on either side; of the deepest one the middle of its floor is taken.
    """
    heights = _smoothed(np.log1p(np.asarray(counts, dtype=np.float64)))
    left = np.maximum.accumulate(heights)
    right = np.maximum.accumulate(heights[::-1])[::-1]
    depth = np.minimum(left, right) - heights
    deepest = int(np.argmax(depth))
    if depth[deepest] < _DEPTH:
        return None
    floor = np.flatnonzero(depth >= depth[deepest] - 1e-9)
    # Of several stretches with the same floor the one around the first deepest bin.
    run = floor[: np.flatnonzero(np.diff(floor, append=floor[-1] + 2) > 1)[0] + 1]
    return float((run[0] + run[-1] + 1) / 2 / len(heights))


def _smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    reach = int(3 * _SMOOTH)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SMOOTH) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


def _nearest_pairs(
    first: Int64, second: Int64, cosine: Float32, threshold: float, count: int
) -> list[tuple[int, int, float]]:
    """The `count` pairs nearest to the threshold, each once, whichever of its two rows found it."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((high, low, np.abs(cosine - np.float32(threshold))))
    pairs: dict[tuple[int, int], float] = {}
    for position in order:
        pairs.setdefault((int(low[position]), int(high[position])), float(cosine[position]))
        if len(pairs) == count:
            break
    return [(a, b, value) for (a, b), value in pairs.items()]
