"""Images with masks or depth maps: what is read of the files, and geometry that treats both alike."""

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import resize_uint8
from dinov2cli.data.dense import (
    Pair,
    augmented,
    cut,
    decode_target,
    fitted_size,
    flipped,
    in_order,
    pair_random,
    random_crop,
    read_pair,
    read_pairs,
    read_target,
    require_role,
    resize_nearest,
    resize_pair,
)
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def npy(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def pair_of(height=24, width=30, seed=0) -> Pair:
    random = np.random.default_rng(seed)
    target = random.integers(0, 9, (height, width)).astype(np.uint8)
    pixels = np.repeat(target[..., None] * 25, 3, axis=2)
    return Pair(3, "three", torch.from_numpy(pixels).permute(2, 0, 1), target, np.zeros(32, np.uint8))


@pytest.fixture
def folder(tmp_path, encode):
    """images/{a,b/c}.png of 24 x 16 pixels and masks of the same names."""
    for number, name in enumerate(("a", "b/c")):
        for kind in ("images", "masks"):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_bytes(encode(number))
        values = np.arange(16 * 24).reshape(16, 24) % (7 + number)
        (tmp_path / "masks" / f"{name}.png").write_bytes(encoded(Image.fromarray(values.astype(np.uint8))))
    return tmp_path


# --- Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, format", [("uint8", "PNG"), ("uint16", "PNG"), ("int32", "TIFF"), ("float32", "TIFF"), ("uint16", "TIFF")]
)
def test_targets_keep_the_numbers_of_their_files(dtype, format):
    values = (np.arange(6 * 9).reshape(6, 9) * (1 if dtype == "uint8" else 1000)).astype(dtype)
    found = decode_target(encoded(Image.fromarray(values), format), name="x")
    assert found.dtype == np.dtype(dtype) and np.array_equal(found, values)


@pytest.mark.parametrize("dtype", ["uint8", "int64", ">i2", "float64"])
def test_npy_targets(dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    found = decode_target(npy(values[None]), name="x")
    assert found.dtype.isnative and np.array_equal(found, values)


def test_palette_and_bilevel_images_give_indices():
    palette = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] + [1] * (253 * 3))
    assert decode_target(encoded(palette), name="x").tolist() == [[0, 1], [2, 255]]
    assert decode_target(encoded(Image.fromarray(np.eye(2, dtype=bool))), name="x").tolist() == [[1, 0], [0, 1]]


def test_grey_saved_as_colour_is_read_and_colour_is_refused():
    grey = np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4, 1), 3, axis=2)
    assert np.array_equal(decode_target(encoded(Image.fromarray(grey)), name="x"), grey[..., 0])
    grey[0, 0, 1] = 99
    with pytest.raises(InputError, match=r"x: its mask has colours \(RGB\), expected one channel of class numbers"):
        decode_target(encoded(Image.fromarray(grey)), name="x")


def test_damaged_and_lossy_targets():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40)).astype(np.uint8)))
    with pytest.raises(BadImage):
        decode_target(whole[: len(whole) // 2], name="x")
    with pytest.raises(BadImage):
        decode_target(npy(np.zeros((3, 4)))[:70], name="x")
    with pytest.raises(InputError, match=r"array \[2, 3, 4\] of float64; expected real numbers \[H, W\]"):
        decode_target(npy(np.zeros((2, 3, 4))), name="x")
    jpeg = encoded(Image.new("L", (8, 8)), "JPEG")
    with pytest.raises(InputError, match="JPEG, which changes class numbers"):
        decode_target(jpeg, name="x")
    assert decode_target(jpeg, name="x", role="depth").shape == (8, 8)


def test_masks_in_a_folder_beside_the_images(folder, encode):
    for spec in (f"{folder}/images?mask=../masks", f"{folder}/images?mask={folder}/masks"):
        source = open_source(spec)
        assert source.has_role("mask") and not source.has_role("depth")
        pair = read_pair(open_source(source.spec), 1, "mask")
        assert pair.image.shape == (3, 16, 24) and pair.image.dtype == torch.uint8
        assert np.array_equal(pair.target, np.arange(16 * 24).reshape(16, 24) % 8)
        assert (pair.row, pair.name) == (1, "b/c.png")
    before = source.content_hash()
    (folder / "masks" / "a.png").write_bytes(encode(5))
    assert source.content_hash() != before


def test_masks_by_pattern_and_below_the_images(folder):
    (folder / "images" / "gt").mkdir()
    (folder / "images" / "one_left.png").write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "gt" / "one_ids.png").write_bytes((folder / "masks" / "a.png").read_bytes())
    source = open_source(f"{folder}/images?mask=gt/*_ids.png")
    assert source.ids == ["a.png", "b/c.png", "one_left.png"]
    assert read_pair(source, 2, "mask").target.shape == (16, 24)
    with pytest.raises(BadImage, match="no mask of that name"):
        read_pair(source, 0, "mask")


def test_folders_that_cannot_be_masks(folder):
    with pytest.raises(InputError, match="which does not exist"):
        open_source(f"{folder}/images?mask=nothing")
    with pytest.raises(InputError, match=r"is the folder of the images itself.*mask=\./\*_mask\.png"):
        open_source(f"{folder}/images?mask=.")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"none of its 2 images has a mask in .*expected a\.png or \.tif"):
        open_source(f"{folder}/images?mask=../empty")


