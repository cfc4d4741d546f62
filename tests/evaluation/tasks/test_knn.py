import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.features import Features
from dinov2cli.evaluation.tasks.knn import Knn
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

TRAIN, TEST = "demo:digits?split=train&count=150&size=28", "demo:digits?split=test&count=60&size=28"


def tiny_model() -> LoadedModel:
    network = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, generator=torch.Generator().manual_seed(0)
    ).eval()
    return LoadedModel(network, "tiny", Preprocess(resize=28, crop=28), True, {"arch": "tiny", "seed": 0})


def trial(train: str = TRAIN, test: str = TEST, **settings) -> Trial:
    return Trial(tiny_model(), open_source(test), open_source(train), **settings)


def run(task, trial):
    task.check(trial)
    return task.judge(trial, task.collect(trial))


class Labelled(Trial):
    """A trial with labels and features that are given: train first, then test."""

    def __init__(self, *labels, names=None, signal: float = 8.0) -> None:
        super().__init__(tiny_model(), open_source("demo:digits?count=60"), open_source("demo:digits?count=150"))
        self.given = {}
        for source, some in zip((self.train, self.test), labels, strict=True):
            some = np.asarray(some)
            source.__dict__["_labelling"] = (some, names)
            tokens = np.random.default_rng(len(some)).normal(size=(len(some), 1, 10)).astype(np.float32)
            tokens[np.arange(len(some)), 0, some] += signal
            nothing = np.zeros((len(some), 32), np.uint8)
            index = np.arange(len(some))
            self.given[id(source)] = Features(index, some, names, tokens, None, tokens[:, 0], nothing, 0.0)

    def features(self, source, *, view=None, keep=None):
        return self.given[id(source)]


@pytest.fixture(scope="module")
def found():
    where = Labelled(np.arange(150) % 10, np.arange(60) % 10, names=list("abcdefghij"), signal=2.0)
    return where, run(Knn(neighbours=[10, 20], shots=[5], tries=3), where)


def test_figures_are_those_of_scikit_learn_on_the_class_tokens(found):
    where, judged = found
    train, test = where.features(where.train), where.features(where.test)
    oracle = KNeighborsClassifier(
        n_neighbors=20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.class_tokens[:, -1], train.labels)
    assert judged.figures[0].metric == "top1_k20"
    assert judged.figures[0].statistic.value() == pytest.approx(oracle.score(test.class_tokens[:, -1], test.labels))
    names = [figure.metric for figure in judged.figures]
    assert names[:4] == ["top1_k20", "top1_k10", "top5_k10", "top5_k20"]
    assert names[4:] == ["top1_k10_shots5", "top5_k10_shots5", "top1_k20_shots5", "top5_k20_shots5"]
    few = judged.figures[4]
    assert few.settings["shots"] == 5 and few.settings["tries"] == 3 and few.settings["train_images"] == 50
    assert 0 < few.settings["spread"] < 0.2 and few.statistic.value() < 1
    assert judged.settings["train_images"] == 150 and not judged.settings["leave_one_out"]


def test_the_table_has_a_row_for_every_test_image(found):
    where, judged = found
    table = judged.predictions
    assert table.column("id").to_pylist() == judged.units == where.test.ids
    assert table.column("label").to_pylist() == list("abcdefghij") * 6
    correct = np.array(table.column("correct").to_pylist())
    same = np.array(table.column("label").to_pylist()) == np.array(table.column("prediction").to_pylist())
    assert np.array_equal(correct, same) and correct.mean() == judged.figures[0].statistic.value()
    for row in table.to_pylist():
        assert len(row["neighbours"]) == len(row["neighbour_labels"]) == len(row["similarities"]) == 5
        assert set(row["neighbours"]) <= set(where.train.ids)
        assert row["similarities"] == sorted(row["similarities"], reverse=True)
        place = where.train.ids.index(row["neighbours"][0])
        assert where.train.label_names[where.train.labels[place]] == row["neighbour_labels"][0]
        assert 0.1 < row["confidence"] <= 1


def test_the_same_images_are_left_out_in_turn():
    where = trial(TRAIN, TRAIN)
    judged = run(Knn(neighbours=[5]), where)
    assert judged.notes[0] == "train and test are the same images: each is left out of its own neighbours"
    assert judged.settings["leave_one_out"]
    for row in judged.predictions.to_pylist():
        assert row["id"] not in row["neighbours"]
    with pytest.raises(UserError, match=r"^--shots with the same images for train and test"):
        run(Knn(shots=[1]), where)


def test_pools_differ():
    where = trial()
    figures = {
        pool: run(Knn(neighbours=[5], pool=pool), where).predictions.column("similarities").to_pylist()
        for pool in ("auto", "cls", "mean", "cls+mean")
    }
    assert figures["auto"] == figures["cls"]
    assert figures["mean"] != figures["cls"] != figures["cls+mean"]


def test_five_classes_have_no_top_five_and_absent_ones_are_a_note():
    labels = np.arange(30) % 5
    judged = run(Knn(neighbours=[3]), Labelled(labels, np.where(labels == 4, 0, labels), names=list("abcde")))
    assert [figure.metric for figure in judged.figures] == ["top1_k3"]
    assert judged.figures[0].statistic.value() == 1
    assert judged.notes == [
        "1 of 5 classes have no test image (e): figures are of the others, and answers naming these count as wrong"
    ]


def test_unlabelled_images_take_no_part():
    labels = np.arange(30) % 6
    judged = run(Knn(neighbours=[3]), Labelled(np.where(labels == 5, -1, labels), np.where(labels > 2, -1, labels)))
    assert len(judged.units) == len(judged.predictions) == 15
    assert judged.settings["train_images"] == 25 and judged.settings["classes"] == 5


@pytest.mark.parametrize(
    "train, test, message",
    [
        ([0] * 9, [0] * 9, "has one class (0), so there is nothing to tell apart"),
        ([0, 1] * 5, [0, 2], "has 1 class that"),
        ([0, 1] * 5, [-1, -1], "none of its 2 images has a label"),
    ],
)
def test_unfit_labels_are_refused_before_anything_is_computed(train, test, message):
    with pytest.raises(InputError) as caught:
        Knn().check(Labelled(train, test))
    assert message in str(caught.value)
