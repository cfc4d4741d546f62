"""Test images for the report of an evaluation: the surest wrong answers, nearest neighbours, patch features."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image
from dinov2cli.data.source import ImageSource
from dinov2cli.evaluation.features import view_of
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.report.grids import Cell, Neighbour, image_grid
from dinov2cli.report.thumbnails import spread, thumbnail

_PER_ROW, _WRONG = 6, 12
_QUERIES = 6
_GRID = 16  # patches across that a map should have
_MOST_ZOOM = 4  # beyond, patches show textures that the model never met


def surest_mistakes(predictions: pa.Table, test: ImageSource) -> str | None:
    """The wrong answers given with most confidence, as a grid; None where nothing is wrong or nothing says how sure."""
    names = set(predictions.column_names)
    if not {"label", "prediction", "confidence", "id"} <= names:
        return None
    labels, answers, sure, ids = (
        predictions.column(name).to_pylist() for name in ("label", "prediction", "confidence", "id")
    )
    wrong = [i for i in range(len(ids)) if labels[i] != answers[i] and sure[i] is not None]
    wrong = sorted(wrong, key=lambda i: -sure[i])[:_WRONG]
    row_of = _rows(test, {ids[i] for i in wrong})
    cells = []
    for i in wrong:
        image = thumbnail(test, row_of[ids[i]])
        if image is not None:
            cells.append(Cell(image, [f"{answers[i]} ({sure[i]:.0%})", f"is {labels[i]}"], "wrong"))
    return image_grid([cells[i : i + _PER_ROW] for i in range(0, len(cells), _PER_ROW)]) if cells else None


def neighbour_rows(
    predictions: pa.Table, train: ImageSource, test: ImageSource, *, queries: int = _QUERIES
) -> list[tuple[np.ndarray, str, list[Neighbour]]]:
    """Test images of different classes, each with its nearest training images, for `knn_neighbours`."""
    labels = predictions.column("label").to_pylist()
    first_of_class = sorted({label: i for i, label in reversed(list(enumerate(labels)))}.values())
    records = predictions.take(pa.array(spread(first_of_class, queries))).to_pylist()
    train_row = _rows(train, {name for record in records for name in record["neighbours"]})
    test_row = _rows(test, {record["id"] for record in records})
    found = []
    for record in records:
        image = thumbnail(test, test_row[record["id"]])
        near = []
        columns = (record["neighbours"], record["neighbour_labels"], record["similarities"])
        for name, label, similarity in zip(*columns, strict=True):
            pixels = thumbnail(train, train_row[name])
            if pixels is not None:
                near.append(Neighbour(pixels, label, float(similarity), label == record["label"]))
        if image is not None:
            found.append((image, record["label"], near))
    return found


def patch_maps(
    network: VisionTransformer | Encoder, preprocess: Preprocess, source: ImageSource, *, count: int = 6
) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Images uint8 [S, S, 3] spread over a source and their patch tokens [M, h, w, D], for `pca_maps`.

    The images are shown at up to four times the model's own size where its patches are too few for a map; None where
    none can be read, or the model does not take that size.
    """
    zoom = min(_MOST_ZOOM, max(1, -(-_GRID // (preprocess.crop // network.patch_size))))
    larger = preprocess.with_crop(preprocess.crop * zoom, network.patch_size)
    view = view_of(larger)
    crops = []
    for row in spread(range(len(source)), count):
        try:
            crops.append(view(decode_image(source.read(row), name=source.name(row)), row))
        except BadImage:
            continue  # counted and named when the features were taken
    if not crops:
        return None
    images = torch.stack(crops)
    device = next(iter(network.parameters()), torch.empty(0)).device
    with torch.inference_mode():
        patches, _ = network.intermediate(larger.normalize(images.to(device)), [network.depth - 1])[-1]
    side = larger.crop // network.patch_size
    if patches.shape[1] != side * side:
        return None  # stages of a convolutional network have fewer places than patches
    tokens = patches.unflatten(1, (side, side)).float().cpu().numpy()
    return list(images.permute(0, 2, 3, 1).numpy()), tokens


def _rows(source: ImageSource, wanted: set[str]) -> dict[str, int]:
    return {name: row for row, name in enumerate(source.ids) if name in wanted}


def panel_grid(panels: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]], *, size: int = 200) -> str:
    """Rows of pictures with captions (title, images, labels), as of an image, its answer and the truth."""
    rows = [[Cell(image, [label]) for image, label in zip(images, labels, strict=True)] for _, images, labels in panels]
    return image_grid(rows, size=size, titles=[title for title, _, _ in panels])
