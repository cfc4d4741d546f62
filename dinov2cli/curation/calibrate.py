"""Choose a duplicate threshold for a backbone on the user's own images."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import UserError
from dinov2cli.search.neighbours import top_k
from dinov2cli.search.vectors import Vectors, as_vectors


@dataclass(frozen=True)
class Calibration:
    """threshold: cosine to use. recall: share of copies above it with their own original. false_merge: share of
    originals above it with another image. images: how many originals it was measured on."""

    threshold: float
    recall: float
    false_merge: float
    images: int


def calibrate_threshold(
    originals: Vectors | npt.NDArray[np.floating],
    copies: Vectors | npt.NDArray[np.floating],
    *,
    false_merge: float = 0.01,
    lowest: float = 0.5,
    block: int = 16384,
) -> Calibration:
    """The lowest threshold at which at most a share `false_merge` of originals would be joined to a different image.

    originals: [N, D] images that are known, or assumed, to be different from each other (drop exact and perceptual
    copies first: true copies among them raise the threshold). copies: [N, D], row i an altered copy of original i
    (re-encoded, cropped, flipped, ...), used to measure how many such copies the threshold still finds. The nearest
    other image gets nearer as a set grows, so take a sample of a few thousand at least, and a lower rate for a
    pool much larger than the sample. Raises UserError for fewer than 10 originals or sets of different size.
    """
    first, second = as_vectors(originals), as_vectors(copies)
    if first.rows < 10 or first.rows != second.rows:
        raise UserError(
            f"calibration: found {first.rows} originals and {second.rows} copies; expected at least 10 of each, "
            "row by row"
        )
    nearest = top_k(first, 1)[0][:, 0].astype(np.float64)
    allowed = int(np.floor(false_merge * first.rows))
    threshold = max(lowest, float(np.sort(nearest)[first.rows - 1 - allowed]))
    found = 0
    for start in range(0, first.rows, block):
        a, b = first.block(start, start + block), second.block(start, start + block)
        found += int((np.einsum("nd,nd->n", a, b) > threshold).sum())
    return Calibration(threshold, found / first.rows, float((nearest > threshold).mean()), first.rows)
