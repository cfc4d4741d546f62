"""Ages as people write them: numbers, ranges ('20-29', 'more than 70'), and ranges that a spreadsheet made dates."""

import math
import re
from collections.abc import Collection
from typing import NamedTuple

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_BETWEEN = re.compile(r"[(\[]?\s*(\d{1,3})\s*(?:-|–|—|,|to)\s*(\d{1,3})\s*[)\]]?")
_FROM = re.compile(r"(?:(?:from|≥|>=)\s*(\d{1,3})|(\d{1,3})\s*(?:\+|plus|(?:or|and)\s+(?:more|over|older|above)))")
_ABOVE = re.compile(r"(?:more than|over|above|older than|>)\s*(\d{1,3})")
_BELOW = re.compile(r"(?:less than|under|below|younger than|up to|<=|≤|<)\s*(\d{1,3})")
_TIME = r"(?:[ t]\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?)?"
_DAY_MONTH = re.compile(r"(\d{1,2})[-\s/.]+([a-z]{3,9})\.?(?:[-\s/.,]+(\d{4}|\d{2}))?")
_MONTH_NUMBER = re.compile(r"([a-z]{3,9})\.?[-\s/.]+(\d{4}|\d{1,2})")
_ISO = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})" + _TIME)
_NUMBERS = re.compile(r"(\d{1,2})[/.-](\d{1,2})[/.-](\d{4}|\d{2})" + _TIME)


class AgeRange(NamedTuple):
    """From `low` to `high` years, infinite where open; orders as ranges are shown."""

    low: float
    high: float


def age_range(text: str) -> AgeRange | None:
    """The range that a text means, None where it means none.

    >>> age_range("20-29"), age_range("more than 70"), age_range("20")
    (AgeRange(low=20.0, high=29.0), AgeRange(low=71.0, high=inf), None)
    """
    words = re.sub(r"\s*(?:years?(?: old)?|yrs?)$", "", text.strip().lower())
    if match := _BETWEEN.fullmatch(words):
        low, high = float(match[1]), float(match[2])
        return AgeRange(low, high) if low <= high else None
    if match := _FROM.fullmatch(words):
        return AgeRange(float(match[1] or match[2]), math.inf)
    if match := _ABOVE.fullmatch(words):
        return AgeRange(float(match[1]) + 1, math.inf)
    if match := _BELOW.fullmatch(words):
        return AgeRange(-1.0, float(match[1]))  # before '0-2'
    return None


def date_ranges(text: str) -> list[AgeRange]:
    """The ranges of which a spreadsheet may have made this date; empty where the text is no date.

    A range ascends, so that the order of day and month does not matter: '03-Sep' and '9-Mar' both were '3-9'. Where the
    day is the first of a month, month and year may have been the range: '2019-10-01' was '1-10' or '10-19'.
    """
    words = text.strip().lower()
    pairs: list[tuple[int, int]] = []
    if match := _DAY_MONTH.fullmatch(words):
        pairs = _pairs(int(match[1]), _month(match[2]), match[3])
    elif match := _MONTH_NUMBER.fullmatch(words):
        pairs = [(_month(match[1]), int(match[2]) % 100)]
    elif match := _ISO.fullmatch(words):
        pairs = _pairs(int(match[3]), int(match[2]), match[1])
    elif match := _NUMBERS.fullmatch(words):
        first, second = int(match[1]), int(match[2])
        # 10/1/2019 is the first of October or the tenth of January.
        pairs = _pairs(first, second, match[3]) + _pairs(second, first, match[3])
    ranges = {AgeRange(float(min(pair)), float(max(pair))) for pair in pairs if 0 < min(pair) < max(pair)}
    return sorted(ranges)


def _month(word: str) -> int:
    return _MONTHS.index(word[:3]) + 1 if word[:3] in _MONTHS else 0


def _pairs(day: int, month: int, year: str | None) -> list[tuple[int, int]]:
    if not (1 <= day <= 31 and 1 <= month <= 12):
        return []
    pairs = [(day, month)]
    if day == 1 and year is not None and month < int(year) % 100:
        pairs.append((month, int(year) % 100))
    return pairs


def turned_back(text: str, others: Collection[AgeRange]) -> AgeRange | None:
    """The range of which a spreadsheet made a date: of several the one that no other range of the column overlaps; None
    where that leaves none or several."""
    ranges = date_ranges(text)
    if len(ranges) > 1:
        ranges = [one for one in ranges if not any(one.low <= other.high and other.low <= one.high for other in others)]
    return ranges[0] if len(ranges) == 1 else None
