"""Perceptual hash: the same for the 8 orientations, near for re-encoded copies, far for other photographs."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from dinov2cli.search.hamming import RADIUS, HashTable, best_hash_match, hash_edges, stack_hashes
from dinov2cli.search.hashing import bytes_digest, oriented, perceptual_hash, pixel_digest, sharpness, trim_border


@pytest.fixture(scope="module")
def tiles() -> list[np.ndarray]:
    """Tiles of real photographs, 128 x 160."""
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    result = []
    for photo in photos:
        for top in range(0, photo.shape[0] - 128, 128):
            for left in range(0, photo.shape[1] - 160, 160):
                result.append(np.ascontiguousarray(photo[top : top + 128, left : left + 160, :3]))
    return [t for t in result if t.std() > 25]


def orientations(image: np.ndarray) -> list[np.ndarray]:
    forms = [np.rot90(image, turns) for turns in range(4)]
    return [np.ascontiguousarray(f) for f in forms + [f[:, ::-1] for f in forms]]


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


def bits_between(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.unpackbits(a ^ b).sum())


def test_every_orientation_has_the_hash_of_one_form_of_the_original(tiles):
    original = perceptual_hash(tiles[0]).bits[0]
    used = set()
    for form in orientations(tiles[0]):
        distance = [bits_between(perceptual_hash(form).bits[0, 0], bits) for bits in original]
        assert min(distance) <= 4
        used.add(int(np.argmin(distance)))
    assert used == set(range(8))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: jpeg(x, 30),
        lambda x: np.asarray(Image.fromarray(x).resize((80, 64))),
        lambda x: np.asarray(Image.fromarray(x).resize((97, 97))),
        lambda x: np.pad(x, ((20, 20), (0, 0), (0, 0))),
        lambda x: np.ascontiguousarray(np.rot90(jpeg(x, 60)[:, ::-1])),
    ],
    ids=["jpeg30", "half", "square", "letterbox", "turned"],
)
def test_copies_are_found_and_other_photographs_are_not(tiles, change):
    table = stack_hashes([perceptual_hash(t) for t in tiles])
    copies = stack_hashes([perceptual_hash(change(t)) for t in tiles])
    similarity, row = best_hash_match(copies, table)
    found = row == np.arange(len(tiles))
    assert found.mean() >= 0.95
    assert ((row == -1) | found).all()
    assert (similarity[found] >= 1 - RADIUS / 256).all() and np.isneginf(similarity[~found]).all()


def test_edges_equal_all_pairs_and_both_indexes_agree(tiles, monkeypatch):
    images = tiles + [jpeg(t, 50) for t in tiles[:6]] + [t[:, ::-1].copy() for t in tiles[3:8]] + [tiles[0], tiles[0]]
    table = stack_hashes([perceptual_hash(i) for i in images])
    expected = {}
    for i in range(len(images)):
        for j in range(i + 1, len(images)):
            distance = min(  # either way round: turning an image moves the median, hence a few bits
                bits_between(table.bits[a, v, 0], table.bits[b, w, o])
                for a, b in ((i, j), (j, i))
                for v in range(2)
                for w in range(2)
                for o in range(8)
                if table.valid[a, v] and table.valid[b, w]
            )
            if distance <= RADIUS:
                expected[(i, j)] = 1 - distance / 256
    n = len(tiles)
    flat = hash_edges(table)
    monkeypatch.setattr("dinov2cli.search.hamming._FLAT_BELOW", 0)
    tables = hash_edges(table)
    for edges in (flat, tables):
        got = {(int(a), int(b)): float(s) for a, b, s in zip(edges.src, edges.dst, edges.similarity, strict=True)}
        # Rows with the very same hash are joined in a star, so their other pairs need not be listed.
        star = {(0, n + 11), (0, n + 12)}
        assert star <= set(got) and set(got) <= set(expected)
        missing = set(expected) - set(got)
        assert all(n + 11 in pair or n + 12 in pair for pair in missing)
        for pair, value in got.items():
            assert value == pytest.approx(expected[pair], abs=1e-6)
    assert len(expected) >= 11


def test_wide_radius_misses_nothing_either(monkeypatch):
    monkeypatch.setattr("dinov2cli.search.hamming._FLAT_BELOW", 0)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (1, 2, 8, 32), dtype=np.uint8)
    far = base.copy()
    flips = rng.permutation(256)[:40]
    far.reshape(2, 8, 32)[0, 0] ^= np.packbits(np.isin(np.arange(256), flips))
    valid = np.array([[True, False]])
    symmetric = np.tile(np.outer([1, 2, 3, 4, 4, 3, 2, 1], [1, 2, 3, 4, 4, 3, 2, 1])[..., None], (1, 2, 1, 1, 3))
    thumbs = symmetric.astype(np.uint8)
    a, b = HashTable(base, valid, thumbs), HashTable(far, valid, thumbs)
    similarity, row = best_hash_match(a, b, radius=40)
    assert row.tolist() == [0] and similarity[0] == pytest.approx(1 - 40 / 256)
    assert best_hash_match(a, b, radius=39)[1].tolist() == [-1]
    # The same bits with another look are no match.
    other = HashTable(far, valid, (symmetric * np.array([1, -1, 1]) % 256).astype(np.uint8))
    assert best_hash_match(a, other, radius=40)[1].tolist() == [-1]


def test_thumbnails_turn_as_the_hashes_do(tiles):
    original = perceptual_hash(tiles[1])
    for form in orientations(tiles[1]):
        other = perceptual_hash(form)
        number = int(np.argmin([bits_between(other.bits[0, 0], b) for b in original.bits[0]]))
        turned = oriented(original.thumbs[:1], number)[0].astype(int)
        assert np.abs(turned - other.thumbs[0]).max() <= 2


def test_flat_images_and_missing_ones_match_nothing(tiles):
    grey = np.full((50, 60, 3), 128, np.uint8)
    noise = np.clip(grey + np.random.default_rng(0).normal(0, 3, grey.shape), 0, 255).astype(np.uint8)
    table = stack_hashes([perceptual_hash(grey), perceptual_hash(noise), None, perceptual_hash(tiles[0])])
    assert table.valid[:, 0].tolist() == [False, False, False, True]
    assert len(hash_edges(table)) == 0
    assert len(hash_edges(stack_hashes([None, None]))) == 0


def test_digests_tell_bytes_pixels_and_shape():
    x = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert pixel_digest(x) == pixel_digest(x.copy()) != pixel_digest(x.reshape(4, 2, 3))
    assert pixel_digest(np.asfortranarray(x)) == pixel_digest(x)
    assert bytes_digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_sharpness_falls_with_blur(tiles):
    soft = np.asarray(Image.fromarray(tiles[0]).resize((40, 32)).resize((160, 128)))
    assert sharpness(tiles[0]) > 2 * sharpness(soft)
    assert sharpness(tiles[0][:2]) == 0.0


def test_trim_takes_borders_and_nothing_else():
    inside = np.random.default_rng(0).integers(100, 255, (40, 60), dtype=np.uint8)
    framed = np.pad(inside, 10)
    np.testing.assert_array_equal(framed[trim_border(framed)], inside)
    assert trim_border(inside) is None  # nothing to trim
    assert trim_border(np.zeros((20, 20), np.uint8)) is None  # nothing left
    speck = np.zeros((100, 100), np.uint8)
    speck[50, 50] = 255
    assert trim_border(speck) is None  # what is left is not a picture
