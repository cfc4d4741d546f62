"""The page of an evaluation: whose examples it shows, and what it says of classes."""

import numpy as np
import pyarrow as pa

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.data.source import open_source
from dinov2cli.evaluation.tasks.interface import Panel
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.load import load_model
from dinov2cli.report.classes import class_answers, class_table, confusion_chart, has_classes
from dinov2cli.report.evaluation import ModelResult, best_of, evaluation_report
from dinov2cli.report.examples import patch_maps, surest_mistakes


def row(model, value, **settings):
    shared = {"confidence": 0.95, "headline": True, "resamples": 200}
    return ResultRow(model, "t", "d", "error", value, value - 0.1, value + 0.1, 7, {**shared, **settings}, 1.0)


def answers(labels, given, confidence=None, ids=None):
    ids = ids or [str(i) for i in range(len(labels))]
    sure = [0.5] * len(labels) if confidence is None else confidence
    columns = {"id": ids, "label": list(labels), "prediction": list(given), "confidence": sure}
    return pa.table({**columns, "correct": [a == b for a, b in zip(labels, given, strict=True)]})


def test_the_best_model_is_the_one_shown():
    models = {name: ModelResult([row(name, value)]) for name, value in (("a", 0.4), ("b", 0.7), ("c", 0.7))}
    assert best_of(models) == "b"
    lower = {name: ModelResult([row(name, value, lower_is_better=True)]) for name, value in (("a", 0.4), ("b", 0.7))}
    assert best_of(lower) == "a"
    page = evaluation_report(lower, title="t")
    assert "40.0 % [30.0, 50.0] ★" in page and "70.0 % [60.0, 80.0] ★" not in page


def test_what_was_found_has_a_column_for_each_model():
    models = {
        "a": ModelResult([row("a", 0.4, found={"head": "x1", "validation": {str(i): i for i in range(60)}})]),
        "b": ModelResult([row("b", 0.5, found={"head": "x2", "more": 3}, notes=["odd"])]),
    }
    page = evaluation_report(models, title="t")
    assert "<th>found or chosen</th><th>a</th><th>b</th>" in page
    assert "<tr><td>head</td><td>x1</td><td>x2</td></tr>" in page and "<td>more</td><td></td><td>3</td>" in page
    assert "<summary>a: validation</summary>" in page and "odd" in page and "<td>found</td>" not in page


def test_classes_are_counted_the_worst_first():
    table = answers("aaabbbbc", "aabbbaac")
    found = class_answers(table)
    assert [(one.name, one.images, one.right, one.taken_for, one.times) for one in found] == [
        ("b", 4, 2, "a", 2),
        ("a", 3, 2, "b", 1),
        ("c", 1, 1, "", 0),
    ]
    headers, rows = class_table({"m": found, "n": class_answers(answers("aaabbbbc", "aaabbbbc"))}, 2)
    assert headers == ["class", "images", "right, m", "right, n", "most often taken for by m"]
    assert rows == [["b", "4", "50.0 %", "100.0 %", "a (2)"], ["a", "3", "66.7 %", "100.0 %", "b (1)"]]
    assert has_classes(table) and not has_classes(None) and not has_classes(pa.table({"id": ["x"]}))
    assert confusion_chart(table).count("<path") > 6
    many = [str(i) for i in range(50)]
    assert confusion_chart(answers(many, many)) is None


def test_examples_are_the_surest_mistakes_and_maps_have_the_grid_of_the_patches():
    source = open_source("demo:photos?count=40")
    labels, given, sure = ["x"] * 40, ["x"] * 40, np.linspace(0.1, 0.9, 40)
    given[3], given[20] = "wrong-3", "wrong-20"
    table = answers(labels, given, sure.tolist(), list(source.ids))
    grid = surest_mistakes(table, source)
    assert grid.index("wrong-20") < grid.index("wrong-3") and grid.count("is x") == 2
    assert surest_mistakes(answers(labels, labels, sure.tolist(), list(source.ids)), source) is None
    loaded = load_model("tiny", img_size=32)
    images, tokens = patch_maps(loaded.backbone, loaded.preprocess, source, count=3)
    side = images[0].shape[0] // loaded.backbone.patch_size
    assert tokens.shape == (3, side, side, loaded.backbone.embed_dim) and side >= 16


def test_the_page_of_a_trial_shows_panels_and_what_patches_see():
    source = open_source("demo:photos?count=40")
    trial = Trial(load_model("tiny", img_size=32), source)
    panel = Panel("one image", [np.zeros((8, 8, 3), np.uint8)] * 2, ["image", "truth"])
    page = evaluation_report({"tiny": ModelResult([row("tiny", 0.4)], panels=[panel])}, title="t", trial=trial)
    for text in ("one image", "truth", "What the patches see", "Answers of tiny"):
        assert text in page, text


def test_models_of_unlike_figures_do_not_fail():
    metres = ResultRow("m", "depth", "d", "rmse", 0.5, 0.4, 0.6, 9, {"unit": "metres", "lower_is_better": True})
    page = evaluation_report({"m": ModelResult([metres])}, title="t")
    assert "0.500 m" in page and "[0.400, 0.600]" in page
