"""Which row of a table of attributes belongs to which image: names of files compared, exactly or by their tails."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import IMAGE_EXTENSIONS, suggestion
from dinov2cli.errors import InputError
from dinov2cli.fairness.attribute_files import UNNAMED

# Columns that usually name the image, tried first and believed even where they hold nothing but numbers.
_NAMES = (
    *("id", "image_id", "image_path", "path", "file_path", "filepath", "file", "file_name", "filename", "image"),
    *("image_name", "img", "img_path", "name", "key", "__key__", "url", "image_url", "uid"),
)


class Way(NamedTuple):
    """How two names are compared: their last `parts` parts between slashes (0: the whole, as written), with or without
    the extension of an image."""

    parts: int
    extension: bool

    def of(self, name: str) -> str | None:
        """What is compared of a normalised name; None where it has fewer parts."""
        tail = name
        if self.parts:
            pieces = name.rsplit("/", self.parts)
            if len(pieces) < self.parts:
                return None
            tail = "/".join(pieces[-self.parts :])
        if self.extension:
            return tail
        stem, dot, extension = tail.rpartition(".")
        return stem if dot and stem and f".{extension.lower()}" in IMAGE_EXTENSIONS else tail

    def words(self, column: str) -> str:
        """The comparison as said to the user."""
        if not self.parts:
            return f"id or path of the image in column {column}"
        what = "file name" if self.parts == 1 else f"last {self.parts} parts of the path"
        return f"{what}{'' if self.extension else ' without extension'} of column {column}"


# From strict to loose: among ways that find as many images, the strictest is taken.
WHOLE = Way(0, True)
WAYS = (WHOLE, *(Way(parts, extension) for extension in (True, False) for parts in (4, 3, 2, 1)))
_LOOSEST = WAYS[-1]


@dataclass(frozen=True, eq=False)
class Match:
    """rows int64 [n]: row of each image's attributes, -1 where there is none. key: how they were found, in words.

    repeated: rows that say the same of an image as the row taken. differing: (image, row taken, row that says something
    else).
    """

    rows: np.ndarray
    key: str
    repeated: list[int]
    differing: list[tuple[int, int, int]]

    @property
    def found(self) -> tuple[int, int]:
        """How many images have one answer, how many have any."""
        some = int((self.rows >= 0).sum())
        return some - len({image for image, _, _ in self.differing}), some


def match_rows(table: pa.Table, source: ImageSource, *, key: str | None, file: str) -> Match:
    """Find the row of every image.

    Args:
        key: the column that names images; None tries every column of texts, and columns of whole numbers that are
            called as such columns usually are (a row number equal to a file name by chance would join anything).

    Only names that are unique among the images count. The column and the way that give most images one answer are
    taken. Raises InputError: `key` is no column, nothing matches, or two rows say different things of one image.
    """
    if key is not None and key not in table.column_names:
        raise InputError(
            f"{file}: no column '{key}' to find images by{suggestion(key, table.column_names)}; "
            f"its columns are {', '.join(table.column_names)}"
        )
    names = {column: texts for column in _candidates(table, key) if (texts := _names_in(table, column, key is None))}
    images = _Images(source)
    best: Match | None = None
    for match in (match for column, texts in names.items() for match in _matches(table, column, texts, images)):
        if best is None or match.found > best.found:
            best = match
        if best.found == (images.count, images.count):
            break
    if best is None:
        raise _no_match(file, source, names, key)
    if best.differing:
        raise _two_answers(file, source, table, best)
    return best


def _candidates(table: pa.Table, key: str | None) -> list[str]:
    if key is not None:
        return [key]
    order = {name: place for place, name in enumerate(_NAMES)}
    return sorted(table.column_names, key=lambda name: order.get(name.lower(), len(order)))


def _names_in(table: pa.Table, column: str, chosen: bool) -> list[str | None] | None:
    """A column as names of images; None where it cannot be one."""
    kind = table.column(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (texts or pa.types.is_integer(kind)):
        return None
    values = [None if value is None else str(value).strip() or None for value in table.column(column).to_pylist()]
    believed = not chosen or column.lower() in _NAMES
    if not believed and (not texts or _all_numbers(values)):
        return None
    return values


def _all_numbers(values: Iterable[str | None]) -> bool:
    return all(value is None or value.lstrip("+-").replace(".", "", 1).isdigit() for value in values)


class _Images:
    """Names of the images of a source, ready to be looked up in any way."""

    def __init__(self, source: ImageSource) -> None:
        self._whole = (source.ids, source.paths)
        # The tails of a path are those of an id that it ends in.
        within = all(path.endswith(name) for name, path in zip(*self._whole, strict=True))
        self._normal = tuple([normal_name(name) for name in names] for names in self._whole[1 if within else 0 :])
        self._tables: dict[Way, dict[str | None, int]] = {}
        self.count = len(source)

    def by(self, way: Way) -> dict[str | None, int]:
        """Name → image, -1 for a name that several have."""
        if way not in self._tables:
            table: dict[str | None, int] = {}
            for names in self._whole if way is WHOLE else self._normal:
                for image, name in enumerate(names):
                    tail = way.of(name)
                    if tail is not None and table.setdefault(tail, image) != image:
                        table[tail] = -1
            self._tables[way] = table
        return self._tables[way]


def normal_name(name: str) -> str:
    """A path or URL with plain slashes, percent-decoded, without scheme, query and a leading './'."""
    if "://" in name:
        name = name.split("://", 1)[1].split("?", 1)[0].split("#", 1)[0]
    name = unquote(name).replace("\\", "/")
    return name.removeprefix("./").rstrip("/")


def _matches(table: pa.Table, column: str, texts: Sequence[str | None], images: _Images) -> Iterator[Match]:
    normal = {text: normal_name(text) for text in set(texts) if text is not None}
    loosest = images.by(_LOOSEST)
    # A match in any way is one in the loosest, and most columns have none.
    if not any(_LOOSEST.of(name) in loosest for name in normal.values()):
        return
    for way in WAYS:
        known = images.by(way)
        image_of = {text: known.get(text if way is WHOLE else way.of(name), -1) for text, name in normal.items()}
        pairs = [(image_of[text], row) for row, text in enumerate(texts) if text is not None and image_of[text] >= 0]
        if pairs:
            yield _joined(table, column, way, pairs, images.count)


def _joined(table: pa.Table, column: str, way: Way, pairs: Sequence[tuple[int, int]], count: int) -> Match:
    rows = np.full(count, -1, dtype=np.int64)
    more: list[tuple[int, int, int]] = []
    for image, row in pairs:
        if rows[image] < 0:
            rows[image] = row
        else:
            more.append((image, int(rows[image]), row))
    said = _contents(table, column, sorted({row for _, first, other in more for row in (first, other)}))
    differing = [triple for triple in more if said[triple[1]] != said[triple[2]]]
    repeated = [other for _, first, other in more if said[first] == said[other]]
    return Match(rows, way.words(column), repeated, differing)


def _contents(table: pa.Table, column: str, rows: list[int]) -> dict[int, str]:
    """What some rows say, besides the name of the image and a number of the row."""
    others = table.drop_columns([name for name in (column, UNNAMED) if name in table.column_names])
    if not rows or not others.column_names:
        return dict.fromkeys(rows, "")
    return {row: repr(values) for row, values in zip(rows, others.take(rows).to_pylist(), strict=True)}


def _no_match(file: str, source: ImageSource, names: dict[str, list[str | None]], key: str | None) -> InputError:
    if not len(source):
        return InputError(f"{source.spec}: no images to find in {file}")
    image = source.ids[0]
    shown = {column: value for column, values in names.items() if (value := next(filter(None, values), None))}
    if not shown:
        where = f"column '{key}' holds no names" if key is not None else "no column holds names of files"
        return InputError(f"{file}: {where}; expected one that names the images, such as {image}; name it with --id")
    column, value = next(iter(shown.items()))
    what = f"no name in column '{column}'" if key is not None else "no column"
    return InputError(
        f"{file}: {what} matches any image of {source.spec} by id, path or file name: an image is called "
        f"'{image}', column '{column}' begins with '{value[:120]}'; name the column that names images with --id"
    )


def _two_answers(file: str, source: ImageSource, table: pa.Table, match: Match) -> InputError:
    image, first, other = match.differing[0]
    one, two = (table.slice(row, 1).to_pylist()[0] for row in (first, other))
    of_row = [name for name in one if name != UNNAMED and repr(one[name]) != repr(two[name])]
    column = next((name for name in of_row if not match.key.endswith(f" column {name}")), of_row[0])
    images = len({image for image, _, _ in match.differing})
    return InputError(
        f"{file}: two rows say different things of one image, {source.ids[image]} ({column}: '{one[column]}' and "
        f"'{two[column]}'; {images} such image{'s' if images != 1 else ''}, found by {match.key}); expected one row "
        "per image: keep one of them, or name another column with --id"
    )
