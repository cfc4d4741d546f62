import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.tasks.logreg import Logreg
from dinov2cli.evaluation.tasks.trial import Trial
from tests.evaluation.tasks.test_knn import Labelled, run, tiny_model, trial

FEW = [1e-3, 1e-1, 10.0]


def test_figures_are_those_of_scikit_learn_at_the_chosen_strength():
    where = Labelled(np.arange(150) % 10, np.arange(60) % 10, signal=2.0)
    judged = run(Logreg(strengths=FEW), where)
    train, test = where.features(where.train), where.features(where.test)
    oracle = LogisticRegression(C=judged.settings["C"], tol=1e-8, max_iter=10_000).fit(
        train.pooled.astype(np.float64), train.labels
    )
    figures = {figure.metric: figure.statistic.value() for figure in judged.figures}
    assert list(figures) == ["top1", "top5", "mean_per_class"]
    answers = oracle.predict(test.pooled.astype(np.float64))
    assert figures["top1"] == pytest.approx((answers == test.labels).mean(), abs=1e-3)
    recalls = [(answers == c)[test.labels == c].mean() for c in np.unique(test.labels)]
    assert figures["mean_per_class"] == pytest.approx(np.mean(recalls), abs=2e-3)
    assert figures["top1"] < figures["top5"]
    table = judged.predictions
    assert table.column("id").to_pylist() == judged.units == where.test.ids
    assert np.mean(table.column("correct").to_pylist()) == figures["top1"]
    confidence = oracle.predict_proba(test.pooled.astype(np.float64)).max(axis=1)
    assert np.allclose(table.column("confidence").to_pylist(), confidence, atol=0.01)
    assert judged.settings["C"] in FEW and len(judged.settings["validation"]) == 3


def test_the_metric_asked_for_comes_first():
    judged = run(Logreg(strengths=FEW, metric="mean_per_class"), trial())
    assert [figure.metric for figure in judged.figures] == ["mean_per_class", "top1", "top5"]


def test_few_and_absent_classes():
    labels = np.arange(30) % 3
    judged = run(Logreg(strengths=FEW), Labelled(labels, np.where(labels == 2, -1, labels), names=list("abc")))
    assert [figure.metric for figure in judged.figures] == ["top1", "mean_per_class"]
    assert judged.figures[0].statistic.value() == judged.figures[1].statistic.value() == 1
    assert len(judged.units) == 20 and "1 of 3 classes have no test image (c)" in judged.notes[-1]


@pytest.mark.parametrize(
    "train, test, message",
    [
        ([0] * 9, [0] * 9, "has one class (0), so there is nothing to tell apart"),
        ([0, 1] * 5, [0, 2], "has 1 class that"),
        ([0, 1, 2], [0, 1, 2], "no training class has two images"),
    ],
)
def test_unfit_labels_are_refused_before_anything_is_computed(train, test, message):
    with pytest.raises(InputError) as caught:
        Logreg().check(Labelled(train, test))
    assert message in str(caught.value)


def test_features_that_are_not_finite_are_refused():
    where = Labelled(np.arange(30) % 3, np.arange(30) % 3)
    where.given[id(where.test)].pooled[4, 2] = np.inf
    with pytest.raises(WorkError, match="1 of 30 feature vectors of the test set hold NaN or infinity"):
        run(Logreg(strengths=FEW), where)


def shapes(path, n: int, seed: int) -> None:
    """Images with up to three bars of colour, each a label of its own; every tenth was never labelled."""
    rng = np.random.default_rng(seed)
    words = np.array(["red", "green", "blue"])
    present = rng.random((n, 3)) < 0.5
    images = []
    for row in present:
        pixels = rng.integers(0, 60, (28, 28, 3)).astype(np.uint8)
        for channel in np.flatnonzero(row):
            pixels[9 * channel : 9 * channel + 9, :, channel] += 190
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        images.append({"bytes": buffer.getvalue(), "path": None})
    lists = [None if i % 10 == 9 else words[row].tolist() for i, row in enumerate(present)]
    pq.write_table(pa.table({"image": images, "things": pa.array(lists, pa.list_(pa.string()))}), path)


def test_lists_of_labels_give_mean_average_precision(tmp_path):
    shapes(tmp_path / "train.parquet", 80, 0)
    shapes(tmp_path / "test.parquet", 50, 1)
    train, test = (open_source(f"{tmp_path / name}.parquet?label=things") for name in ("train", "test"))
    where = Trial(tiny_model(), test, train)
    judged = run(Logreg(strengths=[0.1, 10.0]), where)
    (figure,) = judged.figures
    assert figure.metric == "mAP" and len(figure.statistic) == len(judged.units) == 45
    names = ["blue", "green", "red"]
    truth = np.array(
        [[name in some for name in names] for some in test.column("things").to_pylist() if some is not None]
    )
    table = np.array([[n in some for n in names] for some in train.column("things").to_pylist() if some is not None])
    rows = [np.array([i % 10 != 9 for i in range(n)]) for n in (80, 50)]
    x, z = (where.features(s).pooled[r].astype(np.float64) for s, r in zip((train, test), rows, strict=True))
    scores = [
        LogisticRegression(C=judged.settings["C"], tol=1e-8, max_iter=10_000).fit(x, column).decision_function(z)
        for column in table.T
    ]
    expected = average_precision_score(truth, np.stack(scores, axis=1), average="macro")
    assert figure.statistic.value() == pytest.approx(expected, abs=0.01)
    assert figure.statistic.value() > truth.mean() + 0.1
    assert judged.predictions.column("labels").to_pylist() == [
        sorted(some) for some in test.column("things").to_pylist() if some is not None
    ]
    with pytest.raises(UserError, match=r"^--metric top1: .* has lists of labels; use map"):
        Logreg(metric="top1").check(where)
    with pytest.raises(UserError, match=r"^--metric map: .* has one label per image; use top1, mean_per_class or auto"):
        Logreg(metric="map").check(trial())
