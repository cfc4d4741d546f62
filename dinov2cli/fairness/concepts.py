"""From a classifier's answers to what is asked of them: whether an image's concept is among them, and how often they
fall under a meta-label.

Hits are those of Dollar Street (arXiv 2304.07193, section 8.1): one of the first answers is a class of the image's
concept. Meta-labels are those of Goyal et al. 2022 (arXiv 2202.07603, indicator 1): how often one of the first answers,
given with some confidence, is a Human, Possibly-Human, Non-Human or Crime class.
"""

import csv
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import InputError
from dinov2cli.fairness.answers import Answers

META = ("Human", "Possibly-Human", "Non-Human", "Crime")
"""The meta-labels of Goyal et al. 2022, in their order."""

_SHOWN = 3
_NUMBER = re.compile(r"[0-9]+")
_MAPPING = 'expected a table with the columns concept and class, or JSON {"concept": ["class", ...]}'
_META = 'expected a table with the columns class and meta_label, or JSON {"class": "meta-label", ...}'


def read_mapping(file: Path) -> dict[str, list[str]]:
    """Which classes of the classifier stand for each concept, from a file: concept -> classes, in the file's order.

    A CSV or TSV file with the columns concept and class has one pair per row (a concept with several classes has
    several rows); JSON has {"concept": ["class", ...]}. Pairs that come twice count once. Raises InputError for a file
    that is missing, is neither, or holds nothing.
    """
    if file.suffix.lower() == ".json":
        pairs = _json_pairs(file, _MAPPING)
    else:
        pairs = _table_pairs(file, ("concept",), ("class",), _MAPPING)
    mapping: dict[str, list[str]] = {}
    for concept, name in pairs:
        classes = mapping.setdefault(concept, [])
        if name is not None and name not in classes:
            classes.append(name)
    if not any(mapping.values()):
        raise InputError(f"{file} maps no concept to a class; {_MAPPING}")
    return mapping


def through(
    concepts: Sequence[Sequence[str] | None], mapping: Mapping[str, Sequence[str]] | None
) -> list[list[str] | None]:
    """The classes that stand for the concepts of each image: those of the mapping, each once.

    A concept that the mapping does not name stands for the class of its own name; one that it maps to an empty list
    stands for none. mapping None: every concept is a class. An image without concepts (None) stays so.
    """
    known = mapping or {}
    return [
        None
        if some is None
        else list(dict.fromkeys(name for concept in some for name in known.get(concept, (concept,))))
        for some in concepts
    ]


def hits(
    answers: Answers, targets: Sequence[Sequence[str] | None]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], list[str]]:
    """Whether one of the answers for each image is among its target classes: values float64 [n], counted bool [n], and
    notes.

    targets name classes of the classifier, or number them as its training labels do (only where no class is called by a
    number). Not counted are images without targets (None), and those whose targets the classifier all does not know,
    which are noted. Of an image with several targets the known ones count. Raises InputError where no target of any
    image is known.
    """
    if len(targets) != len(answers.classes):
        raise ValueError(f"{len(answers.classes)} answers need as many lists of targets, got {len(targets)}")
    number = _numbering(answers.class_names, answers.class_numbers)
    values, counted = np.zeros(len(targets)), np.zeros(len(targets), dtype=bool)
    sets: dict[tuple[str, ...], frozenset[int]] = {}
    unknown: dict[str, int] = {}
    lost = 0
    for row, (some, given) in enumerate(zip(targets, answers.classes.tolist(), strict=True)):
        if not some:
            continue
        names = tuple(some)
        if names not in sets:
            sets[names] = frozenset(number[name.strip()] for name in names if name.strip() in number)
        wanted = sets[names]
        counted[row] = bool(wanted)
        values[row] = any(one in wanted for one in given)
        if not wanted:
            lost += 1
            for name in names:
                unknown[name] = unknown.get(name, 0) + 1
    if not counted.any():
        raise InputError(_nothing_known(list(unknown), answers.class_names))
    return values, counted, _lost_note(lost, unknown)


def check_targets(targets: Sequence[Sequence[str] | None], class_names: Sequence[str]) -> None:
    """Raise InputError where no target of any image names or numbers a class, before anything is computed."""
    number = _numbering(class_names)
    given = dict.fromkeys(name for some in targets for name in some or ())
    if not any(name.strip() in number for name in given):
        raise InputError(_nothing_known(list(given), class_names))


