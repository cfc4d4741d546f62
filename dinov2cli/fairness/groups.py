"""Groups of images by attributes: by age, by skin, and by whatever columns are asked for."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from dinov2cli.errors import InputError, UserError
from dinov2cli.fairness.ages import AgeRange, age_range, date_ranges, turned_back
from dinov2cli.fairness.attribute_values import number
from dinov2cli.fairness.attributes import Attributes, Invalid, accepted_numbers, numbers, refused, texts
from dinov2cli.fairness.axis import (
    Axis,
    bucket_axis,
    category_axis,
    crossed,
    shown_numbers,
    third_cuts,
)

_OLDEST = 130
_MOST_GROUPS = 200
_NUMBER_GROUPS = 12
_AUDITED = 20
_SKIN = re.compile(r"(?:fitzpatrick|skin|type|[\s_-])*([1-6](?:\.0+)?|iv|vi?|i{1,3})")
_ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6}


def age_axis(
    name: str,
    attributes: Attributes,
    column: str,
    *,
    cuts: Sequence[float] = (18, 30, 45, 70),
    repair: bool = False,
    invalid: Invalid = "error",
) -> tuple[Axis, list[str]]:
    """Groups by age, and notes for the user: numbers of years are cut, ranges ('20-29', 'more than 70') are groups as
    they are, and words that are neither ('adult') too.

    Args:
        cuts: lower ends of the groups of numbers. The group below the first is left out where no image falls into it.
        repair: turn ranges that a spreadsheet made dates ('03-Sep' was '3-9') back, with a note.
        invalid: whether impossible ages are an error or count as unknown, with a note.

    Raises:
        InputError: no such column; dates without `repair`, or which may have been several ranges; numbers beside
            ranges; ages that are none, below 0 or above 130.
    """
    given = texts(attributes, column)
    given, notes = _without_dates(attributes, column, given, repair)
    ranges = _ranges(given)
    figures = {text for text in set(given) if text is not None and not np.isnan(number(text))}
    if not ranges and not figures:
        return replace(category_axis(name, given), about="as given"), notes
    if not ranges:
        return _ages_of_numbers(name, attributes, column, cuts, invalid)
    if figures:
        one, two = min(figures), min(ranges)
        raise InputError(
            f"{attributes.file}: column {column} mixes ages ('{one}') and ranges of ages ('{two}'); expected one of "
            "both: make them all ranges, or all numbers"
        )
    wrong = {text for text in given if text is not None and text not in ranges}
    notes += refused(attributes, column, given, wrong, what="age", expected="a range such as 20-29", invalid=invalid)
    spelled = _spelled(ranges)
    grouped = [spelled[ranges[text]] if text in ranges else None for text in given]
    axis = category_axis(name, grouped, order=[spelled[found] for found in sorted(spelled)])
    return replace(axis, about="ranges as given"), notes


def _without_dates(
    attributes: Attributes, column: str, given: list[str | None], repair: bool
) -> tuple[list[str | None], list[str]]:
    dates = {text for text in set(given) if text is not None and date_ranges(text)}
    if not dates:
        return given, []
    row = next(row for row, text in enumerate(given) if text in dates)
    where = f"{attributes.file}: column {column}, image {attributes.ids[row]}: '{given[row]}' is a date"
    ranges = _ranges(given)
    back = {text: turned_back(text, ranges.values()) for text in dates}
    unclear = next((text for text in given if text in dates and back[text] is None), None)
    if unclear is not None:
        row = given.index(unclear)
        which = " or ".join(_words(found) for found in date_ranges(unclear))
        raise InputError(
            f"{attributes.file}: column {column}, image {attributes.ids[row]}: '{unclear}' is a date: a spreadsheet "
            f"makes one of a range, here of {which}; take the column from the original file"
        )
    spelled = _spelled(ranges)
    turned = {text: spelled.get(found, _words(found)) for text, found in back.items() if found is not None}
    if not repair:
        raise InputError(
            f"{where}: a spreadsheet makes one of the range {turned[str(given[row])]}; take the column from the "
            "original file, or --set repair_ages=true turns such dates back"
        )
    images = sum(text in dates for text in given)
    pairs = ", ".join(f"{text} → {turned[text]}" for text in sorted(dates))
    note = f"the ages of {images:,} images were dates made by a spreadsheet and were turned back ({pairs})"
    return [text if text is None else turned.get(text, text) for text in given], [note]


def _ranges(given: Sequence[str | None]) -> dict[str, AgeRange]:
    """The texts that are ranges, in the order they come."""
    different = (text for text in dict.fromkeys(given) if text is not None)
    return {text: found for text in different if (found := age_range(text)) is not None}


def _spelled(ranges: dict[str, AgeRange]) -> dict[AgeRange, str]:
    """How a range is written: as at first, for '20-29' and '20 - 29' are one group."""
    return {found: text for text, found in reversed(ranges.items())}


def _words(ages: AgeRange) -> str:
    return f"{ages.low:.0f}-{ages.high:.0f}"


def _ages_of_numbers(
    name: str, attributes: Attributes, column: str, cuts: Sequence[float], invalid: Invalid
) -> tuple[Axis, list[str]]:
    values, notes = accepted_numbers(
        attributes,
        column,
        lambda value: 0 <= value <= _OLDEST,
        what="age",
        expected=f"a number from 0 to {_OLDEST}",
        invalid=invalid,
    )
    shown = shown_numbers(cuts)
    between = [f"{one}–{two}" for one, two in pairwise(shown)]
    names = (f"under {shown[0]}", *between, f"{shown[-1]}+") if len(cuts) else None
    axis = bucket_axis(name, values, cuts, names=names)
    if not (axis.codes == 0).any():
        axis = replace(axis, names=axis.names[1:], codes=np.maximum(axis.codes - 1, -1))
    return axis, notes


def skin_axes(values: Sequence[str | None]) -> tuple[Axis, Axis]:
    """Apparent skin by Fitzpatrick's types: 'skin type' with the groups 1 to 6, 'skin tone' with lighter (1–3) and
    darker (4–6).

    values: '4', '4.0', 'IV', 'type 4', 'Fitzpatrick IV'.

    Raises:
        InputError: another text.
    """
    types = {text: _skin_type(text) for text in dict.fromkeys(values) if text is not None}
    codes = np.array([-1 if text is None else types[text] - 1 for text in values], dtype=np.int64)
    kind = Axis("skin type", tuple("123456"), codes, ordered=True, about="Fitzpatrick's types")
    tones = np.where(codes < 0, -1, codes // 3)
    return kind, Axis("skin tone", ("lighter", "darker"), tones, ordered=True, about="Fitzpatrick's types 1–3 and 4–6")


def _skin_type(text: str) -> int:
    match = _SKIN.fullmatch(text.strip().lower())
    if match is None:
        raise InputError(
            f"'{text}' is no skin type; expected Fitzpatrick's types 1 to 6 (or I to VI), with nothing where it is "
            "not known"
        )
    return _ROMAN.get(match[1]) or int(match[1][0])


def axes_of(
    asked: Sequence[str], attributes: Attributes, *, invalid: Invalid = "error", repair: bool = False
) -> tuple[list[Axis], list[str]]:
    """The axes that `--by` names, and notes for the user.

    Each is COLUMN, COLUMN:30:45:70 (numbers with cuts), or two or more of these crossed, A*B; what is crossed is an
    axis of its own only if it is asked for too. Numbers of more than 12 different values become thirds of the images;
    ranges of ages are put in order.

    Raises:
        InputError: no such column, none of its values known, or more than 200 different texts; what `age_axis` and
            `numbers` raise.
        UserError: cuts that are no numbers or do not ascend.
    """
    axes: list[Axis] = []
    notes: list[str] = []
    for text in dict.fromkeys(asked):
        columns = attributes.table.column_names
        parts = [text] if text in columns else [part.strip() for part in text.split("*")]
        made = [_asked_axis(part, attributes, invalid, repair) for part in parts]
        axis = made[0][0]
        for other, _ in made[1:]:
            axis = crossed(axis, other)
        axes.append(axis)
        notes += [note for _, some in made for note in some]
        if len(axis.names) == 1:
            notes.append(f"{axis.name} has one group, {axis.names[0]}: nothing to compare it with")
    return axes, list(dict.fromkeys(notes))


def _asked_axis(asked: str, attributes: Attributes, invalid: Invalid, repair: bool) -> tuple[Axis, list[str]]:
    column, *given = [asked] if asked in attributes.table.column_names else asked.split(":")
    column = column.strip()
    values = texts(attributes, column)
    known = {value for value in values if value is not None}
    if not known:
        raise InputError(f"{attributes.file}: column {column} has no known value; choose another with --by")
    if given:
        cuts = [number(cut) for cut in given]
        if any(np.isnan(cuts)):
            raise UserError(f"--by {asked}: '{':'.join(given)}' are no numbers; expected cuts, such as {column}:30:60")
        found, notes = numbers(attributes, column, what=column, invalid=invalid)
        return bucket_axis(column, found, cuts), notes
    figures = sum(not np.isnan(number(value)) for value in known)
    if figures > _NUMBER_GROUPS and figures >= 0.9 * len(known):
        found, notes = numbers(attributes, column, what=column, invalid=invalid)
        axis = bucket_axis(column, found, third_cuts(found))
        return replace(axis, about=f"thirds of the images: {axis.about}"), notes
    if not figures and _are_ages(known):
        return age_axis(column, attributes, column, repair=repair, invalid=invalid)
    if len(known) > _MOST_GROUPS:
        raise InputError(
            f"{attributes.file}: column {column} has {len(known):,} different texts, which looks like names and not "
            f"like an attribute; expected at most {_MOST_GROUPS} groups: choose another column with --by"
        )
    return category_axis(column, values), []


def _are_ages(known: Collection[str]) -> bool:
    """Whether these are ranges, some perhaps made dates; dates alone may be days on which pictures were taken."""
    ranges = sum(age_range(text) is not None for text in known)
    return ranges > 0 and all(age_range(text) or date_ranges(text) for text in known)


def columns_to_audit(attributes: Attributes, *, without: Collection[str] = ()) -> list[str]:
    """The columns that part the images into 2 to 20 groups, besides some; none of lists, and none that says something
    else of every image it says anything of."""
    found = []
    for field in attributes.table.schema:
        if field.name in without or pa.types.is_nested(field.type):
            continue
        known = [value for value in texts(attributes, field.name) if value is not None]
        if 2 <= len(set(known)) <= _AUDITED and len(set(known)) < len(known):
            found.append(field.name)
    return found
