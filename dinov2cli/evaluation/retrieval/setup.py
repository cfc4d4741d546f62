"""Who is searched for among whom: a retrieval benchmark in rows of features, from columns, labels or a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.data.source import ImageSource
from dinov2cli.errors import InputError
from dinov2cli.evaluation.retrieval.ranking import EASY, HARD, Ranking, Truth
from dinov2cli.evaluation.retrieval.truth import (
    Box,
    GivenTruth,
    as_flags,
    graded_rows,
    group_codes,
    moved,
    read_ground_truth,
    rows_by_id,
    rows_of,
    truths_between,
    truths_within,
)

Int64 = npt.NDArray[np.int64]


@dataclass
class Setup:
    """queries: int64 [Q] rows of the query features; query_rows: int64 [Q] the same in the query source; database:
    int64 [N] rows of the database features; truths: rows within these N; boxes: part of the image of each query.

    open_ended: the queries are a set of their own, some of which may have no answer. found: facts for the settings.
    """

    queries: Int64
    query_rows: Int64
    database: Int64
    truths: list[Truth]
    boxes: Sequence[Box | None]
    open_ended: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def first_right(self, ranking: Ranking) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Per query, bool [Q] each: whether the nearest image is right, and whether any is."""
        pairs = zip(ranking.nearest[:, 0], self.truths, strict=True)
        return np.array([row in truth.rows for row, truth in pairs]), np.array([len(t.rows) > 0 for t in self.truths])


def prepare(
    test: ImageSource,
    queries: ImageSource | None,
    ground_truth: str | None,
    test_index: Int64,
    query_index: Int64 | None,
) -> Setup:
    """The benchmark over the rows of the sources that have features: test_index [n], query_index [q].

    query_index is None where the queries are read from the features of the test set. Raises InputError where nothing
    says what belongs together, for a file that does not fit the data, and where no query has anything to be found.
    """
    if ground_truth is not None:
        setup = _from_file(read_ground_truth(ground_truth), test, queries, test_index, query_index)
    elif queries is None:
        setup = _within(test, test_index)
    else:
        assert query_index is not None
        setup = _between(test, queries, test_index, query_index)
    answerable = sum(bool(np.isin(truth.grades, (EASY, HARD)).any()) for truth in setup.truths)
    if not answerable:
        raise InputError(
            f"{test.spec}: none of the {len(setup.truths)} queries has an image to be found; expected groups of two or "
            "more images, or right images for the queries"
        )
    if setup.open_ended or ground_truth is not None:
        setup.found["queries_with_answer"] = answerable
    return setup


def _grouping(source: ImageSource) -> tuple[pa.ChunkedArray, str]:
    column = source.column("group")
    if column is not None:
        return column, "group"
    if source.labels is None:
        there = ", ".join(source.columns.column_names) or "none"
        raise InputError(
            f"{source.spec} has no column 'group' that says which images belong together, its columns are {there}; "
            "name one with ?group=COLUMN, take folders with ?label=folder, or give a file with --ground-truth"
        )
    labels = source.labels
    names = source.label_names
    texts = [None if label < 0 else str(label) if names is None else names[label] for label in labels.tolist()]
    return pa.chunked_array([pa.array(texts, pa.string())]), "label"


def _within(test: ImageSource, index: Int64) -> Setup:
    column, role = _grouping(test)
    (groups,) = group_codes(column)
    flags = test.column("is_query")
    asked = None if flags is None else as_flags(flags, test.spec)
    if asked is not None and not asked.any():
        raise InputError(f"{test.spec}: no row has is_query set; expected one query at least, or no such column")
    queries, truths, left_out = truths_within(groups[index], None if asked is None else asked[index])
    notes = _label_note(role)
    if left_out:
        which = "images" if asked is None else "queries"
        notes.append(f"{left_out} {which} were left out: no other image is of their group")
    every = np.arange(len(index))
    found = {"groups_of": role, "left_out": left_out, "every_image_asks": asked is None}
    return Setup(queries, index[queries], every, truths, [None] * len(queries), found=found, notes=notes)


def _between(test: ImageSource, queries: ImageSource, index: Int64, query_index: Int64) -> Setup:
    (column, role), (asked, _) = _grouping(test), _grouping(queries)
    groups, query_groups = group_codes(column, asked)
    truths = truths_between(query_groups[query_index], groups[index])
    notes = _label_note(role)
    without = sum(not len(truth.rows) for truth in truths)
    if without:
        notes.append(f"{without} of {len(truths)} queries have no image of their group: they count in GAP alone")
    rows = np.arange(len(query_index))
    found = {"groups_of": role, "queries_from": queries.spec}
    boxes = [None] * len(rows)
    return Setup(rows, query_index, np.arange(len(index)), truths, boxes, open_ended=True, found=found, notes=notes)


def _label_note(role: str) -> list[str]:
    return (
        [] if role == "group" else ["there is no column 'group': images of the same label are taken to belong together"]
    )


def _from_file(
    given: GivenTruth, test: ImageSource, queries: ImageSource | None, index: Int64, query_index: Int64 | None
) -> Setup:
    own = queries is None
    rows = rows_by_id(test.ids)
    source = test if queries is None else queries
    names = rows if own else rows_by_id(source.ids)
    asked = rows_of([query.id for query in given.queries], names, path=given.path, data=source.spec)
    searched = np.ones(len(test), dtype=bool)
    if given.database is not None:
        searched[:] = False
        searched[rows_of(given.database, rows, path=given.path, data=test.spec)] = True
    elif own:
        searched[asked] = False
    database = np.flatnonzero(searched[index])
    place = np.full(len(test), -1, dtype=np.int64)
    place[index[database]] = np.arange(len(database))
    # Where each query is among the features of the queries, -1 for an image that could not be read.
    feature = np.full(len(source), -1, dtype=np.int64)
    read = index if query_index is None else query_index
    feature[read] = np.arange(len(read))
    kept = np.flatnonzero(feature[asked] >= 0)
    truths = [graded_rows(query, rows, path=given.path, data=test.spec) for query in given.queries]
    there = [moved(truths[number], place) for number in kept]
    notes = _lost_notes(
        len(asked) - len(kept), sum(len(truths[n].rows) for n in kept) - sum(len(t.rows) for t in there)
    )
    boxes = [given.queries[number].box for number in kept]
    setup = Setup(feature[asked[kept]], asked[kept], database, there, boxes, notes=notes)
    setup.found["ground_truth_queries"] = len(asked)
    return setup


def _lost_notes(queries: int, images: int) -> list[str]:
    lost = [f"{queries} queries"] * (queries > 0) + [f"{images} images of the ground truth"] * (images > 0)
    return [f"{' and '.join(lost)} could not be read or are not searched, and were left out"] if lost else []
