"""Several models on the same images: how their gaps differ."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from dinov2cli.evaluation.intervals import difference
from dinov2cli.evaluation.tasks.interface import Figure, Judged

CHANGES = pa.schema(
    [(name, pa.string()) for name in ("baseline", "model", "axis", "metric")]
    + [(name, pa.float64()) for name in ("gap_before", "gap_after", "change", "low", "high")]
)


def gap_changes(judged: Mapping[str, Judged], *, confidence: float, resamples: int, seed: int) -> pa.Table:
    """Change of every gap from the first model to each other one, with the interval of a paired bootstrap over the
    clusters that both share. A gap is left out where the models do not have it over the same images and groups."""
    (baseline, first), *others = judged.items()
    before = _gaps(first)
    found = []
    for model, other in others:
        after = _gaps(other)
        for metric in before.keys() & after.keys():
            pair = before[metric], after[metric]
            if not _comparable(first, other, *pair):
                continue
            clusters = None if first.clusters is None else first.clusters[pair[0].rows]
            limits: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
            change = difference(*(figure.statistic for figure in pair), clusters=clusters, **limits)
            values = [figure.statistic.value() for figure in pair]
            axis = pair[0].settings["axis"]
            name = metric.removesuffix(f"_gap[{axis}]")
            found.append((baseline, model, axis, name, *values, change.value, change.low, change.high))
    order = {metric: place for place, metric in enumerate(before)}
    found.sort(key=lambda row: (list(judged).index(row[1]), order[f"{row[3]}_gap[{row[2]}]"]))
    return pa.table([list(column) for column in zip(*found, strict=True)] or [[]] * len(CHANGES), schema=CHANGES)


def _gaps(judged: Judged) -> dict[str, Figure]:
    return {figure.metric: figure for figure in judged.figures if figure.statistic.kind == "gap"}


def _comparable(first: Judged, other: Judged, before: Figure, after: Figure) -> bool:
    """Whether two gaps are over the same images and as many groups."""
    if before.settings["groups"] != after.settings["groups"] or before.rows is None or after.rows is None:
        return False
    return [first.units[row] for row in before.rows] == [other.units[row] for row in after.rows]