def read_meta_labels(file: Path, class_names: Sequence[str]) -> tuple[dict[str, npt.NDArray[np.bool_]], list[str]]:
    """Which classes fall under each meta-label, meta-label -> bool [C], and notes.

    A CSV or TSV file has the columns class and meta_label; JSON has {"class": "meta-label"} or {"meta-label": ["class",
    ...]}. The four of `META` are recognised in any spelling (possibly_human, possibly human); others may be added, and
    a class may fall under several. Meta-labels without a class that the classifier knows are left out and noted, as
    are classes of the file that it does not know, and its classes that the file does not name (they fall under none).
    Raises InputError for a file that is missing, malformed, or knows none of the classes.
    """
    if file.suffix.lower() == ".json":
        pairs = _meta_pairs(file)
    else:
        pairs = [
            (name, meta)
            for name, meta in _table_pairs(file, ("class",), ("metalabel", "meta"), _META)
            if meta is not None
        ]
    number = {name.strip(): place for place, name in enumerate(class_names)}
    spelling = {_plain(name): name for name in META}
    found = {name: np.zeros(len(class_names), dtype=bool) for name in META}
    if not pairs:
        raise InputError(f"{file} names no class; {_META}")
    for name, meta in pairs:
        meta = spelling.setdefault(_plain(meta), meta)
        table = found.setdefault(meta, np.zeros(len(class_names), dtype=bool))
        if name in number:
            table[number[name]] = True
    named = list(dict.fromkeys(name for name, _ in pairs))
    if not any(table.any() for table in found.values()):
        raise InputError(f"{file}: {_nothing_known(named, class_names)}")
    notes = []
    foreign = [name for name in named if name not in number]
    if foreign:
        notes.append(f"{len(foreign):,} classes of {file.name} are not classes of the classifier ({_shown(foreign)})")
    without = [name for name in class_names if name.strip() not in set(named)]
    if without:
        notes.append(
            f"{len(without):,} of {len(class_names):,} classes have no meta-label in {file.name} ({_shown(without)}): "
            "answers that name them fall under none"
        )
    empty = [meta for meta, table in found.items() if not table.any()]
    if empty:
        notes.append(f"no class of the classifier is {' or '.join(empty)}: there is no rate of it")
    return {meta: table for meta, table in found.items() if table.any()}, notes


def meta_rates(
    answers: Answers, meta: Mapping[str, npt.NDArray[np.bool_]], *, threshold: float = 0.1
) -> dict[str, npt.NDArray[np.float64]]:
    """For each meta-label whether an image got one of its classes among its answers with this confidence or more:
    float64 [n] of 0 and 1. An image may fall under several meta-labels, or none."""
    sure = (answers.classes >= 0) & (answers.confidences >= threshold)
    return {
        name: (sure & members[np.maximum(answers.classes, 0)]).any(axis=1).astype(np.float64)
        for name, members in meta.items()
    }


def _numbering(class_names: Sequence[str], class_numbers: Sequence[int] = ()) -> dict[str, int]:
    """Place of every class by its name and, where no name is a number, by its number."""
    names = [name.strip() for name in class_names]
    number = {name: place for place, name in enumerate(names)}
    if not any(_NUMBER.fullmatch(name) for name in names):
        numbers = class_numbers or range(len(names))
        number.update({str(label): place for place, label in enumerate(numbers)})
    return number


def _nothing_known(named: Sequence[str], class_names: Sequence[str]) -> str:
    if not named:
        return "no image has a target class; expected the classes that each image shows"
    by_case = {name.casefold(): name for name in class_names}
    close = next(
        (by_case[near] for name in named for near in difflib.get_close_matches(name.casefold(), by_case, 1)), ""
    )
    meant = f" (did you mean {close}?)" if close else ""
    return (
        f"none of the {len(named):,} target classes ({_shown(named)}) is a class of the classifier "
        f"({_shown(class_names)}){meant}; give the classes the names that the training set has, or map them to these"
    )


def _lost_note(lost: int, unknown: Mapping[str, int]) -> list[str]:
    if not lost:
        return []
    most = sorted(unknown, key=lambda name: (-unknown[name], name))
    return [f"{lost:,} images show only what is no class of the classifier ({_shown(most)}) and are not counted"]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{file}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error}); expected CSV, TSV or JSON") from error


def _table_pairs(
    file: Path, first: tuple[str, ...], second: tuple[str, ...], expected: str
) -> list[tuple[str, str | None]]:
    """Two columns of a CSV or TSV file, found by their names in any spelling; None where the second is empty."""
    lines = _text(file).splitlines()
    delimiter = "\t" if file.suffix.lower() == ".tsv" or "\t" in (lines or [""])[0] else ","
    rows = list(csv.reader(lines, delimiter=delimiter))
    header = [_plain(name) for name in rows[0]] if rows else []
    places = [next((header.index(name) for name in names if name in header), -1) for names in (first, second)]
    if min(places) < 0:
        found = f"its columns are {', '.join(rows[0])}" if rows else "it is empty"
        raise InputError(f"{file}: {found}; {expected}")
    pairs: list[tuple[str, str | None]] = []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= max(places) or not row[places[0]].strip():
            raise InputError(f"{file}, row {number}: {delimiter.join(row)!r} lacks a value; {expected}")
        pairs.append((row[places[0]].strip(), row[places[1]].strip() or None))
    return pairs


def _json(file: Path, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON ({error}); {expected}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}; {expected}")
    return value


def _json_pairs(file: Path, expected: str) -> list[tuple[str, str | None]]:
    """Every key with each item of its list; with None for an empty list."""
    pairs: list[tuple[str, str | None]] = []
    for key, listed in _json(file, expected).items():
        items = [listed] if isinstance(listed, str) else listed
        if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
            raise InputError(f"{file}: {key!r} has {str(listed)[:40]!r}; {expected}")
        pairs += [(key.strip(), str(item).strip()) for item in items] or [(key.strip(), None)]
    return pairs


def _meta_pairs(file: Path) -> list[tuple[str, str]]:
    """(class, meta-label) of JSON in either direction: lists are classes, a plain text is a meta-label."""
    value = _json(file, _META)
    lists = sum(isinstance(item, list) for item in value.values())
    if lists not in (0, len(value)):
        raise InputError(f"{file} mixes texts and lists; {_META}")
    pairs = [(key, item) for key, item in _json_pairs(file, _META) if item is not None]
    return [(item, key) for key, item in pairs] if lists else pairs
