"""The tiers of duplicate search, from certain to likely: bytes, pixels, perceptual hash, embedding.

All tiers speak one language: edges between rows of the pool with a similarity in 0 .. 1, and for leakage one best
match per row in a reference set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Progress
from dinov2cli.search.edges import Edges, make_edges
from dinov2cli.search.hamming import BITS, HashTable, best_hash_match
from dinov2cli.search.neighbours import best_match
from dinov2cli.search.vectors import Float32, Int64, Vectors

TIERS = ("bytes", "pixels", "perceptual", "geometric", "embedding")
Keys: TypeAlias = Sequence[str | None] | pa.Array | pa.ChunkedArray
"""A digest for every row; None or null where there is none."""


@dataclass(frozen=True)
class Tier:
    """Edges of one kind. `floor` is the similarity at its threshold: how far above it an edge lies is its strength."""

    name: str
    edges: Edges
    floor: float

    def strength(self) -> Float32:
        """[E] in 0 .. 1; exact copies have 1."""
        if self.floor >= 1:
            return np.ones(len(self.edges), dtype=np.float32)
        return np.clip((self.edges.similarity - np.float32(self.floor)) / np.float32(1 - self.floor), 0, 1)

    def only(self, which: npt.NDArray[np.bool_]) -> "Tier":
        """The same with the edges of a mask [E]."""
        edges = self.edges
        left = Edges(edges.src[which], edges.dst[which], edges.similarity[which], edges.truncated)
        return Tier(self.name, left, self.floor)


@dataclass(frozen=True)
class Reference:
    """A set that nothing may leak from, by what is known of it.

    ids [R], its name, and digests, hashes or vectors of its images. local: from local features, for every row of the
    pool the similarity [N] and row [N] (-1 for none) of its best match.
    """

    ids: Sequence[str]
    name: str = "reference"
    sha256: Keys | None = None
    pixels: Keys | None = None
    hashes: HashTable | None = None
    vectors: Vectors | npt.NDArray[np.floating] | None = None
    local: Callable[[], tuple[Float32, Int64]] | None = None


@dataclass(frozen=True)
class Matches:
    """For every row of the pool its match among the references: set [N], row [N] of that set (-1 for none), similarity
    [N], tier [N] (a position in TIERS)."""

    set: Int64
    row: Int64
    similarity: npt.NDArray[np.float64]
    tier: Int64


def exact_tier(name: str, keys: Keys, priority: Int64) -> Tier:
    """Rows with the same key, joined in a star to the one with the lowest `priority` [N]; None joins nothing.

    The star's centre is then the image that will be kept, so every copy has its direct edge to it.
    """
    code = _codes(keys)
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
    references: Sequence[Reference],
    *,
    threshold: float,
    sha256: Keys | None = None,
    pixels: Keys | None = None,
    hashes: HashTable | None = None,
    hash_radius: int,
    vectors: Vectors | npt.NDArray[np.floating] | None = None,
    bias: Float32 | None = None,
    index: str = "auto",
    nprobe: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Matches:
    """The reference image that each row repeats, of the first set that has one, by the most certain tier that both
    sides have.

    threshold: cosine above which (strictly) a row counts as leaked. bias: what score normalisation takes from every
    row's cosines [N]. Direct matches only: a row is never dropped for resembling another row that matches.
    """
    nowhere = np.full(rows, -1, dtype=np.int64)
    found = Matches(nowhere, nowhere.copy(), np.full(rows, np.nan), nowhere.copy())
    for number, reference in enumerate(references):
        for tier, ours, theirs in (("bytes", sha256, reference.sha256), ("pixels", pixels, reference.pixels)):
            if ours is not None and theirs is not None:
                first = pc.index_in(_strings(ours), value_set=_strings(theirs), skip_nulls=True)
                row = np.asarray(first.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)
                _take(found, number, tier, row, np.ones(rows))
        if hashes is not None and reference.hashes is not None:
            similarity, row = best_hash_match(hashes, reference.hashes, radius=hash_radius, ranks=ranks)
            _take(found, number, "perceptual", row, similarity)
        if reference.local is not None:
            similarity, row = reference.local()
            _take(found, number, "geometric", row, similarity)
        if vectors is not None and reference.vectors is not None and len(reference.ids):
            similarity, row = best_match(
                vectors,
                reference.vectors,
                index=index,
                nprobe=nprobe,
                memory=memory,
                seed=seed,
                progress=progress,
                ranks=ranks,
            )
            if bias is not None:
                similarity = similarity - bias  # the image asked about is the query, so its own bias counts in full
            _take(found, number, "embedding", np.where(similarity > threshold, row, -1), similarity)
    return found


def _take(found: Matches, number: int, tier: str, row: Int64, similarity: npt.NDArray[np.floating]) -> None:
    new = (found.row < 0) & (row >= 0)
    found.set[new], found.row[new], found.similarity[new] = number, row[new], similarity[new]
    found.tier[new] = TIERS.index(tier)


def _codes(keys: Keys) -> Int64:
    """A number per distinct key, [N]; -1 for None or an empty one."""
    codes = _strings(keys).dictionary_encode().indices.fill_null(-1)
    return np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.int64)


def _strings(keys: Keys) -> pa.Array:
    """Keys as one Arrow array; an empty key becomes a null, which equals nothing."""
    strings = pa.array(keys, pa.string()) if isinstance(keys, Sequence) else keys
    if isinstance(strings, pa.ChunkedArray):
        strings = strings.combine_chunks()
    return pc.if_else(pc.equal(strings, ""), None, strings)
