"""The task: sets with masks to figures, alone and on two ranks, stopped and resumed, and what it refuses."""

import json
import textwrap

import numpy as np
import pytest
import torch

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.tasks.segmentation import Segmentation
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from tests.evaluation.dense_sets import colour_set, labels_of, png
from tests.launch import launch

QUICK = {"size": 24, "window": 16, "stride": 8, "steps": 60, "lr": 0.02, "train_batch_size": 8}


def tiny_model(seed: int = 0) -> LoadedModel:
    network = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, generator=torch.Generator().manual_seed(seed)
    ).eval()
    return LoadedModel(network, "tiny", Preprocess(resize=16, crop=16), True, {"arch": "tiny", "seed": seed})


def trial(train: str, test: str, **settings) -> Trial:
    return Trial(tiny_model(), open_source(test), open_source(train), batch_size=64, **settings)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return colour_set(folder / "train.parquet", 24), colour_set(folder / "test.parquet", 10, seed=500)


def run(task, asked):
    task.check(asked)
    return task.judge(asked, task.collect(asked))


def outcome(judged):
    found = {figure.metric: figure.statistic.value() for figure in judged.figures}
    return found | {"values": judged.figures[0].statistic.values.tolist(), "loss": judged.settings["final_loss"]}


@pytest.mark.parametrize("changes", [{}, {"head": "ms", "scales": [1.0, 1.5]}, {"augmentation": "crops"}])
def test_classes_that_differ_in_colour_are_found(sets, changes):
    judged = run(Segmentation(**QUICK | changes), trial(*sets))
    assert [figure.metric for figure in judged.figures] == ["mIoU", "pixel_accuracy", "mean_class_accuracy"]
    value = judged.figures[0].statistic.value()
    # Bilinear logits of patches of 4 pixels cannot follow squares of 8 to the pixel.
    assert value > 0.6 and value > judged.settings["most_frequent_class"]["mIoU"] + 0.3
    assert judged.settings["classes"] == 3 and len(judged.settings["iou_by_class"]) == 3
    assert judged.settings["blocks"] == ([0, 1] if changes.get("head") == "ms" else [1])
    assert len(judged.units) == len(judged.figures[0].statistic) == 10 and judged.predictions.num_rows == 10
    assert len(judged.panels) == 6 and [image.shape for image in judged.panels[0].images] == [(24, 32, 3)] * 3
    json.dumps(judged.settings)


def test_tokens_in_memory_or_computed_at_every_step(sets):
    stored = run(Segmentation(**QUICK, augmentation="none", memory=8), trial(*sets))
    asked = trial(*sets)
    said = []
    asked.say = said.append
    computed = run(Segmentation(**QUICK, augmentation="none", memory=0), asked)
    assert stored.settings["token_maps"] == "stored" and computed.settings["token_maps"] == "computed at every step"
    assert "the model runs at every step instead" in said[0]
    first, second = (judged.figures[0].statistic.value() for judged in (stored, computed))
    assert abs(first - second) < 0.1


def test_the_same_command_finds_the_same_and_another_seed_does_not(sets):
    first, again, other = (outcome(run(Segmentation(**QUICK), trial(*sets, seed=seed))) for seed in (0, 0, 1))
    assert first == again != other


def test_a_killed_command_goes_on_bitwise(sets, tmp_path, monkeypatch):
    task = Segmentation(**QUICK | {"steps": 230})
    wanted = outcome(run(task, trial(*sets)))
    kept = {"store": Parts(tmp_path / "out"), "cache": Parts(tmp_path / "cache")}
    steps = {"n": 0}

    def dies(label, total, unit="images"):
        import contextlib

        @contextlib.contextmanager
        def counting():
            def advance(count):
                steps["n"] += unit == "steps"
                if steps["n"] == 210:
                    raise KeyboardInterrupt

            yield advance

        return counting()

    with pytest.raises(KeyboardInterrupt):
        run(task, trial(*sets, progress=dies, **kept))
    monkeypatch.setattr("dinov2cli.evaluation.dense.maps._block", lambda *_: pytest.fail("maps computed again"))
    steps["n"] = 1000
    assert outcome(run(task, trial(*sets, progress=dies, **kept))) == wanted
    assert steps["n"] == 1030  # from the state of step 200
    monkeypatch.setattr(Seeing, "of", lambda *_: pytest.fail("the test set segmented again"))
    asked = trial(*sets, **kept)
    monkeypatch.setattr(Segmentation, "_panels", lambda *_: [])
    assert outcome(run(task, asked)) == wanted


def test_ignored_numbers_neither_train_nor_count(tmp_path):
    def with_border(mask, number):
        mask[:, :6] = 255 if number % 2 else 9
        return mask

    train = colour_set(tmp_path / "train.parquet", 12, changed=with_border)
    test = colour_set(tmp_path / "test.parquet", 4, seed=500, changed=with_border)
    judged = run(Segmentation(**QUICK, ignore=[255, 9]), trial(train, test))
    assert judged.settings["classes"] == 3
    assert judged.figures[1].statistic.values[:, 1].tolist() == [24 * 26] * 4


