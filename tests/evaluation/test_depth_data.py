"""What a set of depths holds, and what is said of sets that cannot be right."""

import numpy as np
import pytest

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.bad import BadImages
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.depth.data import CELLS, DepthScale, doubts, survey
from tests.evaluation.depth_sets import encoded, millimetres, scene, scenes, write_set

SCALE = DepthScale(units_per_metre=1000)


def looked_through(spec, scale=SCALE, **settings):
    return survey(open_source(spec), scale, bad=settings.pop("bad", BadImages()), **settings)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def image(rng):
    return encoded(scene(rng)[0])


def test_stored_numbers_become_metres():
    stored = np.array([[0, 255, 51]], dtype=np.uint8)
    metres = DepthScale(units_per_metre=25.5).metres(stored)
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, [[0, 10, 2]])
    assert DepthScale(units_per_metre=25.5).valid(metres).tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    "numbers", [{"units_per_metre": 0}, {"units_per_metre": -1}, {"min_depth": 0}, {"min_depth": 3, "max_depth": 2}]
)
def test_impossible_scales_are_refused(numbers):
    with pytest.raises(UserError, match="expected"):
        DepthScale(**numbers)


def test_a_survey_by_definition(tmp_path, rng):
    depths = [scene(rng)[1] for _ in range(5)]
    depths[1][:, :20] = 0
    depths[2][:10] = 12.0
    depths[3][:] = 0
    spec = write_set(tmp_path / "set.parquet", [(image(rng), millimetres(depth)) for depth in depths])
    found = looked_through(spec)
    stored = np.stack([np.round(depth * 1000) / 1000 for depth in depths])
    valid = (stored > 0.001) & (stored < 10)
    assert found.rows.tolist() == [0, 1, 2, 4]
    assert found.empty == [open_source(spec).name(3)]
    assert found.mean == pytest.approx(stored[valid].mean())
    assert found.valid == pytest.approx(valid.mean())
    assert found.beyond == pytest.approx((stored >= 10).sum() / (stored > 0).sum())
    assert found.largest == pytest.approx(12)
    assert found.digests.shape == (5, 32)
    # A cell is the mean of the pixels on which its centre falls.
    row, column = (np.arange(CELLS[0]) + 0.5) * 42 // CELLS[0], (np.arange(CELLS[1]) + 0.5) * 56 // CELLS[1]
    at = np.ix_(range(5), row.astype(int), column.astype(int))
    expected = np.where(valid, stored, 0)[at].sum(0) / valid[at].sum(0)
    np.testing.assert_allclose(found.cells, expected, rtol=1e-5)


def test_negative_depths_and_nan_of_float_files_do_not_count(tmp_path, rng):
    depth = np.full((42, 56), 2.0, dtype=np.float32)
    depth[0], depth[1], depth[2] = np.nan, -3.0, np.inf
    spec = write_set(tmp_path / "set.parquet", [(image(rng), encoded(depth, "TIFF"))])
    found = looked_through(spec, DepthScale())
    assert found.valid == pytest.approx(39 / 42)
    assert found.mean == pytest.approx(2.0)
    assert np.isfinite(found.cells).all()


def test_a_set_of_zeros_is_refused(tmp_path, rng):
    spec = write_set(tmp_path / "set.parquet", [(image(rng), millimetres(np.zeros((42, 56))))] * 2)
    with pytest.raises(InputError, match="none of its 2 depth maps has a pixel between"):
        looked_through(spec)


def test_millimetres_taken_for_metres_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"100% of its depths lie beyond max_depth=10 .*is units_per_metre=1 right"):
        looked_through(scenes(tmp_path / "set.parquet", 2), DepthScale())


def test_metres_taken_for_millimetres_are_doubted(tmp_path):
    spec = scenes(tmp_path / "set.parquet", 2)
    scale = DepthScale(units_per_metre=100_000)
    (note,) = doubts(looked_through(spec, scale), scale, spec)
    assert "the largest depth is 0.0" in note
    assert "is units_per_metre=100000 right?" in note
    assert doubts(looked_through(spec), SCALE, spec) == []


def test_images_without_depth_are_named(tmp_path, rng):
    good, empty = millimetres(scene(rng)[1]), millimetres(np.zeros((42, 56)))
    spec = write_set(tmp_path / "set.parquet", [(image(rng), depth) for depth in (good, empty, empty)])
    (note,) = doubts(looked_through(spec), SCALE, spec)
    assert "2 of 3 images have no valid depth and are left out" in note


def test_depth_of_another_size_is_refused_unless_resized(tmp_path, rng):
    spec = write_set(tmp_path / "set.parquet", [(image(rng), millimetres(scene(rng, 21, 28)[1]))])
    with pytest.raises(InputError, match=r"depth has 28 x 21 pixels, the image 56 x 42.*resize_target"):
        looked_through(spec)
    assert looked_through(spec, DepthScale(1000, resize_target=True)).valid == 1


def test_unreadable_files_are_counted_and_left_out(tmp_path, rng):
    good = millimetres(scene(rng)[1])
    pairs = [(image(rng), good), (b"nothing", good), (image(rng), good[:60]), (image(rng), good)]
    bad = BadImages()
    found = looked_through(write_set(tmp_path / "set.parquet", pairs), bad=bad)
    assert found.rows.tolist() == [0, 3]
    assert bad.count == 2


def test_what_was_looked_through_is_not_read_again(tmp_path, monkeypatch):
    spec = scenes(tmp_path / "set.parquet", 3)
    stage = Parts(tmp_path).stage("survey", {})
    first = looked_through(spec, stage=stage)
    monkeypatch.setattr("dinov2cli.evaluation.depth.data.read_pairs", None)
    again = looked_through(spec, stage=stage)
    assert again.rows.tolist() == first.rows.tolist()
    assert again.mean == first.mean
    np.testing.assert_array_equal(again.cells, first.cells)
