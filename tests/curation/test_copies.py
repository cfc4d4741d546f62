"""Altered copies: every edit does what its name says, sets are labelled rightly and do not depend on order."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from dinov2cli.curation import edits, pages
from dinov2cli.curation.copies import (
    DISTRACTORS,
    KINDS,
    altered_copy,
    altered_file,
    labelled_set,
    original_file,
    sampled_set,
    write_set,
)
from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.chelsea()[20:220, 60:300])


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Six photographs of different sizes."""
    from skimage import data

    large = [data.chelsea(), data.astronaut(), data.coffee()]
    return [np.ascontiguousarray(x[i : i + 150 + 10 * i, 40 : 220 - 8 * i]) for i, x in enumerate(large + large[::-1])]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of pixels in grey levels."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


def test_exact_reencoded_and_converted(photo):
    exact = altered_file(photo, "exact")
    assert exact == original_file(photo)
    sizes = set()
    for seed in range(6):
        again = altered_file(photo, "reencode", seed=seed)
        sizes.add(len(again))
        assert again != exact and 0.1 < apart(decode_image(again, name="x"), photo) < 8
    assert len(sizes) > 4
    forms = {Image.open(io.BytesIO(altered_file(photo, "format", seed=seed))).format for seed in range(12)}
    assert forms == {"PNG", "WEBP"}
    same = [np.array_equal(altered_copy(photo, "format", seed=seed), photo) for seed in range(12)]
    assert 0 < sum(same) < 12  # PNG and lossless WebP, and lossy WebP


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_undoes_what_was_done_to_the_pixels(photo, orientation):
    class Fixed:
        def integers(self, low: int, high: int) -> int:
            return orientation if low == 2 else 95

    data = edits.exif(photo, Fixed())
    raw = Image.open(io.BytesIO(data))
    assert raw.getexif()[0x0112] == orientation
    assert apart(decode_image(data, name="x"), photo) < 3
    assert apart(np.asarray(ImageOps.exif_transpose(raw)), photo) < 3
    stored = np.asarray(raw)
    assert stored.shape != photo.shape or apart(stored, photo) > 10


def test_resized(photo):
    for seed in range(5):
        copy = altered_copy(photo, "resize", seed=seed)
        scale = copy.shape[0] / photo.shape[0]
        assert 0.29 <= scale <= 0.81 and copy.shape[1] == pytest.approx(scale * photo.shape[1], abs=2)
        back = np.asarray(Image.fromarray(copy).resize(photo.shape[1::-1], Image.Resampling.BICUBIC))
        assert apart(back, photo) < 12


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_crops_are_windows_of_that_share(photo, share):
    picture, places = Image.fromarray(photo), set()
    for seed in range(8):
        part = np.asarray(edits.crop(share)(picture, rng(seed)))
        height, width = part.shape[:2]
        assert height * width / photo[..., 0].size == pytest.approx(share, abs=0.01)
        assert width / height == pytest.approx(photo.shape[1] / photo.shape[0], rel=0.02)
        windows = np.lib.stride_tricks.sliding_window_view(photo[..., 1], (height, width))
        hit = np.argwhere((windows == part[..., 1]).all(axis=(2, 3)))
        assert len(hit) == 1
        places.add(tuple(hit[0]))
    assert len(places) == 8


def test_mirrored_turned_and_grey(photo):
    assert apart(altered_copy(photo, "flip"), photo[:, ::-1]) < 5
    turned = {
        int(np.argmin([9e9 if r.shape != c.shape else apart(c, r) for r in [np.rot90(photo, k) for k in range(4)]]))
        for c in [altered_copy(photo, "rot90", seed=seed) for seed in range(12)]
    }
    assert turned == {1, 2, 3}
    grey = altered_copy(photo, "gray")
    assert np.ptp(grey.astype(int), axis=2).max() <= 2
    assert apart(grey[..., 0], photo @ np.array([0.299, 0.587, 0.114])) < 5


