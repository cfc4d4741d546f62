"""`dinov2 eval compare` as a user meets it: on stdout, on stderr and on disk."""

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2cli.artifacts.manifest import read_manifest
from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.results import ResultRow, write_results
from dinov2cli.evaluation.intervals import interval
from dinov2cli.evaluation.statistics import mean

HARD = np.random.default_rng(0).random(300)


def results(path, model, skill, *, size=224):
    right = mean(np.less(HARD, skill).astype(float))
    low, high = interval(right, seed=0)
    settings = {"unit": "share", "image_size": size, "headline": True}
    row = ResultRow(model, "knn", "demo:photos", "top1_k20", right.value(), low, high, 300, settings)
    with Output.open(path, "results", command="dinov2 eval knn", config={"model": model}) as out:
        write_results(out, [row], scores=[right.scores([str(i) for i in range(300)])])
    return path


@pytest.fixture
def pair(tmp_path):
    return results(tmp_path / "a", "small", 0.4), results(tmp_path / "b", "large", 0.6)


def test_tables_go_to_stderr_and_to_stdout_when_asked(dinov2, pair):
    done = dinov2("eval", "compare", *pair)
    assert done.code == 0 and done.out == ""
    assert (
        "difference to small" in done.err and "better" in done.err and "knn demo:photos: top-1, k = 20 (%)" in done.err
    )
    quiet = dinov2("eval", "compare", *pair, "-q", "--format", "markdown")
    assert (
        quiet.err == "" and quiet.out.startswith("| model | knn demo:photos: top-1, k = 20 (%) |") and "**" in quiet.out
    )
    assert "better" in dinov2("eval", "compare", *pair, "--format", "table").out
    assert "\\toprule" in dinov2("eval", "compare", *pair, "--format", "latex").out
    lines = list(csv.DictReader(io.StringIO(dinov2("eval", "compare", *pair, "--format", "csv").out)))
    assert [line["model"] for line in lines] == ["small", "large"]
    found = dinov2("eval", "compare", *pair, "--json", "--baseline", "large").json
    assert found["models"] == ["small", "large"] and found["baseline"] == "large"
    assert [record["verdict"] for record in found["results"]] == ["worse", None]


def test_the_comparison_is_kept_where_asked_and_made_once(dinov2, pair, tmp_path):
    command = ("eval", "compare", *pair, "-o", tmp_path / "c")
    done = dinov2(*command)
    assert done.code == 0 and done.out == f"{tmp_path / 'c'}\n"
    manifest = read_manifest(tmp_path / "c")
    assert (manifest.kind, manifest.complete, manifest.rows) == ("comparison", True, 2)
    assert [entry["spec"] for entry in manifest.inputs] == [str(path) for path in pair]
    records = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert pq.read_table(tmp_path / "c" / "comparison.parquet").to_pylist() == records
    assert "Differences to small" in (tmp_path / "c" / "report.html").read_text()
    again = dinov2(*command, "--json")
    assert again.code == 0 and again.json["already_done"] and again.json["results"] == records
    other = dinov2(*command, "--baseline", "large")
    assert other.code == 2 and "made with other settings: baseline: None → large" in other.err


def test_warnings_name_what_was_measured_otherwise(dinov2, pair, tmp_path):
    third = results(tmp_path / "t", "third", 0.5, size=448)
    err = dinov2("eval", "compare", pair[0], third).err
    assert "warning: knn on demo:photos of small and third differ in image_size: 224 and 448" in err.replace("\n", " ")


def test_what_cannot_be_compared_is_refused_in_one_line(dinov2, pair, tmp_path):
    assert dinov2("eval", "compare").code == 2
    done = dinov2("eval", "compare", pair[0], tmp_path / "none")
    assert done.code == 3 and "none does not exist; expected a directory made by `dinov2 eval`" in done.err
    Output.open(tmp_path / "half", "results", command="dinov2 eval knn x", config={}).close()
    done = dinov2("eval", "compare", pair[0], tmp_path / "half")
    assert done.code == 3 and "half is unfinished" in done.err
    done = dinov2("eval", "compare", *pair, "--baseline", "huge")
    assert done.code == 2 and "expected one of small, large" in done.err
    done = dinov2("eval", "compare", *pair, "--json", "--format", "csv")
    assert done.code == 2 and "both ask for stdout" in done.err
    assert dinov2("eval", "compare", *pair, "--confidence", "95").code == 2


def test_one_model_makes_a_table_alone(dinov2, pair):
    done = dinov2("eval", "compare", pair[0], "--format", "markdown")
    assert done.code == 0 and done.out.count("| model") == 1 and "difference" not in done.out
