"""Which pairs of images are copies: aligned by their local features, compared by pixels, judged by what is rare.

Two pages of the same template agree over most of their area, and so do a photograph and its copy with a logo. What
tells them apart is what else the agreeing part is seen in: the template lies around pictures that differ, the
photograph does not. So every part of an image has a rarity: high where the images that agree there agree as a whole
("concordant"), low where many agree there and not elsewhere. Pairs that agree only in part need rarity.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.edges import Edges
from dinov2cli.search.local_align import Alignment, align, mirrored_places
from dinov2cli.search.local_candidates import Candidates
from dinov2cli.search.local_compare import CELLS, Comparison, compare
from dinov2cli.search.local_features import LocalFeatures
from dinov2cli.search.vectors import Float32, Int64

THRESHOLD = 0.6
"""Share of the texture that must agree, in the part of one image that lies in the other."""

CERTAIN = 0.95
"""Share from which on a pair is a copy without a look at others: pages of one template with different pictures reach
0.91, seldom 0.94."""

ALONE_SHARE = 0.85
"""Share needed where no other image says whether the part that agrees is rare."""

LEAST_INLIERS = 6
RARE = 0.5
"""Rarity of the part that agrees (1: found only in images that agree as a whole)."""

VOUCHED = 0.4
"""Share of the texture that must agree and be known to be rare from other pairs."""

_LEAST_OVERLAP = 0.3  # of one of the two images
_LEAST_EVIDENCE = 4.0  # patches of full contrast
_CERTAIN_REACH = 0.5  # of the texture that lies near matched features
_CERTAIN_CHANGED = 0.06  # of the area
_CERTAIN_COVERED = 0.88  # dark pictures on two pages look much the same from afar, but share no features
_AGAINST = 2.0  # images that agree in this part only count double
_MOST_COPIES = 8
_BLOCK = 256


@dataclass(frozen=True)
class Verified:
    """Pairs that are copies, and what was found of all that were compared.

    edges: src < dst within one set (rows of both sets where they were two), similarity = share; transform [E, 2, 3]:
    from positions in src (over its longer side; mirrored first where `mirrored` [E]) to those in dst; inliers [E]:
    features that agree; overlap [E, 2]: share of src that lies in dst, and of dst in src: (0.5, 1) says that dst is a
    crop of half of src. shares [P]: the share of every pair compared, 0 where nothing could be aligned; rejected [P]:
    pairs above the threshold that were not accepted, for what agrees is not rare.
    """

    edges: Edges
    transform: Float32
    mirrored: npt.NDArray[np.bool_]
    inliers: Int64
    overlap: Float32
    shares: Float32
    rejected: npt.NDArray[np.bool_]

    def describe(self, edge: int) -> str:
        """In words, what dst is to src: 'crop', 'part', 'the same frame', with '(mirrored)'."""
        src, dst = self.overlap[edge]
        if src < 0.9 <= dst:
            word = f"crop ({100 * src:.0f} % of the other)"
        elif dst < 0.9 <= src:
            word = f"part of it is the other ({100 * dst:.0f} %)"
        elif min(src, dst) >= 0.9:
            word = "same frame"
        else:
            word = f"overlapping part ({100 * max(src, dst):.0f} %)"
        return f"{word}, mirrored" if self.mirrored[edge] else word


def verified_edges(
    features: LocalFeatures,
    candidates: Candidates,
    reference: LocalFeatures | None = None,
    *,
    threshold: float = THRESHOLD,
    copies: Int64 | None = None,
    workers: int = 1,
    store: Store | None = None,
    key: str = "",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Verified:
    """The candidates (rows of `features` in a; in b too, or rows of `reference`) that are copies.

    Args:
        threshold: share of the texture that must agree, at least; see `Verified`.
        copies: [N] how many copies of each image are known already and left out of the candidates; they speak for
            the rarity of all parts of it.
        workers: threads.
        store, key: finished blocks of pairs are kept; `key` says which images these are.

    Memory: 250 bytes a pair that could be aligned.
    """
    pairs = _unique_pairs(candidates, one_set=reference is None)
    stage = None
    if store is not None:
        digest = hashlib.sha256(pairs.tobytes()).hexdigest()
        stage = store.stage(
            "local-pairs", {"images": key, "pairs": digest, "sets": 1 + (reference is not None), "compare": 1}
        )
    other = features if reference is None else reference
    with ThreadPoolExecutor(max(1, workers)) as threads:

        def one(pair: Int64) -> dict[str, np.ndarray]:
            return _compared(features, int(pair[0]), other, int(pair[1]), bool(pair[2]))

        def block(start: int) -> Arrays:
            found = list(threads.map(one, pairs[start : start + _BLOCK]))
            return {name: np.concatenate([f[name] for f in found]) for name in found[0]}

        parts = list(over_blocks(kept(block, stage), len(pairs), _BLOCK, progress=progress, ranks=ranks))
    if not parts:
        return _nothing()
    table = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    if reference is not None:  # rows of two sets must not be taken for each other
        pairs = pairs + np.array([0, len(features), 0])
    verified = _judged(pairs, table, threshold, copies)
    if reference is None:
        return verified
    edges = verified.edges
    shifted = Edges(edges.src, edges.dst - len(features), edges.similarity)
    return Verified(shifted, *(getattr(verified, name) for name in _REST))


def best_local_match(verified: Verified, rows: int) -> tuple[Float32, Int64]:
    """For every row of the first of two sets its best copy in the second: similarity [N], row [N] (-inf and -1: none).

    `verified`: of `verified_edges` with a reference. Of equally similar ones the first is taken.
    """
    similarity = np.full(rows, -np.inf, dtype=np.float32)
    row = np.full(rows, -1, dtype=np.int64)
    edges = verified.edges
    order = np.lexsort((edges.dst, -edges.similarity, edges.src))
    who, first = np.unique(edges.src[order], return_index=True)
    similarity[who], row[who] = edges.similarity[order][first], edges.dst[order][first]
    return similarity, row


_REST = ("transform", "mirrored", "inliers", "overlap", "shares", "rejected")
_MAPS = ("support_a", "support_b", "weight_a", "weight_b")


def _unique_pairs(candidates: Candidates, *, one_set: bool) -> Int64:
    """[P, 3]: a, b, mirrored; each once, a < b within one set."""
    a, b = candidates.a, candidates.b
    if one_set:
        a, b = np.minimum(a, b), np.maximum(a, b)
    pairs = np.unique(np.column_stack([a, b, candidates.mirrored.astype(np.int64)]), axis=0)
    return pairs[pairs[:, 0] != pairs[:, 1]] if one_set else pairs


def _compared(features: LocalFeatures, a: int, other: LocalFeatures, b: int, mirrored: bool) -> dict[str, np.ndarray]:
    """What is known of one pair, as rows of arrays; `aligned` is empty or that of the one row of the rest."""
    found = align(features, a, other, b, mirrored)
    if found is None or len(found.inliers) < LEAST_INLIERS:
        return _row(None, None, None)
    places_a = mirrored_places(features, a, mirrored)[found.inliers[:, 0], :2]
    places_b = other.places(b)[found.inliers[:, 1], :2]
    thumb = np.ascontiguousarray(features.thumbs[a][:, ::-1] if mirrored else features.thumbs[a])
    there, transform = np.ascontiguousarray(other.thumbs[b]), found.transform.astype(np.float64)
    of_a = compare(thumb, features.extent[a], there, other.extent[b], transform, places_a)
    of_b = compare(there, other.extent[b], thumb, features.extent[a], _inverse(transform), places_b)
    return _row(found, of_a, of_b)


def _row(found: Alignment | None, a: Comparison | None, b: Comparison | None) -> dict[str, np.ndarray]:
    if found is None or a is None or b is None:
        maps = {name: np.zeros((0, CELLS, CELLS), np.uint8) for name in _MAPS}
        return {
            "aligned": np.zeros(1, bool),
            "transform": np.zeros((0, 2, 3), np.float32),
            "numbers": np.zeros((0, 8), np.float32),
            **maps,
        }
    # The image that lies further inside the other says how far they agree: of a crop all is seen again.
    frame = a if a.overlap >= b.overlap else b
    numbers = [len(found.inliers), a.overlap, b.overlap, frame.share, frame.covered, frame.reach]
    numbers += [frame.changed, frame.evidence]
    flip = slice(None, None, -1 if found.mirrored else 1)  # maps lie as the image itself does, not its mirror image
    values = (a.support[:, flip], b.support, a.weight[:, flip], b.weight)
    return {
        "aligned": np.ones(1, bool),
        "transform": found.transform[None],
        "numbers": np.array([numbers], dtype=np.float32),
        **{name: np.round(255 * v).astype(np.uint8)[None] for name, v in zip(_MAPS, values, strict=True)},
    }


def _judged(pairs: Int64, table: Arrays, threshold: float, copies: Int64 | None) -> Verified:
    which = np.flatnonzero(table["aligned"])
    inliers, over_a, over_b, share, covered, reach, changed, evidence = table["numbers"].T
    sound = (np.maximum(over_a, over_b) >= _LEAST_OVERLAP) & (evidence >= _LEAST_EVIDENCE)
    alike = sound & (share >= CERTAIN) & (reach >= _CERTAIN_REACH) & (changed <= _CERTAIN_CHANGED)
    certain = alike & (covered >= _CERTAIN_COVERED)
    partial = sound & ~alike
    value = np.where(certain, share, covered)
    doubtful = np.flatnonzero(sound & ~certain & (covered >= threshold))
    accept = certain & (share >= threshold)
    accept[doubtful] = _rare_enough(pairs[which], table, certain, partial, doubtful, covered, copies)
    shares = np.zeros(len(pairs), dtype=np.float32)
    shares[which] = np.where(sound, value, 0)
    rejected = np.zeros(len(pairs), dtype=bool)
    rejected[which[doubtful]] = ~accept[doubtful]
    # Of a pair found both as it is and mirrored the alignment with more features stands.
    chosen = np.flatnonzero(accept)
    a, b = pairs[which[chosen], 0], pairs[which[chosen], 1]
    order = np.lexsort((-inliers[chosen], b, a))
    chosen, a, b = chosen[order], a[order], b[order]
    new = np.ones(len(a), dtype=bool)
    new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    chosen = chosen[new]
    return Verified(
        edges=Edges(a[new], b[new], value[chosen].astype(np.float32)),
        transform=table["transform"][chosen].astype(np.float32),
        mirrored=pairs[which[chosen], 2] == 1,
        inliers=inliers[chosen].astype(np.int64),
        overlap=np.column_stack([over_a, over_b])[chosen].astype(np.float32),
        shares=shares,
        rejected=rejected,
    )


def _rare_enough(
    pairs: Int64,
    table: Arrays,
    certain: npt.NDArray[np.bool_],
    partial: npt.NDArray[np.bool_],
    doubtful: Int64,
    covered: np.ndarray,
    copies: Int64 | None,
) -> npt.NDArray[np.bool_]:
    """Whether what the doubtful pairs agree in is rare, from one side or the other."""
    if not len(doubtful):
        return np.zeros(0, dtype=bool)
    images = np.unique(pairs[doubtful, :2])
    concordant = np.zeros((len(images), CELLS, CELLS), dtype=np.float32)
    discordant = np.zeros_like(concordant)
    if copies is not None:
        known = images < len(copies)
        concordant[known] += np.minimum(copies[images[known]], _MOST_COPIES).astype(np.float32)[:, None, None]
    for side in (0, 1):
        at = np.searchsorted(images, pairs[:, side])
        here = (at < len(images)) & (images[np.minimum(at, len(images) - 1)] == pairs[:, side])
        for counts, kind in ((concordant, certain), (discordant, partial)):
            for rows in _pieces(np.flatnonzero(here & kind)):
                np.add.at(counts, at[rows], table[_MAPS[side]][rows].astype(np.float32) / 255)
    rare = np.zeros(len(doubtful), dtype=bool)
    for piece in _pieces(np.arange(len(doubtful))):
        for side in (0, 1):
            rows = doubtful[piece]
            at = np.searchsorted(images, pairs[rows, side])
            support = table[_MAPS[side]][rows].astype(np.float32) / 255
            weight = table[_MAPS[side + 2]][rows].astype(np.float32) / 255
            total = np.maximum(weight.sum(axis=(1, 2)), 1e-6)
            agreed = np.maximum((weight * support).sum(axis=(1, 2)), 1e-6)
            others = np.maximum(discordant[at] - support, 0)  # what this pair says of itself does not count
            rarity = (1 + concordant[at]) / (1 + concordant[at] + _AGAINST * others)
            trusted = rarity * np.minimum(concordant[at], 1)
            vouched = (weight * support * trusted).sum(axis=(1, 2)) / total >= VOUCHED
            alone = (weight * support * rarity).sum(axis=(1, 2)) / agreed > RARE
            rare[piece] |= vouched | (alone & (covered[rows] >= ALONE_SHARE))
    return rare


def _pieces(rows: Int64) -> Iterator[Int64]:
    for start in range(0, len(rows), 1 << 16):
        yield rows[start : start + (1 << 16)]


def _inverse(transform: np.ndarray) -> np.ndarray:
    back = np.linalg.inv(transform[:, :2])
    return np.column_stack([back, -back @ transform[:, 2]])


def _nothing() -> Verified:
    none = np.zeros(0, dtype=np.int64)
    return Verified(
        edges=Edges(none, none, np.zeros(0, np.float32)),
        transform=np.zeros((0, 2, 3), np.float32),
        mirrored=np.zeros(0, bool),
        inliers=none,
        overlap=np.zeros((0, 2), np.float32),
        shares=np.zeros(0, np.float32),
        rejected=np.zeros(0, bool),
    )
