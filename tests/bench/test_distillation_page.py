"""docs/distillation.md, the README and a recipe's header show what benchmarks/distill.json holds; as a program it
updates the page."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "distillation.md"
FILE = ROOT / "benchmarks" / "distill.json"
FIGURES = json.loads(FILE.read_text()) if FILE.exists() else {}
ARMS, BENCH = FIGURES.get("arms", {}), FIGURES.get("bench", {})
MAIN = "distill-heads"
measured = pytest.mark.skipif(not ARMS, reason="benchmarks/distill.json holds no runs yet")


def share(found: dict) -> str:
    """A figure in percent with its interval."""
    return f"{100 * found['value']:.1f} [{100 * found['ci_low']:.1f}, {100 * found['ci_high']:.1f}]"


def change(found: dict) -> str:
    """The difference from scratch with its interval."""
    if found["difference"] is None:
        return ""
    low, high = (f"{100 * found[f'difference_{end}']:+.1f}" for end in ("low", "high"))
    return f"{100 * found['difference']:+.1f} [{low} to {high}]"


def arms() -> list[str]:
    """Every run of the study."""
    lines = [
        "| run | parameters | steps | images | minutes | k-NN, % | − scratch | linear, % | − scratch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in ARMS.items():
        cost = [f"{arm['parameters']:,}", f"{arm['steps']:,}", f"{arm['images']:,}", f"{arm['seconds'] / 60:.0f}"]
        cells = [name, *cost, *(form(arm[task]) for task in ("knn", "linear") for form in (share, change))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if ARMS else ["(not measured yet)"]


def bench() -> list[str]:
    """The step beside pretraining's."""
    if not BENCH:
        return ["(not measured yet)"]
    b = BENCH
    case = f"{b['teacher']} to {b['student']}, batch {b['batch_size']}, {b['prototypes']:,} prototypes, {b['device']}"
    return [
        f"| {case} | distillation | pretraining | ratio |",
        "| --- | --- | --- | --- |",
        f"| images/s | {b['images_per_s']:.1f} | {b['pretrain_images_per_s']:.1f} | {b['speedup']:.2f} "
        f"(floor by operations {b['floor_speedup']:.2f}) |",
        f"| peak memory, MiB | {b['memory_mib']:,.0f} | {b['pretrain_memory_mib']:,.0f} | {b['memory_ratio']:.2f} |",
        f"| the teacher's share of the time | {100 * b['teacher_share']:.0f} % "
        f"({100 * b['teacher_flop_share']:.0f} % of the operations) | | |",
        f"| {b['several_students']} students of one pass, beside one after the other | "
        f"{b['several_seconds']:.2f} s a step | | {b['several_speedup']:.2f}× "
        f"(floor {b['several_floor_speedup']:.2f}×) |",
    ]


TABLES = {"arms": arms, "bench": bench}


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


def test_the_page_shows_the_file():
    page = PAGE.read_text()
    assert all(f"<!-- /{name} -->" in page for name in TABLES)
    assert updated(page) == page


def test_commands_of_the_page_exist():
    from dinov2cli.cli.main import run
    from dinov2cli.recipe import recipe_names

    blocks = "\n".join(re.findall(r"```\n(.*?)```", PAGE.read_text(), flags=re.S))
    for command in set(re.findall(r"^dinov2 (\S+)", blocks, flags=re.M)):
        assert run([command, "--help"]) == 0
    assert set(re.findall(r"--config ([\w-]+)", PAGE.read_text())) <= set(recipe_names())


@measured
def test_a_quarter_of_the_teacher_beats_itself_from_scratch():
    """Figures of a recorded run, not of this one: a record that falls short must not be published as if it did not."""
    best, scratch, teacher = ARMS[MAIN], ARMS["scratch"], ARMS["teacher"]
    assert best["parameters"] == scratch["parameters"] <= teacher["parameters"] / 4
    assert best["seconds"] <= 1.05 * scratch["seconds"]
    assert all(best[task]["difference_low"] > 0 for task in ("knn", "linear"))


@measured
def test_the_recipe_s_header_is_the_file_s():
    header = (ROOT / "recipes" / f"{FIGURES['recipe']}.yaml").read_text().split("\nmodel:")[0]
    for name in (MAIN, "scratch", "teacher"):
        for task in ("knn", "linear"):
            assert f"{100 * ARMS[name][task]['value']:.1f} %" in header, (name, task)
    for task in ("knn", "linear"):
        assert f"{100 * ARMS[MAIN][task]['difference']:+.1f}" in header


@pytest.mark.skipif(not BENCH, reason="benchmarks/distill.json holds no bench yet")
def test_the_readme_s_row_is_the_file_s():
    (row,) = re.findall(r"^\| `distill` \|.*$", (ROOT / "README.md").read_text(), flags=re.M)
    for text in (f"{BENCH['images_per_s']:.1f} images/s", f"{BENCH['speedup']:.2f}×", f"{BENCH['memory_ratio']:.2f}"):
        assert text in row, text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
