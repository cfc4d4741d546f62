"""Colour augmentation: Pillow's operations, the drawn distributions, and bitwise independence of the batch."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats
from skimage import data as photographs

from dinov2cli.data import augment as module
from dinov2cli.data.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, Parameters, uniforms
from dinov2cli.data.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    blur_weights,
    gaussian_blur,
    grayscale,
    shift_hue,
    solarize,
)
from dinov2cli.errors import UserError

FACTORS = [0.0, 0.6, 0.85, 1.0, 1.2, 1.4]


def numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64)


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """Three tiles of real photographs and one of noise, uint8 [4, 64, 64, 3]."""
    tiles = [photographs.astronaut()[60:124, 180:244], photographs.coffee()[150:214, 200:264]]
    tiles += [photographs.chelsea()[80:144, 120:184], np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)]
    return np.stack(tiles)


@pytest.fixture(scope="module")
def floats(photos) -> torch.Tensor:
    return torch.from_numpy(photos).permute(0, 3, 1, 2).float()


def levels(x: torch.Tensor) -> np.ndarray:
    """float [n, C, H, W] as [n, H, W, C]."""
    return x.permute(0, 2, 3, 1).numpy()


class TestOperations:
    """Against Pillow's own, whose results are whole levels: within one level."""

    @pytest.mark.parametrize("factor", FACTORS)
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (adjust_brightness, ImageEnhance.Brightness),
            (adjust_contrast, ImageEnhance.Contrast),
            (adjust_saturation, ImageEnhance.Color),
        ],
    )
    def test_enhancements_match_pillow(self, photos, floats, ours, theirs, factor):
        result = levels(ours(floats, torch.full((4,), factor)))
        for image, row in zip(photos, result, strict=True):
            expected = np.asarray(theirs(Image.fromarray(image)).enhance(factor)).astype(float)
            assert (row - expected).min() > -1e-3  # Pillow cuts the fraction off
            assert (row - expected).max() < 1 + 1e-3

    @pytest.mark.parametrize("operation", [adjust_brightness, adjust_contrast, adjust_saturation, shift_hue])
    def test_each_image_gets_its_own_factor(self, floats, operation):
        factors = torch.tensor([0.1, 0.6, 1.0, 1.3])
        together = operation(floats, factors)
        for row in range(4):
            assert torch.equal(together[row], operation(floats[row : row + 1], factors[row : row + 1])[0])

    def test_grayscale_is_pillows_exactly(self, photos, floats):
        for image, row in zip(photos, levels(grayscale(floats)), strict=True):
            assert np.array_equal(row[..., 0], np.asarray(ImageOps.grayscale(Image.fromarray(image))))

    @pytest.mark.parametrize("threshold", [0, 100, 128, 256])
    def test_solarize_is_pillows_exactly(self, photos, floats, threshold):
        for image, row in zip(photos, levels(solarize(floats, threshold)), strict=True):
            assert np.array_equal(row, np.asarray(ImageOps.solarize(Image.fromarray(image), threshold)))

    @pytest.mark.parametrize("turns", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.4, 1.0])
    def test_hue_matches_hsv_in_float64(self, floats, turns):
        pixels = floats[:, :, ::5, ::5]
        result = levels(shift_hue(pixels, torch.full((4,), turns)))
        for image, row in zip(levels(pixels).astype(float), result, strict=True):
            for pixel, ours in zip(image.reshape(-1, 3), row.reshape(-1, 3), strict=True):
                hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
                expected = 255 * np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
                np.testing.assert_allclose(ours, expected, atol=2e-3)

    def test_hue_matches_pillow_up_to_its_coarse_hue(self, photos, floats):
        """Pillow keeps 256 hues and 256 saturations: differences of a few levels, none on average."""
        shift = 25
        result = levels(shift_hue(floats, torch.full((4,), shift / 255)))
        for image, row in zip(photos, result, strict=True):
            hsv = np.asarray(Image.fromarray(image).convert("HSV")).copy()
            hsv[..., 0] += np.uint8(shift)
            expected = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")).astype(float)
            assert np.abs(row - expected).mean() < 2
            assert abs((row - expected).mean()) < 1

    def test_hue_of_colours_that_are_nearly_grey(self):
        """After brightness and saturation values are no whole numbers: chromas between 0 and 1 are chromas too."""
        pixels = np.random.default_rng(0).uniform(0, 0.9, (200, 3)) + 100
        x = torch.from_numpy(pixels.T.astype(np.float32)).view(1, 3, 200, 1)
        ours = shift_hue(x, torch.tensor([0.07]))[0, :, :, 0].T.numpy()
        for pixel, found in zip(pixels, ours, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
            np.testing.assert_allclose(
                found, 255 * np.array(colorsys.hsv_to_rgb(hue + 0.07, saturation, value)), atol=2e-3
            )

    def test_hue_leaves_grey_alone(self):
        grey = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        assert torch.equal(shift_hue(grey, torch.tensor([0.1])), grey)

    @pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
    def test_blur_matches_a_float64_gaussian(self, photos, floats, sigma):
        """scipy's kernel cut at 4 pixels with its mirror border is the same filter."""
        result = levels(gaussian_blur(floats, torch.from_numpy(blur_weights(np.full(4, sigma)))))
        for image, row in zip(photos.astype(float), result, strict=True):
            expected = ndimage.gaussian_filter(image, sigma, mode="mirror", radius=4, axes=(0, 1))
            np.testing.assert_allclose(row, expected, atol=1e-3)

    def test_blur_weights_sum_to_one(self):
        weights = blur_weights(np.linspace(0.1, 2, 50)).astype(float)
        np.testing.assert_allclose(2 * weights[:, :4].sum(1) + weights[:, 4], 1, atol=1e-6)

    def test_blur_of_tiny_crops_is_refused(self):
        with pytest.raises(UserError, match=r"crops of 4x4 pixels cannot be blurred, expected at least 5 pixels"):
            gaussian_blur(torch.zeros(1, 3, 4, 4), torch.from_numpy(blur_weights(np.ones(1))))


def plain_parameters(n: int, **changes: np.ndarray) -> Parameters:
    """Parameters that leave n images as they are, but for `changes`."""
    no, one = np.zeros(n, dtype=bool), np.ones(n, dtype=np.float32)
    neutral = {"jitter": no, "brightness": one, "contrast": one, "saturation": one, "hue": 0 * one, "gray": no}
    neutral |= {"blur": no, "solarize": no, "sigma": np.ones(n), "order": np.tile(np.arange(4), (n, 1))}
    return Parameters(**(neutral | changes))


def denormalised(x: torch.Tensor) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return levels((x * std + mean) * 255)


class TestPipeline:
    def test_without_operations_it_only_normalises(self, photos):
        images = torch.from_numpy(photos).permute(0, 3, 1, 2)
        ours = Augment().apply(images, plain_parameters(4)).double().permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(ours, (photos / 255 - IMAGENET_MEAN) / IMAGENET_STD, atol=1e-5)

    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
    def test_operations_follow_the_drawn_order_and_clamp_between(self, photos, order):
        """Against Pillow, one operation after another; strong factors, so that another order or no clamp shows."""
        factors = {0: 1.8, 1: 0.5, 2: 1.7, 3: 0.0}
        enhancers = {0: ImageEnhance.Brightness, 1: ImageEnhance.Contrast, 2: ImageEnhance.Color}
        changes = {
            "jitter": np.ones(4, dtype=bool),
            "order": np.tile(order, (4, 1)),
            "brightness": np.full(4, factors[0], np.float32),
            "contrast": np.full(4, factors[1], np.float32),
            "saturation": np.full(4, factors[2], np.float32),
        }
        images = torch.from_numpy(photos).permute(0, 3, 1, 2)
        ours = denormalised(Augment().apply(images, plain_parameters(4, **changes)))
        for image, row in zip(photos, ours, strict=True):
            expected = Image.fromarray(image)
            for operation in order:
                if operation in enhancers:
                    expected = enhancers[operation](expected).enhance(factors[operation])
            difference = np.abs(row - np.asarray(expected).astype(float))
            assert difference.mean() < 1.5
            assert difference.max() < 5  # Pillow cuts fractions off three times, then multiplies

    def test_gray_blur_solarize_come_in_this_order(self, photos):
        yes = np.ones(4, dtype=bool)
        images = torch.from_numpy(photos).permute(0, 3, 1, 2)
        parameters = plain_parameters(4, gray=yes, blur=yes, solarize=yes, sigma=np.full(4, 1.3))
        ours = denormalised(Augment().apply(images, parameters))
        for image, row in zip(photos, ours, strict=True):
            grey = np.asarray(ImageOps.grayscale(Image.fromarray(image))).astype(float)
            blurred = ndimage.gaussian_filter(grey, 1.3, mode="mirror", radius=4)
            expected = np.where(blurred >= 128, 255 - blurred, blurred)
            sure = np.abs(blurred - 128) > 1e-2
            np.testing.assert_allclose(row[sure], np.repeat(expected[sure][:, None], 3, 1), atol=1e-2)

    def test_untouched_images_of_a_batch_stay_untouched(self, photos):
        images = torch.from_numpy(photos).permute(0, 3, 1, 2)
        some = np.array([True, False, True, False])
        parameters = plain_parameters(4, jitter=some, brightness=np.full(4, 0.5, np.float32), gray=some)
        ours, plain = (Augment().apply(images, p) for p in (parameters, plain_parameters(4)))
        assert torch.equal(ours[~some], plain[~some])
        assert not torch.equal(ours[0], plain[0])

    def test_input_is_not_changed(self, photos):
        images = torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()
        before = images.clone()
        Augment().apply(images, Augment().parameters(0, numbers(4), numbers(4), numbers(4)))
        assert torch.equal(images, before)


@pytest.fixture(scope="module")
def crops() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(22 * 6, 3, 7, 7, generator=generator) * 255, (37, 37))
    smooth = smooth.to(torch.uint8).view(6, 22, 3, 37, 37)
    return smooth[:2].contiguous(), smooth[2:, :, :, :19, :19].contiguous()


