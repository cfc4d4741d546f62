"""Multi-crop geometry: Pillow's resize, the distribution of boxes, and independence of everything but the key."""

import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import stats
from skimage import data as photographs

from dinov2cli.data.crops import Box, Cut, MultiCrop, random_box, resize_box, sample_rng, stored_box, turned
from dinov2cli.data.decode import Decoder, open_image
from dinov2cli.data.scratch import Scratch
from dinov2cli.errors import UserError


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return photographs.astronaut()[:400, :300]


@pytest.mark.parametrize("size", [224, 98, 28])
@pytest.mark.parametrize("box", [Box(0, 0, 400, 300), Box(13, 57, 301, 222), Box(100, 100, 20, 27), Box(5, 5, 1, 1)])
def test_resize_matches_pillow(photo, size, box):
    """Both round to whole levels between the two passes, not always in the same order: neither is better."""
    cut = photo[box.top : box.top + box.height, box.left : box.left + box.width]
    pillow = np.asarray(Image.fromarray(cut).resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    ours = resize_box(torch.from_numpy(photo), box, size, Scratch()).double().numpy()
    floats = torch.from_numpy(cut.astype(np.float64)).permute(2, 0, 1)[None]
    exact = (
        F.interpolate(floats, (size, size), mode="bicubic", antialias=True)[0].clamp(0, 255).permute(1, 2, 0).numpy()
    )
    assert np.abs(ours - pillow).mean() < 0.3
    assert np.abs(ours - exact).mean() < np.abs(pillow - exact).mean() + 0.01
    assert abs((ours - pillow).mean()) < 0.02


def test_a_fourth_channel_changes_nothing(photo):
    box, padded = Box(13, 57, 301, 222), np.dstack([photo, photo[..., :1]])
    plain, four = (resize_box(torch.from_numpy(pixels), box, 98, Scratch()) for pixels in (photo, padded))
    assert torch.equal(four[..., :3], plain)


def test_scratch_is_used_again_and_grows(photo):
    scratch, pixels = Scratch(), torch.from_numpy(photo)
    boxes = [Box(0, 0, 20, 20), Box(0, 0, 300, 300), Box(7, 7, 60, 50)]
    assert all(torch.equal(resize_box(pixels, b, 28, scratch), resize_box(pixels, b, 28, Scratch())) for b in boxes)
    assert scratch.take(5, 5).data_ptr() == scratch.take(300, 300).data_ptr()


def test_flip_mirrors_left_and_right(photo):
    crop = resize_box(torch.from_numpy(photo), Box(10, 20, 200, 100), 56, Scratch())
    assert torch.equal(turned(crop, 1, True), crop.flip(1))
    assert torch.equal(turned(crop, 1, False), crop)


class TestBoxes:
    @pytest.fixture(scope="class")
    @staticmethod
    def boxes() -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.array([random_box(2000, 2000, (0.05, 0.32), rng) for _ in range(4000)])

    def test_area_is_uniform_in_the_scale(self, boxes):
        """No box of this scale is rejected in a square image, so the area is uniform as drawn."""
        share = boxes[:, 2] * boxes[:, 3] / 2000**2
        assert stats.kstest(share, stats.uniform(0.05, 0.27).cdf).pvalue > 1e-3

    def test_aspect_is_log_uniform(self, boxes):
        low, high = np.log(3 / 4), np.log(4 / 3)
        aspect = np.log(boxes[:, 3] / boxes[:, 2])
        assert stats.kstest(aspect, stats.uniform(low, high - low).cdf).pvalue > 1e-3

    def test_position_is_uniform_among_those_that_fit(self, boxes):
        for start, length in ((0, 2), (1, 3)):
            position = (boxes[:, start] + 0.5) / (2000 - boxes[:, length] + 1)
            assert stats.kstest(position, "uniform").pvalue > 1e-3

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (1, 500), (500, 1), (40, 400), (224, 224)])
    def test_boxes_lie_inside(self, height, width):
        rng = np.random.default_rng(0)
        for scale in ((0.32, 1.0), (0.05, 0.32), (1.0, 1.0)):
            for _ in range(50):
                box = random_box(height, width, scale, rng)
                assert box.height >= 1
                assert box.width >= 1
                assert 0 <= box.top <= height - box.height
                assert 0 <= box.left <= width - box.width

    def test_every_position_of_a_small_image_is_reached(self):
        rng = np.random.default_rng(0)
        tops = {random_box(4, 4, (0.06, 0.07), rng).top for _ in range(200)}
        assert tops == {0, 1, 2, 3}

    @pytest.mark.parametrize(
        ("height", "width", "expected"),
        [(100, 1000, Box(0, 433, 100, 133)), (1000, 100, Box(433, 0, 133, 100)), (30, 30, Box(0, 0, 30, 30))],
    )
    def test_fallback_is_the_largest_centred_box(self, height, width, expected):
        """A box of 1.0 of the area and another aspect never fits, so the fallback is taken at once."""
        draws = np.random.default_rng(0)
        if height == width:  # all ten draws too wide
            draws = type("Draws", (), {"random": lambda self, shape: np.full(shape, 0.999)})()
        assert random_box(height, width, (1.0, 1.0), draws) == expected


