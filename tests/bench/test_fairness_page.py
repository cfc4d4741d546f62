"""docs/fairness.md shows what benchmarks/fairness.json and fairness_sites.json hold; as a program it updates it."""

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from dinov2cli.cli import fairness
from dinov2cli.fairness.protocols.registry import PROTOCOLS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "fairness.md"


def held(name: str) -> dict:
    """What a file of benchmarks/ holds; nothing if it is not there."""
    file = ROOT / "benchmarks" / name
    return json.loads(file.read_text()) if file.exists() else {}


FIGURES, SITES = held("fairness.json"), held("fairness_sites.json")


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}"


def alarms() -> list[str]:
    """How often something is called significant where nothing is."""
    lines = [
        "| sets without any gap, 3 axes × 2 measures | sets | any gap called significant, % | any group, % |",
        "| --- | --- | --- | --- |",
    ]
    for found in FIGURES["false_alarms"]:
        cells = [found["name"], f"{found['sets']:,}", percent(found["any_gap"]), percent(found["any_group"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def coverage() -> list[str]:
    """How often intervals hold the truth, by the number of clusters of a group, and how often a gap is found."""
    lines = [
        "| clusters of a group × images | group, % | all pairs, % | gap, % | drop, % | 10 points found, % | 20, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys((one["clusters"], one["images"]) for one in FIGURES["coverage"]):
        own = [one for one in FIGURES["coverage"] if (one["clusters"], one["images"]) == key]
        means = [
            f"{percent(sum(one[name] for one in own) / len(own))} ({percent(min(one[name] for one in own))})"
            for name in ("group", "pairs", "gap", "drop")
        ]
        power = []
        for planted in (0.1, 0.2):
            some = [one["found_by_test"] for one in own if one["planted"] == planted]
            power.append(percent(sum(some) / len(some)))
        lines.append(f"| {key[0]} × {key[1]} | {' | '.join(means + power)} |")
    return lines


def sites() -> list[str]:
    """What the audit found with and without a planted fault."""
    lines = [
        "| set | model | axis | best | worst | gap, points | p, corrected |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("sound", "fault"):
        for gap in SITES[name]["gaps"]:
            ends = [f"{gap[end]} {percent(gap[f'{end}_value'])}" for end in ("best", "worst")]
            size = f"{percent(gap['gap'])} [{percent(gap['gap_low'])}, {percent(gap['gap_high'])}]"
            cells = [name, gap["model"], gap["axis"], *ends, size, f"{gap['p_corrected']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


TABLES = {"alarms": alarms, "coverage": coverage, "sites": sites}


def updated(page: str) -> str:
    """The page with the text between its markers made anew."""
    for name, make in TABLES.items():
        text = "\n".join(make())
        page = re.sub(
            rf"<!-- {name} -->\n(?:.*?<!-- /{name} -->\n)?",
            lambda _, name=name, text=text: f"<!-- {name} -->\n{text}\n<!-- /{name} -->\n",
            page,
            flags=re.S,
        )
    return page


def test_the_page_shows_what_was_measured():
    page = PAGE.read_text()
    assert all(f"<!-- /{name} -->" in page for name in TABLES)
    assert page == updated(page), "run python tests/bench/test_fairness_page.py"


def test_false_alarms_are_no_more_than_stated():
    """Of every made-up null that the program is told the clusters of; four standard errors of chance are allowed."""
    for found in FIGURES["false_alarms"]:
        if "as if independent" not in found["name"]:
            reach = 4 * (0.05 * 0.95 / found["sets"]) ** 0.5
            assert found["any_gap"] <= 0.05 + reach, found
            assert found["any_group"] <= 0.05 + reach, found


def test_the_page_tells_of_clusters_that_are_unlike():
    unlike, page = FIGURES["unlike"], PAGE.read_text()
    assert f"up to {percent(max(one['found_by_test'] for one in unlike))} % of sets" in page
    assert f"as few as {percent(min(min(one['group']) for one in unlike))} %" in page
    assert f"those of pairs in {percent(min(one['pairs'] for one in unlike))} % or more" in page


def test_the_planted_fault_is_found_and_nothing_where_there_is_none():
    assert not any(gap["significant"] for gap in SITES["sound"]["gaps"])
    found = [gap for gap in SITES["fault"]["gaps"] if gap["significant"]]
    assert [(gap["axis"], gap["worst"]) for gap in found] == [("site", "harbour")]
    assert (ROOT / "docs" / "fairness.png").stat().st_size < 300_000


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=["docs", "README"])
@pytest.mark.parametrize("study", PROTOCOLS)
def test_the_commands_shown_have_options_that_there_are(page, study):
    (line,) = re.findall(rf"^dinov2 fairness {study} .*", page.read_text(), flags=re.M)
    options = {
        parameter.name: parameter.opts for parameter in get_command(fairness.app).get_command(None, study).params
    }
    known = {option for given in options.values() for option in given}
    assert {word for word in line.split() if word.startswith("-")} <= known


def test_the_readme_shows_what_the_bench_measured():
    bench = held("cpu.json")["benches"]["fairness"]
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `fairness` |"))
    shown = f"{bench['seconds']:.2f} s (in clusters of ten: {bench['clustered_seconds']:.1f} s)"
    assert shown in row and f"{bench['speedup']:.1f}×" in row and f"{bench['memory_ratio']:.2f}" in row


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
