"""The tiers of duplicate search, from certain to likely: bytes, pixels, perceptual hash, embedding.

All tiers speak one language: edges between rows of the pool with a similarity in 0 .. 1, and for leakage one best
match per row in a reference set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Progress
from dinov2cli.search.edges import Edges, make_edges
from dinov2cli.search.hamming import BITS, HashTable, best_hash_match
from dinov2cli.search.neighbours import best_match
from dinov2cli.search.vectors import Int64, Vectors

TIERS = ("bytes", "pixels", "perceptual", "embedding")
Keys = Sequence[str | None]


@dataclass(frozen=True)
class Tier:
    """Edges of one kind. `floor` is the similarity at its threshold: how far above it an edge lies is its strength."""

    name: str
    edges: Edges
    floor: float

    def strength(self) -> npt.NDArray[np.float64]:
        """[E] in 0 .. 1; exact copies have 1."""
        span = max(1.0 - self.floor, 1e-9)
        value = (self.edges.similarity.astype(np.float64) - self.floor) / span
        return np.clip(value, 0.0, 1.0) if self.floor < 1 else np.ones(len(self.edges))


@dataclass(frozen=True)
class Reference:
    """The set nothing may leak from, by what is known of it: ids [R], and digests, hashes or vectors of its images."""

    ids: Sequence[str]
    sha256: Keys | None = None
    pixels: Keys | None = None
    hashes: HashTable | None = None
    vectors: Vectors | npt.NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Matches:
    """For every row of the pool its match in the reference: row [N] (-1 for none), similarity [N], tier [N]
    (a position in TIERS)."""

    row: Int64
    similarity: npt.NDArray[np.float64]
    tier: Int64


def exact_tier(name: str, keys: Keys, priority: Int64) -> Tier:
    """Rows with the same key, joined in a star to the one with the lowest `priority` [N]; None joins nothing.

    The star's centre is then the image that will be kept, so every copy has its direct edge to it.
    """
    code = _codes(keys)[0]
    order = np.lexsort((priority, code))
    order = order[code[order] >= 0]
    _, first = np.unique(code[order], return_index=True)
    counts = np.diff(np.append(first, len(order)))
    centre = np.repeat(order[first], counts) if len(first) else order
    return Tier(name, make_edges(centre, order, np.ones(len(order))), 1.0)


def perceptual_tier(edges: Edges, radius: int) -> Tier:
    """Edges of the perceptual hash; one bit beyond the radius is where their strength begins."""
    return Tier("perceptual", edges, 1 - (radius + 1) / BITS)


def reference_matches(
    rows: int,
    reference: Reference,
    *,
    threshold: float,
    sha256: Keys | None = None,
    pixels: Keys | None = None,
    hashes: HashTable | None = None,
    hash_radius: int,
    vectors: Vectors | npt.NDArray[np.floating] | None = None,
    index: str = "auto",
    nprobe: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Matches:
    """The reference image that each row repeats, by the most certain tier that both sides have.

    threshold: cosine above which (strictly) a row counts as leaked. Direct matches only: a row is never dropped
    for resembling another row that matches.
    """
    found = Matches(np.full(rows, -1, dtype=np.int64), np.full(rows, np.nan), np.full(rows, -1, dtype=np.int64))
    for tier, ours, theirs in ((0, sha256, reference.sha256), (1, pixels, reference.pixels)):
        if ours is not None and theirs is not None:
            position = _first_position(theirs)
            row = np.array([position.get(key, -1) if key else -1 for key in ours], dtype=np.int64)
            _take(found, tier, row, np.ones(rows))
    if hashes is not None and reference.hashes is not None:
        similarity, row = best_hash_match(hashes, reference.hashes, radius=hash_radius, ranks=ranks)
        _take(found, 2, row, similarity)
    if vectors is not None and reference.vectors is not None and len(reference.ids):
        similarity, row = best_match(
            vectors, reference.vectors, index=index, nprobe=nprobe, seed=seed, progress=progress, ranks=ranks
        )
        _take(found, 3, np.where(similarity > threshold, row, -1), similarity)
    return found


def _take(found: Matches, tier: int, row: Int64, similarity: npt.NDArray[np.floating]) -> None:
    new = (found.row < 0) & (row >= 0)
    found.row[new], found.similarity[new], found.tier[new] = row[new], similarity[new], tier


def _first_position(keys: Keys) -> dict[str, int]:
    position: dict[str, int] = {}
    for row, key in enumerate(keys):
        if key:
            position.setdefault(key, row)
    return position


def _codes(keys: Keys) -> tuple[Int64, int]:
    """A number per distinct key, -1 for None or an empty one."""
    position: dict[str, int] = {}
    code = [position.setdefault(key, len(position)) if key else -1 for key in keys]
    return np.array(code, dtype=np.int64), len(position)
