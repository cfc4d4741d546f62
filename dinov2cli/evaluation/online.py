"""k-NN during training: a quick leave-one-out check on a fixed sample of the training images, to see features grow."""

from dataclasses import dataclass

import numpy as np
import torch

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image, resize_center_crop
from dinov2cli.data.source import ImageSource
from dinov2cli.errors import InputError
from dinov2cli.evaluation.features import extract
from dinov2cli.evaluation.knn import knn_classify
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

_BATCH = 64


@dataclass(frozen=True)
class _Images:
    images: torch.Tensor


def has_labels(source: ImageSource) -> bool:
    """Whether k-NN has something to go by: at least two images of the source have a label."""
    return source.labels is not None and bool((source.labels >= 0).sum() >= 2)


class OnlineKnn:
    """Called with (backbone, step) it gives {"knn": top-1 accuracy at k = 20} of class tokens; pixels are decoded once.

    The sample holds `sample` labelled images drawn by `seed`; unreadable ones are left out. Raises InputError when
    fewer than two images have a label.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        preprocess: Preprocess,
        seed: int,
        sample: int = 2000,
        precision: str = "fp32",
    ) -> None:
        self._preprocess, self._precision = preprocess, precision
        labels = source.labels
        if labels is None or not has_labels(source):
            raise InputError(
                f"{source.spec} has no labels for k-NN during training; name their column with ?label=NAME, "
                "use ?label=folder, or set eval.every=0"
            )
        rng = np.random.Generator(np.random.Philox(key=[seed, 0x0A11]))
        rows = np.sort(rng.permutation(np.flatnonzero(labels >= 0))[:sample])
        read = [(int(labels[row]), image) for row in rows if (image := self._read(source, int(row))) is not None]
        if len(read) < 2:
            raise InputError(f"{source.spec}: fewer than two of {len(rows)} images can be read, k-NN needs more")
        self._labels = np.unique([label for label, _ in read], return_inverse=True)[1]
        self._images = torch.stack([image for _, image in read])

    def _read(self, source: ImageSource, row: int) -> torch.Tensor | None:
        try:
            pixels = decode_image(source.read(row), name=source.name(row))
        except BadImage:
            return None  # the training loader counts and names it
        return resize_center_crop(pixels, self._preprocess.resize, self._preprocess.crop)

    def __call__(self, backbone: VisionTransformer, step: int) -> dict[str, float]:
        """Return the accuracy of the present features; the backbone is left in the mode it was in."""
        del step
        training = backbone.training
        backbone.eval()
        batches = [_Images(part) for part in self._images.split(_BATCH)]
        parts = extract(backbone, batches, preprocess=self._preprocess, precision=self._precision)
        features = torch.cat([part.pooled for part in parts])
        backbone.train(training)
        result = knn_classify(features, self._labels, features, self._labels, ks=(20,), leave_one_out=True)
        return {"knn": float(result.correct().mean())}
