"""Fingerprints from files: reduced decoding finds what full decoding found, and nothing depends on how work is cut."""

import hashlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from dinov2cli.artifacts.parts import Parts
from dinov2cli.curation import fingerprints as module
from dinov2cli.curation.fingerprints import Fingerprints, fingerprint_images, with_pixel_digests
from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image, decode_small
from dinov2cli.distributed import Ranks
from dinov2cli.search.hamming import hash_edges
from dinov2cli.search.hashing import pixel_digest


class Files:
    """An image source over bytes in memory that counts what is read; None cannot be read."""

    def __init__(self, files: dict[str, bytes | None]) -> None:
        self.ids = list(files)
        self.paths = list(files)
        self._files = list(files.values())
        self.reads = 0

    def __len__(self) -> int:
        return len(self._files)

    def read(self, row: int) -> bytes:
        self.reads += 1
        data = self._files[row]
        if data is None:
            raise BadImage(self.ids[row], "file is missing")
        return data

    def origin(self, row: int) -> tuple[str, int]:
        return "/x", row


def encode(image: np.ndarray | Image.Image, form: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Photographs of 300 x 400 that are no part of each other."""
    from skimage import data

    return [np.ascontiguousarray(p[:300, :400, :3]) for p in (data.chelsea(), data.coffee(), data.astronaut())]


@pytest.fixture(params=["turbo", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to decode a JPEG."""
    if request.param == "pillow":
        monkeypatch.setattr("dinov2cli.data.jpeg.turbo", lambda: None)
    return str(request.param)


def equal(a: Fingerprints, b: Fingerprints) -> None:
    assert a.sha256 == b.sha256 and a.pixels == b.pixels and a.unreadable == b.unreadable
    for name in ("width", "height", "sharpness"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("owner", "kind", "bits", "thumbs"):
        np.testing.assert_array_equal(getattr(a.hashes, name), getattr(b.hashes, name))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_pictures_stand_upright(photos, decoder, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photos[0], form, exif=exif)
    whole = decode_image(data, name="x")
    small, height, width = decode_small(data, name="x", least=64)
    assert (height, width) == whole.shape[:2]
    assert small.shape[:2] == (-(-height // 4), -(-width // 4))
    expected = np.asarray(Image.fromarray(whole).reduce(4)).astype(int)
    assert np.abs(expected - small).mean() < 4


def test_small_pictures_are_not_reduced_and_large_ones_by_eight(photos, decoder):
    tiny = photos[0][:100, :90]
    assert decode_small(encode(tiny), name="x", least=64)[0].shape == (100, 90, 3)
    large = np.kron(photos[0], np.ones((2, 2, 1), np.uint8))
    assert decode_small(encode(large), name="x", least=64)[0].shape == (75, 100, 3)
    assert decode_small(encode(large, "PNG"), name="x", least=300)[0].shape == (300, 400, 3)
    grey = decode_small(encode(Image.fromarray(photos[0]).convert("L")), name="x", least=64)[0]
    assert grey.shape == (75, 100, 3) and (grey[..., 0] == grey[..., 2]).all()
    inks = decode_small(encode(Image.fromarray(photos[0]).convert("CMYK")), name="x", least=64)[0]
    assert np.abs(inks.astype(int) - decode_small(encode(photos[0]), name="x", least=64)[0]).mean() < 8
    deep = Image.fromarray(photos[0][..., 0].astype(np.uint16) << 8)
    assert decode_small(encode(deep, "PNG"), name="x", least=64)[0].shape == (75, 100, 3)


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"format": "PNG"}], ids=["jpeg", "progressive", "png"])
def test_a_truncated_file_is_unreadable_though_it_is_decoded_reduced(photos, decoder, cut, options):
    options = dict(options)
    data = encode(photos[1], options.pop("format", "JPEG"), **options)
    prints = fingerprint_images(Files({"whole": data, "cut": data[: int(cut * len(data))]}))
    assert prints.unreadable == {1: "truncated file"}
    assert prints.sha256[1] is None and prints.width[1] == 0 and 1 not in prints.hashes.owner


def test_hashes_of_reduced_jpegs_are_near_those_of_whole_pictures(photos, decoder):
    files = Files(
        {
            "a.jpg": encode(photos[0], quality=95),
            "a.png": encode(photos[0], "PNG"),
            "a-large.jpg": encode(np.kron(photos[0], np.ones((3, 3, 1), np.uint8)), quality=95),
            "b.png": encode(photos[1], "PNG"),
            "b.jpg": encode(photos[1], quality=40),
        }
    )
    found = hash_edges(fingerprint_images(files).hashes, radius=16)
    assert set(zip(found.src.tolist(), found.dst.tolist(), strict=True)) == {(0, 1), (0, 2), (1, 2), (3, 4)}


def test_pixels_are_compared_where_they_may_be_equal_and_only_there(photos):
    jpeg = encode(photos[0], quality=90)
    pixels = decode_image(jpeg, name="x")
    flat = np.full((60, 70, 3), 200, np.uint8)
    files = Files(
        {
            "jpeg": jpeg,
            "png of it": encode(pixels, "PNG"),
            "tagged": jpeg[:2] + b"\xff\xfe\x00\x07hello" + jpeg[2:],
            "same bytes": jpeg,
            "lower quality": encode(pixels, quality=60),
            "other size": encode(pixels[:-2], "PNG"),
            "turned": encode(np.rot90(pixels).copy(), "PNG"),
            "other": encode(photos[1], "PNG"),
            "flat": encode(flat, "PNG"),
            "flat too": encode(flat, "BMP"),
            "flatter": encode(flat[:50], "PNG"),
        }
    )
    prints = fingerprint_images(files, workers=2)
    assert prints.pixels[0] == prints.pixels[1] == prints.pixels[2] == prints.pixels[3] == pixel_digest(pixels)
    assert prints.pixels[4] not in (None, prints.pixels[0])
    assert prints.pixels[5:8] == [None] * 3 and prints.pixels[10] is None
    assert prints.pixels[8] == prints.pixels[9] == pixel_digest(flat)
    assert prints.sha256[0] == prints.sha256[3] == hashlib.sha256(jpeg).hexdigest()


def test_two_sets_are_completed_with_each_other(photos):
    ours = Files({"a.png": encode(photos[0], "PNG"), "b.jpg": encode(photos[1])})
    theirs = Files({"c.bmp": encode(photos[0], "BMP"), "d.png": encode(photos[2], "PNG")})
    one, two = fingerprint_images(ours), fingerprint_images(theirs)
    assert one.pixels == [None, None] == two.pixels
    one, two = with_pixel_digests(one, ours, other=two), with_pixel_digests(two, theirs, other=one)
    assert one.pixels == two.pixels == [pixel_digest(photos[0]), None]


def test_sharpness_tells_copies_of_one_size_apart(photos):
    blurred = Image.fromarray(photos[0]).resize((200, 150)).resize((400, 300))
    files = {"a": encode(photos[0]), "b": encode(blurred), "c": encode(photos[0], "PNG"), "d": encode(blurred, "PNG")}
    sharp = fingerprint_images(Files(files)).sharpness
    assert sharp[0] > 1.05 * sharp[1] and sharp[2] > 1.05 * sharp[3]
    assert sharp[0] == pytest.approx(sharp[2], rel=0.25)


@pytest.fixture
def mixed(photos, monkeypatch) -> Callable[[], Files]:
    """Forty files, copies and damaged ones among them, in blocks of 8 and lots of 3."""
    monkeypatch.setattr(module, "_CHUNK", 8)
    monkeypatch.setattr(module, "_FILES", 3)
    rng = np.random.default_rng(0)
    files: dict[str, bytes | None] = {}
    for i in range(40):
        top, left = rng.integers(0, 100, 2)
        tile = photos[i % 3][top : top + 128, left : left + 160]
        files[f"{i:02d}"] = encode(tile, "PNG" if i % 4 else "JPEG")
    files["07"], files["21"], files["30"], files["31"] = None, b"no image", files["02"], files["03"]
    return lambda: Files(files)


def test_blocks_and_workers_change_nothing(mixed, monkeypatch):
    small = fingerprint_images(mixed(), workers=3)
    monkeypatch.setattr(module, "_CHUNK", 1000)
    monkeypatch.setattr(module, "_FILES", 100)
    equal(small, fingerprint_images(mixed()))
    assert sorted(small.unreadable.values()) == ["file is missing", "not an image that can be read"]


def test_a_stopped_run_continues_from_its_parts(mixed, tmp_path):
    whole = fingerprint_images(mixed())
    source = mixed()
    read = source.read

    def killed(row: int) -> bytes:
        if row == 20:
            raise KeyboardInterrupt
        return read(row)

    source.read = killed
    with pytest.raises(KeyboardInterrupt):
        fingerprint_images(source, store=Parts(tmp_path))
    again = mixed()
    equal(whole, fingerprint_images(again, store=Parts(tmp_path)))
    assert again.reads <= 40 - 16 + 4  # two blocks were kept; a few files more for pixel digests
    third = mixed()
    equal(whole, fingerprint_images(third, store=Parts(tmp_path)))
    assert third.reads == 0


class Pretender(Ranks):
    """A rank of a launch whose other ranks have finished before: their blocks come from a store."""

    def merge(self, own, total, *, main_only=False):
        self.others.append(list(own))
        yield from ()


def test_ranks_make_the_same_fingerprints(mixed, tmp_path):
    """Each of three ranks computes its share of the blocks; together they are the whole."""
    whole = fingerprint_images(mixed())
    store = Parts(tmp_path)
    for rank in range(3):
        mine = Pretender(rank=rank, world_size=3)
        object.__setattr__(mine, "others", [])
        with pytest.raises(ValueError):  # its own blocks alone are not as many as there are
            fingerprint_images(mixed(), ranks=mine, store=store)
        assert len(mine.others[0]) == len(range(rank, 5, 3))
    last = mixed()
    equal(whole, fingerprint_images(last, store=store))
    assert last.reads <= 4


def test_an_empty_source_and_one_without_a_single_hash():
    assert len(fingerprint_images(Files({}))) == 0
    flat = Files({"a": encode(np.zeros((9, 9, 3), np.uint8), "PNG"), "b": encode(np.zeros((1, 1, 3), np.uint8), "PNG")})
    prints = fingerprint_images(flat)
    assert len(prints.hashes.owner) == 0 and prints.pixels == [None, None] and len(hash_edges(prints.hashes)) == 0
