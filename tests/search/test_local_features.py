"""Local features: planted transforms are found again, mirrored ones too; nothing is made of empty pictures."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("cv2")

from dinov2cli.data.demo_photos import photo_files
from dinov2cli.distributed import ALONE, Ranks, join, leave
from dinov2cli.errors import UserError
from dinov2cli.search import local_candidates as candidates_room
from dinov2cli.search import local_features as features_room
from dinov2cli.search import local_verify as verify_room
from dinov2cli.search.local_align import align
from dinov2cli.search.local_candidates import local_candidates
from dinov2cli.search.local_compare import compare
from dinov2cli.search.local_features import (
    THUMB,
    WIDTH,
    LocalFeatures,
    describe,
    extract_local_features,
    mirror_signs,
)
from dinov2cli.search.local_verify import best_local_match, verified_edges
from tests.launch import launch


class Memory:
    """A store that keeps blocks in a dictionary and counts them."""

    def __init__(self):
        self.stages = {}

    def stage(self, name, key):
        return MemoryStage(self.stages.setdefault(f"{name} {sorted(key.items())}", {}))


class MemoryStage:
    def __init__(self, blocks):
        self.blocks = blocks

    def load(self, start):
        return self.blocks.get(start)

    def save(self, start, arrays):
        self.blocks[start] = arrays


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Real photographs, the longer side 320 pixels."""
    found = []
    for path in list(photo_files().values())[:7]:
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((320, 320))
        found.append(np.asarray(picture))
    return found


def features_of(images: list[np.ndarray | None], **options) -> LocalFeatures:
    return extract_local_features(lambda row: images[row], len(images), **options)


def pairs_of(verified) -> set[tuple[int, int]]:
    return set(zip(verified.edges.src.tolist(), verified.edges.dst.tolist(), strict=True))


def turned(image: np.ndarray, degrees: float, scale: float, shift: tuple[float, float], size: tuple[int, int]):
    """(picture, transform [2, 3] in pixels of the old to pixels of the new)."""
    angle = np.deg2rad(degrees)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.column_stack([matrix, shift])
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    picture = Image.fromarray(image).transform(
        size, Image.Transform.AFFINE, tuple(back.ravel()), Image.Resampling.BICUBIC
    )
    return np.asarray(picture), matrix


