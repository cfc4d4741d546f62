"""Thresholds: known distributions of similarity, planted rates met on images never looked at, and real files."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.special import betainc

from dinov2cli.curation.calibrate import calibrate
from dinov2cli.curation.calibrate_hashes import hash_pairs, hash_tier, nearest_bits
from dinov2cli.curation.calibrate_tiers import Aim, vector_scores, vector_tier
from dinov2cli.curation.copies import KINDS
from dinov2cli.curation.tails import (
    NearPairs,
    bootstrap_scores,
    fit_tail,
    pairs_to_keep,
    score_for_share,
    share_above,
)
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.search.hamming import BITS, RADIUS, stack_hashes
from dinov2cli.search.hashing import ORIENTATIONS, oriented, perceptual_hash
from tests.curation.conftest import unit


def sphere(rows: int, dim: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, dim)))


def cap(cosine: float, dim: int) -> float:
    """Share of random pairs of directions whose cosine is above this: half a regularised incomplete beta function."""
    return 0.5 * betainc((dim - 1) / 2, 0.5, 1 - cosine**2)


def near_of(vectors: np.ndarray, share: float) -> NearPairs:
    return vector_scores(vectors, vectors[:0], np.zeros(0, np.int64), None, share)[0]


class Tiles:
    """An image source over arrays, as PNG files."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self.files = []
        for image in images:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG")
            self.files.append(stream.getvalue())
        self.ids = [f"{i:05d}.png" for i in range(len(images))]
        self.paths = self.ids

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int, /) -> bytes:
        return self.files[row]

    def origin(self, row: int, /) -> tuple[str, int]:
        return "/x", row


