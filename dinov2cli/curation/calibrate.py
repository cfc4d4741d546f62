"""Thresholds for a data set and a model, measured: on the set's own images, and on altered copies made of them.

The set's images, looked at in pairs, tell how alike different images are; how that is carried over from a sample to
the whole pool is said in `tails.py`. Copies that the sample may hold already would be taken for different images that
look alike, so equal files and images that the hashes call copies are dropped first. The copies made by `copies.py`
tell what the thresholds still find, by kind of edit: they do not move a threshold.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.curation.calibrate_hashes import FURTHEST, hash_pairs, hash_tier
from dinov2cli.curation.calibrate_tiers import Aim, TierCalibration, vector_scores, vector_tier
from dinov2cli.curation.copies import KINDS, altered_file
from dinov2cli.curation.dedup import dedup
from dinov2cli.curation.fingerprints import Fingerprints, Images, fingerprint_images, pool_from_images
from dinov2cli.curation.tails import Float64
from dinov2cli.data.bad import BadImages
from dinov2cli.data.decode import decode_image
from dinov2cli.errors import InputError, UserError
from dinov2cli.search.blocks import Progress
from dinov2cli.search.hamming import BITS, best_hash_match
from dinov2cli.search.vectors import Float32, as_vectors

Embed = Callable[[list[npt.NDArray[np.uint8]]], npt.NDArray[np.floating]]
"""From images [H, W, 3] uint8 to their vectors [n, D], of any length."""

FEWEST_IMAGES = 50
_BATCH = 64


@dataclass(frozen=True)
class Calibration:
    """images: different images that were compared, of `sampled`; copied: originals that copies were made of; pool: how
    many images the thresholds are for; target: wanted share of images joined to a different one; tiers by name."""

    images: int
    sampled: int
    copied: int
    pool: int
    target: float
    seed: int
    tiers: dict[str, TierCalibration]

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for a manifest; nan becomes None."""
        return _plain(asdict(self))

    def messages(self) -> list[str]:
        """A line per tier, for people."""
        return [tier.reason for tier in self.tiers.values()]


