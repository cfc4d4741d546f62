"""Choose a duplicate threshold for a backbone on the user's own images."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

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
    strictest = float(np.sort(nearest)[first.rows - 1 - allowed])
    # Rounded up to a number one can type; also clear of rounding in another order of summation.
    threshold = max(lowest, min(1.0, np.ceil(strictest * 1e4) / 1e4))
    found = 0
    for start in range(0, first.rows, block):
        a, b = first.block(start, start + block), second.block(start, start + block)
        found += int((np.einsum("nd,nd->n", a, b) > threshold).sum())
    return Calibration(threshold, found / first.rows, float((nearest > threshold).mean()), first.rows)


def altered_copy(image: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint8]:
    """A copy [h, w, 3] of an image [H, W, 3] such as the web makes them, for calibration; the same for the same seed.

    Cropped to 70 to 100 % of its area, mirrored half the time, scaled by 0.5 to 1, brightness and colour changed by
    up to 20 %, encoded as JPEG of quality 40 to 90.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xCA1]))
    copy = Image.fromarray(image)
    side = np.sqrt(rng.uniform(0.7, 1.0))
    width, height = max(1, round(copy.width * side)), max(1, round(copy.height * side))
    left, top = int(rng.integers(0, copy.width - width + 1)), int(rng.integers(0, copy.height - height + 1))
    copy = copy.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        copy = copy.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(0.5, 1.0)
    copy = copy.resize((max(8, round(width * scale)), max(8, round(height * scale))), Image.Resampling.BICUBIC)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Color):
        copy = enhance(copy).enhance(rng.uniform(0.8, 1.2))
    stream = io.BytesIO()
    copy.save(stream, "JPEG", quality=int(rng.integers(40, 91)))
    return np.array(Image.open(stream).convert("RGB"))