class TestIndependence:
    """An image comes out the same, bit for bit, whatever else is in its batch. Odd sizes leave vector tails."""

    epoch, sample = numbers(22) % 3, numbers(22) * 1000 + 7

    @classmethod
    def run(cls, crops, rows) -> tuple[torch.Tensor, torch.Tensor]:
        picked = (part[:, rows].contiguous() for part in crops)
        return Augment()(*picked, seed=5, epoch=cls.epoch[rows], sample=cls.sample[rows])

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, crops):
        return cls.run(crops, numbers(22))

    @pytest.mark.parametrize(
        "rows",
        [[0], [21], [3, 4, 5], list(range(21, -1, -1)), list(range(0, 22, 2)), [7, 7, 7], list(range(1, 18))],
        ids=str,
    )
    def test_batch_composition_and_order(self, crops, whole, rows):
        for part, expected in zip(self.run(crops, np.array(rows)), whole, strict=True):
            assert torch.equal(part, expected[:, rows])

    @pytest.mark.parametrize("elements", [1, 5000, 40000, 1 << 30])
    def test_chunk_size(self, crops, whole, elements, monkeypatch):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        for part, expected in zip(self.run(crops, numbers(22)), whole, strict=True):
            assert torch.equal(part, expected)

    def test_threads(self, crops, whole):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if before > 1 else 4)
            for part, expected in zip(self.run(crops, numbers(22)), whole, strict=True):
                assert torch.equal(part, expected)
        finally:
            torch.set_num_threads(before)

    def test_two_ranks_of_two_workers(self, crops, whole):
        """Any way of dealing the samples out gives the same images."""
        for rank_rows in (numbers(22)[0::2], numbers(22)[1::2]):
            for rows in np.array_split(rank_rows, 2):
                for part, expected in zip(self.run(crops, rows), whole, strict=True):
                    assert torch.equal(part, expected[:, rows])

    def test_crops_are_numbered_global_first(self, crops, whole):
        augment = Augment()
        every = [*zip(crops[0], whole[0], strict=True), *zip(crops[1], whole[1], strict=True)]
        for number, (images, expected) in enumerate(every):
            drawn = augment.parameters(5, self.epoch, self.sample, np.full(22, number))
            assert torch.equal(augment.apply(images, drawn), expected)

    def test_fewer_locals_leave_the_other_crops(self, crops, whole):
        fewer = (crops[0], crops[1][:1])
        for part, expected in zip(self.run(fewer, numbers(22)), whole, strict=True):
            assert torch.equal(part, expected[: len(part)])

    def test_no_locals(self, crops, whole):
        global_crops, local_crops = self.run((crops[0], crops[1][:0]), numbers(22))
        assert torch.equal(global_crops, whole[0])
        assert local_crops.shape == (0, 22, 3, 19, 19)

    def test_global_random_state_is_neither_used_nor_changed(self, crops, whole):
        torch.manual_seed(123)
        state = torch.get_rng_state()
        again = self.run(crops, numbers(22))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(again[0], whole[0])

    def test_every_part_of_the_key_counts(self, crops, whole):
        augment = Augment()
        keys = {"seed": 5, "epoch": self.epoch, "sample": self.sample}
        for change in ({"seed": 6}, {"epoch": self.epoch + 1}, {"sample": self.sample + 1}):
            other = augment(*crops, **(keys | change))[0]
            same = (other == whole[0]).flatten(2).all(2).float().mean()
            assert same < 0.1
        twin = augment(crops[0][:1].expand(2, -1, -1, -1, -1), crops[1], **keys)[0]  # the same crop twice
        assert (twin[0] != twin[1]).flatten(1).any(1).all()

    def test_tensors_name_images_as_well_as_arrays(self, crops, whole):
        tensors = {"epoch": torch.from_numpy(self.epoch), "sample": torch.from_numpy(self.sample)}
        assert torch.equal(Augment()(*crops, seed=5, **tensors)[0], whole[0])


