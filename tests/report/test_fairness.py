"""The page about differences between groups, from made-up tables: none of these figures is a result."""

import functools
import html
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.evaluation.tasks.interface import Panel as Panelled
from dinov2cli.report.fairness import FairnessPage, fairness_report
from dinov2cli.report.fairness_charts import Panel, crossed_table, dot_chart, shortened
from dinov2cli.report.fairness_data import in_order
from dinov2cli.report.fairness_text import digits_for, estimate, p_text, share, tied, who

COUNTRIES = re.split(
    r"\s+",
    "Bangladesh Bolivia Brazil Burkina-Faso Burundi Cambodia Cameroon Canada China Colombia Denmark Egypt Ethiopia "
    "France Ghana Guatemala Haiti India Indonesia Iran Italy Jordan Kazakhstan Kenya Kyrgyzstan Latvia Lebanon "
    "Liberia Malawi Mexico Mongolia Myanmar Nepal Netherlands Nigeria Pakistan Palestine Peru Philippines Romania "
    "Russia Rwanda Serbia Somalia South-Africa South-Korea Spain Sweden Tanzania Thailand Togo Tunisia Turkey "
    "Ukraine",
)
MODELS = ["dinov2_vits14", "dinov2_vitb14", "resnet50_supervised"]
META = {"Human": "high", "Possibly-Human": "neither", "Non-Human": "low", "Crime": "low"}
ENVIRONMENT = {"dinov2cli": "0.1.0", "Python": "3.11.9", "PyTorch": "2.13.0", "NumPy": "2.3.1"}
SETTINGS = {
    "confidence": 0.95,
    "resamples": 2000,
    "permutations": 2000,
    "min_images": 30,
    "min_clusters": 5,
    "classifier": "linear",
    "seed": 0,
}


