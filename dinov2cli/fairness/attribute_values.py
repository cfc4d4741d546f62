"""Cells of a table of attributes as texts, numbers and lists; what counts as unknown."""

import ast
import json
import math
from typing import Any

import pyarrow as pa

UNKNOWN = frozenset({"", "n/a", "na", "nan", "none", "null", "unknown", "not stated", "prefer not to say", "?", "-"})
"""Texts (of any case) that say that a value is not known."""


def column_texts(column: pa.ChunkedArray) -> list[str | None]:
    """Every cell as stripped text, None where it is not known; whole numbers are written without a fraction."""
    if pa.types.is_nested(column.type) or pa.types.is_null(column.type):
        return [cell_text(value) for value in column.to_pylist()]
    encoded = column.combine_chunks().dictionary_encode()
    words = [cell_text(value) for value in encoded.dictionary.to_pylist()]
    return [None if place is None else words[place] for place in encoded.indices.to_pylist()]


def cell_text(value: Any) -> str | None:
    """One cell as text; None where it is not known."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        value = ", ".join(text for entry in value if (text := cell_text(entry)) is not None)
    text = "" if value is None else str(value).strip()
    return None if text.casefold() in UNKNOWN else text


def column_lists(column: pa.ChunkedArray) -> list[list[str] | None]:
    """Every cell as a list of texts: Arrow lists, list literals of JSON or Python, other texts as lists of one.

    Raises:
        ValueError: a text begins as a list literal and is none of texts and whole numbers; its argument is the row.
    """
    if not pa.types.is_nested(column.type):
        known: dict[str, list[str]] = {}
        return [_list_of(text, row, known) for row, text in enumerate(column_texts(column))]
    found: list[list[str] | None] = []
    for row, value in enumerate(column.to_pylist()):
        if not (value is None or isinstance(value, list)):
            raise ValueError(row)
        found.append(None if value is None else [text for entry in value if (text := cell_text(entry)) is not None])
    return found


def _list_of(text: str | None, row: int, known: dict[str, list[str]]) -> list[str] | None:
    if text is None:
        return None
    if text not in known:
        entries = literal_list(text) if text.startswith("[") else [text]
        if entries is None:
            raise ValueError(row)
        known[text] = entries
    return list(known[text])


def literal_list(text: str) -> list[str] | None:
    """The entries of a list literal of JSON or Python that holds texts and whole numbers only; None for anything else.

    >>> literal_list("['pot', 'pan, cooking_pan', 3]")
    ['pot', 'pan, cooking_pan', '3']
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        try:
            entries = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    if not isinstance(entries, list):
        return None
    if any(isinstance(entry, bool) or not isinstance(entry, str | int) for entry in entries):
        return None
    return [str(entry).strip() for entry in entries]


def number(text: str) -> float:
    """A finite number written as in English or by a program, NaN for anything else ('1,000' and '1_000' among it)."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) and "_" not in text else math.nan