def test_a_source_without_masks_is_told_how_to_name_them(folder):
    with pytest.raises(InputError, match=r"no mask \(class numbers of every pixel\).*\?mask=COLUMN"):
        require_role(open_source(f"{folder}/images"), "mask")
    require_role(open_source(f"{folder}/images?depth=../masks"), "depth")


def test_targets_of_another_size(folder):
    large = np.repeat(np.repeat(np.arange(16 * 24).reshape(16, 24) % 7, 2, 0), 2, 1).astype(np.uint8)
    (folder / "masks" / "a.png").write_bytes(encoded(Image.fromarray(large)))
    source = open_source(f"{folder}/images?mask=../masks")
    with pytest.raises(InputError, match=r"a\.png: its mask has 48 x 32 pixels, the image 24 x 16"):
        read_pair(source, 0, "mask")
    assert np.array_equal(read_pair(source, 0, "mask", resize_target=True).target, large[1::2, 1::2])
    assert read_target(source, 0, "mask", (32, 48)).shape == (32, 48)


@pytest.mark.parametrize("workers", [0, 3])
def test_many_pairs_in_order_with_bad_ones_counted(folder, encode, workers):
    for number in range(20):
        (folder / "images" / f"n{number:02d}.png").write_bytes(encode(number) if number != 4 else b"no image")
        mask = Image.fromarray(np.full((16, 24), number, np.uint8))
        (folder / "masks" / f"n{number:02d}.png").write_bytes(encoded(mask))
    (folder / "masks" / "n07.png").unlink()
    source = open_source(f"{folder}/images?mask=../masks")
    found = list(read_pairs(source, range(2, 22), "mask", workers=workers, make=lambda pair: int(pair.target[0, 0])))
    wanted = [number for number in range(20) if number not in (4, 7)]
    assert [value for value in found if not isinstance(value, BadImage)] == wanted
    assert [index for index, value in enumerate(found) if isinstance(value, BadImage)] == [4, 7]
    good = [pair for pair in read_pairs(source, range(22), "mask", workers=workers) if not isinstance(pair, BadImage)]
    assert len(good) == 20 and good[2].digest.shape == (32,)


def test_errors_of_threads_reach_the_caller_and_early_ends_stop_them():
    def fail(number):
        if number == 5:
            raise InputError("five")
        return number

    with pytest.raises(InputError, match="five"):
        list(in_order(fail, range(50), 3))
    before = threading.active_count()
    for value in in_order(lambda number: number, range(100), 3):
        if value == 2:
            break
    assert threading.active_count() <= before + 3


# --- Geometry -----------------------------------------------------------------------------------------------------


def test_nearest_resize_against_pillow():
    values = np.random.default_rng(0).integers(0, 200, (17, 23)).astype(np.uint8)
    for size in ((34, 46), (9, 40), (5, 7), (17, 23)):
        wanted = Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST)
        assert np.array_equal(resize_nearest(values, *size), np.asarray(wanted))


def test_resize_of_a_pair_keeps_image_and_target_together():
    pair = pair_of()
    small = resize_pair(pair, 12, 20)
    assert small.size == small.target.shape == (12, 20)
    assert torch.equal(small.image, resize_uint8(pair.image.permute(1, 2, 0).contiguous().numpy(), 12, 20))
    assert set(np.unique(small.target)) <= set(np.unique(pair.target))


@pytest.mark.parametrize(
    "size, shorter, longest, wanted",
    [((240, 320), 480, None, (480, 640)), ((100, 700), 50, 200, (29, 200)), ((333, 500), 512, 2048, (512, 769))],
)
def test_fitted_sizes(size, shorter, longest, wanted):
    assert fitted_size(*size, shorter, longest) == wanted


def test_flip_crop_and_cut_move_both_alike():
    pair = pair_of()
    for changed in (flipped(pair), cut(pair, 3, 4, 10, 12), random_crop(pair, 10, 50, np.random.default_rng(1))):
        assert np.array_equal(changed.image[0].numpy(), changed.target * 25)
    assert np.array_equal(flipped(pair).target, pair.target[:, ::-1])
    assert random_crop(pair, 10, 50, np.random.default_rng(1)).size == (10, 30)


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    pair = pair_of(60, 80)

    def drawn(seed, epoch, row):
        return augmented(pair, pair_random(seed, epoch, row), shorter=60, scale=(0.5, 2.0), crop=(32, 32))

    first, again = drawn(0, 1, 2), drawn(0, 1, 2)
    assert torch.equal(first.image, again.image) and np.array_equal(first.target, again.target)
    others = [drawn(1, 1, 2), drawn(0, 2, 2), drawn(0, 1, 3)]
    assert not any(other.size == first.size and torch.equal(other.image, first.image) for other in others)
    # Scaled down below the crop a side is what it is; scaled up the crop is full.
    sizes = {drawn(0, epoch, 0).size for epoch in range(40)}
    assert (32, 32) in sizes and all(height <= 32 and width <= 32 for height, width in sizes)


def test_scales_are_uniform_and_flips_even():
    pair = pair_of(20, 20)
    found = [augmented(pair, pair_random(0, epoch, 0), shorter=20, scale=(0.5, 2.0)) for epoch in range(400)]
    sides = np.array([one.size[0] for one in found])
    assert sides.min() == 10 and sides.max() >= 39 and abs(sides.mean() - 25) < 1.5
    plain = [augmented(pair, pair_random(0, epoch, 0), shorter=None) for epoch in range(400)]
    mirrored = np.mean([np.array_equal(one.target, pair.target[:, ::-1]) for one in plain])
    assert 0.4 < mirrored < 0.6
