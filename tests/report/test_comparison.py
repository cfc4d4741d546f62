import csv
import io

import pytest

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.evaluation.comparison import Change, Column, Comparison
from dinov2cli.evaluation.intervals import Difference
from dinov2cli.report.comparison import (
    as_csv,
    as_latex,
    as_markdown,
    comparison_report,
    differences_table,
    figures_table,
    sentences,
)

KNN = Column("knn", "/d/val.parquet", "top1_k20", "d/val", "share", False)
DEPTH = Column("depth", "/d/nyu", "rmse", "nyu", "metres", True)


def row(model, column, value, half):
    return ResultRow(model, column.task, column.dataset, column.metric, value, value - half, value + half, 500)


@pytest.fixture
def comparison():
    rows = {
        ("vit_s|1", KNN): row("vit_s|1", KNN, 0.5, 0.02),
        ("vit_s|1", DEPTH): row("vit_s|1", DEPTH, 0.6, 0.1),
        ("vit_b", KNN): row("vit_b", KNN, 0.625, 0.02),
        ("vit_b", DEPTH): row("vit_b", DEPTH, 0.55, 0.1),
    }
    changes = [
        Change("vit_b", KNN, Difference(0.125, 0.1, 0.15, 1500)),
        Change("vit_b", DEPTH, Difference(-0.05, -0.12, 0.02, 500)),
    ]
    return Comparison(["vit_s|1", "vit_b"], [KNN, DEPTH], rows, "vit_s|1", changes, ["sizes differ: 224 & 448"])


def test_tables_show_values_with_intervals_and_mark_the_best(comparison):
    table = figures_table(comparison)
    assert table.headers == ["model", "knn d/val: top-1, k = 20 (%)", "depth nyu: rmse (m) ↓"]
    assert [[cell.text for cell in line] for line in table.rows] == [
        ["vit_s|1", "50.0 [48.0, 52.0]", "0.600 [0.500, 0.700]"],
        ["vit_b", "62.5 [60.5, 64.5]", "0.550 [0.450, 0.650]"],
    ]
    assert [[cell.best for cell in line] for line in table.rows] == [[False] * 3, [False, True, True]]
    turned = figures_table(comparison, transposed=True, intervals=False)
    assert turned.headers == ["", "vit_s|1", "vit_b"]
    assert [cell.text for cell in turned.rows[0]] == ["knn d/val: top-1, k = 20 (%)", "50.0", "62.5"]
    lines = [[cell.text for cell in line] for line in differences_table(comparison).rows]
    assert lines[0][2:] == ["+12.5 [+10.0, +15.0] *", "1,500", "better"]
    assert lines[1][2:] == ["-0.050 [-0.120, +0.020]", "500", "–"]


def test_a_figure_that_a_model_lacks_leaves_a_gap(comparison):
    del comparison.rows["vit_s|1", KNN]
    comparison.rows["vit_b", DEPTH] = row("vit_b", DEPTH, float("nan"), 0.1)
    cells = [[cell.text for cell in line] for line in figures_table(comparison).rows]
    assert cells[0][1] == "" and cells[1][2] == "– [–, –]"
    assert comparison.best(KNN) == [] and comparison.best(DEPTH) == []
    assert "<svg" not in comparison_report(comparison)  # nothing that both were measured by


def test_markdown_and_latex_have_the_best_in_bold_and_nothing_that_breaks_a_table(comparison):
    text = as_markdown([figures_table(comparison), differences_table(comparison)], comparison.notes)
    lines = text.splitlines()
    assert lines[1] == "| --- | --- | --- |"
    assert lines[2] == "| vit_s\\|1 | 50.0 [48.0, 52.0] | 0.600 [0.500, 0.700] |"
    assert lines[3] == "| vit_b | **62.5 [60.5, 64.5]** | **0.550 [0.450, 0.650]** |"
    assert "**+12.5 [+10.0, +15.0] \\***" in text and lines[-1] == "- sizes differ: 224 & 448"
    text = as_latex([figures_table(comparison)], comparison.notes)
    assert r"vit\_b & \textbf{62.5 [60.5, 64.5]} & \textbf{0.550 [0.450, 0.650]} \\" in text
    assert r"top-1, k = 20 (\%) & depth nyu: rmse (m) $\downarrow$ \\" in text
    assert text.startswith("\\begin{tabular}{lll}\n\\toprule") and text.endswith("% sizes differ: 224 & 448\n")


def test_csv_has_the_numbers_as_they_are(comparison):
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert len(lines) == 4
    assert float(lines[2]["value"]) == 0.625 and lines[2]["best"] == "True" and lines[2]["verdict"] == "better"
    assert lines[0]["difference"] == "" and float(lines[2]["difference_low"]) == 0.1


def test_the_page_says_what_the_tables_say(comparison):
    assert sentences(comparison) == [
        "vit_b against vit_s|1, of 2 figures: better in 1, within chance in 1.",
    ]
    page = comparison_report(comparison, title="Two models", confidence=0.9)
    for part in (
        "<h1>Two models</h1>",
        "better in 1, within chance in 1.",
        "62.5 [60.5, 64.5] ★",
        "+12.5 [+10.0, +15.0] *",
        "Differences to vit_s|1",
        "the 90% interval leaves out zero",
        "sizes differ: 224 &amp; 448",
        "best: vit_b",
    ):
        assert part in page, part
    assert page.count("<svg") == 1


def test_several_models_have_a_chart_for_each_figure(comparison):
    comparison.models.append("third")
    for column in (KNN, DEPTH):
        comparison.rows["third", column] = row("third", column, 0.4, 0.01)
    page = comparison_report(comparison)
    assert page.count("<svg") == 1 and "40.0 %" in page  # the depth error is no share


def test_one_model_has_no_differences(comparison):
    comparison.models = ["vit_b"]
    comparison.rows = {place: found for place, found in comparison.rows.items() if place[0] == "vit_b"}
    comparison.changes = []
    page = comparison_report(comparison)
    assert "Differences to" not in page and "62.5 [60.5, 64.5]" in page and "1 model, 2 figures" in page
