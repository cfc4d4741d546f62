"""Results of several models side by side: which is best at what, and whether that is more than chance.

Two models are compared on the very same test images by a paired bootstrap (`intervals.difference`), of whole clusters
where images belong together; never across test sets, and where settings of the tests differ that is said.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli.artifacts.results import ResultRow, Scores, read_scores
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.clustered import cluster_codes
from dinov2cli.evaluation.comparison_entries import Entry, differing, key_of, labelled, read_entries, short_names, shown
from dinov2cli.evaluation.intervals import DEFAULT_CONFIDENCE, DEFAULT_RESAMPLES, Difference, difference
from dinov2cli.evaluation.statistics import Statistic


@dataclass(frozen=True)
class Column:
    """One figure that models are compared by. dataset: the DATA string; data: the same, short, told from the others."""

    task: str
    dataset: str
    metric: str
    data: str
    unit: str
    lower_is_better: bool


@dataclass(frozen=True)
class Change:
    """How much `model` differs from the baseline in one column, over `change.n` test images that both were given."""

    model: str
    column: Column
    change: Difference

    @property
    def verdict(self) -> str:
        """'better' or 'worse' where the interval leaves out zero, else ''."""
        if not self.change.significant:
            return ""
        return "better" if (self.change.value > 0) != self.column.lower_is_better else "worse"


@dataclass
class Comparison:
    """models in the order given; rows: the result of each (model, column) that there is; changes to the baseline."""

    models: list[str]
    columns: list[Column]
    rows: dict[tuple[str, Column], ResultRow]
    baseline: str
    changes: list[Change]
    notes: list[str] = field(default_factory=list)

    def best(self, column: Column) -> list[str]:
        """The models with the best value of a column, several where they tie; none where one alone was measured."""
        values = {model: row.value for (model, of), row in self.rows.items() if of == column and row.value == row.value}
        if len(values) < 2:
            return []
        top = (min if column.lower_is_better else max)(values.values())
        return [model for model in self.models if values.get(model) == top]

    def records(self) -> list[dict[str, Any]]:
        """One plain row for each model and column, with its difference to the baseline (None where there is none)."""
        changes = {(change.model, change.column): change for change in self.changes}
        return [
            {
                "model": model,
                "task": column.task,
                "dataset": column.dataset,
                "metric": column.metric,
                **{key: getattr(row, key) for key in ("value", "ci_low", "ci_high", "n")},
                "unit": column.unit,
                "lower_is_better": column.lower_is_better,
                "best": model in self.best(column),
                "baseline": self.baseline,
                **_difference_fields(changes.get((model, column))),
            }
            for (model, column), row in self.rows.items()
        ]


def _difference_fields(change: Change | None) -> dict[str, Any]:
    if change is None:
        return dict.fromkeys(("difference", "difference_low", "difference_high", "difference_n", "verdict"))
    found = change.change
    return {
        "difference": found.value,
        "difference_low": found.low,
        "difference_high": found.high,
        "difference_n": found.n,
        "verdict": change.verdict,
    }


def compare_results(
    paths: Sequence[Path | str],
    *,
    baseline: str | None = None,
    every: bool = False,
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = DEFAULT_CONFIDENCE,
) -> Comparison:
    """Compare all models of some results directories, or of those below them, to the baseline (default: the first).

    every: all figures, not only the one to quote of each task and data set. Raises InputError where there are no
    finished results, or models that have no test image in common; UserError for a baseline that is not among them.
    """
    notes: list[str] = []
    entries = labelled(read_entries(paths, notes), notes)
    if not every:
        entries = _headlines(entries)
    models = list(dict.fromkeys(entry.label for entry in entries))
    if baseline is None:
        baseline = models[0]
    if baseline not in models:
        raise UserError(f"--baseline {baseline!r} is none of the models; expected one of {', '.join(models)}")
    columns = _columns(entries)
    by_place = {(entry.label, columns[key_of(entry.row)]): entry for entry in entries}
    notes += _unequal_settings(by_place, baseline)
    notes += _lonely(columns.values(), by_place)
    changes = _changes(by_place, baseline, notes, seed=seed, resamples=resamples, confidence=confidence)
    rows = {place: entry.row for place, entry in by_place.items()}
    return Comparison(models, list(columns.values()), rows, baseline, changes, list(dict.fromkeys(notes)))


def _headlines(entries: list[Entry]) -> list[Entry]:
    """The figures to quote: marked in the results, else the first of each model, task and data set."""
    marked = [entry for entry in entries if entry.row.settings.get("headline")]
    has = {(entry.label, entry.row.task, entry.row.dataset) for entry in marked}
    first: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        place = (entry.label, entry.row.task, entry.row.dataset)
        if place not in has:
            first.setdefault(place, entry)
    chosen = {(entry.path, entry.number) for entry in [*marked, *first.values()]}
    # A figure that is the one to quote for one model is shown of all that have it.
    keys = {key_of(entry.row) for entry in entries if (entry.path, entry.number) in chosen}
    return [entry for entry in entries if key_of(entry.row) in keys]


def _columns(entries: Sequence[Entry]) -> dict[tuple[str, str, str], Column]:
    names = short_names(list(dict.fromkeys(entry.row.dataset for entry in entries)))
    columns: dict[tuple[str, str, str], Column] = {}
    for entry in entries:
        row, settings = entry.row, entry.row.settings
        column = Column(
            *key_of(row),
            names[row.dataset],
            settings.get("unit", "share"),
            bool(settings.get("lower_is_better", False)),
        )
        columns.setdefault(key_of(row), column)
    return columns


_Places = Mapping[tuple[str, Column], Entry]


def _unequal_settings(places: _Places, baseline: str) -> list[str]:
    """Notes on columns whose models were not measured alike: other settings, or data that changed in between."""
    notes: dict[str, list[str]] = {}
    for column in dict.fromkeys(column for _, column in places):
        here = {model: entry for (model, of), entry in places.items() if of == column}
        first_name = baseline if baseline in here else next(iter(here))
        first = here[first_name]
        for model, entry in here.items():
            place = f"{column.task} on {column.data}"
            if first.data_hash and entry.data_hash and first.data_hash != entry.data_hash:
                notes[f"{column.data} changed between the measurement of {first_name} and that of {model}"] = []
            for key in differing([first.row.settings, entry.row.settings]):
                pair = (shown(one.row.settings.get(key)) for one in (first, entry))
                text = " of {} and {} differ in {}: {} and {}".format(first_name, model, key, *pair)
                where = notes.setdefault(text, [])
                if place not in where:
                    where.append(place)
    return [", ".join(where) + text for text, where in notes.items()]


def _lonely(columns: Iterable[Column], places: _Places) -> list[str]:
    """Notes on metrics of one task that were measured on other data sets by other models: these are not compared."""
    by_metric: dict[tuple[str, str], list[tuple[Column, set[str]]]] = {}
    for column in columns:
        measured = {model for model, of in places if of == column}
        by_metric.setdefault((column.task, column.metric), []).append((column, measured))
    notes = []
    for (task, metric), found in by_metric.items():
        alone = [(column, models) for column, models in found if len(models) == 1]
        if len({next(iter(models)) for _, models in alone}) > 1:
            told = ", ".join(f"{next(iter(models))} on {column.data}" for column, models in alone)
            notes.append(f"{task} {metric} was measured on different test sets ({told}): these are not compared")
    return notes


def _changes(places: _Places, baseline: str, notes: list[str], **how: Any) -> list[Change]:
    changes, strangers = [], 0
    for column in dict.fromkeys(column for _, column in places):
        own = places.get((baseline, column))
        before = None if own is None else read_scores(own.path, own.number)
        for (model, of), entry in places.items():
            if of != column or model == baseline or own is None:
                continue
            after = read_scores(entry.path, entry.number)
            if before is None or after is None:
                lacking = own if before is None else entry
                notes.append(f"{lacking.path} kept no scores of its test images, so no difference: evaluate again")
                continue
            where = f"{column.task} {column.metric} on {column.data}, {baseline} and {model}"
            pair, note = _paired(before, after)
            if note:
                notes.append(f"{where}: {note}")
            if pair is None:
                strangers += 1
            else:
                first, second, clusters = pair
                changes.append(Change(model, column, difference(first, second, clusters=clusters, **how)))
    if strangers and not changes:
        raise InputError(f"the models have no test images in common ({notes[-1]}); evaluate them on the same data")
    return changes


_Pair = tuple[Statistic, Statistic, np.ndarray | None]


def _paired(before: Scores, after: Scores) -> tuple[_Pair | None, str]:
    """Both metrics over the units that both have, in one order, with the clusters of these if there are any, and what
    the user must know of that."""
    first, second = Statistic.of(before), Statistic.of(after)
    if {first.kind, second.kind} == {"mean", "ratio"}:  # the same share, over all units and over some of them
        first, second = first.as_ratio(), second.as_ratio()
    if first.kind != second.kind or first.values.shape[1] != second.values.shape[1]:
        return None, "the metrics are not of the same classes, so there is no difference to tell"
    units, others = list(before.units), list(after.units)
    note = ""
    own = other = np.arange(len(units))
    if units != others:
        place = {name: row for row, name in enumerate(others)}
        if len(place) < len(others) or len(set(units)) < len(units):
            return None, "test images of the same name cannot be told apart, so there is no difference to tell"
        rows = np.array([(row, place[name]) for row, name in enumerate(units) if name in place], dtype=np.int64)
        if not len(rows):
            return None, f"none of {len(units)} and {len(others)} test images is in both"
        own, other = rows.T
        if len(rows) < max(len(units), len(others)):
            note = f"compared on the {len(rows)} test images that both have, of {len(units)} and {len(others)}"
        first, second = first.at(own), second.at(other)
    clusters, others_clusters = _clusters_at(before, own), _clusters_at(after, other)
    if clusters is None or others_clusters is None:  # what images belong together does not hang on the model
        clusters = others_clusters if clusters is None else clusters
    elif not np.array_equal(clusters, others_clusters):
        return None, (
            "other test images belong together (persons, households) in one than in the other, so there is no "
            "difference to tell: evaluate again"
        )
    return (first, second, clusters), note


def _clusters_at(scores: Scores, rows: np.ndarray) -> np.ndarray | None:
    return None if scores.clusters is None else cluster_codes([scores.clusters[row] for row in rows])
