"""Pairs of images that share rare local features: an inverted file over visual words, with signatures.

A feature's word is its cell in a product of two small k-means (an inverted multi-index, Babenko and Lempitsky 2012),
its signature the signs of its 64 numbers (Hamming embedding, Jegou et al. 2008). Two features match where they share a
word and differ in few signs. What is found in many images (letters, logos, the frame of a page) says little about any
two of them: every feature has one vote, shared out among the images it is found in.
"""

import hashlib
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Arrays, Progress, Store, kept, over_blocks
from dinov2cli.search.local_features import WIDTH, LocalFeatures, mirror_signs
from dinov2cli.search.vectors import Float32, Int64, sample_rows

K = 10
"""Candidates looked at of each image."""

MAX_BITS = 12
"""Signs of 64 that may differ: true matches differ in 8 to 18, chance ones within a word in 24 or so."""

LEAST_VOTES = 3
"""Matching features below which a pair is chance."""

_PER_WORD = 32  # features in a word, on average
_LARGEST_SIDE, _SMALLEST_SIDE = 1024, 8
_COMMON = 400  # a word this many times the average is common: letters, or noise
_BLOCK = 64
_AT_ONCE = 1 << 22
_SAMPLE = 200_000
_FADE = 0.5

Uint64 = npt.NDArray[np.uint64]
_BITS_OF = np.unpackbits(np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2), axis=1).sum(axis=1)