@pytest.mark.parametrize(
    ("degrees", "scale", "shift"), [(0, 1, (0, 0)), (8, 0.9, (40, 20)), (-35, 0.6, (60, 150)), (180, 0.8, (300, 250))]
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_planted_transform_is_found(photos, degrees, scale, shift, mirrored):
    source = photos[0]
    shown = np.ascontiguousarray(source[:, ::-1]) if mirrored else source
    moved, matrix = turned(shown, degrees, scale, shift, (340, 300))
    features = features_of([source, moved])
    found = align(features, 0, features, 1, mirrored)
    assert found is not None and len(found.inliers) >= 20
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * source.shape[1::-1]
    wanted = corners @ matrix[:, :2].T + matrix[:, 2]
    got = (corners / max(source.shape)) @ found.transform[:, :2].T + found.transform[:, 2]
    assert np.abs(got * 340 - wanted).max() < 5  # pixels of 340
    assert found.scale * 340 / max(source.shape) == pytest.approx(scale, rel=0.02)
    other_way = align(features, 0, features, 1, not mirrored)
    assert other_way is None or len(other_way.inliers) < 12


def test_signs_turn_features_into_those_of_the_mirrored_picture(photos):
    features = features_of([photos[1], np.ascontiguousarray(photos[1][:, ::-1])])
    a, b = features.places(0), features.places(1)
    a[:, 0], a[:, 3] = features.extent[0, 0] - a[:, 0], np.pi - a[:, 3]
    apart = np.abs(a[:, None, :3] - b[None, :, :3]).sum(axis=2) + (1 - np.cos(a[:, None, 3] - b[None, :, 3]))
    nearest = apart.argmin(axis=1)
    same = apart.min(axis=1) < 0.01
    assert same.mean() > 0.5
    first, second = features.descriptors(0)[same], features.descriptors(1)[nearest[same]]
    assert np.median(np.linalg.norm(first * mirror_signs() - second, axis=1)) < 0.25
    assert np.median(np.linalg.norm(first - second, axis=1)) > 0.5
    assert np.allclose(np.linalg.norm(first, axis=1), 0.65, atol=0.35)


def test_codes_keep_the_distances_of_root_sift(photos):
    """64 of 128 axes carry nearly all of the distance of two features: compared with OpenCV's own numbers."""
    import cv2

    grey = cv2.cvtColor(photos[2], cv2.COLOR_RGB2GRAY)
    points = cv2.SIFT_create(200).detect(grey, None)
    _, counts = cv2.SIFT_create(200).compute(grey, points)
    root = np.sqrt(counts / counts.sum(axis=1, keepdims=True)).astype(np.float64)
    from dinov2cli.search.local_features import _codes

    codes = _codes(counts) / 256.0
    exact = np.linalg.norm(root[:, None] - root[None], axis=2)
    ours = np.linalg.norm(codes[:, None] - codes[None], axis=2)
    assert np.corrcoef(exact.ravel(), ours.ravel())[0, 1] > 0.98
    assert (ours <= exact + 0.02).all()  # a projection never adds distance, but for rounding


def test_features_are_spread_and_limited(photos):
    canvas = np.full((400, 600, 3), 250, np.uint8)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row in range(20):
        draw.text((5, 5 + 19 * row), "many letters with many corners " * 2, fill=(0, 0, 0))
    page = np.array(picture)
    page[100:300, 380:580] = photos[0][:200, :200]
    one = describe(page, most=200)
    assert len(one["xy"]) == 200
    x = one["xy"][:, 0] / 65535
    assert 0.25 < (x > 380 / 600).mean() < 0.75  # without spreading, letters take nearly all
    assert len(describe(page, most=10_000)["xy"]) > 600


@pytest.mark.parametrize(
    "image",
    [
        None,
        np.zeros((0, 0, 3), np.uint8),
        np.full((64, 64, 3), 7, np.uint8),
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((3, 400), np.uint8),
    ],
    ids=["none", "empty", "flat", "pixel", "strip"],
)
def test_pictures_without_features_match_nothing(photos, image):
    features = features_of([image, image, photos[0], image])
    assert np.diff(features.offsets)[[0, 1, 3]].sum() == 0
    candidates = local_candidates(features)
    verified = verified_edges(features, candidates)
    assert len(candidates) == 0 and len(verified.edges) == 0
    assert len(features_of([image]).codes) == 0
    assert len(verified_edges(features_of([]), local_candidates(features_of([]))).edges) == 0


def test_identical_pictures_are_all_found(photos):
    features = features_of([photos[0]] * 5)
    verified = verified_edges(features, local_candidates(features))
    assert pairs_of(verified) == {(a, b) for a in range(5) for b in range(a + 1, 5)}
    assert (verified.edges.similarity > 0.999).all() and (verified.overlap > 0.95).all()
    assert verified.describe(0) == "same frame"


def test_crops_are_described(photos):
    image = photos[1]
    height, width = image.shape[:2]
    crop = np.ascontiguousarray(image[height // 5 : -height // 10, width // 10 : -width // 5])
    flipped = np.ascontiguousarray(crop[:, ::-1])
    features = features_of([image, crop, flipped, *photos[2:5]])
    verified = verified_edges(features, local_candidates(features))
    assert pairs_of(verified) == {(0, 1), (0, 2), (1, 2)}
    assert verified.mirrored.tolist() == [False, True, True]
    assert verified.overlap[0] == pytest.approx([0.49, 1], abs=0.08)
    assert verified.describe(0).startswith("crop (") and verified.describe(1).endswith("mirrored")
    assert len(verified.shares) >= 3 and verified.shares.max() <= 1


def test_comparison_measures_what_changed(photos):
    """A quarter of the picture replaced: three quarters of the area are the same, whatever brightness and contrast."""
    import cv2

    image = photos[0]
    changed = (image * 0.7 + 20).astype(np.uint8)
    height, width = image.shape[:2]
    changed[: height // 2, : width // 2] = photos[3][: height // 2, : width // 2]
    thumbs = [
        cv2.resize(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), (THUMB, THUMB), interpolation=3) for x in (image, changed)
    ]
    extent = np.array([1, height / width], np.float32)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 15), np.linspace(0, height / width, 15)), axis=-1).reshape(-1, 2)
    unit = np.array([[1.0, 0, 0], [0, 1, 0]])
    same = compare(thumbs[0], extent, thumbs[0], extent, unit, grid)
    other = compare(thumbs[0], extent, thumbs[1], extent, unit, grid)
    assert same.share > 0.999 and same.changed == 0 and same.overlap == 1
    assert other.changed == pytest.approx(0.25, abs=0.08) and 0.5 < other.share < 0.9
    assert other.support[5:, 5:].min() > 0.9 and other.support[1, 1] < 0.6
    half = compare(thumbs[0], extent, thumbs[0], extent, unit + [[0, 0, 0.5], [0, 0, 0]], grid)
    assert half.overlap == pytest.approx(0.5, abs=0.05)
    few = compare(thumbs[0], extent, thumbs[0], extent, unit, grid[:2])
    assert few.share > 0.999 and few.covered < 0.3


