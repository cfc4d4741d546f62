"""Evaluation results on disk: one row per figure, each with its confidence interval, as JSON and as Parquet, and beside
them the scores of every test image that the figures were made of."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2cli.artifacts.manifest import FILE_NAME, Manifest, has_manifest, read_manifest, require_kind
from dinov2cli.artifacts.output import Output
from dinov2cli.errors import InputError

FILE = "results.json"
_SCORES = "scores.parquet"
# The names of a large test set in one dictionary, so that they are stored once for each figure.
_DICTIONARY_BYTES = 32 << 20

_COMPARISON = pa.schema(
    [(name, pa.string()) for name in ("model", "task", "dataset", "metric")]
    + [(name, pa.float64()) for name in ("value", "ci_low", "ci_high")]
    + [("n", pa.int64()), ("unit", pa.string()), ("lower_is_better", pa.bool_()), ("best", pa.bool_())]
    + [("baseline", pa.string())]
    + [(name, pa.float64()) for name in ("difference", "difference_low", "difference_high")]
    + [("difference_n", pa.int64()), ("verdict", pa.string())]
)


@dataclass(frozen=True)
class ResultRow:
    """One figure. `value`, `ci_low`, `ci_high` share the metric's unit (accuracies are fractions); `n` test images."""

    model: str
    task: str
    dataset: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """The row for JSON, which has no NaN: a figure without a value is None."""
        found: dict[str, Any] = _without_nan(asdict(self))
        return found


@dataclass(frozen=True)
class Scores:
    """What one figure was made of: the numbers of every unit (test image, query), from which it can be resampled.

    statistic: kind of the metric (see `evaluation.statistics`). units: n names. values: float64 [n, width], what the
    columns are depends on the kind. clusters: n names of what units come in (a person, a household), None for a unit of
    none; None where each unit stands for itself.
    """

    statistic: str
    units: Sequence[str]
    values: np.ndarray
    clusters: Sequence[str | None] | None = None


def write_results(
    out: Output,
    rows: list[ResultRow],
    *,
    predictions: pa.Table | None = None,
    scores: Sequence[Scores] | None = None,
    report: str | None = None,
    **extra: Any,
) -> Manifest:
    """Write results.json and results.parquet (and the HTML report) and finish the output.

    `predictions` holds one row per test image (`id`, `label`, `prediction`, `correct`, …). `scores`: one for each of
    `rows`, in their order, so that two models can be compared image by image; kept in scores.parquet (columns model,
    task, dataset, metric, statistic, unit, and `value` float64 or, where a unit has several numbers, `values` float32;
    also `cluster` if any of them has clusters).
    Raises ValueError if there is not one for each row.
    """
    if scores is not None and len(scores) != len(rows):
        raise ValueError(f"{len(rows)} rows of results need as many scores, got {len(scores)}")
    out.write_json(FILE, [row.record() for row in rows])
    # Settings differ between tasks, so the Parquet column holds them as JSON text.
    flat = [{**asdict(row), "settings": json.dumps(row.record()["settings"], default=str)} for row in rows]
    out.write_table("results.parquet", pa.Table.from_pylist(flat))
    if predictions is not None:
        out.write_table("predictions.parquet", predictions)
    if scores:
        clustered = any(found.clusters is not None for found in scores)
        tables = [_scores_table(row, found, clustered) for row, found in zip(rows, scores, strict=True)]
        out.write(_SCORES, lambda path: _write_groups(path, tables))
    if report is not None:
        out.write_text("report.html", report)
    return out.finish(rows=len(rows), **extra)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {key: math.nan for key in ("value", "ci_low", "ci_high") if record[key] is None}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_READ = ("statistic", "unit", "value", "values", "cluster")
_NAMES = ("model", "task", "dataset", "metric", "statistic")


