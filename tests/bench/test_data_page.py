"""docs/data.md and the README show what benchmarks/data.json holds."""

import json
import re
from pathlib import Path

from dinov2cli.bench.data import table

ROOT = Path(__file__).resolve().parents[2]
RUNS = json.loads((ROOT / "benchmarks" / "data.json").read_text())["runs"]


def test_the_table_of_the_page_is_the_files():
    page = (ROOT / "docs" / "data.md").read_text()
    shown = {"0.19 megapixels": "web", "3.1 megapixels": "camera"}
    assert table({title: RUNS[name]["figures"] for title, name in shown.items()}) in page
    for name in shown.values():
        assert f"`{RUNS[name]['command'].replace(' --device cpu --json', '')}`" in page


def test_the_readme_s_row_is_the_file_s():
    found = RUNS["web"]["figures"]
    (row,) = re.findall(r"^\| `data` \|.*$", (ROOT / "README.md").read_text(), flags=re.M)
    assert f"{found['images_per_s']:.0f} images/s a core" in row
    assert f"| {found['speedup']:.1f}× | {found['memory_ratio']:.2f} |" in row
