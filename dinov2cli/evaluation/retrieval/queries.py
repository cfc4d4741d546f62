"""Queries that are a part of an image: their rows as a source of their own, and the view that shows the part."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dinov2cli.data.derived import DerivedSource
from dinov2cli.data.loader import View
from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import parse_spec
from dinov2cli.evaluation.retrieval.truth import Box


@dataclass(frozen=True)
class BoxView:
    """The part of each image inside its box (rounded to pixels, as far as it lies in the image), then `inner`.

    boxes: (x0, y0, x1, y1) in pixels of the upright image for each row, None for the whole image.
    """

    inner: View
    boxes: tuple[Box | None, ...]

    @property
    def name(self) -> str:
        return f"{self.inner.name} in boxes {hashlib.sha256(repr(self.boxes).encode()).hexdigest()}"

    @property
    def size(self) -> int:
        return self.inner.size

    def __call__(self, pixels: npt.NDArray[np.uint8], row: int) -> torch.Tensor:
        return self.inner(boxed(pixels, self.boxes[row]), row)


def boxed(pixels: npt.NDArray[np.uint8], box: Box | None) -> npt.NDArray[np.uint8]:
    """The part of an image [H, W, 3] inside a box; all of it where the box lies outside the image."""
    if box is None:
        return pixels
    x0, y0, x1, y1 = (max(0, round(edge)) for edge in box)
    part = pixels[y0:y1, x0:x1]
    return np.ascontiguousarray(part) if part.size else pixels


def some_rows(source: ImageSource, rows: Sequence[int]) -> ImageSource:
    """A source of some rows of another, in the order given, without its labels and columns."""
    ids, paths = source.ids, source.paths
    table = pa.table({"id": [ids[row] for row in rows], "image_path": [paths[row] for row in rows]})
    index = np.array(rows, dtype=np.int64)
    return DerivedSource(parse_spec(source.spec), table, [source], np.zeros_like(index), index)
