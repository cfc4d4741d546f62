"""Descriptors in ONNX files, how a MODEL of that kind is spelled, and the squares that all descriptors see."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.cli.frame import canonical_model
from dinov2cli.data.decode import decode_image, resize_uint8
from dinov2cli.data.loader import CentreView, read_ranges
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.features import extract, stream_features
from dinov2cli.models.load import load_model
from dinov2cli.models.onnx_descriptor import OnnxDescriptor
from dinov2cli.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.models.onnx_files import HALF, onnx_file

needs_runtime = pytest.mark.skipif("not __import__('importlib').util.find_spec('onnxruntime')", reason="no onnxruntime")
WEIGHTS = np.random.default_rng(0).normal(size=(192, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(images):
    pooled = images.double().numpy().reshape(5, 3, 8, 8, 8, 8).mean(axis=(3, 5)).reshape(5, 192)
    vectors = pooled @ WEIGHTS.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def refusal(spec, error=InputError, **options):
    with pytest.raises(error) as caught:
        load_model(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@needs_runtime
@pytest.mark.parametrize("batch", ["batch", 1, 3, 5, 8])
def test_a_graph_gives_its_vectors_whatever_its_batch(batch, images, expected, tmp_path):
    dim = ("batch", 24) if batch == "batch" else (batch, 24)
    loaded = load_model(
        f"onnx:{onnx_file(tmp_path / 'a.onnx', WEIGHTS, shape=(batch, 3, 64, 64), outputs=[('vectors', dim)])}"
    )
    assert (loaded.network.embed_dim, loaded.network.size, loaded.preprocess.crop) == (24, 64, 64)
    assert (loaded.name, loaded.copy_detection, loaded.random) == ("a", False, False)
    found = loaded.network(images)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@needs_runtime
def test_half_precision_graphs(images, expected, tmp_path):
    file = onnx_file(tmp_path / "a.onnx", WEIGHTS.astype(np.float16), kind=HALF)
    np.testing.assert_allclose(load_model(f"onnx:{file}").network(images).numpy(), expected, atol=5e-3)


@needs_runtime
def test_the_first_output_of_two_axes_is_taken_and_its_length_found_by_a_run(images, expected, tmp_path):
    outputs = [("map", ("batch", 3, 8, 8)), ("vectors", ("batch", "d")), ("flat", ("batch", 192))]
    network = load_model(f"onnx:{onnx_file(tmp_path / 'a.onnx', WEIGHTS, outputs=outputs)}").network
    assert network.embed_dim == 24
    np.testing.assert_allclose(network(images).numpy(), expected, atol=1e-6)


@needs_runtime
def test_a_graph_of_any_size_needs_one_and_one_of_a_fixed_size_keeps_it(tmp_path):
    free = onnx_file(tmp_path / "free.onnx", WEIGHTS[:3], shape=("batch", 3, "h", "w"), pool=None)
    fixed = onnx_file(tmp_path / "fixed.onnx", WEIGHTS)
    assert refusal(f"onnx:{free}", UserError) == (
        f"{free} takes images of any size: say which, as onnx:{free}?size=288"
    )
    assert load_model(f"onnx:{free}?size=96").network(torch.randn(2, 3, 96, 96)).shape == (2, 24)
    assert load_model(f"onnx:{free}", img_size=80).fingerprint["size"] == 80
    assert load_model(f"onnx:{fixed}?size=64").network.size == 64
    assert refusal(f"onnx:{fixed}?size=96", UserError) == (
        f"{fixed} takes images of 64 x 64 pixels only; found size 96: leave it out"
    )


@needs_runtime
def test_graphs_that_are_no_descriptor(tmp_path):
    file = tmp_path / "a.onnx"

    def refused(weights=WEIGHTS, **options):
        return refusal(f"onnx:{onnx_file(file, weights, **options)}")

    assert refused(outputs=[("map", ("batch", 3, 8, 8))]) == (
        f"{file} gives map tensor(float) ['batch', 3, 8, 8]; expected a float output of vectors, [batch, D]"
    )
    assert refused(inputs=[("mask", ("batch", 1))]) == (
        f"{file} takes images tensor(float) ['batch', 3, 64, 64], mask tensor(float) ['batch', 1]; expected one float "
        "input of square images, [batch, 3, size, size]"
    )
    for shape in ((1, 64, 64, 3), (1, 3, 64, 128), ("batch", 3, 64)):
        message = refused(WEIGHTS[: shape[1]], shape=shape, pool=None, outputs=[("vectors", ("b", "d"))])
        assert "expected one float input of square images" in message
    wrong = onnx_file(file, WEIGHTS[:60], shape=("batch", 3, "h", "w"))
    with pytest.raises(InputError, match=r"a.onnx does not run on images \[2, 3, 64, 64\] \(.*another size can"):
        load_model(f"onnx:{wrong}?size=64").network(torch.zeros(2, 3, 64, 64))
    nan = onnx_file(file, np.full((192, 24), np.nan, np.float32))
    with pytest.raises(InputError, match=r"a.onnx: the network gives NaN or infinite vectors"):
        load_model(f"onnx:{nan}").network(torch.ones(2, 3, 64, 64))
    file.write_bytes(b"not a model")
    assert refusal(f"onnx:{file}").startswith(f"{file} cannot be read as an ONNX model (")
    file.unlink()
    assert refusal(f"onnx:{file}") == f"model 'onnx:{file}': found nothing at {file}; expected a file"


def test_without_onnxruntime_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refusal(f"onnx:{onnx_file(tmp_path / 'a.onnx', WEIGHTS)}") == (
        "an onnx: model needs onnxruntime, which is not installed: pip install 'dinov2cli[onnx]'"
    )


def test_a_model_means_the_same_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd?size=288").touch()
    assert canonical_model("sscd:sub/../a.pt") == f"sscd:{tmp_path}/a.pt"
    assert canonical_model("onnx:a.onnx?size=288") == f"onnx:{tmp_path}/a.onnx?size=288"
    assert canonical_model("sscd:odd?size=288") == f"sscd:{tmp_path}/odd?size=288"
    assert canonical_model("vits14") == "vits14"


@pytest.mark.parametrize("size", [(100, 75), (75, 100), (64, 64), (500, 333), (20, 31), (1, 1), (3, 900)])
def test_squares_match_pillow(size):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    result = resize_uint8(np.array(image), 64, 64, "bilinear")
    assert result.shape == (3, 64, 64) and result.dtype == torch.uint8
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.mean() < 0.1 and difference.max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_squares_are_read_in_order_with_what_could_not_be_read(workers, tmp_path):
    for number in range(6):
        Image.new("RGB", (30 + number, 50), (number * 40, 0, 9)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    source = open_source(str(tmp_path))
    readings = list(
        read_ranges(source, [(0, 2), (2, 4), (4, 6)], view=CentreView(32, 32, square=True), workers=workers)
    )
    assert [list(reading.batch.index) for reading in readings] == [[0, 1], [2], [4, 5]]
    assert [len(reading.failures) for reading in readings] == [0, 1, 0]
    images = torch.cat([reading.batch.images for reading in readings])
    assert images.shape == (5, 3, 32, 32)
    assert images[:, 0, 16, 16].tolist() == [0, 40, 80, 160, 200]
    assert [int(width) for reading in readings for width in reading.batch.width] == [30, 31, 32, 34, 35]


@needs_runtime
def test_pixels_are_resized_and_normalised_as_published(tmp_path):
    """From file to vector, against Pillow's resize, ImageNet's statistics and the graph's equation in float64."""
    weights = np.random.default_rng(1).normal(size=(3 * 64, 16)).astype(np.float32)
    loaded = load_model(f"onnx:{onnx_file(tmp_path / 'a.onnx', weights)}")
    source = open_source("demo:photos?count=40")
    with stream_features(
        loaded.network, source, [(0, 4), (4, 6)], preprocess=loaded.preprocess, pool="cls"
    ) as features:
        found = torch.cat([batch.pooled for batch in features]).numpy()
    for row in range(6):
        pixels = decode_image(source.read(row), name="x")
        small = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR), np.float64)
        normal = ((small / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
        vector = normal.reshape(3, 8, 8, 8, 8).mean(axis=(2, 4)).ravel() @ weights
        assert found[row] @ (vector / np.linalg.norm(vector)) > 0.99999
    assert abs(found @ found.T - np.eye(6)).max() > 0.01


def test_tokens_are_refused():
    class Grey(OnnxDescriptor):
        def __init__(self):
            torch.nn.Module.__init__(self)

    for options, found in (({"pool": "mean"}, "pool 'mean'"), ({"patches": True}, "patch tokens")):
        with pytest.raises(UserError) as caught:
            list(extract(Grey(), [], preprocess=None, **options))
        assert str(caught.value) == (
            f"this model gives one vector per image and has no tokens; found {found}: leave that out"
        )
