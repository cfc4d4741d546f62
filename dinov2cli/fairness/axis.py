"""One attribute as groups of images: an `Axis` of categories, of numbers between cuts, or of two axes crossed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import InputError, UserError
from dinov2cli.fairness.attribute_values import number

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
_TIMES = " × "


@dataclass(frozen=True, eq=False)
class Axis:
    """Groups of n images by an attribute.

    names: of the groups, in the order to be shown. codes: int64 [n], each image's group, -1 where it is not known.
    ordered: whether that order is one of size. about: how the groups were made. values: float64 [n] of an attribute of
    numbers, NaN where it is not known. crosses: whether it crosses two axes.
    """

    name: str
    names: tuple[str, ...]
    codes: Int64
    ordered: bool = False
    about: str = ""
    values: Float64 | None = None
    crosses: bool = False

    def at(self, rows: npt.NDArray[np.integer]) -> "Axis":
        """The same groups of some images, in the order of `rows`."""
        return replace(self, codes=self.codes[rows], values=None if self.values is None else self.values[rows])


def category_axis(name: str, values: Sequence[str | None], *, order: Sequence[str] | None = None) -> Axis:
    """A group per text, in alphabetical order with numbers by value ('3-9' before '10-19').

    order: the groups that come first, as far as there are images of them.
    """
    present = {value for value in values if value is not None}
    first = [group for group in dict.fromkeys(order or ()) if group in present]
    figures = bool(present) and not any(np.isnan(number(value)) for value in present)
    key = (lambda value: (number(value), value)) if figures else _natural
    names = (*first, *sorted(present.difference(first), key=key))
    place = {group: code for code, group in enumerate(names)}
    codes = np.array([-1 if value is None else place[value] for value in values], dtype=np.int64)
    numeric = np.array([np.nan if value is None else number(value) for value in values]) if figures else None
    return Axis(name, names, codes, ordered=figures or order is not None, values=numeric)


def _natural(text: str) -> tuple[list[str | int], str]:
    """Texts and whole numbers by turns; the text itself tells equal ones apart."""
    pieces = re.split(r"([0-9]+)", text.casefold())
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], text


def bucket_axis(
    name: str,
    values: Float64,
    cuts: Sequence[float],
    *,
    names: Sequence[str] | None = None,
    closed: Literal["left", "right"] = "left",
) -> Axis:
    """Groups of numbers between cuts: '< 200', '200–1,034', '≥ 1,034', or by the names given, one more than cuts.

    values: float64 [n], NaN is unknown. closed: 'left' counts a value on a cut to the group above it, 'right' below.
    A group that no image falls into stays.

    Raises:
        UserError: no cuts, or they do not ascend.
    """
    if not len(cuts) or not all(one < two for one, two in pairwise(cuts)):
        given = ", ".join(f"{cut:g}" for cut in cuts) or "none"
        raise UserError(f"the cuts of {name} are {given}; expected one or more numbers that ascend, such as 200, 1000")
    if names is not None and len(names) != len(cuts) + 1:
        raise ValueError(f"{len(cuts)} cuts make {len(cuts) + 1} groups, got {len(names)} names")
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    codes = np.where(known, np.digitize(np.where(known, values, 0.0), cuts, right=closed == "right"), -1)
    shown = shown_numbers(cuts)
    below, above = ("<", "≥") if closed == "left" else ("≤", ">")
    between = [f"{one}–{two}" for one, two in pairwise(shown)]
    made = tuple(names) if names is not None else (f"{below} {shown[0]}", *between, f"{above} {shown[-1]}")
    about = f"cut at {_and(shown)}; a value on a cut counts to the group {'above' if closed == 'left' else 'below'} it"
    return Axis(name, made, codes.astype(np.int64), ordered=True, about=about, values=values)


def shown_numbers(cuts: Sequence[float]) -> list[str]:
    """Cuts as short as tells them apart."""
    for digits in (4, 6, 9, 17):
        shown = [f"{cut:,.0f}" if float(cut).is_integer() else f"{float(f'{cut:.{digits}g}'):,}" for cut in cuts]
        if len(set(shown)) == len(cuts):
            break
    return [text.removesuffix(".0") for text in shown]


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def third_cuts(values: Float64) -> tuple[float, float]:
    """The two cuts (values on a cut count above it) that part the images of known value most evenly into three groups.

    Images of one value are never parted; each cut is a value that occurs: the one whose share of images below it is
    nearest to 1/3, then the one above it whose share is nearest to 2/3; of two as near the smaller.

    Raises:
        InputError: fewer than three different values.
    """
    known, counts = np.unique(values[np.isfinite(values)], return_counts=True)
    if len(known) < 3:
        raise InputError(
            f"{len(known)} different known value{'s' if len(known) != 1 else ''} cannot be parted into thirds; "
            "expected three or more: give the cuts yourself, or another column"
        )
    below = np.cumsum(counts)[:-1] * 3  # images below known[1:], in thirds of an image: no rounding decides
    total = int(counts.sum())
    first = int(np.argmin(np.abs(below[:-1] - total)))
    second = first + 1 + int(np.argmin(np.abs(below[first + 1 :] - 2 * total)))
    return float(known[first + 1]), float(known[second + 1])


def crossed(first: Axis, second: Axis) -> Axis:
    """Every combination of two axes that some image has, in their order; unknown where either is."""
    width = len(second.names)
    both = np.where((first.codes < 0) | (second.codes < 0), -1, first.codes * width + second.codes)
    present = np.unique(both[both >= 0])
    names = tuple(f"{first.names[pair // width]}{_TIMES}{second.names[pair % width]}" for pair in present.tolist())
    codes = np.where(both < 0, -1, np.searchsorted(present, both)).astype(np.int64)
    about = "; ".join(f"{axis.name}: {axis.about}" for axis in (first, second) if axis.about)
    return Axis(f"{first.name}{_TIMES}{second.name}", names, codes, about=about, crosses=True)