def test_small_turns_cut_or_fill_the_corners(photo):
    inside = np.full((200, 300, 3), 100, np.uint8)
    shapes = []
    for seed in range(16):
        copy = np.asarray(edits.rotate(Image.fromarray(inside), rng(seed)))
        filled = (np.abs(copy.astype(int) - 100) > 5).any(axis=2)
        cut = copy.shape[0] < 200
        shapes.append(cut)
        if cut:
            assert not filled.any() and copy.shape[0] * copy.shape[1] > 0.5 * 200 * 300
        else:
            # The turned rectangle keeps its area; its bounding box follows from the angle.
            assert (~filled).sum() == pytest.approx(200 * 300, rel=0.02)
            angles = np.radians(np.linspace(3, 10, 200))
            boxes = (300 * np.cos(angles) + 200 * np.sin(angles)) * (300 * np.sin(angles) + 200 * np.cos(angles))
            assert boxes.min() * 0.98 < filled.size < boxes.max() * 1.02
    assert any(shapes) and not all(shapes)
    # Larger than the rectangle given the corners would stick out: brute force over scales.
    for degrees in (3.0, 7.5, 10.0):
        width, height = edits.inscribed(300, 200, degrees)
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))

        def fits(scale: float, c: float = c, s: float = s) -> bool:
            corners = scale * np.array([[150, 100], [150, -100]])
            turned = np.abs(corners @ np.array([[c, s], [-s, c]]))
            return bool((turned <= [150, 100]).all())

        best = max(scale for scale in np.linspace(0.5, 1, 2001) if fits(scale))
        assert 300 * best - 3 <= width <= 300 * best and 200 * best - 3 <= height <= 200 * best


def test_colour_blur_and_noise(photo):
    picture = Image.fromarray(photo)
    changes = [apart(np.asarray(edits.jitter(picture, rng(seed))), photo) for seed in range(8)]
    assert min(changes) > 2 and max(changes) < 60
    sharp = np.abs(np.diff(photo.astype(float), axis=1)).mean()
    for seed in range(4):
        blurred = np.asarray(edits.blur(picture, rng(seed))).astype(float)
        assert np.abs(np.diff(blurred, axis=1)).mean() < 0.85 * sharp and apart(blurred, photo) < 15
    level = np.full((100, 100, 3), 128, np.uint8)
    spread = [np.asarray(edits.noise(Image.fromarray(level), rng(seed))).std() for seed in range(8)]
    assert 7.5 < min(spread) < 14 and 18 < max(spread) < 26


def test_overlays_leave_most_of_the_picture_alone(photo):
    for seed in range(16):
        copy = np.asarray(pages.overlay(Image.fromarray(photo), rng(seed)))
        changed = (copy != photo).any(axis=2).mean()
        assert 0.005 < changed < 0.35, seed


def test_bars_surround_the_whole_picture(photo):
    kinds = set()
    for seed in range(16):
        copy = np.asarray(pages.letterbox(Image.fromarray(photo), rng(seed)))
        y, x = (copy.shape[0] - 200) // 2, (copy.shape[1] - 240) // 2
        kinds.add((y > 0, x > 0))
        np.testing.assert_array_equal(copy[y : y + 200, x : x + 240], photo)
        bars = copy.copy()
        bars[y : y + 200, x : x + 240] = copy[0, 0]
        assert (bars == copy[0, 0]).all() and 0 <= y <= 41 and 0 <= x <= 49
    assert kinds == {(True, False), (False, True), (True, True)}


def test_pages_hold_the_whole_picture_and_are_the_same_around_another(photo):
    styles = set()
    other = np.full_like(photo, 77)
    for seed in range(12):
        one = np.asarray(pages.page(Image.fromarray(photo), rng(seed), rng(99)))
        two = np.asarray(pages.page(Image.fromarray(other), rng(seed), rng(99)))
        styles.add(one.shape)
        differs = np.argwhere((one != two).any(axis=2))
        (top, left), (bottom, right) = differs.min(axis=0), differs.max(axis=0) + 1
        part = one[top:bottom, left:right]
        whole = np.asarray(Image.fromarray(photo).resize((right - left, bottom - top), Image.Resampling.BICUBIC))
        # Not a pixel of the page but the picture's own differs, and there it is the picture.
        assert apart(part, whole) < 1 and 0.05 < (right - left) * (bottom - top) / one[..., 0].size < 0.7
    assert len(styles) == 4
    assert (np.asarray(pages.page(Image.fromarray(photo), rng(1), rng(2))) != pages_of(photo, 1, 3)).any()


def pages_of(image: np.ndarray, look: int, rest: int) -> np.ndarray:
    return np.asarray(pages.page(Image.fromarray(image), rng(look), rng(rest)))