class TestMultiCrop:
    crops = MultiCrop(global_size=56, local_size=28, local_number=4)

    def test_shapes(self, photo):
        global_crops, local_crops = self.crops(photo, 0, 0, 0)
        assert global_crops.shape == (2, 3, 56, 56)
        assert local_crops.shape == (4, 3, 28, 28)
        assert global_crops.dtype == local_crops.dtype == torch.uint8
        assert global_crops.permute(0, 2, 3, 1).is_contiguous()
        none = MultiCrop(local_number=0)(photo, 0, 0, 0)[1]
        assert none.shape == (0, 3, 98, 98)

    def test_depends_on_the_key_alone(self, photo):
        first = self.crops(photo, 1, 2, 3)
        self.crops(photo, 5, 5, 5)
        np.random.seed(7)
        torch.manual_seed(7)
        again = pickle.loads(pickle.dumps(self.crops))(photo, 1, 2, 3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1), (1, 2, -1), (-1, 2, 3)):
            assert not torch.equal(self.crops(photo, *other)[0], first[0])

    def test_the_keys_give_independent_numbers(self):
        """First draws over consecutive samples, epochs and seeds are uniform and uncorrelated."""
        for keys in (
            [(0, 0, i) for i in range(2000)],
            [(0, i, 0) for i in range(2000)],
            [(i, 0, 0) for i in range(2000)],
        ):
            draws = np.array([sample_rng(*key).random() for key in keys])
            assert stats.kstest(draws, "uniform").pvalue > 1e-3
            assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(2000)

    def test_the_streams_of_neighbouring_keys_do_not_overlap(self):
        """Not even shifted: Philox serves blocks of four draws by its counter."""
        keys = [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (0, 0, 1)]
        draws = np.concatenate([sample_rng(*key).random(100) for key in keys])
        assert len(np.unique(draws)) == len(draws)

    def test_crops_come_from_the_scales(self):
        """In an image of a horizontal ramp, the range of a crop's values tells the box's width."""
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)).copy()
        spans: dict[str, list[float]] = {"global": [], "local": []}
        for sample in range(150):
            for name, crops in zip(spans, self.crops(ramp, 0, 0, sample), strict=True):
                flat = crops.flatten(1).int()
                spans[name] += ((flat.amax(1) - flat.amin(1) + 1) / 256).tolist()
        widths = {name: np.array(values) for name, values in spans.items()}
        assert widths["global"].min() > np.sqrt(0.32 * 3 / 4) - 0.03
        assert widths["local"].max() < np.sqrt(0.32 * 4 / 3) + 0.03
        assert widths["local"].min() > np.sqrt(0.05 * 3 / 4) - 0.03
        assert (widths["local"] ** 2).mean() == pytest.approx((0.05 + 0.32) / 2 * 1.014, rel=0.07)  # 1.014: mean aspect

    @pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
    def test_flip_rate(self, probability):
        ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3)).copy()
        crops = MultiCrop(global_size=8, local_size=8, local_number=4, flip=probability)
        flipped = [bool(c[0, 0, 0] > c[0, 0, -1]) for i in range(150) for part in crops(ramp, 0, 0, i) for c in part]
        assert np.mean(flipped) == pytest.approx(probability, abs=4 * np.sqrt(probability * (1 - probability) / 900))

    def test_read_only_and_flipped_arrays_are_taken(self, photo, recwarn):
        frozen = photo.copy()
        frozen.flags.writeable = False
        expected = self.crops(photo.copy(), 0, 0, 0)[0]
        assert torch.equal(self.crops(frozen, 0, 0, 0)[0], expected)
        assert torch.equal(self.crops(photo[::-1].copy()[::-1], 0, 0, 0)[0], expected)
        assert not recwarn

    def test_other_arrays_are_refused(self, photo):
        for wrong in (photo[..., 0], photo.astype(np.float32), photo[..., :2], photo[:0]):
            with pytest.raises(ValueError, match=r"image must be uint8 \[H, W, 3\]"):
                self.crops(wrong, 0, 0, 0)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"global_size": 0}, "crops: sizes 0 and 98"),
            ({"local_number": -1}, "local_number -1 found"),
            ({"global_scale": (0.5, 0.4)}, r"crops: global_scale \(0.5, 0.4\) found, expected 0 < low <= high <= 1"),
            ({"local_scale": (0.0, 0.4)}, "crops: local_scale"),
            ({"flip": 2.0}, "crops: flip 2.0 found, expected a probability"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, settings, message):
        with pytest.raises(UserError, match=message):
            MultiCrop(**settings)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


