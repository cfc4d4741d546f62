"""Depth of whole images by a trained head, its errors, and those of two guesses made without looking at the image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2cli.data.bad import BadImage
from dinov2cli.data.dense import Pair, read_pairs
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import InputError
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.dense.training import digest_of
from dinov2cli.evaluation.depth.data import Depth, DepthScale, Survey
from dinov2cli.evaluation.depth.measures import WIDTH, Crop, DepthErrors, errors_of, image_errors
from dinov2cli.evaluation.depth.training import pixels_of
from dinov2cli.search.blocks import Stage, kept, over_blocks

_BLOCK = 16  # images that are predicted, and kept, together


@dataclass(frozen=True)
class Predictor:
    """A trained head on a frozen backbone. flip: the mean of the image's and its mirror image's prediction."""

    head: nn.Module
    seeing: Seeing
    flip: bool = True

    @torch.no_grad()
    def depths(self, images: Sequence[Tensor]) -> list[Depth]:
        """Depth in metres at every pixel [H, W] of each image (uint8 [3, H, W])."""
        shown = [self.seeing.sight.resized(image) for image in images]
        found = self._shown(shown)
        if self.flip:
            mirrored = self._shown([image.flip(2) for image in shown])
            found = [(own + other.flip(1)) / 2 for own, other in zip(found, mirrored, strict=True)]
        return [_at(depth, *image.shape[1:]).cpu().numpy() for depth, image in zip(found, images, strict=True)]

    def _shown(self, images: Sequence[Tensor]) -> list[Tensor]:
        size = self.seeing.encoder.patch_size
        return [
            pixels_of(self.head(tokens.maps, tokens.cls), (image.shape[1], image.shape[2]), size)[0]
            for tokens, image in zip(self.seeing.of(images), images, strict=True)
        ]

    def digest(self) -> str:
        """A hash of the head's numbers."""
        return digest_of(self.head)


def _at(depth: Tensor, height: int, width: int) -> Tensor:
    if depth.shape == (height, width):
        return depth
    return F.interpolate(depth[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]


@dataclass(frozen=True)
class DepthFindings:
    """Errors of the images `rows` (int64 [n], those with a valid pixel inside the crop): of the model, of the training
    set's mean depth, and of its mean depth at every place of the picture."""

    rows: npt.NDArray[np.int64]
    errors: DepthErrors
    mean_errors: DepthErrors
    cells_errors: DepthErrors


def errors_on(
    predictor: Predictor,
    source: ImageSource,
    rows: npt.NDArray[np.int64],
    scale: DepthScale,
    trained_on: Survey,
    *,
    crop: Crop = "none",
    workers: int = 0,
    stage: Stage | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> DepthFindings:
    """Errors of the images `rows` of a source; on every rank of a launch, each predicts its share of the blocks.

    Raises InputError where no image has a valid pixel inside the crop, and for files that cannot be read any more.
    """

    def work(start: int) -> dict[str, npt.NDArray[Any]]:
        mine = [int(row) for row in rows[start : start + _BLOCK]]
        pairs = [
            _readable(pair)
            for pair in read_pairs(source, mine, "depth", workers=workers, resize_target=scale.resize_target)
        ]
        found = [
            _errors(pair, predicted, scale, trained_on, crop)
            for pair, predicted in zip(pairs, predictor.depths([pair.image for pair in pairs]), strict=True)
        ]
        good = [row for row, errors in zip(mine, found, strict=True) if errors is not None]
        tables = [errors for errors in found if errors is not None]
        return {
            "rows": np.array(good, dtype=np.int64),
            "errors": np.array(tables, dtype=np.float64).reshape(-1, 3, WIDTH),
        }

    parts = list(over_blocks(kept(work, stage), len(rows), _BLOCK, progress=progress, ranks=ranks))
    judged = np.concatenate([part["rows"] for part in parts])
    tables = np.concatenate([part["errors"] for part in parts])
    if not len(judged):
        raise InputError(
            f"{source.spec}: no image has a valid depth inside the crop {crop}; expected some: try --set crop=none"
        )
    return DepthFindings(judged, errors_of(tables[:, 0]), errors_of(tables[:, 1]), errors_of(tables[:, 2]))


def _readable(pair: Pair | BadImage) -> Pair:
    if isinstance(pair, BadImage):
        raise InputError(f"{pair}: it could be read before; do not change data under a running command")
    return pair


def _errors(
    pair: Pair, predicted: Depth, scale: DepthScale, trained_on: Survey, crop: Crop
) -> npt.NDArray[np.float64] | None:
    """Errors of the prediction and of both guesses, float64 [3, WIDTH]; None without a valid pixel."""
    truth = scale.metres(pair.target)
    cells = _at(torch.from_numpy(trained_on.cells), *truth.shape).numpy()
    found = [
        image_errors(guess, truth, min_depth=scale.min_depth, max_depth=scale.max_depth, crop=crop)
        for guess in (predicted, np.full(truth.shape, trained_on.mean), cells)
    ]
    good = [errors for errors in found if errors is not None]
    return np.stack(good) if good else None
