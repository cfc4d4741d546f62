"""The task `robustness` on small real sets: figures recomputed by hand, shifted sets of every kind, resuming, ranks."""

import io
import json
import textwrap
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.parts import Parts
from dinov2cli.artifacts.results import write_results
from dinov2cli.config.evaluation import task_config
from dinov2cli.data.corruptions import CORRUPTIONS, CorruptedView
from dinov2cli.data.loader import CentreView
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.linear.probe import train_linear
from dinov2cli.evaluation.robustness import errors as robustness_errors
from dinov2cli.evaluation.tasks.robustness import Robustness
from dinov2cli.evaluation.tasks.run import run_task
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from tests.launch import launch

TRAIN, TEST = "demo:digits?split=train&count=200&size=42", "demo:digits?split=test&count=60&size=42"
FEW = {"corruptions": ["contrast", "gaussian_noise"], "severities": [1, 5], "steps": 150}


def tiny_model(side: int = 42) -> LoadedModel:
    network = VisionTransformer(
        img_size=side, patch_size=14, embed_dim=32, depth=2, num_heads=2, generator=torch.Generator().manual_seed(0)
    ).eval()
    return LoadedModel(network, "tiny", Preprocess(resize=side, crop=side), True, {"arch": "tiny", "seed": 0})


def trial(train: str = TRAIN, test: str = TEST, others=None, **settings) -> Trial:
    others = {name: open_source(spec) for name, spec in (others or {}).items()}
    return Trial(tiny_model(), open_source(test), open_source(train), others, **settings)


def run(task: Robustness, trial: Trial):
    task.check(trial)
    return task.judge(trial, task.collect(trial))


def values(judged) -> dict[str, float]:
    return {figure.metric: figure.statistic.value() for figure in judged.figures}