def test_chains_make_more_than_one_change(photo):
    copies = [altered_copy(photo, "chain", seed=seed) for seed in range(8)]
    assert all(c.shape != photo.shape or apart(c, photo) > 3 for c in copies)
    assert len({c.shape for c in copies}) > 3


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (40, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_takes_any_size(kind, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    for seed in range(4):
        copy = altered_copy(image, kind, seed=seed)
        assert copy.dtype == np.uint8 and min(copy.shape[:2]) >= 1


def test_sets_are_labelled_and_repeatable(photos, tmp_path):
    files = list(labelled_set(photos[:3], others=photos[3:], seed=5, synthetic=2, templates=2))
    again = list(labelled_set(iter(photos[:3]), others=photos[3:], seed=5, synthetic=2, templates=2))
    assert files == again and len({f.name for f in files}) == len(files)
    assert [f.kind for f in files[:19]] == ["original", *KINDS] and len({f.group for f in files[:57]}) == 3
    assert files[0].data == files[1].data and files[0].group == files[18].group != files[19].group
    rest = files[57:]
    assert len({f.group for f in rest}) == len(rest) == 3 + 6 and {f.kind for f in rest} <= set(DISTRACTORS)
    for f in files:
        assert min(decode_image(f.data, name=f.name).shape[:2]) > 10
    truth = write_set(files, tmp_path / "set")
    source = open_source(str(tmp_path / "set"))
    assert list(source.ids) == truth.names and len(truth) == len(files)
    by_name = {f.name: f for f in files}
    for row, name in enumerate(truth.names):
        assert source.read(row) == by_name[name].data
        assert (truth.groups[row], truth.kinds[row]) == (by_name[name].group, by_name[name].kind)
    with pytest.raises(FileExistsError):
        write_set(files[:1], tmp_path / "set")


def test_copies_do_not_depend_on_order_company_or_other_kinds(photos):
    whole = {f.name: f.data for f in labelled_set(photos, seed=1, synthetic=0)}
    backwards = {f.name: f.data for f in labelled_set(photos[::-1], seed=1, synthetic=0)}
    few = {f.name: f.data for f in labelled_set(photos[2:3], seed=1, kinds=("blur", "chain"), synthetic=0)}
    assert backwards == whole and few.items() <= whole.items() and len(few) == 3
    other = {f.name: f.data for f in labelled_set(photos, seed=2, synthetic=0)}
    changed = {name.rsplit("-")[1].split(".")[0] for name in whole if whole[name] != other.get(name)}
    assert set(KINDS) - changed <= {"exact", "flip", "gray"}


def test_equal_pictures_count_once_and_templates_are_shared(photos):
    files = list(labelled_set([photos[0], photos[0].copy(), photos[1]], kinds=("flip",), others=photos[:1]))
    assert [f.kind for f in files].count("original") == 2 and "photo" not in {f.kind for f in files}
    # One template: other photographs lie on the very page of the copies.
    image, other = photos[0], np.full_like(photos[0], 77)
    pair = [altered_copy(x, "screenshot", template=3) for x in (image, other)]
    alone = altered_copy(other, "screenshot", template=4)
    assert pair[0].shape == pair[1].shape and (np.abs(pair[0].astype(int) - pair[1]) < 12).all(axis=2).mean() > 0.3
    assert alone.shape != pair[0].shape or (np.abs(alone.astype(int) - pair[1]) > 40).any(axis=2).mean() > 0.01


def test_sources_give_their_own_files(tmp_path, photos):
    for i, image in enumerate(photos[:5]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    source = open_source(str(tmp_path))
    files = list(labelled_set(source, kinds=("exact", "gray"), synthetic=0))
    assert sorted({f.data for f in files if f.kind == "exact"}) == sorted(
        (tmp_path / f"{i}.png").read_bytes() for i in range(5)
    )
    sample = list(sampled_set(source, originals=3, others=9, kinds=("flip",), synthetic=0, seed=4))
    assert sample == list(sampled_set(source, originals=3, others=9, kinds=("flip",), synthetic=0, seed=4))
    assert len({f.group for f in sample}) == 5
    with pytest.raises(BadImage):
        decode_image((tmp_path / "bad.png").read_bytes(), name="bad")


def test_bad_requests_are_refused(tmp_path, photo):
    for bad in ({"kinds": ("flip", "melt")}, {"seed": -1}, {"templates": 0}):
        with pytest.raises(UserError, match=r"altered copies: found kinds .* expected kinds of exact, reencode"):
            labelled_set([photo], **bad)
    Image.fromarray(photo).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="found 1 images; expected at least 2"):
        sampled_set(open_source(str(tmp_path)))
    assert list(labelled_set([], synthetic=0)) == []