def test_zero_as_no_class(tmp_path):
    def shifted(mask, number):
        mask += 1
        mask[0] = 0
        return mask

    train = colour_set(tmp_path / "train.parquet", 12, changed=shifted)
    judged = run(Segmentation(**QUICK, reduce_zero_label=True), trial(train, train))
    assert judged.settings["classes"] == 3 and judged.figures[1].statistic.values[0, 1] == 23 * 32


def test_masks_in_folders(tmp_path):
    from tests.evaluation.dense_sets import image_of

    for part, seed in (("train", 0), ("test", 50)):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
        for number in range(6):
            labels = labels_of(seed + number, (24, 32))
            (tmp_path / part / "images" / f"{number}.png").write_bytes(png(image_of(labels, seed + number)))
            (tmp_path / part / "masks" / f"{number}.png").write_bytes(png(labels))
    train, test = (f"{tmp_path / part}/images?mask=../masks" for part in ("train", "test"))
    assert run(Segmentation(**QUICK), trial(train, test)).figures[0].statistic.value() > 0.5


def test_a_class_of_the_test_set_that_training_lacks(tmp_path, sets):
    test = colour_set(tmp_path / "test.parquet", 5, seed=500, classes=4)
    with pytest.raises(InputError, match=r"its mask holds 3, expected 0 to 2 of the 3 classes"):
        run(Segmentation(**QUICK), trial(sets[0], test))
    judged = run(Segmentation(**QUICK, classes=4), trial(sets[0], test))
    assert "classes 3 of the test masks are in no training mask" in judged.notes[0]
    assert judged.settings["iou_by_class"][3] == 0


def test_what_is_refused(tmp_path, sets):
    plain = open_source("demo:digits?count=9").spec
    with pytest.raises(InputError, match=r"no mask .*\?mask=COLUMN"):
        Segmentation().check(trial(sets[0], plain))
    with pytest.raises(UserError, match="stride 40: expected 1 to 16"):
        Segmentation(**QUICK | {"stride": 40}).check(trial(*sets))
    with pytest.raises(InputError, match=r"its mask holds 2, expected 0 to 1 of the 2 classes"):
        run(Segmentation(**QUICK, classes=2), trial(*sets))

    def cut(mask, number):
        return mask[:20] if number == 3 else mask

    odd = colour_set(tmp_path / "odd.parquet", 6, changed=cut)
    with pytest.raises(InputError, match=r"odd\.parquet.*#3: its mask has 32 x 20 pixels, the image 32 x 24"):
        run(Segmentation(**QUICK), trial(odd, sets[1]))
    assert run(Segmentation(**QUICK, resize_target=True), trial(odd, odd)).figures[0].statistic.value() > 0.3
    single = colour_set(tmp_path / "one.parquet", 4, changed=lambda mask, _: mask * 0 + 1)
    with pytest.raises(InputError, match="only class 1; expected two classes or more"):
        run(Segmentation(**QUICK), trial(single, sets[1]))


def test_models_without_tokens_are_refused(sets):
    from dinov2cli.models.descriptors import Descriptor

    asked = trial(*sets)
    asked.model.network = Descriptor.__new__(Descriptor)
    with pytest.raises(UserError, match="has no tokens"):
        Segmentation().check(asked)


_LAUNCHED = """
    import json, os, sys
    from dinov2cli.distributed import join, leave
    from dinov2cli.evaluation.tasks.segmentation import Segmentation
    from tests.evaluation.tasks.test_segmentation import QUICK, outcome, trial
    ranks = join("cpu")
    for changes in ({}, {"augmentation": "crops", "steps": 6}):
        asked = trial(*sys.argv[1:3], ranks=ranks)
        task = Segmentation(**QUICK | {"train_batch_size": 3} | changes)
        task.check(asked)
        collected = ranks.together(lambda: task.collect(asked))
        judged = ranks.first(lambda: outcome(task.judge(asked, collected)))
        if ranks.main:
            print(json.dumps(judged), flush=True)
    leave()
    os._exit(0)
"""


def test_two_ranks_find_what_one_finds(sets, tmp_path):
    """Up to the order of sums in float32: a pixel in a hundred may fall to the other side of a border."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_LAUNCHED))
    done = launch(str(script), *sets, processes=2, module="")
    assert done.returncode == 0, done.stderr[-3000:]
    for line, changes in zip(done.stdout.splitlines(), ({}, {"augmentation": "crops", "steps": 6}), strict=True):
        alone = outcome(run(Segmentation(**QUICK | {"train_batch_size": 3} | changes), trial(*sets)))
        found = json.loads(line)
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert found["mIoU"] == pytest.approx(alone["mIoU"], abs=5e-3)
        assert np.abs(np.array(found["values"]) - alone["values"]).max() <= 0.01 * 24 * 32