def scenes(rows: int, seed: int) -> list[np.ndarray]:
    """Pictures of blobs of colour that differ from one another, 96 x 96."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        coarse = rng.integers(0, 256, (7, 7, 3)).astype(np.uint8)
        made.append(np.asarray(Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)))
    return made


def smaller(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((72, 72), Image.Resampling.BICUBIC))


def embed(images: list[np.ndarray]) -> np.ndarray:
    """A small colour picture of each, less its mean: alike for re-encoded and resized copies, not for turned ones."""
    small = [np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.BOX), np.float32).ravel() for i in images]
    return np.stack(small) - np.mean(small, axis=1, keepdims=True) + 1e-3


def test_nearest_pairs_are_those_of_brute_force():
    x = sphere(1500, 6, 0)  # more than one block
    near = near_of(x, 1e-6)
    cosine = x.astype(np.float64) @ x.T
    expected = np.sort(cosine[np.triu_indices(1500, 1)])[::-1]
    assert len(near.score) == pairs_to_keep(1500, 1e-6) == 1500
    np.testing.assert_allclose(near.score, expected[:1500], atol=1e-6)
    np.testing.assert_allclose(cosine[near.first, near.second], near.score, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 8, 16])
@pytest.mark.parametrize("pool", [2000, 100_000, 10_000_000])
def test_extrapolated_share_is_that_of_the_known_distribution(dim, pool):
    """Directions in a few dimensions: the share of pairs above any cosine is known, for pools of any size."""
    share = 0.01 / (pool - 1)
    near = near_of(sphere(1500, dim, 3), share)
    threshold = score_for_share(near, share)
    assert cap(threshold, dim) < 2.5 * share
    # Strict by no more than its distance to the edge of the sphere allows: in d dimensions the distance shrinks by the
    # (d-1)-th root of the number of pairs.
    assert math.sqrt(2 - 2 * threshold) > 0.5 * math.sqrt(2 - 2 * exact_threshold(share, dim))
    assert share_above(near, threshold) == pytest.approx(share, rel=0.35)


def exact_threshold(share: float, dim: int) -> float:
    grid = 1 - np.geomspace(1e-9, 1, 200_000)
    return float(grid[np.argmin(np.abs(np.log(cap(grid, dim) / share)))])


def test_counted_share_is_exact():
    x = sphere(400, 8, 1)
    cosine = np.sort((x.astype(np.float64) @ x.T)[np.triu_indices(400, 1)])[::-1]
    for share in (0.001, 0.01, 0.2):
        threshold = score_for_share(near_of(x, share), share)
        allowed = math.floor(share * len(cosine))
        assert (cosine > threshold).sum() <= allowed and (cosine >= threshold - 1e-9).sum() == allowed + 1


def test_linear_tail_and_weights():
    rng = np.random.default_rng(0)
    score = np.sort(rng.exponential(0.3, 40_000))[::-1][:3000]
    near = NearPairs(rng.integers(0, 140, 3000), rng.integers(140, 283, 3000), score, 283, "linear")
    tail = fit_tail(near)
    assert tail.scale == pytest.approx(0.3, rel=0.06) and tail.fitted == 2999
    # p = exp(-score / 0.3) by design.
    assert score_for_share(near, 1e-7) == pytest.approx(0.3 * math.log(1e7), rel=0.06)
    assert tail.share_above(score_for_share(near, 1e-7)) == pytest.approx(1e-7, rel=1e-6)
    assert score_for_share(near, 1e-7, np.ones(283)) == pytest.approx(score_for_share(near, 1e-7))
    low, high = bootstrap_scores(near, 1e-7, rounds=200, seed=1)
    assert low < 0.3 * math.log(1e7) < high < 1.3 * low
    assert (low, high) == bootstrap_scores(near, 1e-7, rounds=200, seed=1)
    few = NearPairs(near.first[:5], near.second[:5], score[:5], 283, "linear")
    assert fit_tail(few) is None and score_for_share(few, 1e-7) is None and math.isnan(share_above(few, 9.0))


def test_the_target_is_met_on_images_that_were_not_looked_at():
    """600 of a pool are measured; the rate is that of the whole pool, in which an image has more near ones."""
    for seed in range(3):
        pool = unit(sphere(12_000, 12, seed) + 0.6 * sphere(40, 12, 90)[np.arange(12_000) % 40])  # clusters
        sample = pool[np.random.default_rng(seed).permutation(12_000)[:600]]
        aim = Aim(rate=0.02, pool=12_000, rounds=50, seed=0)
        near, positives, negatives = vector_scores(sample, sample, np.arange(600), None, aim.share)
        kinds = np.array(["x"] * 600)
        found = vector_tier(
            near, positives, negatives, [str(i) for i in range(600)], kinds, aim, unit="cosine", floor=0
        )
        nearest = np.concatenate([_nearest_cosine(pool[i : i + 2000], pool, i) for i in range(0, 12_000, 2000)])
        assert 0.1 * 0.02 < (nearest > found.threshold).mean() < 1.5 * 0.02
        assert found.interval[0] < found.threshold < found.interval[1] + 1e-3
        assert found.false_merge == pytest.approx(0.02, rel=0.2) and not found.bounded


def _nearest_cosine(rows: np.ndarray, pool: np.ndarray, start: int) -> np.ndarray:
    cosine = rows @ pool.T
    cosine[np.arange(len(rows)), np.arange(start, start + len(rows))] = -1
    return cosine.max(axis=1)


def test_look_alikes_of_a_semantic_model_raise_the_threshold():
    """Images of one class at a cosine of about 0.9, though no two are copies: 0.6 would merge whole classes."""
    rng = np.random.default_rng(0)
    classes = sphere(30, 64, 1)
    images = unit(classes[rng.integers(0, 30, 900)] + 0.4 * sphere(900, 64, 2))
    copies = unit(images + 0.05 * sphere(900, 64, 3))
    aim = Aim(0.001, 900, 20, 0)
    kinds = np.array(["near", "far"] * 450)
    copies[1::2] = unit(images[1::2] + sphere(450, 64, 4))
    near, positives, negatives = vector_scores(images, copies, np.arange(900), None, aim.share)
    names = [str(i) for i in range(900)]
    found = vector_tier(near, positives, negatives, names, kinds, aim, unit="cosine", floor=0.6)
    assert found.threshold > 0.9
    cosine = images.astype(np.float64) @ images.T
    assert (cosine[np.triu_indices(900, 1)] > 0.6).sum() > 5000
    assert found.recall["near"] > 0.99 and found.recall["far"] < 0.05
    assert found.mean_recall == pytest.approx(np.mean([*found.recall.values()]))
    assert sum(found.negatives.counts) == 900 * 899 // 2 and sum(found.positives.counts) == 900
    assert found.nearest[0][2] == pytest.approx(near.score[0])
    # Without look-alikes the floor holds.
    alone, positives, negatives = vector_scores(
        sphere(900, 256, 1), sphere(0, 256, 1), np.zeros(0, np.int64), None, 1e-6
    )
    found = vector_tier(alone, positives, negatives, names, kinds[:0], aim, unit="cosine", floor=0.6)
    assert found.threshold == 0.6 and found.bounded and math.isnan(found.mean_recall)


def test_normalised_scores_have_their_own_threshold():
    x = sphere(800, 16, 0)
    bias = np.linspace(0, 0.4, 800)
    near, positives, _ = vector_scores(x, x, np.arange(800), lambda v: bias[: len(v)], 1e-6)
    score = x.astype(np.float64) @ x.T - (bias[:, None] + bias[None]) / 2
    np.testing.assert_allclose(near.score[:50], np.sort(score[np.triu_indices(800, 1)])[::-1][:50], atol=1e-6)
    np.testing.assert_allclose(positives, 1 - bias, atol=1e-5)
    assert near.form == "linear" and near_of(x, 1e-6).form == "distance"


def test_nearest_hashes_are_those_of_brute_force():
    images = scenes(40, 0)
    images[7] = np.rot90(images[3]).copy()
    hashes = [perceptual_hash(i) for i in images]
    first, second, bits = nearest_bits(stack_hashes(hashes), 100)
    expected = []
    for a in range(40):
        forms = [
            perceptual_hash(np.ascontiguousarray(oriented(images[a][None], o)[0])).bits for o in range(ORIENTATIONS)
        ]
        for b in range(a + 1, 40):
            differ = [np.unpackbits(f[:, None] ^ hashes[b].bits[None], axis=2).sum(axis=2).min() for f in forms]
            expected.append((min(differ), a, b))
    expected.sort()
    assert (first[0], second[0]) == (3, 7) and (first < second).all() and len({*zip(first, second, strict=True)}) == 100
    # Hashes of turned pixels and turned hashes of pixels differ in a few bits that are near zero.
    np.testing.assert_allclose(bits, [e[0] for e in expected[:100]], atol=12)


def test_radius_of_the_hash_keeps_to_the_target():
    images = scenes(300, 1)
    aim = Aim(0.001, 300, 20, 0)
    near, passing = hash_pairs(stack_hashes([perceptual_hash(i) for i in images]), aim.share)
    assert len(near.score) == 300 and 3 / 300 <= passing < 0.1 and near.score[0] < -RADIUS / 2
    names, kinds = [str(i) for i in range(300)], np.array(["flip", "crop50"] * 20)
    bits = np.array([3.0, np.inf] * 20)
    found = hash_tier(near, passing, bits, names, kinds, aim)
    assert found.threshold == RADIUS and found.bounded  # different pictures are much further apart
    assert found.recall == {"flip": 1.0, "crop50": 0.0} and found.mean_recall == 1.0
    # The same tail 60 bits nearer: now the radius has to shrink, to where the model has the wanted share.
    rng = np.random.default_rng(0)
    score = -np.sort(np.maximum(60 - rng.exponential(7.0, 2000), 1))
    planted = NearPairs(rng.integers(0, 150, 2000), rng.integers(150, 300, 2000), score, 300, "linear")
    found = hash_tier(planted, 0.1, bits, names, kinds, aim)
    share = 2000 / planted.pairs * math.exp(-(60 - (found.threshold + 1)) / 7.0)
    assert 0 < found.threshold < RADIUS and 299 * 0.1 * share < 2 * aim.rate and not found.bounded
    assert found.interval[0] <= found.threshold <= found.interval[1]
    none = hash_tier(NearPairs(*np.zeros((2, 0), np.int64), np.zeros(0), 300, "linear"), 1.0, bits, names, kinds, aim)
    assert none.threshold == RADIUS and "too few pairs" in none.reason and math.isnan(none.false_merge)


@pytest.fixture(scope="module")
def clean() -> list[np.ndarray]:
    return scenes(150, 5)


def test_from_files_to_thresholds(clean):
    chosen = {"kinds": ("reencode", "flip", "crop50"), "copied": 8, "bootstrap": 20, "seed": 3, "floor": 0.1}
    found = calibrate(Tiles(clean), embed=embed, **chosen)
    assert found.images == found.sampled == found.pool == 150 and found.copied == 8
    tier, hashed = found.tiers["embedding"], found.tiers["perceptual"]
    assert tier.recall["reencode"] == 1 and tier.recall["flip"] < 0.3 and hashed.recall["flip"] == 1
    assert 0.1 < tier.threshold < 1 and hashed.threshold <= RADIUS and hashed.unit == "bits"
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert facts["tiers"]["embedding"]["threshold"] == tier.threshold and len(found.messages()) == 2
    assert found.messages()[0].startswith(f"perceptual: up to {hashed.threshold} of {BITS} bits")
    again = calibrate(Tiles(clean), embed=embed, workers=3, **chosen)
    assert again.facts() == found.facts()
    larger = calibrate(Tiles(clean), embed=embed, perceptual=False, pool=10**8, **chosen)
    assert tier.threshold < larger.tiers["embedding"].threshold <= 1 and list(larger.tiers) == ["embedding"]
    lenient = calibrate(Tiles(clean), embed=embed, perceptual=False, false_merge=0.5, **chosen)
    assert lenient.tiers["embedding"].threshold < tier.threshold


def test_copies_among_the_images_change_nothing(clean):
    """Equal files, other encodings and mirrored forms of the same pictures are no different images that look alike."""
    chosen = {"embed": embed, "perceptual": False, "kinds": ("blur",), "copied": 5, "bootstrap": 5, "floor": 0.1}
    alone = calibrate(Tiles(clean), pool=1000, **chosen)
    doubled = Tiles([*clean, *clean[:20], *(i[:, ::-1].copy() for i in clean[20:40]), *(smaller(i) for i in clean)])
    found = calibrate(doubled, pool=1000, **chosen)
    assert found.sampled == 340 and found.images == 150
    assert found.tiers["embedding"].threshold == pytest.approx(alone.tiers["embedding"].threshold, abs=0.01)


def test_bad_input_is_refused(clean):
    few = Tiles(clean[:20])
    with pytest.raises(UserError, match="found 20 different images; expected at least 50"):
        calibrate(few)
    with pytest.raises(UserError, match="found 1 different images; expected at least 50"):
        calibrate(Tiles([clean[0]] * 60))
    with pytest.raises(UserError, match="found a rate of false merges of 0;"):
        calibrate(Tiles(clean), false_merge=0.0)
    with pytest.raises(UserError, match="no tier"):
        calibrate(Tiles(clean), perceptual=False)
    models = {
        "NaN": lambda images: np.full((len(images), 4), np.nan),
        "is all zero": lambda images: np.eye(4)[np.arange(len(images)) % 4] * (np.arange(len(images)) > 3)[:, None],
        r"shape \(64,\) for 64 images": lambda images: np.zeros(len(images)),
        r"shape \(22, 5\) for 22 images": lambda images: np.ones((len(images), 4 + (len(images) < 64))),
    }
    for message, model in models.items():
        with pytest.raises(InputError, match=message):
            calibrate(Tiles(clean), embed=model, perceptual=False, kinds=("flip",), copied=2)


def test_a_model_to_which_all_images_are_alike_joins_nothing(clean):
    found = calibrate(Tiles(clean), embed=lambda i: np.ones((len(i), 8)), perceptual=False, copied=3, kinds=("flip",))
    tier = found.tiers["embedding"]
    assert (
        tier.threshold == 1 and tier.recall == {"flip": 0.0} and "no cosine below 1 keeps to the target" in tier.reason
    )


def test_all_kinds_on_photographs():
    found = calibrate(open_source("demo:photos?count=120&size=96&copies=0"), embed=embed, copied=3, bootstrap=5)
    assert [*found.tiers["embedding"].recall] == list(KINDS)
    assert found.tiers["perceptual"].mean_recall > 0.6