class TestOrientation:
    """EXIF orientation is applied to boxes and crops; the crops are those of the upright picture."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    def test_crops_are_those_of_the_picture_as_displayed(self, photo, orientation, format):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(photo), format, exif=exif)
        opened = open_image(data, name="x")
        upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert (opened.height, opened.width) == upright.shape[:2]
        crop = MultiCrop(global_size=56, local_size=28, local_number=6)
        cuts = crop.draw(opened.height, opened.width, 0, 0, 0)
        assert {cut.flip for cut in cuts} == {True, False}
        into = [torch.empty(2, 56, 56, 3, dtype=torch.uint8), torch.empty(6, 28, 28, 3, dtype=torch.uint8)]
        stored = Decoder().stored(opened)
        crop.cut(stored, cuts, (opened.height, opened.width), into, Scratch(), opened.orientation)
        for ours, expected in zip(into, crop(upright, 0, 0, 0), strict=True):
            difference = (ours.permute(0, 3, 1, 2).int() - expected.int()).abs()
            assert difference.max() <= 4  # passes in the other order round otherwise
            assert difference.float().mean() < 0.2


class TestShrink:
    crops = MultiCrop(global_size=56, local_size=28, local_number=4)

    @pytest.mark.parametrize(
        ("least", "expected"), [(55, 1), (56, 1), (111, 1), (112, 2), (223, 2), (224, 4), (448, 8), (4000, 8)]
    )
    def test_every_crop_keeps_as_many_pixels_as_it_has(self, least, expected):
        wide = Cut(Box(3, 5, 4000, 4000), False)
        cuts = [Cut(Box(3, 5, 4000, least), True), *[wide] * 5]
        assert self.crops.shrink(cuts) == expected

    def test_boxes_of_fewer_pixels(self):
        assert stored_box(Box(8, 16, 40, 80), (100, 200), (25, 50), shrink=4) == Box(2, 4, 10, 20)
        assert stored_box(Box(9, 19, 43, 83), (97, 197), (25, 50), shrink=4) == Box(2, 4, 10, 20)
        assert stored_box(Box(96, 0, 1, 1), (97, 200), (13, 25), shrink=8) == Box(
            12, 0, 1, 1
        )  # never empty, nor outside
        assert stored_box(Box(8, 16, 40, 80), (100, 200), (100, 200), shrink=4) == Box(8, 16, 40, 80)  # was not shrunk

    @pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
    @pytest.mark.parametrize(("width", "height"), [(1000, 872), (993, 865), (994, 871)])
    def test_crops_of_scaled_images_are_close(self, width, height, orientation):
        """Within a level or so of those of the full image; half a pixel off its place would be three times that."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo = Image.fromarray(photographs.hubble_deep_field()).crop((0, 0, width, height))
        data, crop = encoded(photo, "JPEG", quality=92, exif=exif), self.crops
        differences = {4: [], 8: []}
        for sample in range(12):
            opened = open_image(data, name="x")
            displayed = opened.height, opened.width
            cuts = crop.draw(*displayed, 0, 0, sample)
            factor = crop.shrink(cuts)
            into = [torch.empty(2, 56, 56, 3, dtype=torch.uint8), torch.empty(4, 28, 28, 3, dtype=torch.uint8)]
            small = Decoder().stored(open_image(data, name="x"), factor)
            crop.cut(small, cuts, displayed, into, Scratch(), orientation, factor)
            full, ours = torch.from_numpy(Decoder().stored(opened).copy()), [*into[0], *into[1]]
            for cut, made in zip(cuts, ours, strict=True):
                box = Box(*(factor * side for side in stored_box(cut.box, displayed, small.shape, orientation, factor)))
                expected = turned(resize_box(full, box, len(made), Scratch()), orientation, cut.flip)
                differences.setdefault(factor, []).append(float((made.float() - expected.float()).abs().mean()))
        assert np.mean(differences[4]) < 0.6
        assert np.mean(differences[8]) < 1.5
