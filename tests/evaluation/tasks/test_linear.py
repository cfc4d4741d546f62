import json
import textwrap

import numpy as np
import pytest
import torch

from dinov2cli.artifacts.parts import Parts
from dinov2cli.config.evaluation import task_config
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.features import Features
from dinov2cli.evaluation.tasks.linear import Linear
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from tests.launch import launch

TRAIN, TEST = "demo:digits?split=train&count=240&size=28", "demo:digits?split=test&count=90&size=28"


def tiny_model() -> LoadedModel:
    network = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, generator=torch.Generator().manual_seed(0)
    ).eval()
    return LoadedModel(network, "tiny", Preprocess(resize=28, crop=28), True, {"arch": "tiny", "seed": 0})


def trial(train: str = TRAIN, test: str = TEST, **settings) -> Trial:
    return Trial(tiny_model(), open_source(test), open_source(train), **settings)


class Given(Trial):
    """A trial whose features are given: train first."""

    def __init__(self, train: Features, test: Features) -> None:
        super().__init__(tiny_model(), open_source("demo:digits?count=90"), open_source("demo:digits?count=91"))
        self.given = {id(self.train): train, id(self.test): test}

    def features(self, source, *, view=None, keep=None):
        return self.given[id(source)]


def features(labels, dim: int = 16, *, patches: bool = True, seed: int = 0, names=None) -> Features:
    """What a good model would give: the class in the last class token, the rest noise."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    tokens = rng.normal(size=(len(labels), 4 if patches else 1, dim)).astype(np.float32)
    tokens[np.arange(len(labels)), -1, labels] += 8
    averaged = rng.normal(size=(len(labels), dim)).astype(np.float32) if patches else None
    index = np.arange(len(labels))
    return Features(index, labels, names, tokens, averaged, tokens[:, -1], np.zeros((len(labels), 32), np.uint8), 0.0)


def run(task: Linear, trial: Trial):
    task.check(trial)
    return task.judge(trial, task.collect(trial))


def outcome(judged) -> dict:
    """All of it, to compare bit for bit."""
    return {
        "figures": [(figure.metric, figure.statistic.value()) for figure in judged.figures],
        "table": judged.predictions.to_pydict(),
        "settings": judged.settings,
    }


def test_figures_predictions_and_settings_tell_one_story():
    judged = run(Linear(steps=300), trial())
    assert [figure.metric for figure in judged.figures] == ["top1", "top5", "mean_per_class"]
    top1, top5, per_class = (figure.statistic.value() for figure in judged.figures)
    table = judged.predictions.to_pydict()
    assert set(table) == {"id", "label", "prediction", "correct", "confidence"}
    right = np.array(table["label"]) == np.array(table["prediction"])
    assert table["correct"] == right.tolist() and top1 == right.mean() and top1 < top5
    assert judged.units == table["id"] and len(set(judged.units)) == 90
    labels = np.array(table["label"])
    assert per_class == pytest.approx(np.mean([right[labels == name].mean() for name in np.unique(labels)]))
    assert all(0 <= value <= 1 for value in table["confidence"])
    assert judged.settings["heads"] == 52 and judged.settings["steps"] == 300
    assert judged.notes == ["last 4 blocks clipped to the 2 there are"]
    assert top1 > 0.3  # of ten classes, by random weights


def test_the_class_that_the_last_token_tells_is_found():
    train, test = features(np.arange(200) % 4), features(np.arange(90) % 4, seed=1)
    judged = run(Linear(steps=200), Given(train, test))
    assert [figure.metric for figure in judged.figures] == ["top1", "mean_per_class"]  # no top-5 among four classes
    assert judged.figures[0].statistic.value() > 0.98
    assert judged.settings["averaged_patches"] in (True, False) and judged.settings["blocks"] in (1, 4)


def test_one_vector_per_image_is_enough():
    train, test = features(np.arange(200) % 4, patches=False), features(np.arange(90) % 4, patches=False, seed=1)
    judged = run(Linear(steps=200), Given(train, test))
    assert judged.settings["heads"] == 13 and judged.figures[0].statistic.value() > 0.98
    assert "this model gives one vector per image: the grid has learning rates only" in judged.notes


def test_unlabelled_images_are_left_out():
    train, test = features(np.arange(200) % 4), features(np.arange(90) % 4, seed=1)
    train.class_tokens[:40] = 1e9  # would ruin any head
    train.labels[:40], test.labels[10:] = -1, -1
    judged = run(Linear(steps=200), Given(train, test))
    assert len(judged.units) == 10 and judged.figures[0].statistic.value() > 0.9
    assert judged.settings["train_images"] + judged.settings["validation_images"] == 160


def test_the_same_images_on_both_sides_are_told():
    judged = run(Linear(steps=20), trial(test=TRAIN))
    assert judged.notes[0].startswith(
        "train and test are the same images: the figures say how well they are remembered"
    )
    assert not any("same images" in note for note in run(Linear(steps=20), trial()).notes)


def test_crops_train_on_another_view_in_every_epoch_and_judge_on_the_centre(monkeypatch):
    seen: list[str | None] = []
    own = Trial.features

    def watched(self, source, *, view=None, keep=None):
        seen.append(None if view is None else view.name)
        return own(self, source, view=view, keep=keep)

    monkeypatch.setattr(Trial, "features", watched)
    judged = run(Linear(steps=300, epochs=3, augmentation="crops"), trial())
    assert seen[:2] == [None, None] and [name.split()[-1] for name in seen[2:]] == ["0", "1", "2"]
    assert outcome(judged) == outcome(run(Linear(steps=300, epochs=3, augmentation="crops"), trial()))
    assert outcome(judged)["table"] != outcome(run(Linear(steps=300, epochs=3), trial()))["table"]
    assert (
        outcome(judged)["table"]
        != outcome(run(Linear(steps=300, epochs=3, augmentation="crops"), trial(seed=1)))["table"]
    )


class _StopError(Exception):
    pass


@pytest.mark.parametrize("augmentation", ["none", "crops"])
@pytest.mark.parametrize("saves", [1, 3])
def test_a_stopped_task_goes_on_bitwise_the_same(tmp_path, augmentation, saves):
    """Stopped at a saving of the heads, or amid the features of a view; the store keeps one view at most."""
    task = Linear(steps=40, epochs=2, augmentation=augmentation)
    whole = outcome(run(task, trial()))
    left = [saves]

    class Stopping(Parts):
        def stage(self, name, key):
            stage = super().stage(name, key)
            save = stage.save

            def counting(start, arrays):
                save(start, arrays)
                left[0] -= 1
                if left[0] == 0:
                    raise _StopError

            stage.save = counting
            return stage

    if augmentation == "crops" or saves == 1:
        with pytest.raises(_StopError):
            run(task, trial(store=Stopping(tmp_path)))
    assert outcome(run(task, trial(store=Parts(tmp_path)))) == whole
    assert len(list(tmp_path.rglob("*.npz"))) == (2 if augmentation == "crops" else 1)


_LAUNCHED = """
    import json
    from dinov2cli.distributed import join, leave
    from dinov2cli.evaluation.tasks.linear import Linear
    from tests.evaluation.tasks.test_linear import outcome, trial
    ranks = join("cpu")
    asked = trial(ranks=ranks, batch_size=16)
    task = Linear(steps=60, epochs=2, augmentation="crops")
    collected = ranks.together(lambda: task.collect(asked))
    judged = ranks.first(lambda: outcome(task.judge(asked, collected)))
    if ranks.main:
        print(json.dumps(judged))
    leave()
