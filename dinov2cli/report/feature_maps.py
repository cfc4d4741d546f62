"""PCA maps of a few fixed images while a model trains: the same images every time, so that one sees features grow."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image, resize_center_crop
from dinov2cli.data.source import ImageSource
from dinov2cli.evaluation.features import extract
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.report.pca import pca_colours
from dinov2cli.report.sheet import Column, scaled, sheet_png

_SHOWN = 160  # pixels of an image and its map on the sheet
_GRID = 16  # patches across that a map should have
_MOST_ZOOM = 4  # beyond, patches show textures that the model never met
_TRIES = 50  # images tried where some cannot be read


@dataclass(frozen=True)
class _Images:
    images: Tensor


class FeatureMaps:
    """Called with a backbone it gives a PNG: images above the maps of their patch tokens, see `pca_colours`.

    The `count` images are drawn from `source` by `seed` and decoded once. They are shown to the model at `preprocess`'
    crop, or at up to four times that size where its patches are too few for a map. `found` is how many could be read.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        preprocess: Preprocess,
        patch_size: int,
        seed: int,
        count: int = 6,
        precision: str = "fp32",
    ) -> None:
        grid = preprocess.crop // patch_size
        zoom = min(_MOST_ZOOM, max(1, -(-_GRID // grid)))
        self._preprocess = preprocess.with_crop(preprocess.crop * zoom, patch_size)
        self._patch_size, self._precision = patch_size, precision
        self._images = _draw(source, self._preprocess, seed, count)

    @property
    def found(self) -> int:
        """Number of images on the sheet; with 0 there is none to make."""
        return len(self._images)

    def __call__(self, backbone: VisionTransformer) -> bytes | None:
        """Draw the present features; None where no image could be read or the features are no longer numbers.

        The backbone is left in the mode it was in, and no random state is touched.
        """
        if not self.found:
            return None
        tokens = self.tokens(backbone)
        if not np.isfinite(tokens).all():
            return None  # the training loop stops such a run, and says why
        maps = pca_colours(tokens)
        pictures = self._images.permute(0, 2, 3, 1).numpy()
        size = self._preprocess.crop
        return sheet_png(
            [
                Column("", [scaled(picture, _SHOWN, size), _fitted(colours, scaled(picture, _SHOWN, size).shape[0])])
                for picture, colours in zip(pictures, maps, strict=True)
            ]
        )

    def tokens(self, backbone: VisionTransformer) -> np.ndarray:
        """Patch tokens float32 [M, h, w, D] of the images, after the final norm."""
        training = backbone.training
        backbone.eval()
        parts = list(
            extract(
                backbone,
                [_Images(image[None]) for image in self._images],
                preprocess=self._preprocess,
                patches=True,
                precision=self._precision,
            )
        )
        backbone.train(training)
        side = self._preprocess.crop // self._patch_size
        tokens = torch.cat([part.patches for part in parts if part.patches is not None])
        return tokens.unflatten(1, (side, side)).numpy()


def _draw(source: ImageSource, preprocess: Preprocess, seed: int, count: int) -> Tensor:
    """uint8 [M, 3, S, S]: the first `count` readable ones of the images drawn by `seed`."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x0A12]))
    rows = rng.choice(len(source), size=min(len(source), _TRIES), replace=False)
    found: list[Tensor] = []
    for row in rows.tolist():
        if len(found) == count:
            break
        try:
            pixels = decode_image(source.read(row), name=source.name(row))
        except BadImage:
            continue  # the training loader counts and names it
        found.append(resize_center_crop(pixels, preprocess.resize, preprocess.crop))
    return torch.stack(found) if found else torch.empty((0, 3, preprocess.crop, preprocess.crop), dtype=torch.uint8)


def _fitted(colours: np.ndarray, size: int) -> np.ndarray:
    """A map [h, w, 3] stretched to [size, size, 3], every patch a square or nearly so."""
    rows, columns = (np.arange(size) * length // size for length in colours.shape[:2])
    return colours[rows][:, columns]
