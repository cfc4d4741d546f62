"""What the demo's report shows, gathered from the directories the demo's steps left."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from dinov2cli.artifacts.results import read_predictions, read_results
from dinov2cli.data.decode import decode_image, resize_center_crop
from dinov2cli.data.demo_photos import PlantedCopy
from dinov2cli.data.source import ImageSource
from dinov2cli.evaluation.intervals import paired_difference
from dinov2cli.models.load import LoadedModel
from dinov2cli.report.demo import Comparison
from dinov2cli.report.thumbnails import spread


def compare_results(before: Path, after: Path, *, name: str, metric: str, seed: int) -> Comparison:
    """Compare one metric of two results directories on the same test images, image by image (paired bootstrap)."""
    rows = [next(row for row in read_results(path) if row.metric == metric) for path in (before, after)]
    tables = [read_predictions(path) for path in (before, after)]
    if tables[0].column("id") != tables[1].column("id"):
        raise ValueError(f"{before} and {after} were not measured on the same images")
    correct = [np.asarray(table.column("correct").to_pylist(), dtype=np.float64) for table in tables]
    classes = rows[0].settings["found"].get("classes")
    return Comparison(
        name=name,
        before=(rows[0].value, rows[0].ci_low, rows[0].ci_high),
        after=(rows[1].value, rows[1].ci_low, rows[1].ci_high),
        change=paired_difference(correct[0], correct[1], seed=seed),
        n=rows[0].n,
        chance=1 / int(classes) if classes else None,
    )


def planted_copies_found(dropped: pa.Table, truth: Sequence[PlantedCopy]) -> tuple[int, int, int]:
    """How many planted copies dedup found, how many there are, and how many images went that are no planted copy."""
    gone = dict(zip(dropped.column("id").to_pylist(), dropped.column("group").to_pylist(), strict=True))
    of_pair = {name: pair for pair in truth for name in (pair.copy_id, pair.original_id)}
    found = {of_pair[name].copy_id for name in gone if name in of_pair}
    return len(found), len(truth), sum(name not in of_pair for name in gone)


def patch_tokens(loaded: LoadedModel, images: list[np.ndarray], *, zoom: int = 2) -> np.ndarray:
    """Patch tokens [M, h, w, D] of some images, at `zoom` times the model's own size for a finer map."""
    prepared = loaded.preprocess.with_crop(loaded.preprocess.crop * zoom, loaded.backbone.patch_size)
    crops = torch.stack([resize_center_crop(image, prepared.resize, prepared.crop) for image in images])
    with torch.inference_mode():
        tokens = loaded.backbone(prepared.normalize(crops)).patches
    side = prepared.crop // loaded.backbone.patch_size
    return tokens.unflatten(1, (side, side)).float().numpy()


def sample_images(source: ImageSource, count: int) -> list[np.ndarray]:
    """Decoded images uint8 [H, W, 3] spread evenly over a source."""
    return [decode_image(source.read(row), name=source.name(row)) for row in spread(range(len(source)), count)]
