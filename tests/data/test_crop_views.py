"""`views`: an image is shown in so many ways, over and over; its colours repeat with its crops."""

import pytest

from dinov2cli.data.augment import Augment
from dinov2cli.data.bad import BadImages
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader
from dinov2cli.data.source import open_source

CROP = MultiCrop(global_size=16, local_size=8, local_number=2)
IMAGES, EPOCHS = 6, 4


@pytest.fixture
def folder(tmp_path, encode):
    """Six images, the third of which cannot be read."""
    for number in range(IMAGES):
        content = b"junk" if number == 2 else encode(number, size=(20 + number, 18))
        (tmp_path / f"{number}.png").write_bytes(content)
    return tmp_path


def taken(folder, views, workers=0, **more):
    """Every image of four epochs: (row, epoch or view) and the bytes of its augmented crops."""
    options = {"crop": CROP, "batch_size": 4, "seed": 3, "workers": workers, "bad": BadImages(max_fraction=1), **more}
    loader, augment, found = CropLoader(open_source(str(folder)), views=views, **options), Augment(), []
    for _, batch in zip(range(EPOCHS * IMAGES // 4), loader, strict=False):
        crops = (batch["global_crops"], batch["local_crops"])
        shown = augment(*crops, seed=3, epoch=batch["epoch"], sample=batch["index"])
        for place in range(4):
            pixels = b"".join(part[:, place].contiguous().numpy().tobytes() for part in shown)
            found.append(((int(batch["index"][place]), int(batch["epoch"][place])), pixels))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_view_is_the_same_pixels_every_time(folder, workers):
    shown = taken(folder, 2, workers)
    assert {view for (_, view), _ in shown} == {0, 1}
    by_view = {}
    for key, pixels in shown:
        by_view.setdefault(key, set()).add(pixels)
    assert all(len(pixels) == 1 for pixels in by_view.values())  # also of images that stood in for the unreadable one
    assert len(set().union(*by_view.values())) == len(by_view) == 2 * (IMAGES - 1)
    assert shown == taken(folder, 2)


def test_without_views_every_epoch_is_new_and_the_order_is_that_of_the_epoch_anyway(folder):
    plain, two = taken(folder, None), taken(folder, 2)
    assert len({pixels for _, pixels in plain}) == EPOCHS * IMAGES
    assert [row for (row, _), _ in plain] == [row for (row, _), _ in two]
    orders = [[row for (row, _), _ in two[start : start + IMAGES]] for start in range(0, len(two), IMAGES)]
    assert orders[0] != orders[2]  # the same views in another order
    first = [at for at, (_, pixels) in enumerate(plain[: 2 * IMAGES]) if pixels == two[at][1]]
    assert len(first) == 2 * (IMAGES - 1)  # the first epochs are as without, but for the stand-ins


def test_a_run_goes_on_in_the_same_view(folder):
    whole = taken(folder, 3)
    loader = CropLoader(
        open_source(str(folder)), crop=CROP, batch_size=4, seed=3, workers=0, views=3, bad=BadImages(max_fraction=1)
    )
    loader.load_state_dict({"position": 8})
    batch = next(iter(loader))
    assert list(zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)) == [key for key, _ in whole[8:12]]


def test_no_views_are_refused(folder):
    with pytest.raises(ValueError, match="0 views"):
        CropLoader(open_source(str(folder)), crop=CROP, batch_size=4, seed=3, workers=0, views=0)
