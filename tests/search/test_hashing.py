"""Perceptual hash: the same for the 8 orientations, near for re-encoded copies, far for other photographs."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from dinov2cli.search.framing import edges, may_be_framed, pictures_within, trim_border
from dinov2cli.search.hamming import RADIUS, best_hash_match, hash_edges, stack_hashes
from dinov2cli.search.hashing import (
    FRAMED,
    INNER,
    bytes_digest,
    hash_views,
    image_views,
    oriented,
    perceptual_hash,
    pixel_digest,
    sharpness,
    turn_bits,
)


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


def test_the_hash_of_every_orientation_follows_from_that_of_one(tiles):
    for tile in tiles[:4]:
        original = perceptual_hash(tile)
        for number in range(8):
            form = np.ascontiguousarray(oriented(tile[None], number)[0])
            expected = turn_bits(original.bits[:1], number)[0]
            assert bits_between(perceptual_hash(form).bits[0], expected) <= 4
    used = {  # the numbers are the 8 forms that rotation and mirroring make
        int(np.argmin([bits_between(perceptual_hash(f).bits[0], turn_bits(original.bits[:1], o)[0]) for o in range(8)]))
        for f in orientations(tile)
    }
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


def test_thumbnails_turn_as_the_hashes_do(tiles):
    original = perceptual_hash(tiles[1])
    for form in orientations(tiles[1]):
        other = perceptual_hash(form)
        number = int(np.argmin([bits_between(other.bits[0], turn_bits(original.bits[:1], o)[0]) for o in range(8)]))
        turned = oriented(original.thumbs[:1], number)[0].astype(int)
        assert np.abs(turned - other.thumbs[0]).max() <= 2


def test_flat_images_and_missing_ones_match_nothing(tiles):
    grey = np.full((50, 60, 3), 128, np.uint8)
    slope = np.broadcast_to(np.linspace(90, 160, 60)[None, :, None], (50, 60, 3)).astype(np.uint8)
    table = stack_hashes([perceptual_hash(grey), perceptual_hash(slope), None, perceptual_hash(tiles[0])])
    assert len(table) == 4 and 3 in table.owner and 0 not in table.owner
    assert len(hash_edges(table)) == 0
    assert len(hash_edges(stack_hashes([None, None]))) == 0
    empty = hash_edges(stack_hashes([]))
    assert len(empty) == 0


def test_noise_around_one_colour_matches_nothing_but_itself():
    rng = np.random.default_rng(0)
    noisy = [np.clip(128 + rng.normal(0, s, (90, 90, 3)), 0, 255).astype(np.uint8) for s in (3, 10, 10, 40, 40)]
    table = stack_hashes([perceptual_hash(n) for n in [*noisy, noisy[3][:, ::-1].copy()]])
    found = hash_edges(table)
    assert list(zip(found.src.tolist(), found.dst.tolist(), strict=True)) == [(3, 5)]


def test_digests_tell_bytes_pixels_and_shape():
    x = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert pixel_digest(x) == pixel_digest(x.copy()) != pixel_digest(x.reshape(4, 2, 3))
    assert pixel_digest(np.asfortranarray(x)) == pixel_digest(x)
    assert bytes_digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_sharpness_falls_with_blur(tiles):
    soft = np.asarray(Image.fromarray(tiles[0]).resize((40, 32)).resize((160, 128)))
    assert sharpness(tiles[0]) > 2 * sharpness(soft)
    assert sharpness(tiles[0][:2]) == 0.0


def photo_in(canvas: np.ndarray, picture: np.ndarray, top: int, left: int) -> np.ndarray:
    canvas = canvas.copy()
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def test_trim_takes_borders_and_nothing_else(tiles):
    tile = tiles[0]
    for pad in (((20, 20), (0, 0)), ((0, 0), (15, 25)), ((30, 10), (20, 20)), ((0, 30), (0, 0))):
        framed = np.pad(tile, (*pad, (0, 0)), constant_values=240)
        left, top, right, bottom = trim_border(jpeg(framed, 60))
        expected = (pad[1][0], pad[0][0], pad[1][0] + 160, pad[0][0] + 128)
        assert np.abs(np.array([left, top, right, bottom]) - expected).max() <= 1
        assert may_be_framed(edges(framed)[None]).tolist() == [True]
    assert trim_border(tile) is None  # nothing to trim
    assert trim_border(np.zeros((20, 20, 3), np.uint8)) is None  # nothing left
    speck = np.zeros((100, 100, 3), np.uint8)
    speck[50, 50] = 255
    assert trim_border(speck) is None  # what is left is not a picture
    assert not may_be_framed(np.stack([edges(t) for t in tiles])).all()


@pytest.mark.parametrize("ground", [255, 20])
def test_a_picture_on_a_page_is_found_among_other_things(tiles, ground):
    page = np.full((400, 300, 3), ground, np.uint8)
    for line in range(250, 380, 12):  # text, and a title bar of one colour
        page[line : line + 5, 20:280:3] = 128
    page[5:25, 5:295] = (40, 90, 160)
    shown = photo_in(page, tiles[0], 60, 70)
    assert may_be_framed(edges(shown)[None]).all()
    boxes = pictures_within(jpeg(shown, 80))
    assert any(np.abs(np.array(box) - (70, 60, 230, 188)).max() <= 1 for box in boxes)
    assert pictures_within(tiles[4]) == []
    table = stack_hashes([perceptual_hash(i) for i in (tiles[0], shown, photo_in(page, tiles[9], 60, 70))])
    assert table.kind[table.owner == 1].tolist()[:2] == [FRAMED, INNER]
    found = hash_edges(table)  # the picture is found, the other picture on the same page is not
    assert list(zip(found.src.tolist(), found.dst.tolist(), strict=True)) == [(0, 1)]


def test_views_are_hashed_together_as_one_by_one(tiles):
    views = np.concatenate([image_views(t) for t in tiles])
    bits, valid, thumbs = hash_views(views)
    assert valid.all()
    for tile, one, thumb in zip(tiles, bits, thumbs, strict=True):
        alone = perceptual_hash(tile)
        np.testing.assert_array_equal(alone.bits[0], one)
        np.testing.assert_array_equal(alone.thumbs[0], thumb)
        expected = np.asarray(Image.fromarray(tile).resize((12, 12), Image.Resampling.BOX)).astype(int)
        assert np.abs(expected - thumb).mean() < 4


def test_bits_are_the_signs_of_low_frequencies(tiles):
    """Against SciPy's DCT in float64; coefficients next to nothing may fall either way."""
    from scipy.fft import dctn

    view = image_views(tiles[3])
    luminance = view[0].astype(np.float64) @ [0.299, 0.587, 0.114]
    coefficients = dctn(luminance, norm="ortho")[1:17, 1:17].ravel()
    got = np.unpackbits(hash_views(view)[0][0]).astype(bool)
    clear = np.abs(coefficients) > 1e-2
    assert clear.sum() > 200
    np.testing.assert_array_equal(got[clear], coefficients[clear] > 0)
