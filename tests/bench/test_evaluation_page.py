"""docs/evaluation.md and the README show what benchmarks/evaluation.json holds; as a program it updates the page."""

import json
import re
from pathlib import Path

from dinov2cli.evaluation.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evaluation.md"
FIGURES = json.loads((ROOT / "benchmarks" / "evaluation.json").read_text())


def number(value: float, unit: str, *, signed: bool = False) -> str:
    """A figure in its unit."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if unit == "share" else f"{value:{sign}.3f}"


def rows_of(task: dict) -> dict[str, dict]:
    """The rows of the headline figure, by model."""
    return {row["model"]: row for row in task["rows"] if row["metric"] == task["headline"]}


def real() -> list[str]:
    """Every task on its real case: trained, random weights, pixels."""
    lines = [
        "| task, data | figure | random weights | trained | trained − random | pixels or colours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, task in FIGURES["tasks"].items():
        unit, rows = task["unit"], rows_of(task)
        shown = {"share": "%", "metres": "m"}.get(unit, "")
        trained, floor = rows["trained"], rows["random"]
        change = f"{number(trained['difference'], unit, signed=True)} " + " to ".join(
            number(trained[f"difference_{end}"], unit, signed=True) for end in ("low", "high")
        ).join("[]")
        others = [row for model, row in rows.items() if model.startswith("baseline:")]
        cells = [
            name.replace("-", ", ", 1),
            f"{task['headline']}, {shown}" if shown else task["headline"],
            number(floor["value"], unit),
            f"{number(trained['value'], unit)} [{number(trained['ci_low'], unit)}, {number(trained['ci_high'], unit)}]",
            change,
            number(others[0]["value"], unit) if others else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed() -> list[str]:
    """The benches beside their references."""
    bench = FIGURES["bench"]
    return [
        "| `dinov2 bench eval` | ours | reference | ours / reference |",
        "| --- | --- | --- | --- |",
        f"| linear: {bench['linear_heads']} heads, 10 epochs over features of {bench['linear_rows']:,} images | "
        f"{bench['linear_seconds']:.1f} s | its matrix products alone, {bench['linear_reference_seconds']:.1f} s | "
        f"{bench['linear_ratio']:.2f} |",
        f"| k-NN: {bench['knn_test_images']:,} queries, {bench['knn_train_images']:,} images, {bench['knn_dim']} "
        f"numbers | {bench['knn_seconds']:.2f} s | one float32 product with top-k, "
        f"{bench['knn_product_and_top_k_seconds']:.2f} s | "
        f"{bench['knn_ratio']:.2f} |",
        f"| logistic regression: {bench['logreg_strengths']} values of C, {bench['logreg_images']:,} images, accuracy "
        f"{bench['logreg_accuracy']:.3f} | {bench['logreg_seconds']:.1f} s | scikit-learn over the same grid, "
        f"{bench['logreg_reference_seconds']:.1f} s, accuracy {bench['logreg_reference_accuracy']:.3f} | "
        f"{1 / bench['logreg_speedup']:.3f} |",
    ]


TABLES = {"real": real, "speed": speed}


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


def test_every_task_ranks_trained_above_random():
    """Figures of a recorded run, not of this one: a record that falls short must not be published as if it did not."""
    better: dict[str, list[bool]] = {}
    for name, task in FIGURES["tasks"].items():
        row = rows_of(task)["trained"]
        above = row["difference_high"] < 0 if task["lower_is_better"] else row["difference_low"] > 0
        better.setdefault(name.partition("-")[0], []).append(above)
    assert set(better) == set(TASKS) and all(any(found) for found in better.values())


def test_the_readme_s_row_is_the_file_s():
    (row,) = re.findall(r"^\| `eval` \|.*$", (ROOT / "README.md").read_text(), flags=re.M)
    bench = FIGURES["bench"]
    for text in (f"{bench['linear_ratio']:.2f}", f"{bench['knn_ratio']:.2f}", f"{bench['logreg_speedup']:.0f}×"):
        assert text in row, text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