def _scores_table(row: ResultRow, scores: Scores, clustered: bool) -> pa.Table:
    values = np.asarray(scores.values, dtype=np.float64)
    n, width = values.shape
    names = (row.model, row.task, row.dataset, row.metric, scores.statistic)
    columns = {name: pa.array([text] * n, pa.string()) for name, text in zip(_NAMES, names, strict=True)}
    columns["unit"] = pa.array(scores.units, pa.string())
    if width == 1:
        columns["value"] = pa.array(values[:, 0], pa.float64())
        columns["values"] = pa.nulls(n, pa.list_(pa.float32()))
    else:
        columns["value"] = pa.nulls(n, pa.float64())
        ends = pa.array(np.arange(0, n * width + 1, width, dtype=np.int32))
        columns["values"] = pa.ListArray.from_arrays(ends, pa.array(values.astype(np.float32).reshape(-1)))
    if clustered:
        columns["cluster"] = (
            pa.nulls(n, pa.string()) if scores.clusters is None else pa.array(scores.clusters, pa.string())
        )
    return pa.table(columns)


def _write_groups(path: Path, tables: Sequence[pa.Table]) -> None:
    """One row group for each table, so that each is read alone."""
    options: dict[str, Any] = {"compression": "zstd", "dictionary_pagesize_limit": _DICTIONARY_BYTES}
    with pq.ParquetWriter(path, tables[0].schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))


def find_results(path: Path | str) -> tuple[list[Path], list[Path]]:
    """Directories of finished results at or below `path`, sorted, and those that were left unfinished.

    Raises InputError when `path` is unfinished itself, is an artefact of another kind that holds no results, or holds
    nothing of the sort.
    """
    path = Path(path)
    if has_manifest(path) and read_manifest(path).kind == "results":
        require_kind(path, "results")
        return [path], []
    finished: list[Path] = []
    unfinished: list[Path] = []
    for folder in sorted(file.parent for file in path.rglob(FILE_NAME)) if path.is_dir() else []:
        if any(other in folder.parents for other in finished):
            continue  # a part of these: a suite holds the figures of its tasks
        manifest = read_manifest(folder)
        if manifest.kind == "results":
            (finished if manifest.complete else unfinished).append(folder)
    if finished:
        return finished, unfinished
    if unfinished or has_manifest(path):
        require_kind(unfinished[0] if unfinished else path, "results")  # which says what it is instead
    what = "holds no results" if path.is_dir() else "is not a directory" if path.exists() else "does not exist"
    raise InputError(f"{path} {what}; expected a directory made by `dinov2 eval`, or one with several of them below it")


def read_results(path: Path | str) -> list[ResultRow]:
    """Read a finished results directory; InputError when it is another kind, unfinished or damaged."""
    path = Path(path)
    require_kind(path, "results")
    try:
        records = json.loads((path / FILE).read_text())
        return [ResultRow(**{**record, **_numbers(record)}) for record in records]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path / 'results.json'} cannot be read ({type(error).__name__}); evaluate again with --overwrite"
        ) from None


def read_scores(path: Path | str, row: int) -> Scores | None:
    """The scores behind row number `row` of a finished results directory; None where none were kept.

    Raises InputError when the file is damaged.
    """
    file = Path(path) / _SCORES
    if not file.is_file():
        return None
    try:
        with pq.ParquetFile(file) as stored:
            kept = [name for name in _READ if name in stored.schema_arrow.names]
            table = stored.read_row_group(row, columns=kept)
        n = table.num_rows
        several = table.column("values").combine_chunks()
        if several.null_count:
            values = table.column("value").to_numpy().reshape(n, 1)
        else:
            values = several.flatten().to_numpy().astype(np.float64).reshape(n, -1)
        kind = table.column("statistic")[0].as_py() if n else "mean"
        clusters = table.column("cluster") if "cluster" in kept else None
        names = None if clusters is None or clusters.null_count == n else clusters.to_pylist()
        return Scores(kind, table.column("unit").to_pylist(), values, names)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}); evaluate again with --overwrite") from None


def write_comparison(out: Output, records: list[dict[str, Any]], *, report: str, **extra: Any) -> Manifest:
    """Write a comparison of models, one plain record for each model and figure, as comparison.json and
    comparison.parquet, and its page; finish the output."""
    out.write_json("comparison.json", records)
    out.write_table("comparison.parquet", pa.Table.from_pylist(records, _COMPARISON))
    out.write_text("report.html", report)
    return out.finish(rows=len(records), **extra)


def read_predictions(path: Path | str) -> pa.Table:
    """Read the per-image answers of a finished results directory; InputError when it has none."""
    require_kind(path, "results")
    try:
        return pq.read_table(Path(path) / "predictions.parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path} has no readable predictions.parquet ({type(error).__name__}); evaluate again with --overwrite"
        ) from None
