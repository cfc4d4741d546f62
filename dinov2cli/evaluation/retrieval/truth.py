"""What is right for each query of a retrieval benchmark: images of the same group, or lists by degree from a file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.errors import InputError
from dinov2cli.evaluation.retrieval.ranking import EASY, HARD, JUNK, Truth

Int64 = npt.NDArray[np.int64]
Box = tuple[float, float, float, float]

_GRADES = {"easy": EASY, "hard": HARD, "junk": JUNK}
_FORM = '{"queries": [{"id": ..., "bbox": [x0, y0, x1, y1], "easy": [ids], "hard": [ids], "junk": [ids]}, ...]}'
_SHOWN = 3


def group_codes(*columns: pa.ChunkedArray) -> list[Int64]:
    """Numbers of the groups of several columns in one numbering, int64 [n] each; -1 where a row has none (null)."""
    texts = [pc.cast(column, pa.string()) for column in columns]
    chunks = [chunk for text in texts for chunk in text.chunks]
    codes = pa.chunked_array(chunks, pa.string()).combine_chunks().dictionary_encode().indices
    numbers = pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.split(numbers, np.cumsum([len(text) for text in texts])[:-1])


def as_flags(column: pa.ChunkedArray, where: str) -> npt.NDArray[np.bool_]:
    """Yes or no of each row [n], of a column of bools or of zeros and ones; null is no. Raises InputError otherwise."""
    values = column.to_pylist()
    wrong = next((value for value in values if value not in (None, 0, 1)), None)
    if wrong is not None:
        raise InputError(f"{where}: is_query holds {wrong!r}; expected true and false, or 1 and 0")
    return np.array([bool(value) for value in values], dtype=bool)


def truths_within(groups: Int64, asked: npt.NDArray[np.bool_] | None) -> tuple[Int64, list[Truth], int]:
    """Queries that are images of the database themselves, [n] by group (-1: none): their rows, what is right for each,
    and how many were left out because nothing else is of their group.

    asked: bool [n]; None: every image of a group of several. A query is junk to itself.
    """
    members = _members(groups)
    rows, truths = [], []
    left_out = 0
    for row in np.arange(len(groups)) if asked is None else np.flatnonzero(asked):
        same = members.get(int(groups[row]), np.zeros(0, np.int64))
        if len(same) < 2:
            left_out += 1
            continue
        rows.append(row)
        truths.append(Truth(same, np.where(same == row, JUNK, EASY)))
    return np.array(rows, dtype=np.int64), truths, left_out


def truths_between(query_groups: Int64, groups: Int64) -> list[Truth]:
    """What is right in the database, [n] by group, for each query of another set, [q] by group; nothing for some."""
    members = _members(groups)
    none = np.zeros(0, np.int64)
    found = [members.get(int(group), none) for group in query_groups]
    return [Truth(rows, np.full(len(rows), EASY)) for rows in found]


def _members(groups: Int64) -> dict[int, Int64]:
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(groups[order]) != 0)) if len(order) else np.zeros(0, np.int64)
    split = np.split(order, starts[1:])
    return {int(groups[rows[0]]): rows for rows in split if len(rows) and groups[rows[0]] >= 0}


@dataclass(frozen=True)
class GivenQuery:
    """A query of a ground-truth file: its id, the ids of each grade, and the box of the object in pixels (x0, y0, x1,
    y1), which is all of the image that is searched with; None: the whole image."""

    id: str
    easy: list[str]
    hard: list[str]
    junk: list[str]
    box: Box | None


@dataclass(frozen=True)
class GivenTruth:
    """A ground-truth file. database: ids of the images to be searched; None: all that are no queries."""

    path: str
    queries: list[GivenQuery]
    database: list[str] | None

    @property
    def boxed(self) -> bool:
        """Whether any query has a box."""
        return any(query.box is not None for query in self.queries)


def read_ground_truth(path: Path | str) -> GivenTruth:
    """Read a JSON file of the form {"queries": [{"id", "bbox"?, "easy": [ids], "hard": [ids], "junk": [ids]}, ...],
    "database": [ids]?}.

    It says what the `gnd` of revisited Oxford and Paris says, whose own file is a pickle and is not read here: for
    each query `qimlist[i]` (id), `gnd[i]["bbx"]` (bbox), and `imlist` at the indices in easy, hard and junk.
    Raises InputError, naming the query, for a file that is not of this form.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"ground truth {path} cannot be read ({type(error).__name__}); expected JSON: {_FORM}"
        ) from None
    queries = raw.get("queries") if isinstance(raw, dict) else None
    if not isinstance(queries, list) or not queries:
        raise InputError(f"ground truth {path} has no list of queries; expected {_FORM}")
    database = raw.get("database")
    if database is not None:
        database = _ids(database, f"ground truth {path}: database")
    found = [_query(query, f"ground truth {path}, query {number}") for number, query in enumerate(queries)]
    names = [query.id for query in found]
    if len(set(names)) < len(names):
        raise InputError(f"ground truth {path} names a query twice; expected each id once")
    return GivenTruth(str(path), found, database)


