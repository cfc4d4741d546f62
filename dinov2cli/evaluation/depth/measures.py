"""Monocular depth: bins, losses, masks and metrics (METHOD §6; AdaBins, arXiv 2011.14141; Eigen et al. 2014).

Depths are metres. A pixel is valid where its true depth lies strictly between `min_depth` and `max_depth`: zero (no
measurement) and values cut off at the largest depth do not count. What the metrics need of an image is one row of
sums, so that images can be read, predicted and forgotten one by one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2cli.errors import InputError, UserError

Crop = Literal["none", "eigen", "garg"]
CROPS: tuple[Crop, ...] = ("none", "eigen", "garg")
DELTA = 1.25
VARIANCE_FOCUS = 0.85
GRADIENT_SCALES = 4
_FLOOR = 0.1  # added to each bin's weight, so that the weights of a pixel never sum to zero
_LOG_EPS = 1e-3  # metres; keeps the gradient of the logarithm finite
_SMALLEST_LOSS = 1e-12  # of the loss before its root, whose gradient at zero is infinite

# Rows and columns of the pixels that count, as shares of the sides: first row, last row, first column, last column.
_WINDOWS: dict[str, tuple[float, float, float, float]] = {
    "eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}

Floats = npt.NDArray[np.float64]


def bin_depths(bins: int, min_depth: float, max_depth: float) -> Tensor:
    """Depths of equally spaced bins from min_depth to max_depth, both included, float32 [bins].

    Raises UserError for fewer than two bins or an empty range.
    """
    check_range(min_depth, max_depth)
    if bins < 2:
        raise UserError(f"depth bins are {bins}, expected 2 or more (the paper uses 256)")
    return torch.linspace(min_depth, max_depth, bins)


def check_range(min_depth: float, max_depth: float) -> None:
    """UserError unless 0 < min_depth < max_depth."""
    if not 0 < min_depth < max_depth < float("inf"):
        raise UserError(
            f"min_depth and max_depth are {min_depth:g} and {max_depth:g} metres, expected 0 < min_depth < max_depth: "
            "for example 0.001 and 10 indoors, 0.001 and 80 on roads"
        )


def expected_depth(scores: Tensor, depths: Tensor) -> Tensor:
    """Mean of the bins' `depths` [K] under the linearly normalised `scores` [B, K, h, w], float [B, h, w].

    The weight of a bin is relu(score) + 0.1 over the sum of these (AdaBins' linear normalisation).
    """
    positive = torch.relu(scores)
    top = torch.einsum("bkhw,k->bhw", positive, depths) + _FLOOR * depths.sum()
    return top / (positive.sum(dim=1) + _FLOOR * len(depths))


def valid_pixels(depth: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Where a true depth [..., H, W] is one, bool of the same shape. NaN is none."""
    return (depth > min_depth) & (depth < max_depth)


def crop_window(crop: Crop, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that count in the evaluation of an image of this size.

    eigen: rows 45 to 471 and columns 41 to 601 of 480 x 640 (NYUd), scaled; garg: the window of Garg et al. (KITTI).
    """
    if crop not in CROPS:
        raise UserError(f"crop is {crop!r}, expected one of {', '.join(CROPS)}")
    if crop == "none":
        return slice(0, height), slice(0, width)
    top, bottom, left, right = _WINDOWS[crop]
    # A hair is added: 45 / 480 * 480 must be 45 in floating point too.
    rows = slice(int(top * height + 1e-6), int(bottom * height + 1e-6))
    return rows, slice(int(left * width + 1e-6), int(right * width + 1e-6))


def log_sums(predicted: Tensor, depth: Tensor, valid: Tensor) -> Tensor:
    """Over the valid pixels of [B, H, W]: their number, the sum of g and of g^2, float64 [3].

    g = log predicted - log depth. Sums of several batches, and of several processes, add up.
    """
    g = _log_ratio(predicted, depth, valid)
    number = valid.sum(dtype=torch.float64)
    return torch.stack([number, g.sum(dtype=torch.float64), g.square().sum(dtype=torch.float64)])


def scale_invariant_log_loss(sums: Tensor, *, variance_focus: float = VARIANCE_FOCUS) -> Tensor:
    """sqrt(mean(g^2) - variance_focus * mean(g)^2) of `log_sums` [3]: AdaBins eq. 5 without its factor of 10.

    Zero, with a gradient of zero, where no pixel was valid or none was wrong.
    """
    number = sums[0].detach().clamp_min(1)
    return (sums[2] / number - variance_focus * (sums[1] / number).square()).clamp_min(_SMALLEST_LOSS).sqrt()


def gradient_sums(predicted: Tensor, depth: Tensor, valid: Tensor, *, scales: int = GRADIENT_SCALES) -> Tensor:
    """At every 1st, 2nd, 4th, 8th pixel of [B, H, W]: the number of valid ones, and the sum of |difference of g between
    pixels two apart| along rows and columns where both are valid; float64 [scales, 2], g as in `log_sums`."""
    found = []
    g = _log_ratio(predicted, depth, valid)
    for step in (2**scale for scale in range(scales)):
        g_s, valid_s = g[:, ::step, ::step], valid[:, ::step, ::step]
        across = (g_s[:, :, 2:] - g_s[:, :, :-2]).abs() * (valid_s[:, :, 2:] & valid_s[:, :, :-2])
        down = (g_s[:, 2:] - g_s[:, :-2]).abs() * (valid_s[:, 2:] & valid_s[:, :-2])
        total = across.sum(dtype=torch.float64) + down.sum(dtype=torch.float64)
        found.append(torch.stack([valid_s.sum(dtype=torch.float64), total]))
    return torch.stack(found)


def gradient_loss(sums: Tensor) -> Tensor:
    """Multi-scale gradient matching of log depth from `gradient_sums` (MegaDepth, arXiv 1804.00607, eq. 3)."""
    return (sums[:, 1] / sums[:, 0].detach().clamp_min(1)).sum()


def _log_ratio(predicted: Tensor, depth: Tensor, valid: Tensor) -> Tensor:
    """log predicted - log depth, 0 where not valid."""
    known = torch.where(valid, depth, predicted.detach())  # NaN times zero would still be NaN
    g = torch.log(predicted + _LOG_EPS) - torch.log(known + _LOG_EPS)
    return torch.where(valid, g, torch.zeros_like(g))


@dataclass(frozen=True)
class DepthErrors:
    """Errors of n images, each a mean over its valid pixels: float64 [n] in every field, but for `pixels` (int64 [n]).

    rmse in metres, square (mean squared error) and sq_rel by their definition; deltas [n, 3]: shares of pixels whose
    ratio to the truth, either way, is below 1.25, 1.25^2 and 1.25^3.
    """

    pixels: npt.NDArray[np.int64]
    square: Floats
    abs_rel: Floats
    sq_rel: Floats
    log10: Floats
    deltas: Floats

    @property
    def rmse(self) -> Floats:
        """Root of the mean squared error of each image, metres [n]."""
        return np.sqrt(self.square)

    @property
    def pooled_squares(self) -> Floats:
        """Numbers [n] whose mean is the mean squared error over the pixels of all images: an image counts by its
        number of valid pixels."""
        return self.square * self.pixels / self.pixels.mean()

    def rows(self) -> Floats:
        """All of it as one table [n, 8], which `errors_of` reads back."""
        columns = [self.pixels, self.square, self.abs_rel, self.sq_rel, self.log10, *self.deltas.T]
        return np.stack(columns, axis=1).astype(np.float64)


WIDTH = 8
"""Columns of the table of `DepthErrors.rows`."""


def errors_of(rows: npt.ArrayLike) -> DepthErrors:
    """The errors that a table [n, 8] of `image_errors` holds."""
    table = np.asarray(rows, dtype=np.float64).reshape(-1, WIDTH)
    return DepthErrors(table[:, 0].astype(np.int64), table[:, 1], table[:, 2], table[:, 3], table[:, 4], table[:, 5:])


def image_errors(
    predicted: npt.ArrayLike, depth: npt.ArrayLike, *, min_depth: float, max_depth: float, crop: Crop = "none"
) -> Floats | None:
    """One row of errors (`errors_of`), float64 [8], of a predicted and a true depth map [H, W] in metres.

    Predictions are clipped to the range first. None for an image without a valid pixel inside the crop.
    Raises InputError for maps of unequal size and for predictions that are not finite.
    """
    found, truth = np.asarray(predicted, dtype=np.float64), np.asarray(depth, dtype=np.float64)
    if found.shape != truth.shape:
        raise InputError(f"predicted depth is {found.shape}, the true one {truth.shape}; expected equal sizes")
    if not np.isfinite(found).all():
        raise InputError("predicted depth is not finite: the model's features or the head hold NaN")
    window = crop_window(crop, *truth.shape)
    found, truth = found[window], truth[window]
    valid = (truth > min_depth) & (truth < max_depth)
    if not valid.any():
        return None
    found, truth = np.clip(found[valid], min_depth, max_depth), truth[valid]
    error = found - truth
    ratio = np.maximum(found / truth, truth / found)
    return np.array(
        [
            len(truth),
            np.mean(error**2),
            np.mean(np.abs(error) / truth),
            np.mean(error**2 / truth),
            np.mean(np.abs(np.log10(found) - np.log10(truth))),
            *(np.mean(ratio < DELTA**power) for power in (1, 2, 3)),
        ]
    )
