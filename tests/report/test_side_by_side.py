import json
import math
from typing import Any

import numpy as np
import pytest

from dinov2cli.errors import InputError
from dinov2cli.evaluation.side_by_side import Estimate
from dinov2cli.report.html import Report
from dinov2cli.report.pca import pca_maps
from dinov2cli.report.side_by_side import ModelFigures, SideBySide, add_side_by_side, protocol

SHAPE: dict[str, Any] = {"embed_dim": 384, "depth": 12, "patch_size": 14, "size": 224}
TEACHER = ModelFigures(
    "teacher",
    "big",
    22_000_000,
    **SHAPE,
    images_per_s=Estimate(50.0, 45.0, 52.0, 7),
    memory=3 * 2**30,
    figures={"knn": Estimate(0.8, 0.78, 0.82, 1000), "linear": Estimate(0.82, 0.79, 0.85, 500)},
)
STUDENT = ModelFigures(
    "student",
    "small <x>",
    5_500_000,
    **SHAPE,
    images_per_s=Estimate(150.0, 140.0, 155.0, 7),
    memory=200 * 2**20,
    figures={
        "knn": Estimate(0.7, 0.67, 0.73, 1000),
        "linear": Estimate(0.81, 0.78, 0.84, 500),
        "class_cosine": Estimate(0.91234, 0.9, 0.92, 500),
        "class_constant": Estimate(0.4, 0.39, 0.41, 500),
        "class_cka": Estimate(math.nan, math.nan, math.nan, 1000),
    },
    changes={"knn": Estimate(-0.1, -0.12, -0.08, 1000), "linear": Estimate(-0.01, -0.03, 0.01, 500)},
)
FOUND = SideBySide([TEACHER, STUDENT], 64, ["How it was done."], ["One thing is left out."])


def page(found, **more):
    report = Report("run")
    add_side_by_side(report, found, **more)
    return report.html()


def test_every_figure_is_on_the_page_beside_the_teachers():
    tokens = np.random.default_rng(0).normal(size=(2, 4, 4, 8))
    picture = np.zeros((30, 30, 3), np.uint8)
    html = page(FOUND, maps=pca_maps([picture] * 2, {"teacher": tokens, "student": tokens}, images_per_row=1))
    for part in (
        "80.0 % [78.0, 82.0]",
        "70.0 % [67.0, 73.0]",
        "-10.0 points [-12.0, -8.0]",
        "student, k-NN, k = 20: 70.0 % against 80.0 % of the teacher, -10.0 points [-12.0, -8.0], beyond chance.",
        "-1.0 points [-3.0, +1.0], within chance.",
        "student: 25.0 % of the teacher&#x27;s parameters, 3.00 times its images per second.",
        "22.00 M",
        "small &lt;x&gt;",
        "50 [45, 52]",
        "3.00 GiB",
        "200.0 MiB",
        "memory, forward of 64",
        "0.912 [0.900, 0.920]",
        "<td>–</td>",
        "One thing is left out.",
        "How it was done.",
    ):
        assert part in html, part
    assert html.count("<image ") == 2 * 3  # an image and two maps in each row
    assert "What teacher and students see" not in page(FOUND)


def test_parts_without_figures_are_left_out():
    bare = SideBySide([ModelFigures("teacher", "t", 10, **SHAPE), ModelFigures("student", "s", 5, **SHAPE)], 1, ["x"])
    html = page(bare)
    assert "50.0 % of the teacher" in html and "<figure>" not in html
    for absent in ("linear probe", "How far the tokens agree", "images/s", "memory"):
        assert absent not in html, absent


def test_several_students_have_a_chart_for_each_figure():
    second = ModelFigures("tiny", "t", 1, **SHAPE, figures=STUDENT.figures, changes=STUDENT.changes)
    html = page(SideBySide([TEACHER, STUDENT, second], 64, []))
    assert html.count("<figure>") == 2
    assert ">tiny</th>" in html and html.count("-10.0 points [-12.0, -8.0]</td>") == 2
    half = SideBySide([TEACHER, ModelFigures("student", "s", 5, **SHAPE)], 1, [])
    assert "<figure>" not in page(half)  # bars of the teacher alone would compare nothing


def test_numbers_survive_json_and_what_has_none_is_null():
    text = json.dumps(FOUND.to_json(), allow_nan=False)
    assert json.loads(text)["models"][1]["figures"]["class_cka"]["value"] is None
    again = SideBySide.from_json(json.loads(text))
    assert page(again) == page(FOUND)
    assert again.models[0] == TEACHER
    broken: Any
    for broken in ({}, [], None, {"models": [{"label": "x"}]}, {"models": 3}):
        with pytest.raises(InputError, match="not a comparison of teacher and students"):
            SideBySide.from_json(broken)


def test_metrics_are_all_numbers_by_model():
    found = FOUND.metrics()
    assert found["teacher/knn"] == 0.8 and found["student/knn"] == 0.7 and found["student/knn_change"] == -0.1
    assert found["student/parameters"] == 5_500_000 and found["teacher/memory_bytes"] == 3 * 2**30
    assert found["student/images_per_s"] == 150
    assert "student/class_cka" not in found and "teacher/knn_change" not in found


def test_the_protocol_says_images_sizes_and_place():
    said = " ".join(
        protocol(
            FOUND.models,
            train=("/a/very/long/way/train.parquet?label=label", 2000),
            test=None,
            batch=64,
            where="in bf16 on a GPU",
        )
    )
    for part in ("2,000 images drawn from train.parquet?label=label, on which", "judged by all others", "in bf16 on"):
        assert part in said, part
    assert "/a/very" not in said and "teacher 224 px, student 224 px" in said and "the median of 7" in said
    said = " ".join(protocol(FOUND.models, train=("a", 3), test=("b/" + 60 * "x", 4), batch=1, where=""))
    assert "4 drawn from " + 35 * "x" + "… to judge on" in said and "on which the students" not in said
