"""Attributes of images: read from a file, or from the columns of the source, and brought beside the images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import suggestion
from dinov2cli.errors import InputError
from dinov2cli.fairness.attribute_files import read_table
from dinov2cli.fairness.attribute_keys import Match, match_rows
from dinov2cli.fairness.attribute_values import column_lists, column_texts, number
from dinov2cli.fairness.casual_conversations import match_videos, read_casual_conversations

Invalid = Literal["error", "unknown"]


@dataclass(frozen=True, eq=False)
class Attributes:
    """Attributes beside the n images of a source: row i of `table` belongs to image i, null where it has no row.

    table: every column of the file; those of CSV and TSV are strings. matched: bool [n], which images have a row.
    ids: of the images, for messages. file: as given, or 'columns of <DATA>'. key: how rows were found, in words.
    rows: of the file; rows_without_image of them belong to no image, repeated_rows say the same as another row of
    their image. notes: sentences for the user about these.
    """

    table: pa.Table
    matched: np.ndarray
    ids: list[str]
    file: str
    key: str
    rows: int
    rows_without_image: int = 0
    images_without_row: int = 0
    repeated_rows: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def read_attributes(file: Path | None, source: ImageSource, *, key: str | None = None) -> Attributes:
    """Bring the rows of a file (see `read_table`, `read_casual_conversations`) beside the images of a source.

    Args:
        file: None takes the columns of the source itself.
        key: the column that names images (see `match_rows`); None finds it.

    Raises:
        InputError: no such file, not a table; no row belongs to any image; two rows say different things of one image.
    """
    if file is None:
        return _of_source(source, key)
    if file.suffix.lower() == ".json":
        table = read_casual_conversations(file)
        match = match_videos(table, source, key=key, file=str(file))
    else:
        table = read_table(file)
        match = match_rows(table, source, key=key, file=str(file))
    return _beside(table, match, source, str(file))


def _of_source(source: ImageSource, key: str | None) -> Attributes:
    if key is not None:
        raise InputError(
            f"{source.spec}: column '{key}' was named to find images by, but no file of attributes was given; "
            "give one, or leave --id out: the columns of the images are beside them"
        )
    count = len(source)
    everyone = np.ones(count, dtype=bool)
    return Attributes(source.columns, everyone, source.ids, f"columns of {source.spec}", "row by row", rows=count)


def _beside(table: pa.Table, match: Match, source: ImageSource, file: str) -> Attributes:
    matched = match.rows >= 0
    used = np.zeros(table.num_rows, dtype=bool)
    used[match.rows[matched]] = True
    used[match.repeated] = True
    counts = {
        "rows": table.num_rows,
        "rows_without_image": int((~used).sum()),
        "images_without_row": int((~matched).sum()),
        "repeated_rows": len(match.repeated),
    }
    beside = table.take(pa.array(match.rows, mask=~matched))
    return Attributes(beside, matched, source.ids, file, match.key, notes=_notes(file, len(source), **counts), **counts)


def _notes(
    file: str, images: int, *, rows: int, rows_without_image: int, images_without_row: int, repeated_rows: int
) -> list[str]:
    name = Path(file).name
    notes = []
    if images_without_row:
        notes.append(
            f"{images_without_row:,} of {images:,} images have no row in {name}: all their attributes are unknown"
        )
    if rows_without_image:
        notes.append(f"{rows_without_image:,} of {rows:,} rows of {name} belong to no image and were left out")
    if repeated_rows:
        notes.append(f"{repeated_rows:,} rows of {name} repeat another row of their image and were left out")
    return notes


def texts(attributes: Attributes, column: str) -> list[str | None]:
    """A column as stripped texts, one per image; None where it is null, empty or says that it is not known ('N/A',
    'unknown', 'prefer not to say' and the like). Whole numbers are written without a fraction.

    Raises:
        InputError: there is no such column.
    """
    return column_texts(_column(attributes, column))


def lists(attributes: Attributes, column: str) -> list[list[str] | None]:
    """A column of lists, one list of texts per image, None where it is not known.

    Cells are Arrow lists, or texts with a list of JSON or Python (`['a', 'b, c']`, `[1, 2]`; whole numbers become
    texts); another text is a list of one.

    Raises:
        InputError: no such column, or a cell that begins as a list and is none of texts and whole numbers.
    """
    values = _column(attributes, column)
    try:
        return column_lists(values)
    except ValueError as error:
        row = int(error.args[0])
        cell = str(values[row].as_py())[:80]
        raise InputError(
            f"{attributes.file}: column {column}, image {attributes.ids[row]}: {cell!r} is no list of texts or whole "
            "numbers; expected one such as ['cup', 'bottle'], or a text alone"
        ) from None


def numbers(
    attributes: Attributes, column: str, *, what: str, least: float | None = None, invalid: Invalid = "error"
) -> tuple[np.ndarray, list[str]]:
    """A column as float64 [n], NaN where it is not known, and notes for the user.

    Args:
        what: what the numbers are, in one word, for messages ('income').
        least: every value must be above it; None takes any.
        invalid: whether a text or a value not above `least` is an error or counts as unknown, with a note.

    Raises:
        InputError: no such column, or such a value.
    """
    expected = "a number" if least is None else f"a number above {least:g}"
    bound = -np.inf if least is None else least
    return accepted_numbers(
        attributes, column, lambda value: value > bound, what=what, expected=expected, invalid=invalid
    )


def accepted_numbers(
    attributes: Attributes,
    column: str,
    accept: Callable[[float], bool],
    *,
    what: str,
    expected: str,
    invalid: Invalid,
) -> tuple[np.ndarray, list[str]]:
    """`numbers` with a test of one's own; `expected` says in words what passes it."""
    given = texts(attributes, column)
    known = {text: number(text) for text in set(given) if text is not None}
    wrong = {text for text, value in known.items() if not accept(value)}  # NaN passes no comparison
    values = np.array([np.nan if text is None or text in wrong else known[text] for text in given], dtype=np.float64)
    return values, refused(attributes, column, given, wrong, what=what, expected=expected, invalid=invalid)


def refused(
    attributes: Attributes,
    column: str,
    given: list[str | None],
    wrong: set[str],
    *,
    what: str,
    expected: str,
    invalid: Invalid,
) -> list[str]:
    """The note about values that count as unknown, if any. Raises InputError about them where they are an error."""
    rows = [row for row, text in enumerate(given) if text in wrong]
    if not rows:
        return []
    shown = list(dict.fromkeys(repr(given[row]) for row in rows))
    images = f"{len(rows):,} image{'s' if len(rows) != 1 else ''}"
    if invalid == "error":
        raise InputError(
            f"{attributes.file}: column {column}, image {attributes.ids[rows[0]]}: {shown[0]} is no {what}; expected "
            f"{expected} ({images} with such values): correct them, or count them as unknown with --set invalid=unknown"
        )
    some = ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")
    return [f"the {what} of {images} counts as unknown, for it is not {expected} (column {column}: {some})"]


def _column(attributes: Attributes, column: str) -> pa.ChunkedArray:
    names = attributes.table.column_names
    if column not in names:
        raise InputError(
            f"{attributes.file}: no column '{column}'{suggestion(column, names)}; "
            f"its columns are {', '.join(names) or 'none: give a file of attributes'}"
        )
    return attributes.table.column(column)
