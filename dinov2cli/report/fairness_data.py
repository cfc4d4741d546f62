"""What a page about differences between groups is made of, and its tables as typed rows."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.evaluation.tasks.interface import Panel
from dinov2cli.fairness.analysis import SHUFFLES

CROSS = " × "  # between the two attributes of a crossed axis, and between the two values of its groups
SAME = re.compile(r"same (.+) among the nearest (\d+)")
RECALL, FALSE = "recall of ", "false positives of "
_ORDERED = ("income", "age", "skin type")
_VALUES = "values of "  # a column, in what the clusters of an audit are called
_UNITS = {"households": "household", "persons": "person"}
_BUCKET = ("< ", "≤ ", "≥ ", "> ")


@dataclass(frozen=True)
class FairnessPage:
    """Everything that a page shows.

    protocol: geo, people or audit. tables: "groups" and "gaps" (schemas of dinov2cli/fairness/analysis.py with a
    first column `model`); perhaps "concepts" and "curve" (geo), "odds" (audit), "model_gaps" (several models).
    overall, found: by model. settings: of the protocol. axes: name of an axis → how it was made, in words.
    panels: by model, pictures; empty unless they were asked for. ordered: axes whose groups have an order of their
    own and are shown in it, besides income, age, skin type and axes of cut numbers.
    """

    protocol: str
    models: list[str]
    dataset: str
    tables: Mapping[str, pa.Table]
    overall: Mapping[str, Sequence[ResultRow]]
    settings: Mapping[str, Any]
    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    axes: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    panels: Mapping[str, Sequence[Panel]] = field(default_factory=dict)
    ordered: Sequence[str] = ()

    @cached_property
    def groups(self) -> "list[Group]":
        """Rows of the table of groups. Shared attributes are no merit: of them no group is best."""
        rows = rows_of(self.tables["groups"], Group)
        return [replace(row, better="neither", drop=None) if is_same_attribute(row.metric) else row for row in rows]

    @cached_property
    def gaps(self) -> "list[Gap]":
        """Rows of the table of gaps."""
        return rows_of(self.tables["gaps"], Gap)

    @property
    def confidence(self) -> float:
        """Of all intervals; a corrected p below 1 − confidence is beyond chance."""
        return float(self.settings.get("confidence", 0.95))

    def axis_names(self) -> list[str]:
        """The axes in the order of the table."""
        return list(dict.fromkeys(row.axis for row in self.groups))

    def metrics(self, axis: str) -> list[str]:
        """What is measured on an axis, in the order of the table."""
        return list(dict.fromkeys(row.metric for row in self.groups if row.axis == axis))

    def rows(self, axis: str, metric: str) -> "dict[str, dict[str, Group]]":
        """Known groups by model and name."""
        found: dict[str, dict[str, Group]] = {model: {} for model in self.models}
        for row in self.groups:
            if row.axis == axis and row.metric == metric and row.known:
                found[row.model][row.group] = row
        return found

    def unknown(self, axis: str, metric: str) -> "dict[str, Group]":
        """By model, the images whose group is not known; without an entry where there are none."""
        chosen = (row for row in self.groups if row.axis == axis and row.metric == metric and not row.known)
        return {row.model: row for row in chosen if row.images}

    def gap(self, model: str, axis: str, metric: str) -> "Gap | None":
        """The gap of a model on an axis."""
        return next((row for row in self.gaps if (row.model, row.axis, row.metric) == (model, axis, metric)), None)

    def tested(self, gap: "Gap") -> int:
        """How many comparisons p is corrected for: axes and metrics of the same kind that were tested."""
        kind = is_same_attribute(gap.metric), is_of_class(gap.metric)
        same = (row for row in self.gaps if (is_same_attribute(row.metric), is_of_class(row.metric)) == kind)
        return sum(row.model == gap.model and row.p_corrected is not None for row in same)

    def shuffles(self, gap: "Gap") -> int | None:
        """How many shuffles there were: as many as asked for, or more where many comparisons need them."""
        asked = self.settings.get("permutations")
        if asked is None:
            return None
        return max(asked, math.ceil(SHUFFLES * self.tested(gap) / (1 - self.confidence)))

    @property
    def clustered(self) -> bool:
        """Whether images belong together in larger units."""
        return any(row.clusters != row.images for row in self.groups)

    @property
    def unit(self) -> str:
        """What one of these units is called: household, person, the name of a column."""
        named = {str(found["cluster_unit"]) for found in self.found.values() if "cluster_unit" in found}
        name = named.pop() if len(named) == 1 else ""
        return name.removeprefix(_VALUES) if name.startswith(_VALUES) else _UNITS.get(name, "cluster")

    def has_order(self, axis: str, names: "Sequence[str]") -> bool:
        """Whether the groups of an axis have an order of their own."""
        cut = any(name.startswith(_BUCKET) for name in names)
        return cut or axis in self.ordered or axis in _ORDERED or CROSS in axis


@dataclass(frozen=True)
class Group:
    """A row of the table of groups: one group of one axis in one metric. Shares are fractions; None: does not apply."""

    model: str
    axis: str
    group: str
    metric: str
    better: str
    known: bool
    images: int
    clusters: int
    enough: bool
    value: float | None
    ci_low: float | None
    ci_high: float | None
    expected: float | None
    best: bool
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    drop: float | None
    p_corrected: float | None
    significant: bool

    @property
    def marked(self) -> bool:
        """Whether it is to be shown as the best group."""
        return self.best and self.enough and self.better != "neither"


@dataclass(frozen=True)
class Gap:
    """A row of the table of gaps: largest minus least rate of the groups of an axis that are large enough."""

    model: str
    axis: str
    metric: str
    better: str
    groups: int
    left_out: int
    unknown: int
    best: str | None
    worst: str | None
    best_value: float | None
    worst_value: float | None
    gap: float | None
    gap_low: float | None
    gap_high: float | None
    drop: float | None
    drop_low: float | None
    drop_high: float | None
    p_value: float | None
    p_corrected: float | None
    significant: bool


@dataclass(frozen=True)
class Concept:
    """A row of the table of concepts: how often one is recognised in the least and in the highest income group."""

    model: str
    concept: str
    images: int
    low_group: str
    high_group: str
    low_images: int
    high_images: int
    low_value: float
    high_value: float
    gap: float
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class Odds:
    """A row of the table of odds: how far groups differ in true and false positives of a class, and at most."""

    model: str
    axis: str
    measure: str
    class_name: str | None
    best: str | None
    worst: str | None
    gap: float | None
    gap_low: float | None
    gap_high: float | None


@dataclass(frozen=True)
class ModelGap:
    """A row of the table of changes: the gap of a model against that of the baseline, on the same images."""

    baseline: str
    model: str
    axis: str
    metric: str
    gap_before: float
    gap_after: float
    change: float
    low: float
    high: float


Row = TypeVar("Row", Group, Gap, Concept, Odds, ModelGap)


def rows_of(table: pa.Table, kind: type[Row]) -> list[Row]:
    """The rows of a table; NaN becomes None, a missing flag False.

    Raises ValueError if the table lacks a column.
    """
    columns = {one.name: "class" if one.name == "class_name" else one.name for one in fields(kind)}
    absent = [column for column in columns.values() if column not in table.column_names]
    if absent:
        raise ValueError(f"the table of {kind.__name__} rows has no column {', '.join(absent)}")
    flags = {one.name for one in fields(kind) if one.type is bool}
    values = {name: _values(table.column(column).to_pylist(), name in flags) for name, column in columns.items()}
    return [kind(**{name: values[name][i] for name in columns}) for i in range(table.num_rows)]


def _values(column: list[Any], flag: bool) -> list[Any]:
    if flag:
        return [bool(value) for value in column]
    return [None if isinstance(value, float) and math.isnan(value) else value for value in column]


def in_order(page: FairnessPage, axis: str, metric: str) -> list[str]:
    """Groups as they are to be shown: as given for an ordered or crossed axis, else by the rates of the first model.

    The highest is first. Of an axis without order, groups that are too small come after the others.
    """
    rows = page.rows(axis, metric)
    names = list(dict.fromkeys(name for groups in rows.values() for name in groups))
    if page.has_order(axis, names):
        return names
    first = next(iter(rows.values()), {})

    def rank(name: str) -> tuple[bool, float]:
        row = first.get(name)
        value = row.value if row is not None and row.value is not None else -1.0
        return row is None or not row.enough, -value

    return sorted(names, key=rank)


def of_model(rows: Iterable[Row], model: str) -> list[Row]:
    """Rows of one model."""
    return [row for row in rows if row.model == model]


def is_same_attribute(metric: str) -> bool:
    """Whether the metric says how often nearest images share an attribute."""
    return SAME.fullmatch(metric) is not None


def is_of_class(metric: str) -> bool:
    """Whether the metric is about one class of an audit."""
    return metric.startswith((RECALL, FALSE))


def is_main(metric: str) -> bool:
    """Whether the metric belongs to the answer at the top of the page."""
    return not is_same_attribute(metric) and not is_of_class(metric)