def outcome(judged) -> dict:
    """All of it, to compare bit for bit."""
    return {
        "figures": values(judged),
        "units": judged.units,
        "table": judged.predictions.to_pydict(),
        "settings": judged.settings,
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """make(name, digits, start, stop, change): a folder of digits, one folder per class; its DATA string."""
    root, source = tmp_path_factory.mktemp("digits"), open_source("demo:digits?size=42")
    labels = source.labels

    def make(name: str, start: int, stop: int, digits=range(10), change=lambda pixels: pixels, call=str) -> str:
        for row in range(start, stop):
            if labels[row] in digits:
                pixels = np.asarray(Image.open(io.BytesIO(source.read(row))).convert("RGB"))
                path = root / name / call(f"d{labels[row]}") / f"{row:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(change(pixels)).save(path)
        return f"{root / name}?label=folder"

    return make


@pytest.fixture(scope="module")
def sets(folders):
    return {"train": folders("train", 0, 200), "test": folders("test", 200, 260)}


def by_hand(asked: Trial, task: Robustness, view: CorruptedView | None) -> np.ndarray:
    """Right or wrong of each test image, bool [n], by a head trained anew."""
    train, test = asked.features(asked.train), asked.features(asked.test, view=view)
    trained = train_linear(train.class_tokens, train.averaged_patches, train.labels, seed=asked.seed, steps=task.steps)
    logits = trained.classifier.logits(test.class_tokens, test.averaged_patches)
    return logits.argmax(1).numpy() == test.labels


def test_figures_are_errors_of_one_head_on_corrupted_images():
    asked, task = trial(seed=3), Robustness(**FEW)
    judged = run(task, asked)
    found = values(judged)
    clean = by_hand(asked, task, None)
    errors = {
        kind: [1 - by_hand(asked, task, CorruptedView(CentreView(42, 42), kind, level, 3)).mean() for level in (1, 5)]
        for kind in ("gaussian_noise", "contrast")
    }
    assert found.pop("top1") == pytest.approx(clean.mean()) and clean.mean() > 0.2
    every = np.array(list(errors.values()))
    assert found == pytest.approx(
        {
            "mce_unnormalised": every.mean(),
            "relative_mce_unnormalised": every.mean() - (1 - clean.mean()),
            "error_gaussian_noise": every[0].mean(),
            "error_contrast": every[1].mean(),
            "error_severity_1": every[:, 0].mean(),
            "error_severity_5": every[:, 1].mean(),
        }
    )
    assert list(errors) == list(judged.settings["corruption_errors"])  # in the usual order, not in that asked for
    assert judged.settings["corruption_errors"]["contrast"] == pytest.approx(errors["contrast"])
    assert [figure.lower_is_better for figure in judged.figures] == [False] + [True] * 6
    assert judged.predictions["correct"].to_pylist() == clean.tolist()
    assert judged.units == judged.predictions["id"].to_pylist() and len(judged.units) == 60


def test_alexnet_is_the_baseline_of_those_who_ask_for_it():
    judged = run(Robustness(**FEW, baseline="alexnet"), trial())
    found = values(judged)
    means = {"gaussian_noise": (0.69528 + 0.99452) / 2, "contrast": (0.64548 + 0.9927) / 2}
    expected = np.mean([found[f"error_{kind}"] / means[kind] for kind in means])
    growth = np.mean([(found[f"error_{kind}"] - 1 + found["top1"]) / (means[kind] - 0.435) for kind in means])
    assert found["mce"] == pytest.approx(expected) and found["relative_mce"] == pytest.approx(growth)
    assert any("not with published ones" in note for note in judged.notes)


def test_results_of_another_model_are_a_baseline(tmp_path):
    harmful = {**FEW, "corruptions": ["contrast"], "severities": [5]}
    task, asked = Robustness(**harmful), trial()
    first = run_task(task, asked, model="first", dataset="digits", settings={})
    with Output.open(tmp_path / "first", "results", command="dinov2 eval robustness", config={}) as out:
        write_results(out, first.rows, scores=first.scores)
    baseline = str(tmp_path / "first")
    again = run(Robustness(**harmful, baseline=baseline), asked)
    assert values(again)["mce"] == pytest.approx(1) and values(again)["relative_mce"] == pytest.approx(1)
    with pytest.raises(UserError, match=r"was made at severities \[5\], this is \[2\]"):
        Robustness(corruptions=["contrast"], severities=[2], baseline=baseline).check(asked)
    with pytest.raises(UserError, match="no errors under snow"):
        Robustness(corruptions=["contrast", "snow"], severities=[5], baseline=baseline).check(asked)
    with pytest.raises(InputError):
        Robustness(**FEW, baseline=str(tmp_path / "nothing")).check(asked)


def test_without_harm_to_the_baseline_there_is_no_relative_error(monkeypatch):
    monkeypatch.setattr(robustness_errors, "ALEXNET_CLEAN", 0.82)
    judged = run(Robustness(**FEW, baseline="alexnet"), trial())
    assert "mce" in values(judged) and "relative_mce" not in values(judged)
    assert "no relative mCE: the baseline alexnet gets no worse by contrast" in judged.notes


def test_a_shifted_set_of_some_classes_is_judged_among_them(sets, folders):
    shifted = folders("inverted", 260, 400, digits=(1, 4, 7), change=lambda pixels: 255 - pixels)
    few, every = (
        Robustness(corruptions=["none"], steps=150),
        Robustness(corruptions=["none"], steps=150, restrict="all"),
    )
    asked = trial(**sets, others={"inverted": shifted})
    judged = run(few, asked)
    found, free = values(judged), values(run(every, asked))
    train, test, other = (asked.features(source) for source in (asked.train, asked.test, asked.others["inverted"]))
    trained = train_linear(train.class_tokens, train.averaged_patches, train.labels, seed=0, steps=150)

    def right(features, names, among):
        logits = trained.classifier.logits(features.class_tokens, features.averaged_patches).numpy()
        truth = np.array([f"d{digit}" for digit in range(10)]).searchsorted(names)
        return np.array(among)[logits[:, among].argmax(1)] == truth

    names = np.array(other.label_names)[other.labels]
    assert found["top1_inverted"] == pytest.approx(right(other, names, [1, 4, 7]).mean())
    assert free["top1_inverted"] == pytest.approx(right(other, names, list(range(10))).mean())
    assert found["top1_inverted"] > free["top1_inverted"]
    same = np.isin(np.array(test.label_names)[test.labels], ["d1", "d4", "d7"])
    clean = right(test, np.array(test.label_names)[test.labels], [1, 4, 7])[same].mean()
    assert found["drop_inverted"] == pytest.approx(clean - found["top1_inverted"])
    about = judged.settings["shifted"]["inverted"]
    assert about["classes"] == about["predicted_among"] == 3 and about["clean_top1"] == pytest.approx(clean)
    assert about["images"] == len(other) and about["clean_images"] == same.sum()
    assert len(judged.units) == 60 + len(other) and all(
        len(figure.statistic) == len(judged.units) for figure in judged.figures
    )
    assert len(set(judged.units)) == len(judged.units)


def test_unknown_classes_are_an_error_or_left_out(sets, folders):
    shifted = folders("unknown", 260, 300, call=lambda name: "owl" if name == "d3" else name)
    asked = trial(**sets, others={"odd": shifted})
    with pytest.raises(InputError, match=r"has 1 class that .* lacks \(owl\).*unknown=skip"):
        Robustness(**FEW).check(asked)
    judged = run(Robustness(corruptions=["none"], steps=50, unknown="skip"), asked)
    left_out = judged.settings["shifted"]["odd"]["unknown"]
    assert left_out > 0 and judged.settings["shifted"]["odd"]["images"] == 40 - left_out
    assert any(note.startswith(f"{left_out} images of odd are left out") for note in judged.notes)


def test_the_same_images_with_several_right_answers_are_paired(sets, tmp_path):
    """As ReaL: the test images again, with lists of labels; some have none, some a second one."""
    source = open_source(sets["test"])
    lists = [
        [] if row % 7 == 0 else [label, (label + 1) % 10][: 1 + row % 2] for row, label in enumerate(source.labels)
    ]
    names = [[source.label_names[label] for label in found] for found in lists]
    images = [{"bytes": source.read(row), "path": None} for row in range(len(source))]
    pq.write_table(
        pa.table({"image": images, "real": pa.array(names, pa.list_(pa.string()))}), tmp_path / "real.parquet"
    )
    asked = trial(**sets, others={"real": f"{tmp_path / 'real.parquet'}?label=real"})
    judged = run(Robustness(corruptions=["none"], steps=150), asked)
    table = judged.predictions.to_pydict()
    answers = [int(name[1:]) for name in table["prediction"]]
    right = [answer in found for answer, found in zip(answers, lists, strict=True) if found]
    found = values(judged)
    assert found["top1_real"] == pytest.approx(np.mean(right))
    assert judged.settings["shifted"]["real"]["unlabelled"] == sum(not found for found in lists)
    assert judged.units == table["id"]  # no image twice
    assert found["top1"] == pytest.approx(np.mean(table["correct"]))


def test_the_drop_on_copies_of_the_test_images_is_nothing_at_all(sets):
    judged = run(Robustness(corruptions=["none"], steps=50), trial(**sets, others={"again": sets["test"]}))
    drop = next(figure.statistic for figure in judged.figures if figure.metric == "drop_again")
    weights = np.random.default_rng(0).integers(0, 3, (50, len(drop))).astype(float)
    assert np.abs(drop.replicates(weights)).max() < 1e-12


def test_images_of_the_training_set_are_told(sets, folders):
    judged = run(
        Robustness(corruptions=["none"], steps=50), trial(**sets, others={"known": folders("known", 190, 210)})
    )
    assert any(note.startswith("10 of 20 images of known are in the training set") for note in judged.notes)
    judged = run(Robustness(**{**FEW, "steps": 20}), trial(test=TRAIN))
    assert judged.notes[0].startswith("train and test are the same images")


class _StopError(Exception):
    pass


def test_a_stopped_task_goes_on_at_the_corruption_it_was_at(tmp_path, monkeypatch):
    task = Robustness(**FEW)
    whole = outcome(run(task, trial()))
    seen: Counter = Counter()
    own, stop = Trial.features, [3]

    def watched(self, source, *, view=None, keep=None):
        if view is not None:
            if stop[0] == 0:
                raise _StopError
            stop[0] -= 1
            seen[view.kind, view.severity] += 1
        return own(self, source, view=view, keep=keep)

    monkeypatch.setattr(Trial, "features", watched)
    with pytest.raises(_StopError):
        run(task, trial(store=Parts(tmp_path)))
    assert len(seen) == 3
    stop[0] = 9
    assert outcome(run(task, trial(store=Parts(tmp_path)))) == whole
    assert len(seen) == 4 and set(seen.values()) == {1}
    # Another head, another seed: nothing of it may be taken.
    run(Robustness(**{**FEW, "steps": 151}), trial(store=Parts(tmp_path)))
    run(task, trial(store=Parts(tmp_path), seed=1))
    assert set(seen.values()) == {3}


@pytest.mark.parametrize("keep", [False, True])
def test_features_of_corrupted_images_are_kept_only_if_asked_for(tmp_path, keep):
    run(Robustness(**FEW, keep_features=keep), trial(cache=Parts(tmp_path)))
    assert len(list((tmp_path / "parts").iterdir())) == (6 if keep else 2)


_LAUNCHED = """
    import json
    from dinov2cli.distributed import join, leave
    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.evaluation.tasks.robustness import Robustness
    from tests.evaluation.tasks.test_robustness import FEW, TEST, outcome, trial
    import sys
    ranks = join("cpu")
    asked = trial(ranks=ranks, batch_size=8, store=Parts(__import__("pathlib").Path(sys.argv[1])))
    task = Robustness(**FEW)
    for _ in range(2):  # the second time everything comes from the store
        collected = ranks.together(lambda: task.collect(asked))
    judged = ranks.first(lambda: outcome(task.judge(asked, collected)))
    if ranks.main:
        print(json.dumps(judged))
    leave()
"""


def test_two_ranks_find_what_one_finds(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_LAUNCHED))
    done = launch(str(script), str(tmp_path), processes=2, module="")
    assert done.returncode == 0, done.stderr
    alone = run(Robustness(**FEW), trial(batch_size=8))
    assert json.loads(done.stdout) == json.loads(json.dumps(outcome(alone)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"corruptions": ["rain"]}, "corruptions 'rain' not known: expected all, none, or some of gaussian_noise"),
        ({"corruptions": ["none", "snow"]}, "not known"),
        ({"severities": [1, 6]}, "severities 6 do not exist"),
        ({"corruptions": ["none"]}, "nothing to test"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Robustness(**settings).check(trial())


def test_settings_have_bounds_and_all_means_all():
    config = task_config(Robustness)
    assert config(severities=[3]).corruptions == ["all"]
    assert Robustness()._kinds() == list(CORRUPTIONS)
    for wrong in ({"severities": []}, {"severities": [0]}, {"corruptions": []}, {"restrict": "some"}, {"steps": 0}):
        with pytest.raises(ValueError):
            config(**wrong)


def test_sets_that_cannot_be_judged_are_refused_before_any_work(sets, folders):
    asked = trial(**sets, others={"odd": folders("others", 260, 280, call=lambda name: f"x{name}")})
    with pytest.raises(InputError, match="no class in common"):
        Robustness(**FEW, unknown="skip").check(asked)
    asked = trial(**sets, others={"odd": sets["test"].partition("?")[0]})
    with pytest.raises(InputError, match="has no labels"):
        Robustness(**FEW).check(asked)
    asked = trial(**{**sets, "test": sets["test"].partition("?")[0]})
    with pytest.raises(InputError, match="has no labels"):
        Robustness(**FEW).check(asked)
    asked = trial(**{**sets, "train": folders("one", 0, 60, digits=[3])})
    with pytest.raises(InputError, match="has 1 labelled class"):
        Robustness(**FEW).check(asked)
    asked.model = tiny_model(14)
    with pytest.raises(UserError, match="16 pixels or more, this model sees 14"):
        Robustness(**FEW).check(asked)


def test_features_that_are_not_finite_are_named(monkeypatch):
    own = Trial.features

    def broken(self, source, *, view=None, keep=None):
        found = own(self, source, view=view, keep=keep)
        if view is not None:
            found.class_tokens[3] = np.nan
        return found

    monkeypatch.setattr(Trial, "features", broken)
    with pytest.raises(WorkError, match=r"^1 of 60 feature vectors of demo:digits.* under gaussian_noise hold NaN"):
        run(Robustness(**FEW), trial())
