"""From image files to duplicates: fingerprints of real photographs, and the copies planted in demo:photos."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from dinov2cli.curation.dedup import dedup
from dinov2cli.curation.fingerprints import Fingerprints, fingerprint_images, pool_from_images
from dinov2cli.curation.tiers import Reference
from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.demo import demo_truth
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError


class Files:
    """An image source over bytes in memory; None cannot be read."""

    def __init__(self, files: dict[str, bytes | None]) -> None:
        self.ids = list(files)
        self.paths = [f"/x/{name}" for name in files]
        self._files = list(files.values())

    def __len__(self) -> int:
        return len(self._files)

    def read(self, row: int) -> bytes:
        data = self._files[row]
        if data is None:
            raise BadImage(self.ids[row], "file is missing")
        return data

    def origin(self, row: int) -> tuple[str, int]:
        return "/x", row


def encode(image: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.chelsea()[:200, :240])


@pytest.fixture(scope="module")
def demo() -> tuple[Fingerprints, object]:
    source = open_source("demo:photos")
    return fingerprint_images(source), source


def test_each_tier_finds_its_kind_of_copy(photo):
    other = photo[::2, ::3].copy() // 2 + np.arange(80, dtype=np.uint8)[None, :, None]
    source = Files(
        {
            "a.png": encode(photo),
            "b.png": encode(photo),
            "c.bmp": encode(photo, "BMP"),
            "d.jpg": encode(photo, "JPEG", quality=50),
            "e.png": encode(np.rot90(photo).copy()),
            "f.png": encode(np.pad(photo, ((0, 0), (40, 40), (0, 0)))),
            "g.png": encode(photo[::2, ::2].copy()),
            "h.png": encode(other),
        }
    )
    prints = fingerprint_images(source, workers=2)
    result = dedup(pool_from_images(source, prints), fingerprints=prints)
    found = {r["id"]: (r["reason"], r["duplicate_of"]) for r in result.dropped.to_pylist()}
    # The framed copy is the largest, so it stays.
    assert result.kept["id"].to_pylist() == ["f.png", "h.png"]
    assert {k: v[1] for k, v in found.items()} == dict.fromkeys(found, "f.png")
    # Copies with the very same hash hang on the first of them, which hangs on the framed one.
    assert {k: v[0] for k, v in found.items()} == {
        "a.png": "perceptual",
        "b.png": "bytes",
        "c.bmp": "pixels",
        "d.jpg": "perceptual",
        "e.png": "perceptual",
        "g.png": "perceptual",
    }
    three = Files({source.ids[i]: source.read(i) for i in range(3)})
    same = dedup(pool_from_images(three), fingerprints=fingerprint_images(three))
    assert [(r["id"], r["reason"]) for r in same.dropped.to_pylist()] == [("b.png", "bytes"), ("c.bmp", "pixels")]
    exact = dedup(pool_from_images(source, prints), fingerprints=prints.exact_only())
    assert sorted(r["id"] for r in exact.dropped.to_pylist()) == ["b.png", "c.bmp"]
    assert prints.sha256[0] == hashlib.sha256(source.read(0)).hexdigest() and prints.pixels[0] == prints.pixels[2]
    assert (prints.width[0], prints.height[0]) == (240, 200)


def test_unreadable_images_are_dropped_named_and_shift_nothing(photo):
    source = Files({"a.png": encode(photo), "bad.png": b"no image", "gone.png": None, "z.png": encode(photo)})
    bad = BadImages()
    prints = fingerprint_images(source, bad=bad)
    assert bad.names == ["bad.png", "gone.png"] and sorted(prints.unreadable) == [1, 2]
    result = dedup(pool_from_images(source, prints), fingerprints=prints)
    assert [(r["id"], r["reason"]) for r in result.dropped.to_pylist()] == [
        ("bad.png", "unreadable"),
        ("gone.png", "unreadable"),
        ("z.png", "bytes"),
    ]
    assert result.kept["row"].to_pylist() == [0]
    many = Files({f"{i}.png": encode(photo) if i % 2 else None for i in range(40)})
    with pytest.raises(InputError, match="20 of 40 images cannot be read"):
        fingerprint_images(many, bad=BadImages())


def test_leakage_by_perceptual_hash(photo):
    ours = Files({"a.jpg": encode(photo, "JPEG", quality=40), "b.png": encode(photo[:, ::-1].copy())})
    theirs = fingerprint_images(Files({"test.png": encode(photo)}))
    prints = fingerprint_images(ours)
    reference = Reference(["test.png"], sha256=theirs.sha256, pixels=theirs.pixels, hashes=theirs.hashes)
    result = dedup(pool_from_images(ours, prints), fingerprints=prints, against=[reference])
    assert [(r["reason"], r["duplicate_of"], r["tier"]) for r in result.dropped.to_pylist()] == [
        ("against", "test.png", "perceptual")
    ] * 2


def test_planted_copies_of_demo_photos(demo):
    prints, source = demo
    result = dedup(pool_from_images(source, prints), fingerprints=prints)
    truth = demo_truth("demo:photos")
    origin = {t.copy_id: t.original_id for t in truth}
    group = dict(zip(result.groups["id"].to_pylist(), result.groups["group"].to_pylist(), strict=True))
    found: dict[str, list[bool]] = {}
    for t in truth:
        found.setdefault(t.kind, []).append(group.get(t.copy_id, -1) == group.get(t.original_id, -2))
    recall = {kind: np.mean(hits) for kind, hits in found.items()}
    assert recall["flip"] >= 0.98 and recall["resize"] >= 0.98 and recall["jpeg"] >= 0.8, recall
    dropped = result.dropped.to_pylist()
    right = [origin.get(r["id"], r["id"]) == origin.get(r["duplicate_of"], r["duplicate_of"]) for r in dropped]
    assert np.mean(right) >= 0.96 and len(dropped) >= 140


def test_fingerprints_do_not_depend_on_the_number_of_workers(photo):
    source = Files({f"{i}.png": encode(photo[i:]) for i in range(6)})
    one, three = fingerprint_images(source, workers=1), fingerprint_images(source, workers=3)
    assert one.sha256 == three.sha256 and one.pixels == three.pixels
    np.testing.assert_array_equal(one.hashes.bits, three.hashes.bits)
    np.testing.assert_array_equal(one.hashes.thumbs, three.hashes.thumbs)
    np.testing.assert_array_equal(one.sharpness, three.sharpness)


def test_pool_of_images_carries_labels(demo):
    prints, source = demo
    pool = pool_from_images(source, prints)
    assert pool.column_names[:4] == ["id", "image_path", "source", "row"]
    assert pool["label"].to_numpy().tolist() == source.labels.tolist()
    assert {"width", "height", "sha256", "sharpness"} <= set(pool.column_names)