def wilson(p, n, z=1.96):
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def family(model, axis, metric, groups, *, better="high", p=0.001, expected=None, unknown=0):
    """Rows of one axis and metric: groups as (name, images, rate); fewer than 30 images are too few."""
    sign = -1 if better == "low" else 1
    whole = [(name, rate) for name, n, rate in groups if n >= 30]
    best = max(whole, key=lambda pair: sign * pair[1]) if len(whole) > 1 else None
    worst = min(whole, key=lambda pair: sign * pair[1]) if len(whole) > 1 else None
    significant = 6 * p < 0.05 and best is not None
    rows = []
    for name, n, rate in [*groups, *([("unknown", unknown, groups[0][2])] if unknown else [])]:
        known, enough = name != "unknown", name != "unknown" and n >= 30
        low, high = wilson(rate, n)
        other = enough and best is not None and name != best[0]
        difference = rate - best[1] if other else None
        rows.append(
            {
                "model": model,
                "axis": axis,
                "group": name,
                "metric": metric,
                "better": better,
                "known": known,
                "images": n,
                "clusters": max(1, n // 40),
                "enough": enough,
                "value": rate,
                "ci_low": low,
                "ci_high": high,
                "expected": expected[len(rows)] if expected and known else None,
                "best": enough and best is not None and name == best[0],
                "difference": difference,
                "difference_low": difference - 0.07 if other else None,
                "difference_high": difference + 0.07 if other else None,
                "drop": -difference / best[1] if other and better == "high" else None,
                "drop_low": None,
                "drop_high": None,
                "rest_difference": difference,
                "p_value": p if enough else None,
                "p_corrected": min(1.0, 6 * p) if enough else None,
                "significant": significant and other,
            }
        )
    size = abs(best[1] - worst[1]) if best else None
    gap = {
        "model": model,
        "axis": axis,
        "metric": metric,
        "better": better,
        "groups": len(whole),
        "left_out": len(groups) - len(whole),
        "unknown": unknown,
        "best": best[0] if best else None,
        "worst": worst[0] if worst else None,
        "best_value": best[1] if best else None,
        "worst_value": worst[1] if worst else None,
        "gap": size,
        "gap_low": max(0.0, 0.63 * size) if significant else 0.0 if best else None,
        "gap_high": 1.33 * size + 0.002 if best else None,
        "drop": size / best[1] if best and better == "high" else None,
        "drop_low": 0.6 * size / best[1] if best and better == "high" else None,
        "drop_high": 1.4 * size / best[1] if best and better == "high" else None,
        "p_value": p if best else None,
        "p_corrected": min(1.0, 6 * p) if best else None,
        "significant": significant,
    }
    return rows, gap


def page_of(protocol, models, families, **more):
    found = [family(model, *args, **kwargs) for model, args, kwargs in families]
    tables = {
        "groups": pa.Table.from_pylist([row for rows, _ in found for row in rows]),
        "gaps": pa.Table.from_pylist([gap for _, gap in found]),
        **more.pop("tables", {}),
    }
    if len(models) > 1:
        first = [gap for _, gap in found if gap["model"] == models[0] and gap["gap"] is not None]
        changes = [
            {
                "baseline": models[0],
                "model": model,
                "axis": gap["axis"],
                "metric": gap["metric"],
                "gap_before": gap["gap"],
                "gap_after": 0.8 * gap["gap"],
                "change": -0.2 * gap["gap"],
                "low": -0.2 * gap["gap"] - 0.03,
                "high": -0.2 * gap["gap"] + 0.03,
            }
            for model in models[1:]
            for gap in first[:6]
        ]
        tables["model_gaps"] = pa.Table.from_pylist(changes)
    metrics = more.pop("metrics")
    overall = {
        model: [
            ResultRow(model, protocol, "d", metric, (1 - 0.02 * i) * value, 0.9 * value, 1.1 * value, 12_840)
            for metric, value in metrics.items()
        ]
        for i, model in enumerate(models)
    }
    settings = {**SETTINGS, **more.pop("settings", {})}
    unit = {"geo": "households", "people": "persons"}.get(protocol, "values of patient")
    known = {model: {"cluster_unit": unit, "classes": 1203, "rate": 1e-3 * 2**i} for i, model in enumerate(models)}
    return FairnessPage(protocol, models, "made-up", tables, overall, settings, known, environment=ENVIRONMENT, **more)


def geo_page(count=1):
    models, families, concepts, curve = MODELS[:count], [], [], []
    random = np.random.Generator(np.random.Philox(key=3))
    regions = {"Africa": -0.16, "Asia": -0.05, "Americas": 0.02, "Europe": 0.06}
    incomes = {"low": -0.13, "medium": 0.0, "high": 0.07}
    size = {"Africa": 2400, "Asia": 4600, "Americas": 2900, "Europe": 2100, "low": 4200, "medium": 4400, "high": 4240}
    for i, model in enumerate(models):
        base = 0.73 - 0.04 * i
        areas = [(name, size[name], base + (1 - 0.15 * i) * shift) for name, shift in regions.items()]
        areas.append(("Oceania", 12, 0.9))
        levels = [(name, size[name], base + (1 - 0.15 * i) * shift) for name, shift in incomes.items()]
        both = [
            (
                f"{area} × {level}",
                14 if (area, level) == ("Europe", "low") else 480,
                base + regions[area] + incomes[level],
            )
            for area in regions
            for level in incomes
        ]
        lands = [
            (name.replace("-", " "), int(random.integers(8, 900)), float(np.clip(random.normal(base, 0.1), 0.3, 0.98)))
            for name in COUNTRIES
        ]
        lands.append(("Democratic Republic of the Congo", 12, 0.4))
        families += [
            (model, ("income", "top5", levels), {"p": 0.0005}),
            (model, ("region", "top5", areas), {"p": 0.001, "unknown": 410}),
            (model, ("region × income", "top5", both), {"p": 0.004}),
            (model, ("country", "top5", lands), {"p": 0.03}),
        ]
        for x in np.geomspace(27, 19_671, 40):
            value = float(base - 0.18 + 0.13 * math.log10(x / 27) - 0.02 * i)
            half = 0.02 + 0.015 * abs(math.log10(x) - 2.7)
            curve.append({"model": model, "income": x, "value": value, "low": value - half, "high": value + half})
        for j, name in enumerate(["toilets", "stoves", "spices", "toothbrushes", "front doors", "shower", "roofs"]):
            low, high = 0.4 + 0.02 * j, 0.85 - 0.03 * j
            concepts.append(
                {
                    "model": model,
                    "concept": name,
                    "images": 160 - j,
                    "low_group": "low",
                    "high_group": "high",
                    "low_images": 52,
                    "high_images": 48,
                    "low_value": low,
                    "high_value": high,
                    "gap": high - low,
                    "ci_low": high - low - 0.2,
                    "ci_high": high - low + 0.18,
                }
            )
    return page_of(
        "geo",
        models,
        families,
        metrics={"top5": 0.74, "top1": 0.41},
        tables={"curve": pa.Table.from_pylist(curve), "concepts": pa.Table.from_pylist(concepts)},
        settings={"top": 5},
        axes={"income": "thirds of images, at 227 and 1,034", "region": "column region", "country": "column country"},
        notes=["410 of 13,250 images have no region."],
        ordered=["income"],
    )


def people_page(count=1, *, p=0.2):
    models, families = MODELS[:count], []
    axes = {
        "gender": [("female", 6100), ("male", 5900), ("other", 11)],
        "skin type": [(str(i), n) for i, n in zip(range(1, 7), (300, 2900, 3100, 1800, 2700, 1500), strict=True)],
        "age": [("< 18", 4), ("18–30", 4100), ("30–45", 4400), ("45–70", 3600), ("≥ 70", 210)],
        "gender × skin tone": [(f"{a} × {b}", 2900) for a in ("female", "male") for b in ("lighter", "darker")],
    }
    rate = {"Human": 0.86, "Possibly-Human": 0.4, "Non-Human": 0.03, "Crime": 0.004}
    for i, model in enumerate(models):
        for axis, groups in axes.items():
            for metric, better in META.items():
                shift = 0.12 if metric != "Crime" else 0.4
                rows = [
                    (name, n, rate[metric] * (1 + shift * (j / len(groups) - 0.5) - 0.05 * i))
                    for j, (name, n) in enumerate(groups)
                ]
                chance = 0.001 if metric == "Human" and axis == "age" else p
                families.append((model, (axis, metric, rows), {"better": better, "p": chance, "unknown": 96}))
            if " × " not in axis:
                total = sum(n for _, n in groups)
                chances = [n / total for _, n in groups]
                for k in (1, 5, 10):
                    rows = [(name, n, 0.3 + 0.65 * s - 0.01 * k) for (name, n), s in zip(groups, chances, strict=True)]
                    name = f"same {axis} among the nearest {k}"
                    families.append((model, (axis, name, rows), {"expected": chances, "p": 0.001}))
    return page_of(
        "people",
        models,
        families,
        metrics={metric: rate[metric] for metric in META},
        settings={"top": 5, "threshold": 0.1},
        axes={"age": "cuts at 18, 30, 45 and 70", "skin type": "Fitzpatrick scale, labelled by annotators"},
        ordered=["skin type", "age"],
    )


def odds_row(model, axis, measure, name, gap, best=None, worst=None):
    row = {"model": model, "axis": axis, "measure": measure, "class": name, "best": best, "worst": worst, "gap": gap}
    return row | {"gap_low": max(0.0, gap - 0.08), "gap_high": gap + 0.06}


def audit_page(count=1):
    models, families, odds = MODELS[:count], [], []
    classes = ["melanoma", "naevus", "basal cell carcinoma", "keratosis"]
    axes = {
        "sex": [("female", 1400), ("male", 1530)],
        "site of the image": [("back", 800), ("lower extremity", 700), ("head", 620), ("palms or soles", 17)],
    }
    for i, model in enumerate(models):
        for axis, groups in axes.items():
            rows = [(name, n, 0.81 - 0.03 * j - 0.02 * i) for j, (name, n) in enumerate(groups)]
            families.append((model, (axis, "accuracy", rows), {"p": 0.001 if axis == "sex" else 0.3, "unknown": 57}))
            for k, name in enumerate(classes):
                rows = [(group, n // 5, 0.8 - 0.1 * k - 0.04 * j) for j, (group, n) in enumerate(groups)]
                families.append((model, (axis, f"recall of {name}", rows), {"p": 0.4}))
                rows = [(group, n, 0.05 + 0.02 * j) for j, (group, n) in enumerate(groups)]
                families.append((model, (axis, f"false positives of {name}", rows), {"p": 0.6, "better": "low"}))
                for measure, size in (("true positives", 0.1 - 0.01 * k), ("false positives", 0.03)):
                    ends = {"best": groups[0][0], "worst": groups[1][0]}
                    odds.append(odds_row(model, axis, measure, name, size, **ends))
            odds.append(odds_row(model, axis, "equalised odds", None, 0.1))
    return page_of("audit", models, families, metrics={"accuracy": 0.8}, tables={"odds": pa.Table.from_pylist(odds)})


PAGES = {"geo": geo_page, "people": people_page, "audit": audit_page}


@functools.cache
def shown(protocol, count=1):
    """The page of a protocol as HTML, drawn once for all tests."""
    return fairness_report(PAGES[protocol](count))


def plain(page):
    """The words of a page, without tags, with one kind of space."""
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    return re.sub(r"\s+", " ", text)


def table_of(page, header):
    """Cells of the first table with this header, a list for each line."""
    table = next(part for part in re.findall(r"<table>.*?</table>", page) if f">{header}</th>" in part)
    lines = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]
    return [[html.unescape(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in line] for line in cells]


def one(protocol, families, **more):
    families = [(MODELS[0], (axis, metric, groups), kwargs) for axis, metric, groups, kwargs in families]
    return page_of(protocol, MODELS[:1], families, metrics={families[0][1][1]: 0.7}, **more)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("protocol", PAGES)
def test_page_is_whole_and_fetches_and_runs_nothing(protocol, count):
    page = shown(protocol, count)
    words = plain(page)
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"\bfair\b", words, re.IGNORECASE)
    for heading in ("What these figures do not say", "Licence of the data and consent", "Exact protocol"):
        assert f"<h2>{heading}</h2>" in page
    assert "None" not in words and "nan" not in words.split()
    assert "2,000 resamples" in words and "PyTorch 2.13.0" in words
    for model in MODELS[:count]:
        assert model in words


def test_answer_names_both_ends_the_gap_and_how_often_chance_makes_it():
    groups = [("low", 4000, 0.612), ("medium", 4100, 0.7), ("high", 4200, 0.801)]
    words = plain(fairness_report(one("geo", [("income", "top5", groups, {"p": 5 / 2001})])))
    assert (
        "Objects of low-income homes are recognised in 61.2 % of images, those of high-income homes in 80.1 %: "
        "a gap of 18.9 points [11.9, 25.3]; chance alone makes such a gap in 4 of 2,000 shuffles (p: 0.015)." in words
    )
    assert words.index("a gap of 18.9 points") < words.index("How to read what follows")


def test_shuffles_are_said_as_a_share_where_their_number_is_not_known():
    groups = [("a", 4000, 0.6), ("b", 4100, 0.7)]
    words = plain(fairness_report(one("geo", [("region", "top5", groups, {"p": 0.00123})])))
    assert "chance alone makes such a gap in about 0.1 % of shuffles" in words


def test_many_comparisons_have_more_shuffles_than_asked_for_and_kinds_are_counted_apart():
    page = people_page()
    gaps = {(gap.axis, gap.metric): gap for gap in page.gaps}
    label, same = gaps["age", "Human"], gaps["age", "same age among the nearest 5"]
    assert (page.tested(label), page.shuffles(label)) == (16, 3200)  # 16 × 10 / 0.05
    assert (page.tested(same), page.shuffles(same)) == (9, 2000)  # 1,800 would do, 2,000 are asked for
    assert "p, corrected for 16 comparisons" in plain(shown("people"))


def test_a_gap_that_was_not_found_is_no_proof_and_how_large_one_could_be_is_said():
    groups = [("female", 400, 0.6), ("male", 410, 0.66)]
    words = plain(fairness_report(one("audit", [("sex", "accuracy", groups, {"p": 0.4})])))
    assert "Accuracy, by sex: no gap beyond chance was found. That is no proof that there is none" in words
    assert "gaps of up to 8.2 points could hide" in words and "a gap of 6.0 points" not in words


def test_an_axis_with_one_group_is_not_compared():
    words = plain(fairness_report(one("audit", [("site", "accuracy", [("a", 400, 0.6), ("b", 9, 0.9)], {})])))
    assert "Groups of site cannot be compared: fewer than two of them have enough images." in words


def test_table_of_groups_marks_the_best_the_small_and_the_unknown():
    page = shown("geo")
    lines = {line[0]: line[1:] for line in table_of(page, "households") if line}
    assert lines["high ★"] == ["4,240", "106", "80.0 % [78.8, 81.2]", "", "", "0.003"]
    assert lines["low"] == ["4,200", "105", "60.0 % [58.5, 61.5]", "−20.0 [−27.0, −13.0]", "25.0 %", "0.003"]
    regions = page[page.index("By region</h2>") :]
    lines = {line[0]: line[1:] for line in table_of(regions, "households") if line}
    assert list(lines)[1:] == ["Europe ★", "Americas", "Asia", "Africa", "Oceania (too few)", "unknown"]
    assert lines["Oceania (too few)"][0] == "12" and lines["Oceania (too few)"][3:] == ["", "", ""]
    assert lines["unknown"][0] == "410"


def test_groups_keep_their_order_or_go_by_rate():
    page = geo_page()
    assert in_order(page, "income", "top5") == ["low", "medium", "high"]
    assert in_order(page, "region", "top5") == ["Europe", "Americas", "Asia", "Africa", "Oceania"]
    cut = one("audit", [("weight", "accuracy", [("< 50", 99, 0.5), ("≥ 50", 99, 0.7)], {})])
    assert in_order(cut, "weight", "accuracy") == ["< 50", "≥ 50"]


def test_lower_is_better_is_the_other_way_round():
    page = one("people", [("gender", "Crime", [("female", 900, 0.004), ("male", 900, 0.009)], {"better": "low"})])
    text = fairness_report(page)
    assert "Images of people with gender male get a label of the kind Crime in 0.90 % of cases" in plain(text)
    lines = {line[0]: line for line in table_of(text, "to best, points") if line}
    assert "female ★" in lines and lines["male"][4].startswith("+0.50")


def test_shared_attributes_have_no_best_group_no_drop_and_no_line_among_the_comparisons():
    page = people_page()
    same = [row for row in page.groups if row.metric.startswith("same")]
    assert same and not any(row.marked or row.drop is not None for row in same)
    text = shown("people")
    assert "the whole interval lies above chance in 2 of 2 groups" in plain(text)
    comparisons = table_of(text, "beyond chance")
    assert len(comparisons) == 1 + 16 and not any("same" in cell for line in comparisons for cell in line)
    assert table_of(text, "by chance")[1] == [
        "female",
        "6,100",
        "62.0 % [60.8, 63.2]",
        "58.0 % [56.8, 59.2]",
        "53.0 % [51.8, 54.3]",
        "50.8 %",
    ]


def test_classes_of_an_audit_have_their_recall_in_every_group():
    lines = table_of(shown("audit"), "female")
    assert lines[0] == ["class", "female", "male"]
    assert lines[1] == ["melanoma", "80.0 % [74.9, 84.3]", "76.0 % [70.9, 80.4]"]
    odds = table_of(shown("audit"), "class")
    assert odds[1] == ["sex", "equalised odds", "largest of all", "", "", "10.0 [2.0, 16.0]"]


def test_several_models_are_compared_comparison_by_comparison():
    text = shown("people", 3)
    words = plain(text)
    assert "In 1 of 16 comparisons between groups there is a gap of at least one model that is beyond chance." in words
    assert "Label Human, gap by age: dinov2_vits14 6.2 points [3.9, 8.4], beyond chance; dinov2_vitb14" in words
    assert "The lowest rate is that of images of people aged 18–30, the highest that of images of people aged" in words
    assert (
        "Label Crime, by gender, skin type, age and gender × skin tone: no gap beyond chance was found in any" in words
    )
    changes = table_of(shown("geo", 3), "verdict")
    assert changes[1] == [MODELS[1], "income", "20.0", "16.0", "−4.0 [−7.0, −1.0]", "smaller gap"]


def test_charts_draw_small_groups_hollow_and_name_the_models():
    page = geo_page(2)
    panel = Panel("Objects recognised", page.rows("region", "top5"), page.unknown("region", "top5"))
    chart = dot_chart([panel], in_order(page, "region", "top5"))
    for word in (*MODELS[:2], "Oceania", "unknown", "n = 12, too few", "n = 410"):
        assert f">{word}<" in chart
    paper = "var(--paper, #fcfcfb)"
    assert chart.count(f"fill: {paper}") == 4  # Oceania and unknown, of two models
    whole = dot_chart([Panel("", {m: {"Asia": r["Asia"]} for m, r in panel.rows.items()}, {})], ["Asia"])
    assert f"fill: {paper}" not in whole
    with pytest.raises(ValueError, match="no group"):
        dot_chart([], [])


def test_crossed_groups_are_a_table_with_rates_and_counts():
    page = geo_page()
    chart = crossed_table(page.rows("region × income", "top5"))
    assert chart.count(">n = 480<") == 11 and ">n = 14, too few<" in chart and ">44.0 %<" in chart
    assert crossed_table(page.rows("region", "top5")) is None


def test_long_names_are_shortened_beside_charts_only():
    assert shortened("Democratic Republic of the Congo") == "Democratic Republic of the …"
    assert len(shortened("x" * 80)) == 30 and shortened("x" * 29) == "x" * 29
    assert "Democratic Republic of the Congo (too few)" in plain(shown("geo"))


def test_pictures_appear_only_where_the_caller_gives_them():
    page = one("geo", [("income", "top5", [("low", 400, 0.6), ("high", 400, 0.8)], {})])
    assert "Pictures are not shown" in plain(fairness_report(page)) and "<image" not in shown("geo")
    image = np.full((20, 20, 3), 128, dtype=np.uint8)
    text = fairness_report(replace(page, panels={MODELS[0]: [Panelled("low failed", [image], ["taken for bed"])]}))
    assert "Pictures are not shown" not in plain(text) and "taken for bed" in text and "<image" in text


def test_numbers_have_as_many_digits_as_they_deserve():
    assert [p_text(p) for p in (None, 0.0004, 0.0123, 0.5, 1.0)] == ["", "< 0.001", "0.012", "0.50", "1.00"]
    assert estimate(-0.0504, -0.1, 0.00001, signed=True) == "−5.0 [−10.0, 0.0]"
    assert (digits_for([0.004, 0.008]), digits_for([0.004, 0.02]), digits_for([0.0])) == (2, 1, 1)
    assert share(None) == "–" and share(0.6123) == "61.2 %"
    assert tied("61.2 % [1.0, 2.0]") == "61.2\N{NO-BREAK SPACE}% [1.0,\N{NO-BREAK SPACE}2.0]"


def test_groups_are_said_in_words():
    assert who("geo", "region × income", "Africa × low") == "of homes in Africa with low income"
    assert who("people", "gender × age", "female × ≥ 70") == "of people with gender female and aged 70 or more"
    assert who("audit", "age", "< 30") == "with age below 30"


def test_a_table_without_a_column_is_refused():
    page = geo_page()
    broken = replace(page, tables={**page.tables, "gaps": page.tables["gaps"].drop_columns(["gap_low", "drop"])})
    with pytest.raises(ValueError, match="no column gap_low, drop"):
        fairness_report(broken)


def test_nan_is_nothing():
    page = geo_page()
    column = page.tables["gaps"].column_names.index("drop")
    empty = pa.array([math.nan] * page.tables["gaps"].num_rows)
    gaps = page.tables["gaps"].set_column(column, "drop", empty)
    assert all(row.drop is None for row in replace(page, tables={**page.tables, "gaps": gaps}).gaps)


def test_of_several_models_the_widest_interval_says_what_could_hide():
    rates = {MODELS[0]: 0.62, MODELS[1]: 0.66}
    families = [
        (model, ("sex", "accuracy", [("female", 400, 0.6), ("male", 400, rate)]), {"p": 0.4})
        for model, rate in rates.items()
    ]
    words = plain(fairness_report(page_of("audit", MODELS[:2], families, metrics={"accuracy": 0.6})))
    assert "no gap beyond chance was found in any model" in words
    assert "gaps of up to 8.2 points could hide" in words  # not the 2.9 of the first
