"""Depth of whole images and its errors, image by image; and depth as pictures."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.bad import BadImages
from dinov2cli.data.dense import read_pair
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.dense.tokens import Sight, tokens_of
from dinov2cli.evaluation.depth.data import DepthScale, survey
from dinov2cli.evaluation.depth.heads import build_head
from dinov2cli.evaluation.depth.measures import image_errors
from dinov2cli.evaluation.depth.pictures import coloured, depth_panel
from dinov2cli.evaluation.depth.prediction import Predictor, errors_on
from dinov2cli.evaluation.depth.training import WHOLE
from tests.evaluation.depth_sets import encoded, millimetres, scene, scenes, tiny_model, write_set

SCALE = DepthScale(units_per_metre=1000)
RANGE = {"min_depth": 0.001, "max_depth": 10.0}


def predictor(*, size=None, flip=False, seed=0):
    model = tiny_model()
    seeing = Seeing(
        model.backbone, model.preprocess.normalize, Sight(size, WHOLE, WHOLE), (3,), torch.device("cpu"), norm=False
    )
    head = build_head("lin1", 32, bins=16, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(head.patch.weight, std=3.0, generator=torch.Generator().manual_seed(seed))
    return Predictor(head, seeing, flip)


def image(height, width, seed=0):
    return torch.from_numpy(scene(np.random.default_rng(seed), height, width)[0]).permute(2, 0, 1)


def test_a_whole_image_is_predicted_at_its_own_pixels():
    found = predictor()
    (depth,) = found.depths([image(42, 56)])
    with torch.no_grad():
        tokens = tokens_of(found.seeing.encoder, found.seeing.normalize(image(42, 56)[None]), [3], norm=False)
        expected = torch.nn.functional.interpolate(
            found.head(tokens.maps, tokens.cls)[None], (42, 56), mode="bilinear", align_corners=False
        )
    np.testing.assert_allclose(depth, expected[0, 0], rtol=1e-4)
    assert depth.std() > 0.01


def test_images_of_any_sizes_are_predicted_together():
    sizes = [(42, 56), (30, 61), (42, 56), (14, 14)]
    images = [image(*size, seed=number) for number, size in enumerate(sizes)]
    for size in (None, 50):
        found = predictor(size=size)
        depths = found.depths(images)
        assert [depth.shape for depth in depths] == sizes
        for one, depth in zip(images, depths, strict=True):
            np.testing.assert_allclose(depth, found.depths([one])[0], rtol=1e-4)


def test_the_mirror_image_counts_half():
    plain, both, shown = predictor(), predictor(flip=True), image(42, 56)
    mirrored = plain.depths([shown.flip(2)])[0][:, ::-1]
    np.testing.assert_allclose(both.depths([shown])[0], (plain.depths([shown])[0] + mirrored) / 2, rtol=1e-4)
    assert np.abs(mirrored - plain.depths([shown])[0]).max() > 1e-3


def test_heads_with_other_numbers_have_other_digests():
    assert predictor().digest() == predictor().digest() != predictor(seed=1).digest()


@pytest.fixture
def sets(tmp_path):
    """Opened test set of 20 scenes with holes, and the survey of a training set."""
    rng = np.random.default_rng(4)
    pairs = []
    for _ in range(20):
        pixels, depth = scene(rng)
        depth[:20, :20] = 0
        pairs.append((encoded(pixels), millimetres(depth)))
    train = survey(open_source(scenes(tmp_path / "train.parquet", 6)), SCALE, bad=BadImages())
    return open_source(write_set(tmp_path / "test.parquet", pairs)), train


@pytest.mark.parametrize("crop", ["none", "eigen"])
def test_errors_are_those_of_each_prediction_and_of_two_guesses(sets, crop):
    source, train = sets
    found = errors_on(predictor(), source, np.arange(20), SCALE, train, crop=crop)
    assert found.rows.tolist() == list(range(20))
    for row in (0, 7, 19):
        pair = read_pair(source, row, "depth")
        truth = SCALE.metres(pair.target)
        cells = torch.nn.functional.interpolate(torch.from_numpy(train.cells)[None, None], truth.shape, mode="bilinear")
        guesses = {
            "errors": predictor().depths([pair.image])[0],
            "mean_errors": np.full(truth.shape, train.mean),
            "cells_errors": cells[0, 0].numpy(),
        }
        for name, guess in guesses.items():
            expected = image_errors(guess, truth, crop=crop, **RANGE)
            np.testing.assert_allclose(getattr(found, name).rows()[row], expected, rtol=1e-4)


def test_images_without_depth_inside_the_crop_are_left_out(tmp_path, sets):
    rng = np.random.default_rng(0)
    outside = np.zeros((42, 56))
    outside[0] = 2.0
    pairs = [(encoded(scene(rng)[0]), millimetres(depth)) for depth in (outside, scene(rng)[1])]
    source = open_source(write_set(tmp_path / "set.parquet", pairs))
    assert errors_on(predictor(), source, np.arange(2), SCALE, sets[1], crop="eigen").rows.tolist() == [1]
    with pytest.raises(InputError, match="no image has a valid depth inside the crop eigen"):
        errors_on(predictor(), source, np.arange(1), SCALE, sets[1], crop="eigen")


def test_what_was_predicted_is_not_predicted_again(sets, tmp_path):
    source, train = sets
    stage = Parts(tmp_path).stage("errors", {})
    first = errors_on(predictor(), source, np.arange(20), SCALE, train, stage=stage)
    again = errors_on(None, source, np.arange(20), SCALE, train, stage=stage)
    np.testing.assert_array_equal(first.errors.rows(), again.errors.rows())


def test_depth_as_colours():
    depth = np.array([[1.0, 2.0], [3.0, 9.0]])
    valid = np.array([[True, True], [True, False]])
    picture = coloured(depth, valid, 1.0, 3.0)
    assert picture.dtype == np.uint8
    expected = np.round(colormaps["magma_r"]([0.0, 0.5, 1.0])[:, :3] * 255)
    np.testing.assert_array_equal(picture.reshape(4, 3)[:3], expected)
    assert picture[1, 1].tolist() == [128, 128, 128]
    assert picture[0, 0].sum() > picture[1, 0].sum()  # near is bright


def test_prediction_and_truth_share_their_colours():
    depth = np.linspace(1, 5, 12).reshape(3, 4)
    pictures, labels = depth_panel(np.zeros((3, 4, 3), np.uint8), depth, depth, np.ones((3, 4), bool))
    np.testing.assert_array_equal(pictures[1], pictures[2])
    assert "colours from 1.0 to 5.0 m" in labels[1]
    assert [picture.shape for picture in pictures] == [(3, 4, 3)] * 3
    nothing, _ = depth_panel(np.zeros((3, 4, 3), np.uint8), depth, depth * 0, np.zeros((3, 4), bool))
    assert (nothing[2] == 128).all()
