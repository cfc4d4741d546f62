"""Maps of patch tokens: their three main directions of variation shown as red, green and blue."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dinov2cli.report.grids import Cell, image_grid

# Share of the values cut off at each end before scaling to 0..255, so that one odd patch does not dim all others.
_CUT = 0.01


def pca_colours(tokens: np.ndarray) -> np.ndarray:
    """Colours uint8 [M, h, w, 3] of patch tokens [M, h, w, D]: their first three principal components.

    One basis serves all M images, so a colour means the same in each. A component's sign is free; it is chosen so that
    its third moment is positive, which makes the result the same for the same tokens. Components beyond the rank of
    the tokens are mid-grey.
    """
    shape = tokens.shape[:-1]
    flat = np.asarray(tokens, dtype=np.float64).reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    main = vectors[:, ::-1][:, :3]
    strength = np.sqrt(np.maximum(values[::-1][:3], 0))
    projected = flat @ main
    projected *= np.where((projected**3).sum(axis=0) < 0, -1.0, 1.0)
    low, high = np.quantile(projected, [_CUT, 1 - _CUT], axis=0)
    real = strength > 1e-9 * max(strength[0], 1e-300)
    scaled = np.where(real, (projected - low) / np.where(high > low, high - low, 1.0), 0.5)
    colours = np.full((len(flat), 3), 127, dtype=np.uint8)
    colours[:, : main.shape[1]] = np.clip(np.rint(255 * scaled), 0, 255).astype(np.uint8)
    return colours.reshape(*shape, 3)


def pca_maps(
    images: Sequence[np.ndarray], tokens: Mapping[str, np.ndarray], *, size: int = 120, images_per_row: int = 2
) -> str:
    """Each image beside the map of its patch tokens, one map per model, as SVG text.

    `images` are M uint8 [H, W, 3]; `tokens` maps a model's label ("before training") to [M, h, w, D]. Each model has
    its own three components, so colours compare within a model and not across. Raises ValueError for unequal numbers.
    """
    if not tokens or any(len(grid) != len(images) for grid in tokens.values()):
        raise ValueError(f"every model needs patch tokens of all {len(images)} images")
    maps = {label: pca_colours(grid) for label, grid in tokens.items()}
    groups = [
        [Cell(image), *(Cell(_enlarged(colours[i], size), exact=True) for colours in maps.values())]
        for i, image in enumerate(images)
    ]
    per_row = max(1, min(images_per_row, len(groups)))
    rows = [[cell for group in groups[i : i + per_row] for cell in group] for i in range(0, len(groups), per_row)]
    return image_grid(rows, size=size, columns=["image", *maps] * per_row)


def _enlarged(colours: np.ndarray, size: int) -> np.ndarray:
    """A map [h, w, 3] with every patch a square of whole pixels, for pixel-exact display."""
    factor = max(1, 2 * size // max(colours.shape[:2]))
    height, width = colours.shape[:2]
    enlarged = Image.fromarray(colours).resize((width * factor, height * factor), Image.Resampling.NEAREST)
    return np.asarray(enlarged)
