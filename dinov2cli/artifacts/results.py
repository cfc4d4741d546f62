"""Evaluation results on disk: one row per figure, each with its confidence interval, as JSON and as Parquet."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2cli.artifacts.manifest import Manifest, require_kind
from dinov2cli.artifacts.output import Output
from dinov2cli.errors import InputError


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


def write_results(
    out: Output,
    rows: list[ResultRow],
    *,
    predictions: pa.Table | None = None,
    report: str | None = None,
    **extra: Any,
) -> Manifest:
    """Write results.json and results.parquet (and the HTML report) and finish the output.

    `predictions` holds one row per test image (`id`, `label`, `prediction`, `correct`, …), so that two models can be
    compared image by image.
    """
    records = [asdict(row) for row in rows]
    out.write_json("results.json", records)
    # Settings differ between tasks, so the Parquet column holds them as JSON text.
    flat = [{**record, "settings": json.dumps(record["settings"], default=str)} for record in records]
    out.write_table("results.parquet", pa.Table.from_pylist(flat))
    if predictions is not None:
        out.write_table("predictions.parquet", predictions)
    if report is not None:
        out.write_text("report.html", report)
    return out.finish(rows=len(rows), **extra)


def read_results(path: Path | str) -> list[ResultRow]:
    """Read a finished results directory; InputError when it is another kind, unfinished or damaged."""
    path = Path(path)
    require_kind(path, "results")
    try:
        return [ResultRow(**record) for record in json.loads((path / "results.json").read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path / 'results.json'} cannot be read ({type(error).__name__}); evaluate again with --overwrite"
        ) from None


def read_predictions(path: Path | str) -> pa.Table:
    """Read the per-image answers of a finished results directory; InputError when it has none."""
    require_kind(path, "results")
    try:
        return pq.read_table(Path(path) / "predictions.parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path} has no readable predictions.parquet ({type(error).__name__}); evaluate again with --overwrite"
        ) from None