class TestDistributions:
    n = 20000

    def draw(self, crop: int, **options) -> Parameters:
        return Augment(**options).parameters(
            1, np.zeros(self.n, dtype=np.int64), numbers(self.n), np.full(self.n, crop)
        )

    def rate(self, flags: np.ndarray, expected: float) -> None:
        assert flags.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / self.n))

    @pytest.mark.parametrize(("blur", "rates"), [("nominal", (1.0, 0.1, 0.5, 0.5)), ("released", (0.0, 0.9, 0.5, 0.5))])
    def test_blur_rates(self, blur, rates):
        for crop, expected in zip((0, 1, 2, 9), rates, strict=True):
            self.rate(self.draw(crop, blur=blur).blur, expected)

    @pytest.mark.parametrize(("crop", "solarized"), [(0, 0.0), (1, 0.2), (2, 0.0), (9, 0.0)])
    def test_apply_rates(self, crop, solarized):
        drawn = self.draw(crop)
        self.rate(drawn.jitter, 0.8)
        self.rate(drawn.gray, 0.2)
        self.rate(drawn.solarize, solarized)

    @pytest.mark.parametrize(
        ("name", "low", "high"),
        [
            ("brightness", 0.6, 1.4),
            ("contrast", 0.6, 1.4),
            ("saturation", 0.8, 1.2),
            ("hue", -0.1, 0.1),
            ("sigma", 0.1, 2.0),
        ],
    )
    def test_strengths_are_uniform(self, name, low, high):
        values = getattr(self.draw(2), name)
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3

    def test_strength_above_one_starts_at_zero(self):
        brightness = self.draw(0, jitter=(2.0, 0.4, 0.2, 0.1)).brightness
        assert stats.kstest(brightness, stats.uniform(0, 3).cdf).pvalue > 1e-3

    def test_all_orders_are_as_likely(self):
        _, counts = np.unique(self.draw(2).order, axis=0, return_counts=True)
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > 1e-3

    def test_draws_are_independent_of_each_other(self):
        drawn = self.draw(1)
        columns = ["jitter", "brightness", "contrast", "saturation", "hue", "gray", "blur", "sigma", "solarize"]
        table = np.array([getattr(drawn, name).astype(float) for name in columns])
        correlation = np.corrcoef(table) - np.eye(len(columns))
        assert np.abs(correlation).max() < 5 / np.sqrt(self.n)

    @pytest.mark.parametrize("varied", ["seed", "epoch", "sample", "crop"])
    def test_neighbouring_keys_give_independent_numbers(self, varied):
        zero, count = np.zeros(4000, dtype=np.int64), numbers(4000)
        if varied == "seed":
            u = np.concatenate([uniforms(seed, zero[:1], zero[:1], zero[:1], 4) for seed in range(4000)])
        else:
            u = uniforms(0, *(count if name == varied else zero for name in ("epoch", "sample", "crop")), 4)
        for column in range(4):
            assert stats.kstest(u[:, column], "uniform").pvalue > 1e-3
            assert abs(np.corrcoef(u[:-1, column], u[1:, column])[0, 1]) < 4 / np.sqrt(4000)

    def test_no_two_keys_collide(self):
        grid = np.stack(np.meshgrid(numbers(10), numbers(300), numbers(10), indexing="ij"), -1).reshape(-1, 3)
        u = uniforms(0, *grid.T, 1)
        assert len(np.unique(u)) == len(grid)

    @pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5])
    def test_any_integer_seeds(self, seed):
        assert ((uniforms(seed, *[numbers(5)] * 3, 3) >= 0) & (uniforms(seed, *[numbers(5)] * 3, 3) < 1)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blur": "often"}, "blur: 'often' found, expected 'nominal' or 'released'"),
        ({"gray_probability": 1.2}, "gray_probability: 1.2 found, expected a number from 0 to 1"),
        ({"jitter_probability": -0.1}, "jitter_probability: -0.1 found"),
        ({"solarize_probability": 2}, "solarize_probability: 2 found"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, r"jitter: \(0.4, 0.4, 0.2, 0.6\) found, expected four numbers"),
        ({"jitter": (-0.4, 0.4, 0.2, 0.1)}, "jitter: "),
        ({"blur_sigma": (0.0, 2.0)}, r"blur_sigma: \(0.0, 2.0\) found, expected 0 < low <= high"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Augment(**settings)
