"""Sheets of small pictures as PNG, for files that are looked at outside the report too."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2cli.report.palette import LIGHT

_GAP = 6  # pixels between pictures and around the sheet
_FONT = 13
_CAPTION = 20  # height of the line of captions


@dataclass(frozen=True)
class Column:
    """One column of a sheet: its caption and its pictures, uint8 [H, W, 3] each; None leaves the place empty."""

    caption: str
    pictures: Sequence[np.ndarray | None]


def sheet_png(columns: Sequence[Column]) -> bytes:
    """The columns side by side as the bytes of a PNG: row i holds picture i of every column, at its own size.

    A column is as wide as its widest picture or its caption, a row as high as its highest picture. A line of captions
    stands on top if any column has one. Raises ValueError where there is no picture, or columns differ in length.
    """
    if not any(picture is not None for column in columns for picture in column.pictures):
        raise ValueError("a sheet needs at least one picture")
    if len({len(column.pictures) for column in columns}) != 1:
        raise ValueError("the columns of a sheet must hold equally many places")
    font = ImageFont.load_default(_FONT)
    rows = range(len(columns[0].pictures))
    widths = [
        max([round(font.getlength(column.caption)), *(p.shape[1] for p in column.pictures if p is not None)])
        for column in columns
    ]
    heights = [max((p.shape[0] for c in columns if (p := c.pictures[row]) is not None), default=0) for row in rows]
    top = _GAP + (_CAPTION if any(column.caption for column in columns) else 0)
    size = (_GAP + sum(width + _GAP for width in widths), top + sum(height + _GAP for height in heights))
    sheet = Image.new("RGB", size, LIGHT["card"])
    draw = ImageDraw.Draw(sheet)
    x = _GAP
    for column, width in zip(columns, widths, strict=True):
        draw.text((x, _GAP - 1), column.caption, fill=LIGHT["ink"], font=font)
        y = top
        for picture, height in zip(column.pictures, heights, strict=True):
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (x, y))
            y += height + _GAP
        x += width + _GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def scaled(picture: np.ndarray, size: int, of: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] drawn at the scale at which `of` pixels become about `size`.

    Enlarged by a whole factor with square pixels, so that each stays visible; made smaller with antialiasing.
    """
    height, width = picture.shape[:2]
    factor = size // of
    if factor >= 1:
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    smaller = (max(1, round(width * size / of)), max(1, round(height * size / of)))
    return np.asarray(Image.fromarray(picture).resize(smaller, Image.Resampling.LANCZOS))
