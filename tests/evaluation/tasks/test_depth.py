"""The task `depth` on a trial: from images with depth to figures, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2cli.artifacts.parts import Parts
from dinov2cli.config.evaluation import task_config
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation import statistics
from dinov2cli.evaluation.tasks.depth import Depth
from dinov2cli.evaluation.tasks.run import run_task
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.models.load import LoadedModel, load_model
from dinov2cli.models.preprocess import Preprocess
from tests.evaluation.depth_sets import encoded, millimetres, scene, scenes, tiny_model, write_set

QUICK = {"units_per_metre": 1000, "steps": 60, "train_batch_size": 8, "lr": 0.05, "bins": 32, "gradient_loss": 0}
NYU = Path(__file__).resolve().parents[4] / "shared/data/nyuv2"


def trial(folder, *, train=16, test=6, model=None, **settings):
    specs = [scenes(folder / f"{name}.parquet", n, seed) for seed, (name, n) in enumerate([("a", train), ("b", test)])]
    return Trial(model or tiny_model(), open_source(specs[1]), open_source(specs[0]), **settings)


def run(task, given):
    task.check(given)
    return task.judge(given, task.collect(given))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return run(Depth(**QUICK, panels=2), trial(tmp_path_factory.mktemp("sets")))


def test_figures_their_units_and_what_is_better(judged):
    found = {figure.metric: (figure.unit, figure.lower_is_better) for figure in judged.figures}
    assert found == {
        "rmse": ("metres", True),
        "rmse_pooled": ("metres", True),
        "abs_rel": ("number", True),
        "sq_rel": ("metres", True),
        "log10": ("number", True),
        "delta1": ("share", False),
        "delta2": ("share", False),
        "delta3": ("share", False),
    }
    assert {len(figure.statistic) for figure in judged.figures} == {6}
    assert len(judged.units) == len(set(judged.units)) == 6
    assert isinstance(judged.figures[0].statistic, statistics.Statistic)


def test_the_head_beats_what_looks_at_no_image(judged):
    rmse = judged.figures[0].statistic.value()
    assert rmse < 0.8 * judged.settings["rmse_of_mean_depth"]
    assert rmse < 0.8 * judged.settings["rmse_of_mean_depth_map"]
    assert judged.settings["train_mean_depth"] == pytest.approx(2.5, abs=0.2)
    assert judged.settings["blocks"] == [3]
    assert judged.notes == []


def test_predictions_and_pictures(judged):
    assert judged.predictions.column("id").to_pylist() == judged.units
    np.testing.assert_allclose(judged.predictions.column("rmse"), judged.figures[0].statistic.values[:, 0])
    assert len(judged.panels) == 2
    assert all(
        image.shape == (42, 56, 3) and image.dtype == np.uint8 for panel in judged.panels for image in panel.images
    )
    best, worst = (float(panel.title.split("RMSE ")[1].split()[0]) for panel in judged.panels)
    assert best == pytest.approx(judged.figures[0].statistic.values.min(), abs=1e-3)
    assert worst == pytest.approx(judged.figures[0].statistic.values.max(), abs=1e-3)


@pytest.mark.parametrize("head", ["lin4", "dpt"])
def test_other_heads_run_through_the_runner(tmp_path, head):
    task = Depth(**QUICK | {"steps": 3, "lr": None}, head=head, channels=8, crop="eigen", size=28, panels=0)
    outcome = run_task(task, trial(tmp_path, test=3), model="tiny", dataset="scenes", settings={})
    row = outcome.rows[0]
    assert (row.metric, row.n, row.settings["head"]) == ("rmse", 3, head)
    assert row.ci_low <= row.value <= row.ci_high
    assert row.settings["found"]["blocks"] == [0, 1, 2, 3]
    assert row.settings["found"]["test_images_in_train"] == 0


def test_a_finished_head_is_not_trained_again_and_other_settings_are(tmp_path, monkeypatch):
    task = Depth(**QUICK | {"steps": 4}, panels=0)
    given = trial(tmp_path, test=3, store=Parts(tmp_path))
    first = run(task, given)
    steps = []
    given.progress = _counting(steps)
    again = run(task, given)
    for one, other in zip(first.figures, again.figures, strict=True):
        np.testing.assert_array_equal(one.statistic.values, other.statistic.values)
    assert ("depth head lin1", 1) not in steps
    other = run(Depth(**QUICK | {"steps": 4, "lr": 0.01}, panels=0), given)
    assert steps.count(("depth head lin1", 1)) == 4
    assert not np.array_equal(other.figures[0].statistic.values, first.figures[0].statistic.values)


def test_tokens_are_read_before_the_final_norm(tmp_path):
    collected = Depth(**QUICK | {"steps": 1}).collect(trial(tmp_path, train=2, test=2))
    assert not collected.predictor.seeing.norm


def _counting(seen):
    import contextlib

    @contextlib.contextmanager
    def progress(label, _total, _unit="images"):
        yield lambda count: seen.append((label, count))

    return progress


def test_images_without_depth_are_left_out_and_told(tmp_path):
    rng = np.random.default_rng(0)
    depths = [scene(rng)[1], np.zeros((42, 56)), scene(rng)[1]]
    spec = write_set(tmp_path / "test.parquet", [(encoded(scene(rng)[0]), millimetres(depth)) for depth in depths])
    given = trial(tmp_path)
    given.test = open_source(spec)
    judged = run(Depth(**QUICK | {"steps": 2}, panels=0), given)
    assert len(judged.units) == 2
    assert judged.settings["test_images_without_depth"] == 1
    assert any("1 of 3 images have no valid depth" in note for note in judged.notes)


def test_figures_that_mean_little_come_with_a_note(tmp_path):
    given = trial(tmp_path, train=4)
    given.test = given.train
    judged = run(Depth(**QUICK | {"steps": 1, "lr": 1e-6}, panels=0), given)
    assert any("train and test are the same images" in note for note in judged.notes)
    (note,) = [note for note in judged.notes if "is not below" in note]
    assert f"{judged.settings['rmse_of_mean_depth_map']:.3f} m" in note


class Vector(Descriptor):
    def __init__(self):
        super().__init__(8, 32)


def test_what_cannot_be_done_is_refused_before_anything_is_computed(tmp_path):
    given = trial(tmp_path, train=2, test=2)
    with pytest.raises(UserError, match="0 < min_depth < max_depth"):
        Depth(min_depth=3, max_depth=2).check(given)
    without = trial(tmp_path, train=2, test=2)
    without.train = open_source("demo:digits?count=4")
    with pytest.raises(InputError, match=r"no depth .*\?depth=COLUMN"):
        Depth().check(without)
    vectors = LoadedModel(Vector(), "copies", Preprocess(), False, {"file": "x"})
    with pytest.raises(UserError, match="has no tokens"):
        Depth().check(trial(tmp_path, train=2, test=2, model=vectors))


def test_a_wrong_scale_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="is units_per_metre=1 right"):
        Depth(steps=2).collect(trial(tmp_path, train=2, test=2))


def test_settings_can_be_given_by_name_and_are_bounded():
    config = task_config(Depth)
    assert config(head="dpt", max_depth=80.0, crop="garg").head == "dpt"
    for wrong in ({"head": "linear"}, {"crop": "nyu"}, {"bins": 1}, {"units_per_metre": 0}, {"train_crop": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            config(**wrong)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.skipif(not NYU.is_dir(), reason="no nyuv2 beside the checkout")
def test_real_depth_is_predicted_better_by_colours_of_patches_than_by_its_mean():
    """Histograms of colours are no depth sense, but tell more than nothing: scale, columns and metrics fit together."""
    train, test = (open_source(f"{NYU}/{split}.parquet?depth=depth") for split in ("train", "val"))
    given = Trial(load_model("baseline:pixels"), test, train)
    task = Depth(units_per_metre=25.5, size=42, steps=80, lr=0.01, gradient_loss=0, train_batch_size=8, panels=0)
    torch.set_num_threads(1)
    judged = run(task, given)
    assert len(judged.units) == 73
    assert judged.settings["train_mean_depth"] == pytest.approx(2.77, abs=0.01)
    assert judged.figures[0].statistic.value() < judged.settings["rmse_of_mean_depth"]