def calibrate(
    source: Images,
    *,
    embed: Embed | None = None,
    bias: Callable[[Float32], npt.NDArray[np.floating]] | None = None,
    perceptual: bool = True,
    pool: int | None = None,
    false_merge: float = 0.001,
    images: int = 1000,
    copied: int = 150,
    kinds: Sequence[str] = KINDS,
    floor: float = 0.5,
    seed: int = 0,
    bootstrap: int = 200,
    workers: int = 1,
    bad: BadImages | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Choose the threshold of each tier for a wanted rate of false merges.

    Args:
        source: the images; a random sample of `images` of them is compared, all pairs.
        embed: the model, for the embedding tier; None leaves it out.
        bias: from unit vectors [n, D] to what score normalisation subtracts [n]: the score of a pair is then its cosine
            less the mean of the two biases.
        perceptual: choose the radius of the perceptual hash too.
        pool: how many images the thresholds are for; default: all of the source. The nearest different image gets
            nearer as a set grows.
        false_merge: share of the pool's images that may be joined to a different image.
        copied: of how many originals copies are made, one of each of `kinds`.
        floor: cosine (score) below which no threshold is chosen, however different the images.
        seed: draws the sample, the copies and the bootstrap's samples.
        bootstrap: how many samples the interval is made of.
        workers: threads that decode for the hashes.

    Raises:
        UserError: fewer than 50 different images, a rate outside (0, 1), or no tier.
        InputError: vectors that are not finite, all zero, or of another shape than [n, D].
    """
    if not 0 < false_merge < 1:
        raise UserError(f"calibration: found a rate of false merges of {false_merge:g}; expected one between 0 and 1")
    if embed is None and not perceptual:
        raise UserError("calibration: no tier to choose a threshold for; give a model, or images to hash")
    rows = np.sort(np.random.Generator(np.random.Philox(key=[seed, 0xCA1B])).permutation(len(source))[:images])
    sample = _Sample(source, rows)
    _enough(len(sample))
    prints = fingerprint_images(sample, workers=workers, bad=bad)
    different = _different(sample, prints)
    _enough(len(different))
    order = np.random.Generator(np.random.Philox(key=[seed, 0xC0])).permutation(different)
    chosen = np.sort(order[:copied])
    copies = _Copies(sample, chosen, tuple(kinds), seed)
    aim = Aim(false_merge, len(source) if pool is None else pool, bootstrap, seed)
    tiers = {}
    if perceptual:
        near, passing = hash_pairs(prints.hashes, aim.share)
        bits = _copy_bits(prints, copies, workers)
        tiers["perceptual"] = hash_tier(near, passing, bits, sample.ids, copies.kinds, aim)
    if embed is not None:
        total = len(different) + len(copies)
        originals = _embedded(sample, different, embed, progress, (0, total))
        altered = _embedded(copies, np.arange(len(copies)), embed, progress, (len(different), total))
        own = np.searchsorted(different, copies.original)
        near, positives, negatives = vector_scores(originals, altered, own, bias, aim.share)
        names = [sample.ids[row] for row in different]
        unit = "cosine" if bias is None else "score"
        tiers["embedding"] = vector_tier(near, positives, negatives, names, copies.kinds, aim, unit=unit, floor=floor)
    return Calibration(len(different), len(sample), len(chosen), aim.pool, false_merge, seed, tiers)


class _Sample:
    """Some rows of a source."""

    def __init__(self, source: Images, rows: npt.NDArray[np.int64]) -> None:
        self._source, self._rows = source, rows.tolist()
        self.ids = [source.ids[row] for row in self._rows]
        self.paths = self.ids

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int, /) -> bytes:
        return self._source.read(self._rows[row])

    def origin(self, row: int, /) -> tuple[str, int]:
        return self._source.origin(self._rows[row])


class _Copies:
    """Altered copies of some rows of a sample, made when they are read: every kind of the first, then of the next."""

    def __init__(self, sample: _Sample, rows: npt.NDArray[np.int64], kinds: tuple[str, ...], seed: int) -> None:
        self._sample, self._seed = sample, seed
        self.original = np.repeat(rows, len(kinds))
        self.kinds = np.array(kinds * len(rows), dtype=np.str_)
        self.ids = [f"{kind} of {sample.ids[row]}" for row in rows for kind in kinds]
        self.paths = self.ids

    def __len__(self) -> int:
        return len(self.original)

    def read(self, row: int, /) -> bytes:
        original, kind = int(self.original[row]), str(self.kinds[row])
        image = decode_image(self._sample.read(original), name=self._sample.ids[original])
        return altered_file(image, kind, seed=self._seed)

    def origin(self, row: int, /) -> tuple[str, int]:
        return self._sample.origin(int(self.original[row]))


def _enough(found: int) -> None:
    if found < FEWEST_IMAGES:
        raise UserError(
            f"calibration: found {found} different images; expected at least {FEWEST_IMAGES}, better 1000 and more; "
            "give more images, or a threshold"
        )


def _different(sample: _Sample, prints: Fingerprints) -> npt.NDArray[np.int64]:
    """Rows of the sample without copies, as far as bytes, pixels and hashes tell, and without what cannot be read."""
    return np.sort(dedup(pool_from_images(sample, prints), fingerprints=prints).rows)


def _embedded(
    images: _Sample | _Copies,
    rows: npt.NDArray[np.int64],
    embed: Embed,
    progress: Progress | None,
    done: tuple[int, int],
) -> Float32:
    """Unit vectors [len(rows), D] of these images, `_BATCH` at a time."""
    parts: list[npt.NDArray[np.floating]] = []
    for start in range(0, len(rows), _BATCH):
        here = rows[start : start + _BATCH].tolist()
        found = np.asarray(embed([decode_image(images.read(row), name=images.ids[row]) for row in here]))
        if found.ndim != 2 or len(found) != len(here) or (parts and found.shape[1] != parts[0].shape[1]):
            raise InputError(
                f"calibration: found embeddings of shape {found.shape} for {len(here)} images; expected a vector each, "
                "all of one length"
            )
        if not np.abs(found).sum(axis=1).all():
            raise InputError(
                f"calibration: the embedding of {images.ids[here[int(np.argmin(np.abs(found).sum(axis=1)))]]} is all "
                "zero; expected a direction; use another model"
            )
        parts.append(found)
        if progress is not None:
            progress(done[0] + start + len(here), done[1])
    if not parts:
        return np.zeros((0, 0), np.float32)
    vectors = as_vectors(np.concatenate(parts))
    return vectors.block(0, vectors.rows)


def _copy_bits(prints: Fingerprints, copies: _Copies, workers: int) -> Float64:
    """Bits that differ between each copy and its original [M]; inf where another image of the sample is nearer, or
    none is near."""
    altered = fingerprint_images(copies, workers=workers)
    similarity, row = best_hash_match(altered.hashes, prints.hashes, radius=FURTHEST)
    found = row == copies.original
    return np.where(found, np.round((1 - np.where(found, similarity, 0.0).astype(np.float64)) * BITS), np.inf)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
