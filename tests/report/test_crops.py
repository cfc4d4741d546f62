"""The sheet of augmented crops: every picture in its place, with its own pixels, and masks over the right patches."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.data.augment import Augment
from dinov2cli.report.crops import crops_sheet
from dinov2cli.report.sheet import Column, scaled, sheet_png

GAP, TOP = 6, 26  # around pictures; down to the first picture under the captions
LEVELS = ((200, 10, 60), (30, 220, 90), (120, 0, 250))


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def flat(colour, *shape) -> torch.Tensor:
    """Normalised crops [*shape, 3, S, S] of one colour, by the augmentation's own normalisation."""
    plain = Augment(jitter_probability=0, gray_probability=0, solarize_probability=0)
    plain.blur_rates = np.zeros(3)
    *lead, side = shape
    pixels = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(1, 1, 3, side, side).contiguous()
    one = plain(pixels, pixels[:0], seed=0, epoch=np.zeros(1), sample=np.zeros(1))[0]
    return one[0, 0].expand(*lead, 3, side, side).clone()


def crops(batch=2, side=32):
    views = [flat(LEVELS[0], batch, side), flat(LEVELS[1], batch, side)]
    return torch.stack(views), flat(LEVELS[2], 4, batch, 16), torch.zeros(2 * batch, (side // 8) ** 2, dtype=torch.bool)


def test_normalisation_is_undone_and_each_crop_has_its_column():
    picture = opened(crops_sheet(*crops(), 8))
    # 32 pixels are drawn as 160: two global columns and, two above one another, four local crops in two columns.
    assert picture.shape[1] == GAP + 2 * (160 + GAP) + 2 * (80 + GAP)
    assert picture.shape[0] == TOP + 2 * (162 + GAP)
    for x, colour in ((80, LEVELS[0]), (80 + 166, LEVELS[1]), (332 + 40, LEVELS[2]), (332 + 126, LEVELS[2])):
        for row in range(2):
            np.testing.assert_array_equal(picture[TOP + row * 168 + 40, GAP + x], colour)


def test_masked_patches_are_grey_in_a_copy_beside_the_crop_that_has_them():
    global_crops, local_crops, masks = crops()
    masks[2, 5] = True  # second global crop of the first image: patch (1, 1)
    picture = opened(crops_sheet(global_crops, local_crops, masks, 8))
    assert picture.shape[1] == GAP + 3 * (160 + GAP) + 2 * (80 + GAP)
    left, second = GAP + 2 * 166, TOP + 168
    copy = picture[TOP : TOP + 160, left : left + 160]
    grey = (copy == 128).all(axis=-1)
    assert grey[40:80, 40:80].all() and grey.sum() == 40 * 40
    np.testing.assert_array_equal(copy[~grey], np.broadcast_to(LEVELS[1], copy[~grey].shape))
    empty = picture[second : second + 160, left : left + 160]
    assert (empty == picture[0, 0]).all()  # nothing is hidden there: no copy


def test_without_local_crops_and_with_fewer_images_than_asked():
    global_crops, local_crops, masks = crops(batch=3)
    expected = opened(crops_sheet(global_crops, None, masks, 8, images=2))
    assert expected.shape[:2] == (TOP + 2 * (160 + GAP), GAP + 2 * (160 + GAP))
    np.testing.assert_array_equal(opened(crops_sheet(global_crops, local_crops[:0], masks, 8, images=2)), expected)
    assert opened(crops_sheet(global_crops, None, masks, 8)).shape[0] == TOP + 3 * (160 + GAP)


def test_large_crops_are_made_smaller():
    masks = torch.zeros(2, 16 * 16, dtype=torch.bool)
    picture = opened(crops_sheet(flat(LEVELS[0], 2, 1, 224), flat(LEVELS[2], 8, 1, 98), masks, 14))
    assert picture.shape[0] == TOP + 2 * 70 + 2 + GAP + 160 - 142
    np.testing.assert_array_equal(picture[TOP + 80, GAP + 80], LEVELS[0])


def test_masks_of_another_batch_are_refused():
    global_crops, local_crops, masks = crops()
    with pytest.raises(ValueError, match=r"masks \(3, 16\) do not fit 2 x 2 crops of 4 x 4 patches"):
        crops_sheet(global_crops, local_crops, masks[:3], 8)


def test_sheets_refuse_what_is_no_table():
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one picture"):
        sheet_png([Column("", [None])])
    with pytest.raises(ValueError, match="equally many places"):
        sheet_png([Column("", [picture]), Column("", [picture, None])])


def test_enlarging_keeps_square_pixels():
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    enlarged = scaled(picture, 7, 2)
    assert enlarged.shape == (6, 6, 3)
    np.testing.assert_array_equal(enlarged[::3, ::3], picture)
    np.testing.assert_array_equal(enlarged[2, 2], picture[0, 0])
