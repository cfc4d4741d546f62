import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from skimage import data as photographs

from dinov2cli.data import decode
from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import Decoder, decode_image, open_image, resize_center_crop
from dinov2cli.data.jpeg import turbo, turbo_pixels


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(data: bytes) -> np.ndarray:
    return decode_image(data, name="x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(stored, exif=exif)
    # Where each stored pixel belongs, from the definition of the tag (row 0 / column 0 of the picture as displayed).
    stored_HWC = np.asarray(stored)
    shown = {
        1: stored_HWC,
        2: stored_HWC[:, ::-1],
        3: stored_HWC[::-1, ::-1],
        4: stored_HWC[::-1],
        5: stored_HWC.transpose(1, 0, 2),
        6: np.rot90(stored_HWC, -1),
        7: stored_HWC[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored_HWC, 1),
    }[orientation]
    np.testing.assert_array_equal(rgb(data), shown)
    opened = open_image(data, name="x")
    assert (opened.height, opened.width, opened.orientation) == (*shown.shape[:2], orientation)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_lose_the_picture():
    image = Image.new("RGB", (8, 4), (10, 200, 30))
    data = file_of(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert rgb(data).shape == (4, 8, 3)


def test_grey_and_bilevel_and_palette():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(rgb(file_of(Image.fromarray(ramp))), np.repeat(ramp[..., None], 3, axis=2))
    bits = Image.fromarray(ramp).point(lambda value: 255 * (value > 127)).convert("1")
    assert set(np.unique(rgb(file_of(bits)))) == {0, 255}
    colours = Image.new("P", (2, 1))
    colours.putpalette([255, 0, 0, 0, 0, 255])
    colours.putdata([0, 1])
    np.testing.assert_array_equal(rgb(file_of(colours)), [[[255, 0, 0], [0, 0, 255]]])


def test_transparency_is_laid_over_white():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    half.putpixel((1, 0), (255, 0, 0, 0))  # hidden red
    np.testing.assert_array_equal(rgb(file_of(half)), [[[127] * 3, [255] * 3]])
    np.testing.assert_array_equal(rgb(file_of(Image.new("LA", (1, 1), (0, 0)))), [[[255] * 3]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    np.testing.assert_array_equal(rgb(file_of(palette, transparency=0)), [[[255] * 3, [0, 0, 255]]])
    key = file_of(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    np.testing.assert_array_equal(rgb(key), [[[255] * 3]])


def test_cmyk():
    pixels = rgb(file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 6


@pytest.mark.parametrize("top, bits", [(65535, 16), (4095, 12), (700, 10), (255, 8)])
def test_16_bit_greys_are_scaled_by_their_range(top, bits):
    values = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    pixels = rgb(file_of(Image.fromarray(values)))
    np.testing.assert_array_equal(pixels[..., 0], np.round(values * (255 / (2**bits - 1))))


def test_32_bit_and_float_greys():
    signed = np.array([[-100, 0, 155]], dtype=np.int32)
    np.testing.assert_array_equal(rgb(file_of(Image.fromarray(signed), "TIFF"))[0, :, 0], [0, 100, 255])
    unit = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    np.testing.assert_array_equal(rgb(file_of(Image.fromarray(unit), "TIFF"))[0, :, 0], [0, 128, 255, 0])
    wide = np.array([[-1000.0, 0.0, 1000.0]], dtype=np.float32)
    np.testing.assert_array_equal(rgb(file_of(Image.fromarray(wide), "TIFF"))[0, :, 0], [0, 128, 255])


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(rgb(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_files_are_bad(format, share):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = file_of(noise, format)
    assert rgb(data).shape == (64, 64, 3)
    with pytest.raises(BadImage):
        rgb(data[: int(len(data) * share)])


def test_truncated_is_rejected_even_where_another_library_allowed_it(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = file_of(noise, "JPEG")
    with pytest.raises(BadImage, match="x: truncated file"):
        rgb(data[: len(data) // 2])


def test_reasons():
    with pytest.raises(BadImage, match=r"cat\.jpg: empty file"):
        decode_image(b"", name="cat.jpg")
    with pytest.raises(BadImage, match="not an image that can be read"):
        rgb(b"<html>404</html>")
    data = bytearray(file_of(Image.new("RGB", (32, 32), "green")))
    data[60:80] = bytes(20)
    with pytest.raises(BadImage, match="corrupt file"):
        rgb(bytes(data))
    with pytest.raises(BadImage, match="32 x 32 pixels are more than the limit of 1000"):
        decode_image(file_of(Image.new("RGB", (32, 32))), name="x", max_pixels=1000)


def test_bomb_beyond_pillows_own_limit_is_bad(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="more than the limit"):
        rgb(file_of(Image.new("RGB", (32, 32))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # a warning for Pillow, no matter for us
    assert rgb(file_of(Image.new("RGB", (32, 32)))).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [(100, 75), (75, 100), (64, 64), (500, 333), (20, 31)])
def test_resize_center_crop_matches_pillow(size):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    result = resize_center_crop(np.array(image), 64, 56)
    assert result.shape == (3, 56, 56) and result.dtype == torch.uint8 and result.is_contiguous()
    short = min(size)
    width, height = int(64 * size[0] / short), int(64 * size[1] / short)
    left, top = round((width - 56) / 2), round((height - 56) / 2)
    expected = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 56, top + 56))
    difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 0.1 and difference.max() <= 2


def test_extreme_shapes_stay_small_and_central(monkeypatch):
    image = np.zeros((4, 4000, 3), dtype=np.uint8)
    image[:, 1998:2002] = 255
    result = resize_center_crop(image, 256, 224)
    assert result.shape == (3, 224, 224)
    assert result[:, :, 112].min() > 200
    assert resize_center_crop(np.ascontiguousarray(image.transpose(1, 0, 2)), 256, 224)[:, 112].min() > 200
    resized = []
    monkeypatch.setattr(decode, "resize_uint8", lambda *args: resized.append(args[1:3]) or torch.zeros(3, *args[1:3]))
    resize_center_crop(image, 256, 224)
    assert resized == [(256, 1024)]  # not 256 x 256,000
    monkeypatch.undo()
    assert resize_center_crop(np.zeros((1, 1, 3), np.uint8), 16, 16).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="crop 32 is larger than the resized side 16"):
        resize_center_crop(image, 16, 32)


def photo(size: tuple[int, int] = (333, 251)) -> Image.Image:
    return Image.fromarray(photographs.coffee()).resize(size, Image.Resampling.BICUBIC)


def jpegs() -> dict[str, bytes]:
    """JPEG files of every kind that cameras and web sites make."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {f"subsampling {s}": file_of(photo(), "JPEG", quality=90, subsampling=s) for s in (0, 1, 2)}
    return kinds | {
        "progressive": file_of(photo(), "JPEG", progressive=True),
        "grey": file_of(photo().convert("L"), "JPEG"),
        "turned": file_of(photo(), "JPEG", exif=exif),
        "stored as RGB": file_of(photo(), "JPEG", keep_rgb=True),
        "one pixel": file_of(photo((1, 1)), "JPEG"),
        "two pictures": file_of(photo(), "MPO", save_all=True, append_images=[photo((20, 10))]),
        "low quality": file_of(photo(), "JPEG", quality=5),
    }


@pytest.mark.skipif(turbo() is None, reason="simplejpeg is not installed")
class TestTurbo:
    """The optional JPEG decoder gives Pillow's pixels bit for bit, and leaves what is unusual to Pillow."""

    @pytest.mark.parametrize("kind", list(jpegs()))
    @pytest.mark.parametrize("shrink", [1, 2, 4, 8])
    def test_same_pixels(self, kind, shrink, monkeypatch):
        data = jpegs()[kind]
        pixels = Decoder().stored(open_image(data, name="x"), shrink)[..., :3].copy()
        monkeypatch.setattr(decode, "turbo_pixels", lambda *_: None)
        plain = Decoder().stored(open_image(data, name="x"), shrink)[..., :3]
        width, height = Image.open(io.BytesIO(data)).size
        assert pixels.shape == plain.shape == (-(-height // shrink), -(-width // shrink), 3)
        np.testing.assert_array_equal(pixels, plain)

    @pytest.mark.parametrize("kind", ["progressive", "grey", "two pictures"])
    def test_it_is_used(self, kind):
        image = Image.open(io.BytesIO(jpegs()[kind]))
        assert turbo_pixels(jpegs()[kind], image.format, image.mode, image.size) is not None

    def test_damage_is_judged_by_pillow(self):
        """Stray bytes between the parts of a file are accepted, a missing end is not, with or without."""
        data = jpegs()["subsampling 0"]
        stray = data[:-2] + bytes(3) + data[-2:]
        np.testing.assert_array_equal(rgb(stray), rgb(data))
        with pytest.raises(BadImage, match="truncated file"):
            Decoder().stored(open_image(data[: len(data) // 2], name="x"))

    def test_other_formats_and_colours_are_not_its_business(self):
        for data in (file_of(photo()), file_of(photo().convert("CMYK"), "JPEG")):
            image = Image.open(io.BytesIO(data))
            assert turbo_pixels(data, image.format, image.mode, image.size) is None
            assert rgb(data).shape == (251, 333, 3)


def test_the_environment_can_ask_for_pillow(monkeypatch):
    turbo.cache_clear()
    monkeypatch.setenv("DINOV2_JPEG", "pillow")
    assert turbo() is None
    turbo.cache_clear()


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_upright(number):
    exif = Image.Exif()
    exif[0x0112] = number
    opened = open_image(file_of(photo(), "JPEG", exif=exif), name="x")
    assert (opened.orientation, opened.height, opened.width) == (1, 251, 333)


class TestDecoder:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_stored_pixels_are_not_turned(self, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Decoder().stored(open_image(file_of(photo(), exif=exif), name="x"))
        np.testing.assert_array_equal(stored[..., :3], np.asarray(photo()))

    @pytest.mark.parametrize("size", [(20, 30), (700, 900)])  # copied, and read where Pillow has it
    def test_an_array_stays_whole_while_others_are_decoded(self, size):
        decoder, images = Decoder(), [photo(size), photo(size).rotate(180)]
        kept = [decoder.stored(open_image(file_of(image), name="x")) for image in images]
        for pixels, image in zip(kept, images, strict=True):
            np.testing.assert_array_equal(pixels[..., :3], np.asarray(image))
            assert pixels.flags.writeable

    def test_large_images_are_read_in_place(self):
        assert Decoder().stored(open_image(file_of(photo((700, 900))), name="x")).shape == (900, 700, 4)
        assert Decoder().stored(open_image(file_of(photo((2100, 2100)), "BMP"), name="x")).shape == (2100, 2100, 4)

    def test_memory_is_used_again(self):
        if turbo() is None:
            pytest.skip("simplejpeg is not installed")
        decoder, data = Decoder(), file_of(photo(), "JPEG")
        first, second = (decoder.stored(open_image(data, name="x")) for _ in range(2))
        assert first.ctypes.data == second.ctypes.data

    @pytest.mark.parametrize("format", ["JPEG", "PNG"])
    def test_what_a_huge_image_needs_is_not_kept(self, format, monkeypatch):
        monkeypatch.setattr(decode.scratch, "KEPT_BYTES", 10_000)
        cleared = []
        monkeypatch.setattr(decode.Image.core, "clear_cache", lambda: cleared.append(True))
        decoder = Decoder()
        for size in ((333, 251), (20, 20), (21, 21)):
            pixels = decoder.stored(open_image(file_of(photo(size), format), name="x"))
            assert pixels.shape[:2] == size[::-1]
        assert cleared == [True]
        assert decoder._scratch._bytes.nbytes <= 10_000

    def test_other_formats_ignore_shrink(self):
        assert Decoder().stored(open_image(file_of(photo()), name="x"), 4).shape[:2] == (251, 333)


def test_exif_behind_the_pixels_of_a_png_is_found():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, marked = file_of(photo()), file_of(photo(), exif=exif)
    at = marked.index(b"eXIf") - 4
    chunk = marked[at : at + 12 + int.from_bytes(marked[at : at + 4], "big")]
    end = plain.index(b"IEND") - 4
    opened = open_image(plain[:end] + chunk + plain[end:], name="x")
    assert (opened.orientation, opened.height, opened.width) == (6, 333, 251)
