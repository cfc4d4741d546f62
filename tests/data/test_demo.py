import hashlib

import numpy as np
import pytest
from PIL import Image

from dinov2cli.data import demo_photos
from dinov2cli.data.bad import BadImages
from dinov2cli.data.decode import decode_image
from dinov2cli.data.demo import demo_truth
from dinov2cli.data.loader import iterate_images
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError

SMALL = "demo:photos?count=120"


def pixels(source, row):
    return decode_image(source.read(row), name=source.name(row))


def test_defaults():
    train, test = open_source("demo:photos"), open_source("demo:photos?split=test")
    assert (len(train), len(test)) == (2000, 500)
    assert train.kind == "demo" and train.label_names == test.label_names == sorted(train.label_names)
    assert len(train.label_names) == 18
    assert np.bincount(test.labels, minlength=18).min() >= 10
    assert len(set(train.ids)) == 2000 and not set(train.ids) & set(test.ids)
    assert len(demo_truth("demo:photos")) == 200 and demo_truth("demo:photos?split=test") == []
    assert train.ids[0].split("/")[0] == train.label_names[train.labels[0]] == train.columns["photo"][0].as_py()
    assert train.paths[0] == f"demo:photos/{train.ids[0]}"


def test_no_pixel_is_in_both_splits():
    train, test = (open_source(f"demo:photos?split={split}").tiles for split in ("train", "test"))
    with_margin = 0
    for number, path in enumerate(demo_photos.photo_files().values()):
        with Image.open(path) as image:
            width, height = image.size
        used = np.zeros((height, width), bool)
        for left, top, right, bottom in train.box[train.photo == number].tolist():
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            used[top:bottom, left:right] = True
        for left, top, right, bottom in test.box[test.photo == number].tolist():
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert not used[top:bottom, left:right].any()
            with_margin += used[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8].any()
    assert with_margin > 0  # the two do lie side by side: the test above could fail


def test_tiles_of_one_split_differ():
    tiles = open_source("demo:photos").tiles
    original = tiles.original < 0
    for number in range(len(tiles.names)):
        box = tiles.box[original & (tiles.photo == number)]
        shared = np.maximum(
            np.minimum(box[:, None, 2:], box[None, :, 2:]) - np.maximum(box[:, None, :2], box[None, :, :2]), 0
        ).prod(-1)
        area = (box[:, 2:] - box[:, :2]).prod(-1)
        overlap = shared / (area[:, None] + area - shared)
        np.fill_diagonal(overlap, 0)
        assert overlap.max() < 0.7  # a planted crop has 0.8
    scale = (tiles.box[:, 2] - tiles.box[:, 0]) / 64
    assert scale.min() < 0.8 and scale.max() > 1.3
    assert np.ptp(tiles.look, axis=0).min() > 0.25  # mirror, brightness, contrast, saturation, white balance


def test_same_seed_same_bytes_other_seed_other_tiles():
    digests = []
    for seed in (3, 3, 4):
        demo_photos.plan_tiles.cache_clear()
        source = open_source(f"{SMALL}&seed={seed}")
        digests.append(hashlib.sha256(b"".join(source.read(row) for row in range(20))).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    assert open_source(SMALL).content_hash() == open_source(SMALL).content_hash()
    assert open_source(SMALL).content_hash() != open_source(f"{SMALL}&seed=1").content_hash()


def test_tiles_are_really_encoded_and_decode():
    source = open_source(f"{SMALL}&size=48")
    assert {source.read(row)[:4] for row in range(len(source))} == {b"\x89PNG", b"\xff\xd8\xff\xe0"}
    sizes = {pixels(source, row).shape for row in range(len(source)) if source.tiles.original[row] < 0}
    assert sizes == {(48, 48, 3)}
    batches = list(iterate_images(source, resize=32, crop=32, batch_size=50, workers=0, bad=BadImages()))
    assert sum(len(batch) for batch in batches) == 120


def test_planted_copies_are_what_they_say():
    source = open_source("demo:photos?count=200&copies=0.2")
    truth = demo_truth(source.spec)
    assert len(truth) == 40 and {copy.kind for copy in truth} == set(demo_photos.COPY_KINDS)
    assert len({copy.original_row for copy in truth}) == 40  # nothing is copied twice
    positions = np.array([copy.copy_row for copy in truth])
    assert positions.min() < 50 and positions.max() > 150  # spread, not at the end
    for copy in truth:
        assert source.ids[copy.copy_row] == copy.copy_id and source.ids[copy.original_row] == copy.original_id
        assert source.labels[copy.copy_row] == source.labels[copy.original_row]
        was, now = pixels(source, copy.original_row), pixels(source, copy.copy_row)
        if copy.kind == "flip":
            np.testing.assert_array_equal(now, was[:, ::-1])
        elif copy.kind == "jpeg":
            assert source.read(copy.copy_row)[:2] == b"\xff\xd8" and (now != was).any()
            assert np.abs(now.astype(int) - was).mean() < 20
        elif copy.kind == "crop":
            assert now.shape == (57, 57, 3)
            places = [(y, x) for y in range(8) for x in range(8)]
            assert any(np.array_equal(now, was[y : y + 57, x : x + 57]) for y, x in places)
        else:
            assert 32 <= now.shape[0] <= 51
            back = np.asarray(Image.fromarray(now).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(back - was).mean() < 25


def test_copies_can_be_switched_off():
    assert demo_truth("demo:photos?count=50&copies=0") == []
    with pytest.raises(InputError, match="only demo:photos has planted copies"):
        demo_truth("demo:digits")


def test_mean_colour_alone_does_not_tell_the_photograph():
    train, test = open_source("demo:photos?copies=0"), open_source("demo:photos?split=test")
    colours = [np.array([pixels(s, row).mean((0, 1)) for row in range(len(s))]) for s in (train, test)]
    distance = ((colours[1][:, None] - colours[0][None]) ** 2).sum(-1)
    votes = train.labels[distance.argsort(1)[:, :10]]
    guess = np.array([np.bincount(vote).argmax() for vote in votes])
    assert (guess == test.labels).mean() < 0.4


def test_digits():
    train, test = open_source("demo:digits"), open_source("demo:digits?split=test&size=48")
    assert (len(train), len(test)) == (1347, 450)
    assert train.label_names == [str(digit) for digit in range(10)]
    assert np.bincount(test.labels).min() >= 40
    assert pixels(train, 0).shape == (32, 32, 3) and pixels(test, 0).shape == (48, 48, 3)
    # The first digit of the set is a zero: dark inside, bright ring.
    assert train.labels[0] == 0 and pixels(train, 0)[14:18, 15:17].mean() < 60 < 150 < pixels(train, 0).max()
    assert len(set(train.ids)) == 1347 and not set(train.ids) & set(test.ids)


@pytest.mark.parametrize(
    "spec, text",
    [
        ("demo:photos?split=val", "demo:photos: split=val; expected train or test"),
        ("demo:photos?size=abc", "demo:photos: size=abc; expected a number from 16 to 512"),
        ("demo:photos?copies=0.9", "demo:photos: copies=0.9; expected a number from 0 to 0.5"),
        ("demo:digits?count=1500", "demo:digits: count=1500, but the train split has 1347 images"),
    ],
)
def test_bad_options(spec, text):
    with pytest.raises(InputError) as caught:
        open_source(spec)
    assert str(caught.value) == text


def test_missing_package_is_named(monkeypatch):
    demo_photos.photo_files.cache_clear()
    monkeypatch.setattr(demo_photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"astronaut\.png of skimage is missing; run `pip install"):
        demo_photos.photo_files()
