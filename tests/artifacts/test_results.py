import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2cli.artifacts.manifest import FILE_NAME
from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.results import (
    ResultRow,
    Scores,
    find_results,
    read_results,
    read_scores,
    write_comparison,
    write_results,
)
from dinov2cli.errors import InputError

ROWS = [ResultRow("m", "t", "d", metric, 0.5, 0.4, 0.6, 3) for metric in ("a", "b", "c")]
SCORES = [
    Scores("mean", ["x", "y", "z"], np.array([[0.1], [1 / 3], [1.0]])),
    Scores("ratio", ["x", "y", "z"], np.arange(12.0).reshape(3, 4) / 8),
    Scores("mean", ["x", "w"], np.array([[0.0], [np.nan]])),
]


def write(path, rows=ROWS, scores=SCORES, finish=True):
    with Output.open(path, "results", command="dinov2 eval t m", config={}) as out:
        if finish:
            write_results(out, rows, scores=scores)
    return path


def test_scores_come_back_row_by_row(tmp_path):
    write(tmp_path / "r")
    for number, expected in enumerate(SCORES):
        found = read_scores(tmp_path / "r", number)
        assert (found.statistic, list(found.units)) == (expected.statistic, list(expected.units))
        assert found.values.dtype == np.float64
        assert np.array_equal(found.values, expected.values, equal_nan=True)
    table = pq.read_table(tmp_path / "r" / "scores.parquet")
    assert table.column_names == ["model", "task", "dataset", "metric", "statistic", "unit", "value", "values"]
    assert table["metric"].to_pylist() == [*"aaa", *"bbb", *"cc"]
    assert "scores.parquet" in json.loads((tmp_path / "r" / FILE_NAME).read_text())["files"]


def test_clusters_come_back_and_cost_nothing_where_there_are_none(tmp_path):
    grouped = Scores("mean", ["x", "y", "z"], SCORES[0].values, ["p", None, "p"])
    nobody = Scores("mean", ["x", "y"], np.zeros((2, 1)), [None, None])
    write(tmp_path / "r", scores=[grouped, SCORES[1], nobody])
    assert [read_scores(tmp_path / "r", number).clusters for number in range(3)] == [["p", None, "p"], None, None]
    assert np.array_equal(read_scores(tmp_path / "r", 1).values, SCORES[1].values)
    assert pq.read_table(tmp_path / "r" / "scores.parquet")["cluster"].to_pylist()[:4] == ["p", None, "p", None]
    write(tmp_path / "plain")  # as files of older versions, which have no such column
    assert read_scores(tmp_path / "plain", 0).clusters is None


def test_many_units_and_classes_come_back_and_names_are_stored_once(tmp_path):
    names = [f"some/long/folder/name/{i:08d}.jpg" for i in range(3000)]
    values = np.random.default_rng(0).integers(0, 2, (3000, 1)).astype(float)
    write(tmp_path / "few", ROWS[:1], [Scores("mean", names, values)])
    many = [Scores("mean", names, values)] * 8
    write(tmp_path / "many", [ROWS[0]] * 8, many)
    sizes = [(tmp_path / name / "scores.parquet").stat().st_size for name in ("few", "many")]
    assert sizes[1] < 8 * 60_000  # names alone are 99 kB a time as text
    wide = np.random.default_rng(0).random((400, 300)).astype(np.float32)
    write(tmp_path / "wide", ROWS[:1], [Scores("ratio", names[:400], wide)])
    assert np.array_equal(read_scores(tmp_path / "wide", 0).values, wide)


def test_results_without_scores_have_none_and_damaged_ones_say_so(tmp_path):
    write(tmp_path / "old", scores=None)
    assert read_scores(tmp_path / "old", 0) is None
    with pytest.raises(ValueError, match="3 rows of results need as many scores, got 2"):
        write(tmp_path / "short", scores=SCORES[:2])
    write(tmp_path / "r")
    (tmp_path / "r" / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"scores\.parquet cannot be read .*evaluate again with --overwrite"):
        read_scores(tmp_path / "r", 0)


def test_results_are_found_below_a_directory_and_those_inside_others_are_a_part(tmp_path):
    write(tmp_path / "suite" / "knn")
    write(tmp_path / "other" / "linear")
    write(tmp_path / "half", finish=False)
    finished, unfinished = find_results(tmp_path)
    assert finished == [tmp_path / "other" / "linear", tmp_path / "suite" / "knn"]
    assert unfinished == [tmp_path / "half"]
    assert find_results(tmp_path / "other" / "linear") == ([tmp_path / "other" / "linear"], [])
    write(tmp_path / "whole")  # its own results, of all its tasks
    write(tmp_path / "whole" / "knn")
    assert find_results(tmp_path)[0] == [*finished, tmp_path / "whole"]


def test_what_holds_no_results_is_refused(tmp_path):
    write(tmp_path / "half", finish=False)
    with pytest.raises(InputError, match=r"half is unfinished .*run `dinov2 eval t m` again to finish it"):
        find_results(tmp_path / "half")
    with pytest.raises(InputError, match="half is unfinished"):
        find_results(tmp_path)  # nothing else is there
    with pytest.raises(InputError, match="does not exist; expected a directory made by `dinov2 eval`"):
        find_results(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no results; expected a directory"):
        find_results(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a directory"):
        find_results(tmp_path / "file")
    with Output.open(tmp_path / "e", "embeddings", command="dinov2 embed", config={}) as out:
        out.finish(rows=0)
    with pytest.raises(InputError, match="is embeddings, expected evaluation results"):
        find_results(tmp_path / "e")


def test_a_comparison_of_one_model_has_the_columns_of_any(tmp_path):
    names = ("model", "task", "dataset", "metric", "value", "ci_low", "ci_high", "n", "unit", "lower_is_better", "best")
    record = dict.fromkeys([*names, "baseline", "difference", "difference_low", "difference_high"])
    record |= {"difference_n": None, "verdict": None, "model": "m", "value": 0.5, "n": 3, "best": False}
    with Output.open(tmp_path / "c", "comparison", command="dinov2 eval compare", config={}) as out:
        write_comparison(out, [record], report="<html></html>", baseline="m")
    table = pq.read_table(tmp_path / "c" / "comparison.parquet")
    assert table.to_pylist() == [record]
    assert table.schema.field("difference").type == "double"
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == [record]
    with pytest.raises(InputError, match="expected evaluation results"):
        read_results(tmp_path / "c")
