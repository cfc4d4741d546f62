"""The figures of a study, made of its tables: rates of groups, gaps and drops, each as something to be resampled, so
that two models can be compared on the very same images."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.evaluation import statistics
from dinov2cli.evaluation.tasks.interface import Figure
from dinov2cli.fairness.analysis import Findings
from dinov2cli.fairness.axis import Axis
from dinov2cli.fairness.outcomes import Outcome


def study_figures(
    outcomes: Sequence[Outcome], axes: Sequence[Axis], findings: Findings, *, quoted: int
) -> list[Figure]:
    """The rate of every outcome over all images, then of every group (`top5[region=Africa]`), then the gap of every
    axis (`top5_gap[region]`, best minus worst) and, where high is good, the drop (`top5_drop[region]`, the gap over the
    best), the names of the two groups and what the test said in its settings.

    quoted: the first so many outcomes are printed, with the gaps of the very first and those that are significant.
    """
    first = outcomes[0].metric
    figures = [_overall(outcome, said=place < quoted) for place, outcome in enumerate(outcomes)]
    measured = {outcome.metric: outcome for outcome in outcomes}
    divided = {axis.name: axis for axis in axes}
    for row in findings.groups.to_pylist():
        if row["known"] and row["value"] is not None:
            figures.append(_of_group(measured[row["metric"]], divided[row["axis"]], row))
    for row in findings.gaps.to_pylist():
        if row["gap"] is not None:
            said = row["significant"] or row["metric"] == first
            figures += _of_gap(measured[row["metric"]], divided[row["axis"]], row, findings.groups, said=said)
    return figures


def _overall(outcome: Outcome, *, said: bool) -> Figure:
    rows = np.flatnonzero(outcome.counted)
    statistic = statistics.mean(outcome.values[rows])
    return Figure(outcome.metric, statistic, rows=rows, lower_is_better=outcome.better == "low", said=said)


def _of_group(outcome: Outcome, axis: Axis, row: dict[str, Any]) -> Figure:
    rows = np.flatnonzero(outcome.counted & (axis.codes == axis.names.index(row["group"])))
    settings = {key: row[key] for key in ("axis", "group", "enough", "clusters")}
    return Figure(
        f"{outcome.metric}[{axis.name}={row['group']}]",
        statistics.mean(outcome.values[rows]),
        settings=settings,
        rows=rows,
        limits=(row["ci_low"], row["ci_high"]),
        said=False,
        lower_is_better=outcome.better == "low",
    )


def _of_gap(outcome: Outcome, axis: Axis, row: dict[str, Any], groups: pa.Table, *, said: bool) -> Iterable[Figure]:
    names = _compared(groups, axis.name, outcome.metric)
    codes = [axis.names.index(name) for name in names]
    rows = np.flatnonzero(outcome.counted & np.isin(axis.codes, codes))
    counted = (axis.codes[rows, None] == np.array(codes)).astype(np.float64)
    hits = counted * outcome.values[rows, None]
    told = ("axis", "groups", "best", "worst", "best_value", "worst_value", "p_value", "p_corrected", "significant")
    settings = {key: row[key] for key in told}
    for kind, make in (("gap", statistics.gap), ("drop", statistics.drop)):
        if row[kind] is not None:
            yield Figure(
                f"{outcome.metric}_{kind}[{axis.name}]",
                make(hits, counted),
                lower_is_better=True,
                settings=settings,
                rows=rows,
                limits=(row[f"{kind}_low"], row[f"{kind}_high"]),
                said=said and kind == "gap",
            )


def _compared(groups: pa.Table, axis: str, metric: str) -> list[str]:
    """The groups of an axis that were large enough."""
    return [
        row["group"] for row in groups.to_pylist() if row["axis"] == axis and row["metric"] == metric and row["enough"]
    ]


def texts_of(axis: Axis) -> pa.Array:
    """The group of every image as text, null where it is unknown."""
    names: npt.NDArray[np.object_] = np.array([*axis.names, None], dtype=object)
    return pa.array(names[axis.codes].tolist(), pa.string())
