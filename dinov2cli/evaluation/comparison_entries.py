"""The figures of several results directories, each under a name that tells its model from the others."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinov2cli.artifacts.manifest import read_manifest
from dinov2cli.artifacts.results import ResultRow, find_results, read_results
from dinov2cli.errors import InputError

# Settings that describe a model or what was found, or say how a figure is shown: no part of how it was measured.
_NOT_PROTOCOL = {
    *("unit", "lower_is_better", "statistic", "headline", "found", "notes", "chosen", "model", "model_hash"),
    *("device", "workers", "batch_size", "cache"),
}


_EXTENSIONS = (".parquet", ".pq", ".tar", ".txt", ".lst", ".list", ".pth", ".onnx")
_ANYTHING = ("images", "data", "train", "test", "val", "validation", "all", "run", "export")  # names that say nothing


@dataclass(frozen=True)
class Entry:
    """One row of one results directory, with what tells its model and data from others of the same name."""

    path: Path
    number: int
    row: ResultRow
    identity: str
    spec: str
    data_hash: str
    label: str = ""


def key_of(row: ResultRow) -> tuple[str, str, str]:
    """What makes two figures comparable: the same metric of the same task on the same data."""
    return row.task, row.dataset, row.metric


def read_entries(paths: Sequence[Path | str], notes: list[str]) -> list[Entry]:
    """All figures of the results at or below some paths, in order; what the user must know is added to `notes`.

    Raises InputError where there are no finished results or no figures in them.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        finished, unfinished = find_results(path)
        folders |= dict.fromkeys(folder.resolve() for folder in finished)
        notes += [f"{folder} is unfinished and was left out: run its command again" for folder in unfinished]
    entries = []
    for folder in folders:
        rows = read_results(folder)
        inputs = read_manifest(folder).inputs
        given = [entry for entry in inputs if entry.get("kind") == "model"]
        names = list(dict.fromkeys(row.model for row in rows))
        of_name = dict(zip(names, given, strict=True)) if len(names) == len(given) else {}
        hashes = {str(entry.get("spec")): str(entry.get("hash")) for entry in inputs if "hash" in entry}
        for number, row in enumerate(rows):
            model = of_name.get(row.model, {})
            identity = json.dumps(model or row.model, sort_keys=True)
            spec = str(model.get("spec", row.model))
            entries.append(Entry(folder, number, row, identity, spec, hashes.get(row.dataset, "")))
    if not entries:
        raise InputError(f"{', '.join(map(str, paths))}: the results hold no figures; evaluate again with --overwrite")
    return entries


def labelled(entries: list[Entry], notes: list[str]) -> list[Entry]:
    """Give every model a name of its own: that of its results, and as much of its path as tells it from others.

    The same model measured twice by the same figure appears once for each, named by the directory or by the settings
    that differ; a figure that is there twice with nothing to tell the two apart is left out once.
    """
    labels = _model_labels(entries)
    folders = short_names([str(entry.path) for entry in entries])
    groups: dict[tuple[str, Any], list[Entry]] = {}
    for entry in entries:
        same = groups.setdefault((labels[entry.identity], key_of(entry.row)), [])
        if any(_equal(entry.row, other.row) for other in same):
            notes.append(f"{entry.row.task} of {labels[entry.identity]} is there twice: the first was taken")
        else:
            same.append(entry)
    found: dict[tuple[Path, int], Entry] = {}
    for (label, _), same in groups.items():
        names = [_settings_text(entry, same) or folders[str(entry.path)] for entry in same]
        if len(set(names)) < len(names):  # the same settings twice among others
            names = [f"{folders[str(entry.path)]}, {entry.number}" for entry in same]
        for entry, name in zip(same, names, strict=True):
            found[entry.path, entry.number] = replace(entry, label=label if len(same) == 1 else f"{label} ({name})")
    return [found[entry.path, entry.number] for entry in entries if (entry.path, entry.number) in found]


def _model_labels(entries: Sequence[Entry]) -> dict[str, str]:
    """Name of each model by its identity: that of its results where no other has it, else the end of its path."""
    identities: dict[str, Entry] = {}
    for entry in entries:
        identities.setdefault(entry.identity, entry)
    names = [entry.row.model for entry in identities.values()]
    tails = short_names([entry.spec for entry in identities.values()])
    labels = {
        identity: entry.row.model if names.count(entry.row.model) == 1 and "/" not in entry.row.model else ""
        for identity, entry in identities.items()
    }
    labels = {identity: label or tails[identities[identity].spec] for identity, label in labels.items()}
    if len(set(labels.values())) == len(labels):
        return labels
    # The same path with other weights: the directories of the results tell them apart.
    folders = short_names([str(entry.path) for entry in identities.values()])
    return {i: f"{labels[i]} ({folders[str(entry.path)]})" for i, entry in identities.items()}


def _equal(first: ResultRow, second: ResultRow) -> bool:
    facts = [(row.value, row.ci_low, row.ci_high, row.n) for row in (first, second)]
    return facts[0] == facts[1] and not differing([first.settings, second.settings])


def _settings_text(entry: Entry, same: Sequence[Entry]) -> str:
    """The settings by which one of several measurements differs from the others: 'image_size 448'."""
    keys = differing([other.row.settings for other in same])
    return ", ".join(f"{key} {shown(entry.row.settings.get(key))}" for key in keys)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each of some paths or DATA strings by its end: as many folders, and `?options`, as tell it from all others."""
    distinct = list(dict.fromkeys(paths))
    split = {path: path.partition("?")[0].rstrip("/").split("/") for path in distinct}
    found: dict[str, str] = {}
    for path, parts in split.items():
        others = [other for other in split.values() if other != parts]
        take = next((n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), len(parts))
        stem = Path(parts[-1]).stem if parts[-1].endswith(_EXTENSIONS) else parts[-1]
        if take == 1 and stem in _ANYTHING and len(parts) > 1:
            take = 2
        name = "/".join([*parts[-take:-1], stem])
        same = sum(other == parts for other in split.values()) > 1
        found[path] = name + ("?" + path.partition("?")[2] if same and "?" in path else "")
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the settings of some measurements, of how they were made, that are not the same for all."""
    keys = dict.fromkeys(key for one in settings for key in one if key not in _NOT_PROTOCOL)
    return [key for key in keys if len({shown(one.get(key)) for one in settings}) > 1]


def shown(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