def _query(raw: Any, where: str) -> GivenQuery:
    if not isinstance(raw, dict) or not isinstance(raw.get("id"), str):
        raise InputError(f"{where} has no id; expected {_FORM}")
    where = f"{where} ({raw['id']})"
    unknown = set(raw) - {"id", "bbox", *_GRADES}
    if unknown:
        raise InputError(f"{where} has the unknown key {sorted(unknown)[0]!r}; expected id, bbox, easy, hard and junk")
    lists = {grade: _ids(raw.get(grade, []), f"{where}: {grade}") for grade in _GRADES}
    graded = [name for names in lists.values() for name in names]
    if len(set(graded)) < len(graded):
        twice = next(name for name in graded if graded.count(name) > 1)
        raise InputError(f"{where} has {twice!r} twice; expected each image once, as easy, hard or junk")
    return GivenQuery(raw["id"], **lists, box=_box(raw.get("bbox"), where))


def _ids(raw: Any, where: str) -> list[str]:
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        raise InputError(f"{where} is not a list of ids; expected {_FORM}")
    return raw


def _box(raw: Any, where: str) -> Box | None:
    if raw is None:
        return None
    numbers = raw if isinstance(raw, list) and len(raw) == 4 else []
    if not numbers or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise InputError(f"{where} has the bbox {raw!r}; expected four numbers of pixels [x0, y0, x1, y1]")
    x0, y0, x1, y1 = map(float, numbers)
    if round(x1) <= round(x0) or round(y1) <= round(y0):
        raise InputError(f"{where} has the empty bbox {raw!r}; expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return x0, y0, x1, y1


def rows_by_id(ids: Sequence[str]) -> dict[str, int]:
    """Row of each id, also by the id without its extension where only one row has it ('all_souls_000013')."""
    short: dict[str, int] = {}
    for row, name in enumerate(ids):
        stem = str(PurePosixPath(name).with_suffix("")) if name else name
        short[stem] = -1 if stem in short else row
    return {**{name: row for name, row in short.items() if row >= 0}, **{name: row for row, name in enumerate(ids)}}


def rows_of(names: Sequence[str], rows: Mapping[str, int], *, path: str, data: str) -> Int64:
    """Rows of some ids, int64 [m]. Raises InputError naming those that the data do not have."""
    missing = [name for name in names if name not in rows]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise InputError(
            f"ground truth {path} names {len(missing)} images that {data} does not have ({shown}); expected its ids, "
            f"as {next(iter(rows), 'none')!r}"
        )
    return np.array([rows[name] for name in names], dtype=np.int64)


def graded_rows(query: GivenQuery, rows: Mapping[str, int], *, path: str, data: str) -> Truth:
    """The truth of a query in rows of the data. Raises InputError for ids that the data do not have."""
    lists = [rows_of(getattr(query, grade), rows, path=path, data=data) for grade in _GRADES]
    grades = [np.full(len(found), grade) for found, grade in zip(lists, _GRADES.values(), strict=True)]
    return Truth(np.concatenate(lists), np.concatenate(grades).astype(np.int64))


def moved(truth: Truth, place: Int64) -> Truth:
    """The truth with rows renumbered by `place` [N] (row -> new row); those that went (-1) are left out."""
    new = place[truth.rows]
    return Truth(new[new >= 0], truth.grades[new >= 0])
