"""The same sources on real image sets that may lie beside the checkout; skipped where they do not."""

from pathlib import Path

import pytest

from dinov2cli.data.bad import BadImages
from dinov2cli.data.decode import decode_image
from dinov2cli.data.loader import iterate_images
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the checkout"),
]


def test_imagenette():
    source = open_source(f"{SHARED}/imagenette/val.parquet")
    assert len(source) == 1000 and source.label_names[0] == "tench" and set(source.labels.tolist()) == set(range(10))
    bad = BadImages()
    batches = list(iterate_images(source, resize=64, crop=56, batch_size=32, workers=0, bad=bad, stop=100))
    assert sum(len(batch) for batch in batches) == 100 and bad.count == 0


def test_cifar10_splits():
    with pytest.raises(InputError, match="holds the splits test, train side by side"):
        open_source(f"{SHARED}/cifar10")
    source = open_source(f"{SHARED}/cifar10?split=test")
    assert len(source) == 10_000 and decode_image(source.read(9_999), name="last").shape == (32, 32, 3)


def test_holidays_groups_and_queries():
    source = open_source(f"{SHARED}/holidays/images.parquet")
    group, query = source.column("group").to_pylist(), source.column("is_query").to_pylist()
    assert len(group) == 421 and set(query) == {0, 1} and sum(query) == 149


def test_nyu_masks_and_depth():
    source = open_source(f"{SHARED}/nyuv2/val.parquet?mask=segmentation")
    assert source.has_role("depth") and source.has_role("mask")
    image, depth, mask = (decode_image(source.read(3, role), name=role) for role in ("image", "depth", "mask"))
    assert image.shape == depth.shape == mask.shape
