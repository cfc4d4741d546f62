"""k-NN accuracy of a run's model, of what it started from, of noise and of raw pixels: the figures of half_hour.json.

python benchmarks/half_hour.py RUN 'TRAIN?label=label' 'TEST?label=label'
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from dinov2cli.artifacts.run import read_metrics
from dinov2cli.cli.assembly import initial_backbone, preprocess_of
from dinov2cli.config import PretrainConfig
from dinov2cli.data.decode import decode_image, resize_center_crop
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.evaluation.features import extract
from dinov2cli.evaluation.knn import knn_classify
from dinov2cli.models.load import load_model
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.recipe import load_config

KS = (10, 20, 100, 200)


class Images:
    """A batch in the form that `extract` takes."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images


def pixels(source: ImageSource, size: int) -> torch.Tensor:
    """All images as uint8 [n, 3, size, size]."""
    names = range(len(source))
    return torch.stack([resize_center_crop(decode_image(source.read(i), name=str(i)), size, size) for i in names])


def scores(train: np.ndarray, train_y: np.ndarray, test: np.ndarray, test_y: np.ndarray) -> dict[str, float]:
    """Accuracy for every k."""
    result = {k: knn_classify(train, train_y, test, test_y, ks=(k,)) for k in KS}
    return {str(k): round(float(value.correct().mean()), 4) for k, value in result.items()}


def main(run: Path, train_spec: str, test_spec: str) -> None:
    """Print one JSON object."""
    config = load_config(PretrainConfig, recipe=str(run / "config.yaml"), sets=[], flags={})
    train, test = open_source(train_spec), open_source(test_spec)
    labels = (train.labels, test.labels)
    preprocess: Preprocess = preprocess_of(config)
    images = [pixels(source, preprocess.crop) for source in (train, test)]

    def of(backbone: VisionTransformer) -> dict[str, float]:
        backbone.eval()
        found = []
        for part in images:
            batches = (Images(chunk) for chunk in part.split(200))
            found.append(torch.cat([f.pooled for f in extract(backbone, batches, preprocess=preprocess)]).numpy())
        return scores(found[0], labels[0], found[1], labels[1])

    standard = config.model.model_copy(update={"init": "standard"})
    # A third larger than the crops that were trained on: 32 pixels for 24, the whole of a CIFAR image.
    raw = [pixels(source, round(preprocess.crop * 4 / 3)) for source in (train, test)]
    flat = [preprocess.normalize(part).flatten(1).numpy() for part in raw]
    last = read_metrics(run)[-1]
    figures = {
        "images": len(train),
        "test_images": len(test),
        "trained": of(load_model(str(run)).backbone),
        "start": of(initial_backbone(config, train)[0]),
        "random": of(initial_backbone(config.model_copy(update={"model": standard}), train)[0]),
        "raw_pixels": scores(flat[0], labels[0], flat[1], labels[1]),
        "steps": last["step"],
        "images_seen": last["images"],
        "seconds": round(last["seconds"]),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
