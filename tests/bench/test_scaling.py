"""The scaling bench is a model: it must be reproducible, hang together, and be what docs/scaling.md shows."""

import json
import re
from pathlib import Path

import pytest

from dinov2cli.bench.scaling import RECIPES, Assumptions, run
from dinov2cli.bench.scaling_tables import tables
from dinov2cli.config import PretrainConfig
from dinov2cli.recipe import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
KEPT = json.loads((ROOT / "benchmarks" / "scaling.json").read_text())


@pytest.fixture(scope="module")
def figures():
    return run(recipes={name: load_config(PretrainConfig, recipe=name).model_dump(mode="json") for name in RECIPES})


def test_the_file_holds_what_the_bench_says_today(figures):
    assert tables(figures) == tables(KEPT)


def test_every_table_of_the_page_is_the_file_s():
    made = tables(KEPT)
    for title, table in made.items():
        assert table in PAGE, title
    on_page = re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.M)
    assert sorted(table.strip() for table in on_page) == sorted(made.values())


def test_the_batch_and_the_times_hang_together(figures):
    total = Assumptions().total_batch
    for row in figures["rows"]:
        assert total <= row["images_per_gpu"] * row["gpus"] < total + row["gpus"]
        assert row["memory"]["total"] == sum(size for name, size in row["memory"].items() if name != "total")
        for times in row["links"].values():
            assert row["compute"] < times["hidden"] < times["exposed"]
        if row["gpus"] == 8:
            assert row["traffic"]["total"]["between"] == 0
    assert figures["seconds"] > 0


def test_slower_links_and_faster_compute_bind_sooner(figures):
    settings = {"vitl14-long": load_config(PretrainConfig, recipe="vitl14-long").model_dump(mode="json")}
    fast = run(recipes=settings, assumed=Assumptions(mfu=0.6))["limits"]
    for before, after in zip(figures["limits"], fast, strict=False):
        assert after["bound_from_infiniband"] <= before["bound_from_infiniband"]
        assert before["bound_from_ethernet"] <= before["bound_from_infiniband"]


def test_what_fits_nowhere_says_so():
    settings = {"vitg14-long": load_config(PretrainConfig, recipe="vitg14-long").model_dump(mode="json")}
    small = run(recipes=settings, gpus=(8,), assumed=Assumptions(memory_gib=8))
    assert [row["parts"] for row in small["rows"]] == [None, None, None]
    assert "too much" in tables(small)["vitg14-long: memory per GPU (GiB)"]
    assert small["limits"][0]["fits_from"] is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_quote_the_file(recipe):
    (row,) = [r for r in KEPT["rows"] if (r["recipe"], r["gpus"], r["sharding"]) == (recipe, 128, "hybrid")]
    header = (ROOT / "recipes" / f"{recipe}.yaml").read_text().split("model:")[0]
    assert f"hybrid: {row['memory']['total'] / 2**30:.1f} GiB each" in header
    assert f"{row['traffic']['total']['total'] / 2**20:,.0f} MiB sent" in header
