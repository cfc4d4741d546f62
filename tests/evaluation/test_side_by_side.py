"""Several models on the same images: each as if it had been alone, figures in pairs, against the functions beneath."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2cli.data.decode import decode_image, resize_center_crop
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError
from dinov2cli.evaluation import side_by_side
from dinov2cli.evaluation.agreement import halves
from dinov2cli.evaluation.knn import knn_classify
from dinov2cli.evaluation.side_by_side import (
    Estimate,
    Looked,
    Seer,
    check_test,
    draw,
    framed,
    knn_correct,
    labelled_split,
    linear_correct,
    look,
    token_figures,
)
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

CPU = torch.device("cpu")


def network(width, patch, seed):
    net = VisionTransformer(img_size=32, patch_size=patch, embed_dim=width, depth=2, num_heads=2)
    net.init_weights(torch.Generator().manual_seed(seed))
    return net.eval()


@pytest.fixture(scope="module")
def digits():
    return open_source("demo:digits?count=150")


@pytest.fixture(scope="module")
def seen(digits):
    small, large = Preprocess(resize=18, crop=16), Preprocess(resize=36, crop=32)
    seers = [
        Seer(network(24, 8, 0), large, frozenset([4, 8])),
        Seer(network(16, 4, 1), small, frozenset([4])),
        Seer(network(16, 4, 2), large, frozenset([8])),
    ]
    rows = draw(digits, 120, seed=3)
    told = []
    looked = look(seers, digits, rows, seed=3, precision="fp32", advance=told.append)
    assert sum(told) == 3 * 120
    return seers, rows, looked


def test_features_are_those_of_each_model_alone(digits, seen):
    seers, rows, looked = seen
    for seer, found in zip(seers, looked, strict=True):
        assert found.index.tolist() == rows.tolist() and len(set(rows.tolist())) == 120
        for at in (0, 70, 119):
            pixels = decode_image(digits.read(int(rows[at])), name="x")
            image = resize_center_crop(pixels, seer.preprocess.resize, seer.preprocess.crop)
            with torch.inference_mode():
                output = seer.network(seer.preprocess.normalize(image[None]))
            np.testing.assert_allclose(found.class_tokens[at], output.cls[0], atol=1e-5)
            np.testing.assert_allclose(found.pooled[at], output.cls[0], atol=1e-5)
            np.testing.assert_allclose(found.averaged_patches[at], output.patches[0].mean(0), atol=1e-5)


def test_patches_are_taken_at_the_same_places_of_one_grid(digits, seen):
    """The teacher's 4 x 4 tokens as they are on a grid of 4, and brought to 8 x 8 by torch's bilinear resampling."""
    seers, rows, looked = seen
    teacher, *students = looked
    at = 5
    pixels = decode_image(digits.read(int(rows[at])), name="x")
    with torch.inference_mode():
        image = seers[0].preprocess.normalize(resize_center_crop(pixels, 36, 32)[None])
        own = seers[0].network(image).patches.unflatten(1, (4, 4))
    assert {grid: found.shape for grid, found in teacher.patches.items()} == {4: (120, 16, 24), 8: (120, 32, 24)}
    np.testing.assert_allclose(teacher.patches[4][at], own.flatten(1, 2)[0], atol=1e-5)
    places = side_by_side._places(int(rows[at]), 8, 3)
    assert len(set(places.tolist())) == 32 and places.max() < 64
    wide = F.interpolate(own.permute(0, 3, 1, 2), size=8, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(teacher.patches[8][at], wide[0].flatten(1).T[places], atol=1e-5)
    with torch.inference_mode():
        theirs = seers[2].network(seers[2].preprocess.normalize(resize_center_crop(pixels, 36, 32)[None])).patches[0]
    np.testing.assert_allclose(students[1].patches[8][at], theirs[places], atol=1e-5)


def test_a_broken_image_is_left_out_of_all_models_alike(digits, seen, monkeypatch):
    seers, rows, _ = seen
    original = type(digits).read

    def read(self, row, role="image"):
        return b"broken" if row == rows[2] else original(self, row, role)

    monkeypatch.setattr(type(digits), "read", read)
    found = look(seers[:2], digits, rows[:5], seed=0, precision="fp32")
    assert [one.index.tolist() for one in found] == [rows[[0, 1, 3, 4]].tolist()] * 2
    assert [len(one.patches[4]) for one in found] == [4, 4]
    monkeypatch.setattr(type(digits), "read", lambda *_: b"broken")
    with pytest.raises(InputError, match="none of 5 images can be read"):
        look(seers, digits, rows[:5], seed=0, precision="fp32")


def test_a_teacher_that_sees_another_part_of_an_image_is_framed_as_the_student():
    whole, usual = Preprocess(resize=48, crop=48), Preprocess(resize=256, crop=224)
    assert framed(usual, Preprocess(resize=55, crop=48)) is usual
    seen = framed(usual, whole)
    assert (seen.resize, seen.crop) == (224, 224)
    assert framed(whole, usual).resize == round(48 * 256 / 224)
    assert framed(usual, Preprocess(resize=256, crop=224, square=True)).square


def test_images_are_drawn_by_seed_among_those_with_labels(digits):
    assert draw(digits, 20, seed=1).tolist() == draw(digits, 20, seed=1).tolist() != draw(digits, 20, seed=2).tolist()
    assert len(draw(digits, 10**6, seed=0)) == 150

    class Sparse:
        labels = np.where(np.arange(30) % 3 == 0, 1, -1)

        def __len__(self):
            return 30

    assert set(draw(Sparse(), 99, seed=0).tolist()) == set(range(0, 30, 3))


def test_without_a_test_set_images_judge_each_other(digits, seen):
    _, rows, (teacher, *_) = seen
    split = labelled_split(digits, teacher.index, None, teacher.index)
    assert split.leave_one_out and split.classes == 10
    labels = digits.labels[rows]
    expected = knn_classify(teacher.pooled, labels, teacher.pooled, labels, ks=(20,), leave_one_out=True).correct()
    assert knn_correct(teacher, teacher, split, device=CPU).tolist() == expected.tolist()
    right = linear_correct(teacher, teacher, split, seed=0, device=CPU, steps=300)
    assert len(right) == 60  # the second half
    learned = np.eye(10, dtype=np.float32)[labels] + 0.01 * teacher.class_tokens[:, :10]
    easy = Looked(teacher.index, learned, learned, learned, {})
    assert linear_correct(easy, easy, split, seed=0, device=CPU, steps=300).mean() > 0.95
    # Only the judged half counts: features that tell the classes of the other half alone do not help.
    fit, _ = halves(120, seed=0)
    blind = learned.copy()
    blind[np.setdiff1d(np.arange(120), fit)] = 0
    hidden = Looked(teacher.index, blind, blind, blind, {})
    assert linear_correct(hidden, hidden, split, seed=0, device=CPU, steps=300).mean() < 0.4


def test_with_a_test_set_it_alone_is_judged(digits, seen):
    seers, rows, (teacher, *_) = seen
    test = open_source("demo:digits?split=test&count=40")
    check_test(digits, test)
    (judged,) = look(seers[:1], test, draw(test, 30, seed=0), seed=0, precision="fp32")
    split = labelled_split(digits, teacher.index, test, judged.index)
    expected = knn_classify(
        teacher.pooled, digits.labels[rows], judged.pooled, test.labels[judged.index], ks=(20,)
    ).correct()
    assert knn_correct(teacher, judged, split, device=CPU).tolist() == expected.tolist()
    assert len(linear_correct(teacher, judged, split, seed=0, device=CPU, steps=50)) == 30
    few = labelled_split(digits, rows[np.isin(digits.labels[rows], [3, 7])], test, judged.index)
    assert few.classes == 2 and set(few.test_labels.tolist()) <= {0, 1}
    assert np.isin(test.labels[judged.index[few.test_rows]], [3, 7]).all()
    assert f"{30 - len(few.test_rows)} test images are of classes without a training image" in few.notes[0]


def test_what_cannot_be_judged_is_said(digits, seen, tmp_path):
    from PIL import Image

    _, rows, _ = seen
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    bare = open_source(str(tmp_path))
    with pytest.raises(InputError, match="has no labels"):
        check_test(digits, bare)
    with pytest.raises(InputError, match="has no labels; name their column"):
        labelled_split(bare, np.arange(1), None, np.arange(1))
    one = rows[digits.labels[rows] == 3]
    with pytest.raises(InputError, match="of one class"):
        labelled_split(digits, one, None, one)
    with pytest.raises(InputError, match="lie on no square grid"):
        side_by_side._on_grid(torch.zeros(1, 5, 3), 2)


def test_differences_are_paired():
    generator = np.random.default_rng(0)
    before = (generator.random(400) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:8]] = 1
    change = Estimate.change(before, after, seed=0)
    assert change.value == pytest.approx(0.02) and 0 < change.low < 0.02 < change.high < 0.04
    assert Estimate.of(before, seed=0).high - Estimate.of(before, seed=0).low > 0.08


def test_tokens_are_compared_where_there_are_some(seen):
    _, _, (teacher, small, large) = seen
    found = token_figures(small, teacher, 4, seed=0)
    assert set(found) == {"class_cosine", "class_constant", "patch_cosine", "patch_constant", "class_cka"}
    assert found["class_cosine"].n == 60 and found["class_cka"].n == 120
    assert "patch_cosine" not in token_figures(small, teacher, 5, seed=0)
    same = token_figures(large, large, 8, seed=0)
    for key in ("class_cosine", "class_plain", "patch_cosine", "patch_plain", "class_cka"):
        assert same[key].value == pytest.approx(1, abs=1e-3), key
