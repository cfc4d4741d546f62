"""Depth maps as pictures: near is bright, one colour scale for what is compared, grey where nothing is known."""

import numpy as np
import numpy.typing as npt

_COLOURS = "magma_r"
_UNKNOWN = 128  # grey
_TAILS = (1, 99)  # percentiles of the true depths that the colours span

Picture = npt.NDArray[np.uint8]


def depth_panel(
    image: Picture, predicted: npt.NDArray[np.floating], truth: npt.NDArray[np.floating], valid: npt.NDArray[np.bool_]
) -> tuple[list[Picture], list[str]]:
    """Image [H, W, 3], predicted and true depth [H, W] in metres as pictures uint8 [H, W, 3], and their labels.

    The colours span the true depths of the image; the labels say from where to where.
    """
    known = truth[valid] if valid.any() else predicted.ravel()
    low, high = (float(value) for value in np.percentile(known, _TAILS))
    span = f"colours from {low:.1f} to {high:.1f} m"
    pictures = [
        np.ascontiguousarray(image),
        coloured(predicted, np.ones(predicted.shape, dtype=bool), low, high),
        coloured(truth, valid, low, high),
    ]
    return pictures, ["image", f"predicted depth, {span}", f"true depth, {span}; grey: not known"]


def coloured(depth: npt.NDArray[np.floating], valid: npt.NDArray[np.bool_], low: float, high: float) -> Picture:
    """Depths [H, W] in metres as colours from `low` (bright) to `high` (dark), uint8 [H, W, 3]; not valid: grey."""
    from matplotlib import colormaps

    share = np.where(valid, (depth - low) / max(high - low, 1e-9), 0.0)
    picture = np.round(colormaps[_COLOURS](np.clip(share, 0, 1))[..., :3] * 255).astype(np.uint8)
    picture[~valid] = _UNKNOWN
    return picture
