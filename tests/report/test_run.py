"""The page of a run with a teacher, and with several students."""

import io
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
from PIL import Image

from dinov2cli.report.palette import LIGHT
from dinov2cli.report.plots import loss_curves, plain_key
from dinov2cli.report.run import run_report, student_names
from dinov2cli.report.side_by_side import ModelFigures, SideBySide

SHAPE: dict[str, Any] = {"embed_dim": 8, "depth": 1, "patch_size": 4, "size": 8}
BESIDE = SideBySide([ModelFigures("teacher", "t", 10, **SHAPE), ModelFigures("student", "s", 5, **SHAPE)], 1, ["Done."])


def rows(count=5):
    found = []
    for step in range(1, count + 1):
        line = {"step": step, "total_steps": count, "images": 8 * step, "loss/total": 5.0, "lr": 1e-3, "skipped": 0}
        for number, name in enumerate(("small", "base/x")):
            line |= {f"{name}/loss/total": 5.0 + number - step / 10, f"{name}/loss/feature": 0.5, f"{name}/rankme": 9.0}
        found.append(line)
    found[-1]["small/eval/knn"] = 0.25
    found[-1]["base/x/eval/knn"] = 0.75
    return found


def texts(svg):
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def png(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_students_are_told_by_their_losses():
    assert student_names(rows()) == ["small", "base/x"]
    assert student_names([{"step": 1, "loss/total": 1.0, "lr": 1.0}]) == []
    assert plain_key("base/x/loss/total", ["small", "base/x"]) == "loss/total"
    assert plain_key("loss/total", ["small"]) == "loss/total"


def test_a_chart_has_a_line_of_every_student_and_its_name():
    drawn = loss_curves(rows(), students=["small", "base/x"])
    found = texts(drawn)
    titles = ["Total loss", "Features of the teacher", "Learning rate"]
    assert [text for text in found if text in titles] == titles
    assert found.count("small") == found.count("base/x") == 1
    # Two charts with a line for each student and its entry in the legend; the rate is of all, in the first colour.
    assert drawn.count(f"{LIGHT['accent']}); stroke-width: 1.6") == 2 + 1 + 1
    assert drawn.count(f"{LIGHT['warm']}); stroke-width: 1.6") == 2 + 1
    long = loss_curves(rows(80), students=["small", "base/x"], keys=["loss/total"])
    assert long.count("stroke-opacity: 0.35") == 2


def test_charts_of_one_student_have_no_legend_and_no_names():
    line = {"step": 1, "loss/total": 1.0, "loss/gram": 0.5, "loss/feature": 0.1}
    found = texts(loss_curves([line, {**line, "step": 2}]))
    titles = ("Total loss", "Features of the teacher", "Gram, patch similarities")
    assert [text for text in found if text in titles] == list(titles)


def test_the_page_of_several_students_shows_each():
    maps = {"small": [(2, png(1)), (4, png(2))], "base/x": [(2, png(3))], "none": []}
    page = run_report(rows(), title="r", maps=maps, distilled=True)
    for part in (
        "total loss of small",
        "total loss of base/x",
        "was 5.90 at step 1",
        "knn of base/x, during training",
        "75.0 %",
        "Distillation of a DINOv2 backbone",
        "First evaluation of small, step 2.",
        "Newest evaluation of small, step 4.",
        "First evaluation of base/x, step 2.",
        "RankMe",
        "these losses should fall",
    ):
        assert part in page, part
    assert "Newest evaluation of base/x" not in page and page.count("data:image/png") == 3
    assert "Steps left out" not in page
    skipping = rows()
    skipping[2]["small/skipped"] = 1
    assert "Steps left out" in run_report(skipping, title="r")


def test_teacher_and_students_come_before_the_curves():
    page = run_report(rows(), title="r", distilled=True, beside=(BESIDE, None), crops=png(5))
    assert page.index("Teacher and students side by side") < page.index(">Losses<")
    assert "Nothing is hidden from them" in page and "Augmented crops." in page
    assert "Teacher and students" in run_report([], title="r", beside=(BESIDE, None))


def test_the_page_of_pretraining_is_as_it_was():
    page = run_report([{"step": 1, "total_steps": 1, "loss/total": 9.0}], title="r", crops=png(5), maps=[(1, png(6))])
    assert "Training of a DINOv2 backbone." in page and "the teacher&#x27;s patch features" in page
    assert "grey patches hidden" in page and "First evaluation, step 1." in page and "side by side" not in page