"""


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_ranks_find_what_one_finds(tmp_path, one_thread):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_LAUNCHED))
    done = launch(str(script), processes=2, module="")
    assert done.returncode == 0, done.stderr
    alone = outcome(run(Linear(steps=60, epochs=2, augmentation="crops"), trial(batch_size=16)))
    assert json.loads(done.stdout) == json.loads(json.dumps(alone))


def test_sets_that_cannot_be_judged_are_refused_before_any_work():
    asked = trial()
    asked.train.__dict__["_labelling"] = None
    with pytest.raises(InputError, match="has no labels and this benchmark needs them"):
        Linear().check(asked)
    asked.train.__dict__["_labelling"] = np.zeros(240, np.int64), ["cat"]
    asked.test.__dict__["_labelling"] = np.zeros(90, np.int64), ["cat"]
    with pytest.raises(InputError, match=r"has one class \(cat\), so there is nothing to tell apart"):
        Linear().check(asked)
    asked.test.__dict__["_labelling"] = np.zeros(90, np.int64), ["dog"]
    with pytest.raises(InputError, match=r"has 1 class that .* lacks \(dog\)"):
        Linear().check(asked)
    asked = trial(train="demo:digits?split=train&count=10&size=28")
    with pytest.raises(InputError, match="no training class has two images"):
        Linear().check(asked)


@pytest.mark.parametrize("broken", ["train", "test"])
def test_features_that_are_not_finite_are_named(broken):
    sets = {"train": features(np.arange(200) % 4), "test": features(np.arange(90) % 4, seed=1)}
    sets[broken].averaged_patches[3, 1] = np.inf
    with pytest.raises(WorkError, match=r"^1 of \d+ feature vectors of demo:digits.* hold NaN or infinity"):
        run(Linear(steps=20), Given(**sets))


def test_settings_have_bounds():
    config = task_config(Linear)
    assert config(learning_rates=[0.1], augmentation="crops").epochs == 10
    for wrong in (
        {"learning_rates": []},
        {"learning_rates": [0]},
        {"blocks": [0]},
        {"epochs": 0},
        {"steps": 0},
        {"validation_fraction": 1.0},
        {"augmentation": "jitter"},
    ):
        with pytest.raises(ValueError):
            config(**wrong)