@dataclass(frozen=True)
class Candidates:
    """Pairs a [P] -> b [P], mirrored [P] (whether a is to be mirrored), votes [P]; and `found_in` [F]: for each feature
    of the searching set in how many images it was found (65535 at most)."""

    a: Int64
    b: Int64
    mirrored: npt.NDArray[np.bool_]
    votes: Float32
    found_in: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Vocabulary:
    """mean [64] of the codes, centroids [2, side, 32] of their even and odd columns."""

    mean: Float32
    centroids: Float32

    def words(self, codes: Float32, wide: bool = False) -> Int64:
        """The word of each row [n], or with `wide` the two nearest cells of either half combined to three, [n, 3]."""
        side = self.centroids.shape[1]
        nearest = []
        for half in range(2):
            index = faiss.IndexFlatL2(WIDTH // 2)
            index.add(np.ascontiguousarray(self.centroids[half]))
            nearest.append(index.search(np.ascontiguousarray(codes[:, half::2]), 2 if wide else 1)[1])
        first, second = nearest
        if not wide:
            return first[:, 0] * side + second[:, 0]
        pairs = ((0, 0), (1, 0), (0, 1))
        return np.stack([first[:, i] * side + second[:, j] for i, j in pairs], axis=1)

    def signatures(self, codes: Float32) -> Uint64:
        """The signs of each row as one number, [n]."""
        bits = np.packbits(codes > self.mean, axis=1, bitorder="little")
        return np.ascontiguousarray(bits).view("<u8").ravel()


@dataclass(frozen=True)
class _Inverted:
    """Features by word: owner and signature [F] in the order of words; those of word w are start[w] to start[w + 1]."""

    start: Int64
    owner: npt.NDArray[np.int32]
    signature: Uint64


def local_candidates(
    features: LocalFeatures,
    reference: LocalFeatures | None = None,
    *,
    k: int = K,
    groups: Int64 | None = None,
    mirror: bool = True,
    seed: int = 0,
    store: Store | None = None,
    key: str = "",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Candidates:
    """The up to `k` images (of `reference`, or of the set itself) that share most with each image.

    groups: [N] labels; images of the same group are not compared (they are known to be copies). mirror: look for
    mirrored copies too. store, key: finished blocks of images are kept; `key` says which images these are. Memory: 12
    bytes a feature of the set that is searched, hence 5 kB an image. The result depends on nothing but the features
    and these settings.
    """
    target = features if reference is None else reference
    if not len(features.codes) or not len(target.codes) or k < 1:
        none = np.zeros(0, dtype=np.int64)
        return Candidates(none, none, none == 1, np.zeros(0, np.float32), np.zeros(len(features.codes), np.uint16))
    vocabulary = ranks.first(lambda: fit_vocabulary(target, seed=seed))
    inverted = _invert(target, vocabulary)
    own = groups if groups is not None else np.arange(len(features), dtype=np.int64)
    stage = None
    if store is not None:
        known = hashlib.sha256(np.ascontiguousarray(own).tobytes()).hexdigest()
        plan = {"k": k, "mirror": mirror, "seed": seed, "rows": [len(features), len(target)], "groups": known}
        stage = store.stage("local-candidates", {"images": key, **plan, "bits": MAX_BITS, "search": 1})

    def block(start: int) -> Arrays:
        stop = min(start + _BLOCK, len(features))
        return _search(features, start, stop, inverted, vocabulary, own if reference is None else None, k, mirror)

    results = list(over_blocks(kept(block, stage), len(features), _BLOCK, progress=progress, ranks=ranks))
    joined = {name: np.concatenate([r[name] for r in results]) for name in results[0]}
    return Candidates(joined["a"], joined["b"], joined["mirrored"], joined["votes"], joined["found_in"])


def fit_vocabulary(features: LocalFeatures, *, seed: int = 0) -> Vocabulary:
    """Two k-means of 32 numbers each on a sample of the features; their sizes follow from how many there are."""
    total = len(features.codes)
    side = _SMALLEST_SIDE
    while side < _LARGEST_SIDE and side * side * _PER_WORD < total:
        side *= 2
    sample = np.asarray(features.codes[sample_rows(total, _SAMPLE, seed)], dtype=np.float32)
    side = min(side, len(sample))
    mean = sample.mean(axis=0)
    mean[mirror_signs() < 0] = 0  # it is, over pictures and their mirror images
    halves = []
    for half in range(2):
        part = np.ascontiguousarray(sample[:, half::2])
        kmeans = faiss.Kmeans(WIDTH // 2, side, niter=8, seed=seed + half, min_points_per_centroid=1)
        kmeans.train(part)
        halves.append(np.asarray(kmeans.centroids, dtype=np.float32))
    return Vocabulary(mean, np.stack(halves))


def _invert(features: LocalFeatures, vocabulary: Vocabulary) -> _Inverted:
    total, step = len(features.codes), 1 << 17
    words = np.empty(total, dtype=np.int32)
    signature = np.empty(total, dtype=np.uint64)
    for start in range(0, total, step):
        codes = np.asarray(features.codes[start : start + step], dtype=np.float32)
        words[start : start + step] = vocabulary.words(codes)
        signature[start : start + step] = vocabulary.signatures(codes)
    order = np.argsort(words, kind="stable")
    owner = np.repeat(np.arange(len(features), dtype=np.int32), np.diff(features.offsets))[order]
    first = np.searchsorted(words[order], np.arange(vocabulary.centroids.shape[1] ** 2 + 1))
    return _Inverted(first.astype(np.int64), owner, signature[order])


def _search(
    features: LocalFeatures,
    start: int,
    stop: int,
    inverted: _Inverted,
    vocabulary: Vocabulary,
    groups: Int64 | None,
    k: int,
    mirror: bool,
) -> Arrays:
    first, last = int(features.offsets[start]), int(features.offsets[stop])
    codes = np.asarray(features.codes[first:last], dtype=np.float32)
    image = np.repeat(np.arange(start, stop), np.diff(features.offsets[start : stop + 1]))
    parts = []
    for side, turned in enumerate((codes, codes * mirror_signs())[: 2 if mirror else 1]):
        feature, owner = _matches(turned, inverted, vocabulary)
        other = np.ones(len(owner), dtype=bool) if groups is None else groups[owner] != groups[image[feature]]
        feature, owner = feature[other], owner[other]
        # A feature that is found several times in an image counts once: windows and letters repeat.
        once = np.unique(feature * np.int64(1 << 32) + owner)
        parts.append((once >> 32, once & 0xFFFFFFFF, np.full(len(once), side, dtype=np.int64)))
    feature, owner, turned = (np.concatenate(column) for column in zip(*parts, strict=True))
    found_in = np.bincount(feature, minlength=len(codes))
    pair = ((image[feature] - start) * 2 + turned) * np.int64(1 << 32) + owner
    pair, where, count = np.unique(pair, return_inverse=True, return_counts=True)
    keep = (count >= LEAST_VOTES)[where]
    best, votes = _chosen(feature[keep], where[keep], (pair >> 33).astype(np.int64), 1 / np.maximum(found_in, 1), k)
    return {
        "a": (pair[best] >> 33) + start,
        "b": pair[best] & 0xFFFFFFFF,
        "mirrored": (pair[best] >> 32) & 1 == 1,
        "votes": votes.astype(np.float32),
        "found_in": np.minimum(found_in, 65535).astype(np.uint16),
    }


def _chosen(
    feature: Int64, pair: Int64, image: Int64, weight: npt.NDArray[np.floating], k: int
) -> tuple[Int64, Float32]:
    """Up to k pairs of each image, and their votes when chosen; in the order of images, the first choice first.

    feature, pair [M]: which feature votes for which pair; image [P]: whose pair it is; weight [F]. One after the other,
    the pair with most votes is taken, and the features that voted for it lose part of their weight: thirty pages on
    the same template share the same letters, and would else leave no place to the picture that is on one of them.
    """
    weight = weight.astype(np.float64)
    free = np.ones(len(image), dtype=bool)
    chosen, votes = [], []
    for _ in range(k):
        total = np.where(free, np.bincount(pair, weights=weight[feature], minlength=len(image)), 0)
        order = np.lexsort((np.arange(len(image)), -total, image))
        order = order[total[order] > 0]
        if not len(order):
            break
        first = order[np.concatenate([[True], image[order][1:] != image[order][:-1]])]
        chosen.append(first)
        votes.append(total[first])
        free[first] = False
        taken = np.zeros(len(image), dtype=bool)
        taken[first] = True
        weight[np.unique(feature[taken[pair]])] *= _FADE
    if not chosen:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    rows, value = np.concatenate(chosen), np.concatenate(votes)
    order = np.argsort(image[rows], kind="stable")
    return rows[order], value[order].astype(np.float32)


def _matches(codes: Float32, inverted: _Inverted, vocabulary: Vocabulary) -> tuple[Int64, Int64]:
    """(feature [M], image [M]) of features that share a word and nearly all signs."""
    words = vocabulary.words(codes, wide=True)
    signature = vocabulary.signatures(codes)
    begin, end = inverted.start[words].ravel(), inverted.start[words + 1].ravel()
    common = max(_COMMON, 20 * len(inverted.owner) // len(inverted.start))
    length = np.where(end - begin > common, 0, end - begin)
    who = np.repeat(np.arange(len(codes)), words.shape[1])
    reach = np.cumsum(length)
    found: list[tuple[Int64, Int64]] = []
    at = 0
    while at < len(length):
        before = reach[at - 1] if at else 0
        to = max(at + 1, int(np.searchsorted(reach, before + _AT_ONCE, side="right")))
        some = length[at:to]
        query = np.repeat(who[at:to], some)
        position = np.arange(int(some.sum())) + np.repeat(begin[at:to] - (np.cumsum(some) - some), some)
        near = _bits(signature[query] ^ inverted.signature[position]) <= MAX_BITS
        found.append((query[near], inverted.owner[position[near]].astype(np.int64)))
        at = to
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate([none, *(f[0] for f in found)]), np.concatenate([none, *(f[1] for f in found)])


def _bits(values: Uint64) -> npt.NDArray[np.integer]:
    """How many bits of each number are set."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(values)
    return _BITS_OF[values.view(np.uint16).reshape(-1, 4)].sum(axis=1)  # NumPy 1
