"""Geometric verification of files: copies of real photographs are found, other pictures in the same frames are not."""

import io
import sys
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")

from dinov2cli.curation.copies import KINDS, altered_file, labelled_set
from dinov2cli.curation.verify import (
    Settings,
    geometric_edges,
    geometric_matches,
    geometric_search,
    local_features,
    verify_pairs,
)
from dinov2cli.data.bad import BadImage
from dinov2cli.data.demo_photos import photo_files
from dinov2cli.errors import UserError
from dinov2cli.search.components import component_labels
from dinov2cli.search.edges import make_edges


class Files:
    """Image files in memory as a source."""

    def __init__(self, files: list[bytes | None]):
        self.files = files
        self.reads: list[int] = []

    ids = property(lambda self: [str(i) for i in range(len(self.files))])
    paths = ids

    def __len__(self):
        return len(self.files)

    def read(self, row):
        self.reads.append(row)
        if self.files[row] is None:
            raise BadImage(str(row), "gone")
        return self.files[row]

    def origin(self, row):
        return "files", row


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    found = []
    for path in photo_files().values():
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((240, 240))
        found.append(np.asarray(picture))
    return found


def encoded(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def pairs_of(edges) -> set[tuple[int, int]]:
    return set(zip(edges.src.tolist(), edges.dst.tolist(), strict=True))


def test_copies_of_real_photographs(photos):
    """18 kinds of edits of five photographs; the others only as distractors, most of them on the same pages."""
    files = list(labelled_set(photos[:5], others=photos[5:], synthetic=3, templates=2, seed=3))
    tier = geometric_edges(Files([f.data for f in files]), settings=Settings(workers=2))
    assert tier.name == "geometric" and tier.floor == 0.6 and (tier.strength() >= 0).all()
    groups = [f.group for f in files]
    wrong = [(files[a].name, files[b].name) for a, b in pairs_of(tier.edges) if groups[a] != groups[b]]
    assert not wrong
    label = component_labels(len(files), tier.edges.src, tier.edges.dst)
    original = {f.group: i for i, f in enumerate(files) if f.kind == "original"}
    found = defaultdict(list)
    for i, file in enumerate(files):
        if file.kind in KINDS:
            found[file.kind].append(label[i] == label[original[file.group]])
    recall = {kind: np.mean(hits) for kind, hits in found.items()}
    assert len(recall) >= 15 and np.mean(list(recall.values())) >= 0.9, recall
    assert min(recall[kind] for kind in ("exact", "crop80", "crop50", "rotate", "flip", "rot90")) >= 0.8, recall


def test_what_is_known_is_not_compared_again(photos):
    files = [encoded(photos[0])] * 12 + [altered_file(photos[0], "crop50"), encoded(photos[1]), None]
    source = Files(files)
    known = make_edges(np.zeros(11), np.arange(1, 12), np.ones(11))
    verified = geometric_search(source, known=[known])
    assert sorted(set(source.reads)) == [*range(8), 12, 13, 14]  # of twelve copies eight
    assert pairs_of(verified.edges) and {b for _, b in pairs_of(verified.edges)} == {12}
    alone = geometric_search(Files(files[10:]))
    assert pairs_of(alone.edges) == {(0, 1), (0, 2), (1, 2)}


def test_pairs_of_another_tier_are_checked(photos):
    files = [encoded(photos[0]), altered_file(photos[0], "flip"), encoded(photos[1]), b"no image", encoded(photos[2])]
    source = Files(files)
    verified = verify_pairs(source, np.array([1, 0, 2]), np.array([0, 2, 3]))
    assert pairs_of(verified.edges) == {(0, 1)} and verified.mirrored.tolist() == [True]
    assert 4 not in source.reads
    assert not len(verify_pairs(source, np.zeros(0, int), np.zeros(0, int)).edges)
    with pytest.raises(ValueError, match="one length"):
        verify_pairs(source, np.zeros(2, int), np.zeros(1, int))


def test_matches_in_a_reference_set(photos):
    reference = Files([encoded(p) for p in photos[:3]])
    ours = Files([altered_file(photos[2], "crop80"), encoded(photos[4]), None, altered_file(photos[0], "rotate")])
    similarity, row = geometric_matches(ours, reference)
    assert row.tolist() == [2, -1, -1, 0]
    assert (similarity[[0, 3]] > 0.6).all() and np.isneginf(similarity[[1, 2]]).all()


def test_large_files_are_read_at_a_fraction_of_their_size(photos):
    """Decoded to a half or a quarter, features lie where they lie in the whole."""
    picture = Image.open(next(iter(photo_files().values()))).convert("RGB").resize((1600, 1200))
    large = np.asarray(picture)
    small = np.asarray(picture.resize((512, 384), Image.Resampling.BOX))
    verified = geometric_search(Files([encoded(large), encoded(small)]))
    assert pairs_of(verified.edges) == {(0, 1)} and verified.inliers[0] > 100
    assert np.abs(verified.transform[0] - [[1, 0, 0], [0, 1, 0]]).max() < 0.01


def test_empty_and_wrong_settings(photos):
    assert not len(geometric_edges(Files([])).edges)
    assert not len(geometric_edges(Files([None, None])).edges)
    assert len(local_features(Files([encoded(photos[0])]), settings=Settings(most=50)).codes) <= 50
    for wrong in ({"threshold": 0.0}, {"threshold": 1.5}, {"k": 0}, {"most": 0}):
        with pytest.raises(UserError, match="expected a threshold"):
            Settings(**wrong)


def test_without_opencv_one_clear_error(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install 'dinov2cli\[geometric\]'") as error:
        geometric_edges(Files([encoded(photos[0])]))
    assert "\n" not in str(error.value)
