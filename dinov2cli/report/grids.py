"""Grids of images with captions as SVG: the images are embedded, the words stay text and follow the page's theme."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from PIL import Image

from dinov2cli.report.palette import LIGHT, themed

Mark = Literal["", "right", "wrong", "plain"]
_GAP = 10
_LINE = 15  # CSS pixels for one line of caption
_FONT = 12
_CHARACTER = 6.3  # mean width of a character at that size
_SHARP = 2  # embedded pixels per CSS pixel, for dense screens
_PIXEL_ART = 64  # images up to this size are shown with square pixels


@dataclass(frozen=True)
class Cell:
    """One image of a grid: uint8 [H, W, 3], lines of caption under it, a frame with a sign for right or wrong.

    `exact` keeps every pixel as it is (maps, drawings); photographs are embedded as JPEG.
    """

    image: np.ndarray
    caption: Sequence[str] = ()
    mark: Mark = ""
    exact: bool = False


def _encoded(cell: Cell, size: int) -> tuple[str, bool]:
    """The image as a data URI, no larger than the cell needs, and whether to show it with square pixels."""
    pixels = np.asarray(cell.image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image of a grid must be uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")
    image = Image.fromarray(pixels)
    small = max(image.size) <= min(_PIXEL_ART, size)
    if max(image.size) > _SHARP * size:
        image.thumbnail((_SHARP * size, _SHARP * size), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {}) if small or cell.exact else ("JPEG", {"quality": 88})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{data}", small


def _text(x: float, y: float, text: str, colour: str, room: float, *, bold: bool = False) -> str:
    """A line of text cut to the room it has; the whole of it shows when pointed at."""
    fits = max(1, int(room / _CHARACTER))
    shown = text if len(text) <= fits else text[: fits - 1].rstrip() + "…"
    whole = f"<title>{escape(text)}</title>" if shown != text else ""
    weight = "; font-weight: 650" if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" style="fill: {colour}; font-size: {_FONT}px{weight}">{whole}{escape(shown)}</text>'
    )


def _sign(x: float, y: float, mark: Mark) -> str:
    """A disc with a tick or a cross: right and wrong must not be told by colour alone."""
    colour = LIGHT["good" if mark == "right" else "bad"]
    strokes = "M-3.5 .3 L-1 2.8 L3.6 -2.6" if mark == "right" else "M-3 -3 L3 3 M3 -3 L-3 3"
    line = f"fill: none; stroke: {LIGHT['paper']}; stroke-width: 1.8; stroke-linecap: round"
    return (
        f'<g transform="translate({x:g} {y:g})"><circle r="8" style="fill: {colour}"/>'
        f'<path d="{strokes}" style="{line}"/></g>'
    )


def _cell(cell: Cell, x: float, y: float, size: int) -> str:
    uri, pixelated = _encoded(cell, size)
    render = ' style="image-rendering: pixelated"' if pixelated else ""
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{size}" height="{size}" style="fill: {LIGHT["card"]}"/>',
        f'<image x="{x:g}" y="{y:g}" width="{size}" height="{size}"{render} href="{uri}"/>',
    ]
    if cell.mark in ("right", "wrong"):
        colour = LIGHT["good" if cell.mark == "right" else "bad"]
        parts.append(
            f'<rect x="{x + 1:g}" y="{y + 1:g}" width="{size - 2}" height="{size - 2}" '
            f'style="fill: none; stroke: {colour}; stroke-width: 2"/>'
        )
        parts.append(_sign(x + size - 12, y + 12, cell.mark))
    for number, line in enumerate(cell.caption):
        colour = LIGHT["ink" if number == 0 else "muted"]
        parts.append(_text(x, y + size + _LINE * (number + 1), line, colour, size))
    return "".join(parts)


def image_grid(
    rows: Sequence[Sequence[Cell]],
    *,
    size: int = 120,
    titles: Sequence[str] = (),
    columns: Sequence[str] = (),
    break_after: int | None = None,
) -> str:
    """A grid of square cells `size` CSS pixels wide as SVG text.

    `titles` has one heading above each row (or is empty), `columns` one above each column; `break_after` leaves more
    room after that many columns. Raises ValueError for an empty grid, unequal titles, or images that are not uint8 RGB.
    """
    if not any(rows):
        raise ValueError("a grid needs at least one image")
    if titles and len(titles) != len(rows):
        raise ValueError(f"a grid of {len(rows)} rows needs as many titles, got {len(titles)}")
    width_cells = max(len(row) for row in rows)
    wide_gap = 2 * _GAP if break_after is not None and break_after < width_cells else 0
    width = width_cells * (size + _GAP) - _GAP + wide_gap

    def left(column: int) -> float:
        return column * (size + _GAP) + (wide_gap if break_after is not None and column >= break_after else 0)

    parts = [_text(left(i), _FONT, name, LIGHT["muted"], size) for i, name in enumerate(columns)]
    y: float = _LINE + 5 if columns else 0
    for number, row in enumerate(rows):
        if titles:
            parts.append(_text(0, y + _FONT, titles[number], LIGHT["ink"], width, bold=True))
            y += _LINE + 6
        parts += [_cell(cell, left(i), y, size) for i, cell in enumerate(row)]
        y += size + _LINE * max((len(cell.caption) for cell in row), default=0)
        y += _GAP + (6 if any(cell.caption for cell in row) or titles else 0)
    height = y - _GAP
    return themed(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="system-ui, sans-serif">' + "".join(parts) + "</svg>"
    )


@dataclass(frozen=True)
class DuplicatePair:
    """Two images found to be copies: what was kept, what was dropped, their similarity and a word about why."""

    kept: np.ndarray
    dropped: np.ndarray
    similarity: float | None = None
    reason: str = ""


def duplicate_pairs(pairs: Sequence[DuplicatePair], *, pairs_per_row: int = 3, size: int = 130) -> str:
    """Kept image and dropped copy side by side, several pairs to a row, with reason and similarity."""

    def similarity(pair: DuplicatePair) -> str:
        return "" if pair.similarity is None else f"similarity {pair.similarity:.3f}"

    cells = [(Cell(p.kept, ["kept", similarity(p)]), Cell(p.dropped, ["dropped", p.reason])) for p in pairs]
    return pair_grid(cells, pairs_per_row=pairs_per_row, size=size)


def pair_grid(pairs: Sequence[tuple[Cell, Cell]], *, pairs_per_row: int = 3, size: int = 130) -> str:
    """Two images side by side, several pairs to a row; captions of up to two lines. ValueError without any pair."""
    if not pairs:
        raise ValueError("there is no pair to show")
    per_row = min(pairs_per_row, len(pairs))
    inner, outer = 4, 34
    width = per_row * (2 * size + inner + outer) - outer
    block = size + 2 * _LINE + 16
    parts = []
    for number, (left, right) in enumerate(pairs):
        x = (number % per_row) * (2 * size + inner + outer)
        y = (number // per_row) * block
        parts += [_cell(left, x, y, size), _cell(right, x + size + inner, y, size)]
    height = -(-len(pairs) // per_row) * block - 8
    return themed(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="system-ui, sans-serif">' + "".join(parts) + "</svg>"
    )


@dataclass(frozen=True)
class Neighbour:
    """A training image found for a query, its class, cosine similarity, and whether the class is the query's."""

    image: np.ndarray
    label: str
    similarity: float
    right: bool


def knn_neighbours(queries: Sequence[tuple[np.ndarray, str, Sequence[Neighbour]]], *, size: int = 120) -> str:
    """One row per query: the test image with its class, then its nearest training images, right or wrong."""
    rows = [
        [
            Cell(image, [label, "test image"]),
            *(
                Cell(n.image, [n.label, f"similarity {n.similarity:.3f}"], "right" if n.right else "wrong")
                for n in found
            ),
        ]
        for image, label, found in queries
    ]
    return image_grid(rows, size=size, break_after=1)


def samples_per_cluster(clusters: Sequence[tuple[str, Sequence[np.ndarray]]], *, size: int = 88) -> str:
    """One row of images per cluster under its title, for example "cluster 7: 132 images, 40 kept"."""
    return image_grid(
        [[Cell(image) for image in images] for _, images in clusters],
        size=size,
        titles=[title for title, _ in clusters],
    )