def page_with(photo: np.ndarray, number: int) -> np.ndarray:
    """A photograph on a page with text and coloured boxes that are the same for every photograph."""
    picture = Image.new("RGB", (560, 420), (250, 248, 244))
    draw = ImageDraw.Draw(picture)
    rng = np.random.Generator(np.random.Philox(key=5))
    draw.rectangle((0, 0, 560, 36), fill=(30, 60, 120))
    for row in range(16):
        words = "".join(chr(97 + c) for c in rng.integers(0, 26, 26))
        draw.text((14, 52 + 22 * row), words, fill=(20, 20, 20), font_size=14)
    for box in range(4):
        draw.ellipse((480, 60 + 80 * box, 540, 120 + 80 * box), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    inner = Image.fromarray(photo)
    inner.thumbnail((220, 240))
    picture.paste(inner, (248, 80))
    draw.text((250, 330), f"caption {number}", fill=(60, 60, 60), font_size=13)
    return np.asarray(picture)


def test_pages_of_one_template_are_not_copies_of_each_other(photos):
    pages = [page_with(photo, number) for number, photo in enumerate(photos)]
    n = len(photos)
    features = features_of([*photos, *pages])
    verified = verified_edges(features, local_candidates(features))
    own = {(i, n + i) for i in range(n)}
    assert pairs_of(verified) <= own and len(pairs_of(verified)) >= n - 1
    assert verified.rejected.sum() + (verified.shares > 0.3).sum() > n  # they were compared, and agree in part
    pages_only = features_of(pages)
    assert not pairs_of(verified_edges(pages_only, local_candidates(pages_only)))


def test_results_depend_on_neither_threads_nor_the_file(photos, tmp_path):
    images = [*photos, *(np.ascontiguousarray(p[20:, 30:]) for p in photos)]
    one = features_of(images)
    for other in (features_of(images, workers=3), features_of(images, memory=1000, scratch=tmp_path)):
        for name in ("offsets", "extent", "xy", "scale", "angle", "codes", "thumbs"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert isinstance(other.codes, np.memmap) and not list(tmp_path.iterdir())
    a, b = (verified_edges(f, local_candidates(f), workers=w) for f, w in ((one, 1), (other, 2)))
    assert pairs_of(a) == pairs_of(b) == {(i, len(photos) + i) for i in range(len(photos))}
    assert np.array_equal(a.edges.similarity, b.edges.similarity)


def test_finished_blocks_are_not_made_again(photos, monkeypatch):
    monkeypatch.setattr("dinov2cli.search.local_features.BLOCK", 3)
    images = [*photos, np.ascontiguousarray(photos[0][:, ::-1])]
    read = []

    def reader(row):
        read.append(row)
        return images[row]

    store = Memory()
    first = extract_local_features(reader, len(images), store=store, key="x")
    assert sorted(read) == list(range(8)) and [sorted(s) for s in store.stages.values()] == [[0, 3, 6]]
    wanted = verified_edges(first, local_candidates(first, store=store, key="x"), store=store, key="x")
    assert len(store.stages) == 3
    del next(iter(store.stages.values()))[3]  # as if the run had been killed there
    read.clear()
    again = extract_local_features(reader, len(images), store=store, key="x")
    assert sorted(read) == [3, 4, 5] and np.array_equal(again.codes, first.codes)
    monkeypatch.setattr("dinov2cli.search.local_candidates._matches", None)
    monkeypatch.setattr("dinov2cli.search.local_verify.align", None)
    found = verified_edges(again, local_candidates(again, store=store, key="x"), store=store, key="x")
    assert pairs_of(found) == pairs_of(wanted) == {(0, 7)}
    with pytest.raises(TypeError):  # other images: nothing of it is taken
        local_candidates(again, store=store, key="y")


def test_groups_are_not_compared(photos):
    images = [photos[0], photos[0], np.ascontiguousarray(photos[0][10:, 10:]), photos[1]]
    features = features_of(images)
    candidates = local_candidates(features, groups=np.array([0, 0, 2, 3]))
    assert {tuple(sorted(p)) for p in zip(candidates.a.tolist(), candidates.b.tolist(), strict=True)} >= {
        (0, 2),
        (1, 2),
    }
    assert not any({a, b} == {0, 1} for a, b in zip(candidates.a, candidates.b, strict=True))


def test_the_best_match_in_a_reference_set(photos):
    reference = features_of([photos[3], photos[0], np.ascontiguousarray(photos[0][40:, 60:])])
    ours = features_of([photos[1], photos[0], np.ascontiguousarray(photos[3][10:-20, 20:-10]), None])
    candidates = local_candidates(ours, reference)
    verified = verified_edges(ours, candidates, reference)
    similarity, row = best_local_match(verified, 4)
    assert row.tolist() == [-1, 1, 0, -1]
    assert similarity[1] > 0.999 and np.isinf(similarity[[0, 3]]).all()


def test_popcounts_without_numpy_2(monkeypatch):
    from dinov2cli.search.local_candidates import _bits

    values = np.random.Generator(np.random.Philox(key=1)).integers(0, 2**63, 1000, dtype=np.uint64)
    wanted = [int(v).bit_count() for v in values]
    assert _bits(values).tolist() == wanted
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert _bits(values).tolist() == wanted


def test_without_opencv_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"dinov2cli\[geometric\]"):
        extract_local_features(lambda row: None, 3)
    assert WIDTH == 64


def test_any_number_of_ranks_finds_the_same(tmp_path):
    blocks = features_room.BLOCK, candidates_room._BLOCK, verify_room._BLOCK
    search_with(ALONE, tmp_path / "alone")
    features_room.BLOCK, candidates_room._BLOCK, verify_room._BLOCK = blocks
    done = launch(__file__, str(tmp_path), processes=2, module="")
    assert done.returncode == 0, done.stderr
    alone = np.load(tmp_path / "alone.npz")
    assert len(alone["src"]) >= 5
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert all(np.array_equal(alone[name], found[name]) for name in alone.files)


def search_with(ranks: Ranks, path: Path) -> None:
    """Copies among ten pictures in small blocks, as a file."""
    features_room.BLOCK, candidates_room._BLOCK, verify_room._BLOCK = 3, 3, 4
    images = []
    for file in list(photo_files().values())[:5]:
        picture = Image.open(file).convert("RGB")
        picture.thumbnail((240, 240))
        images += [np.asarray(picture), np.ascontiguousarray(np.asarray(picture)[15:, 20:])]
    features = features_of(images, ranks=ranks)
    candidates = local_candidates(features, ranks=ranks)
    found = verified_edges(features, candidates, ranks=ranks)
    edges = found.edges
    np.savez(
        path, codes=features.codes, votes=candidates.votes, src=edges.src, dst=edges.dst, transform=found.transform
    )


if __name__ == "__main__":
    ranks = join("cpu")
    search_with(ranks, Path(sys.argv[1]) / str(ranks.rank))
    leave()
    os._exit(0)  # as the program does: Python's own exit may abort while threads of a process group end
