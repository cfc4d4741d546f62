"""`dinov2 embed -m sscd:FILE` and `-m onnx:FILE` on random weights: the vectors, the manifest, every refusal."""

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dinov2cli.artifacts.embeddings import open_embeddings
from dinov2cli.data.decode import decode_image
from dinov2cli.data.source import open_source
from dinov2cli.models.resnet import ResNet
from dinov2cli.models.sscd import SSCD
from tests.models.onnx_files import onnx_file

PLAIN = ("--workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Ten photographs in a folder."""
    source, folder = open_source("demo:photos?count=40"), tmp_path_factory.mktemp("few")
    for row in range(10):
        (folder / f"{row}{Path(source.ids[row]).suffix}").write_bytes(source.read(row))
    return folder


@pytest.fixture(scope="module")
def trunk():
    """Every batch norm with statistics of its own, and blocks that matter."""
    torch.manual_seed(0)
    trunk = ResNet()
    with torch.no_grad():
        for name, tensor in trunk.state_dict().items():
            if name.endswith(("running_var", "running_mean")):
                tensor.uniform_(0.5, 1.5)
    return trunk.eval()


@pytest.fixture(scope="module")
def weights(trunk, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "sscd_disc_mixup.torchvision.pt"
    torch.save({f"backbone.{name}": value for name, value in trunk.state_dict().items()}, file)
    return file


def pixels_of(few, side):
    """The images as published: both sides by Pillow's bilinear resize, ImageNet's statistics; float64 [n, 3, s, s]."""
    source = open_source(str(few))
    images = [
        np.asarray(
            Image.fromarray(decode_image(source.read(row), name="x")).resize((side, side), Image.Resampling.BILINEAR)
        )
        for row in range(len(source))
    ]
    normal = (np.stack(images) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(normal).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [320, 96])
def test_vectors_are_those_of_a_forward_pass_by_hand(dinov2, few, trunk, weights, tmp_path, side):
    spec = f"sscd:{weights}" if side == 320 else f"sscd:{weights}?size={side}"
    done = dinov2("embed", few, "-m", spec, "-o", tmp_path / "e", *PLAIN, "--set", "batch_size=4")
    assert done.code == 0, done.err
    found = np.load(tmp_path / "e/img_emb/img_emb_0000.npy").astype(np.float64)
    assert found.shape == (10, 512)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    exact = ResNet().double()
    exact.load_state_dict(trunk.state_dict())
    with torch.inference_mode():
        features = exact.eval()(pixels_of(few, side)).clamp(min=1e-6)
        vectors = F.normalize(exact.fc((features**3).mean(dim=(2, 3)) ** (1 / 3)), dim=1).numpy()
    np.testing.assert_allclose(found, vectors, atol=1e-3)  # stored as float16, pixels within one grey level


def test_the_manifest_says_what_kind_of_model_it_was(dinov2, few, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(weights.parent)
    spec = f"sscd:{weights.name}"
    line = ("embed", few, "-m", spec, "-o", tmp_path / "e", *PLAIN, "--image-size", "64")
    plan = dinov2(*line, "--dry-run", "--json").json
    assert "copy-detection descriptor" in json.dumps(plan) and "square of 64" in json.dumps(plan)
    assert dinov2(*line, "--json").json["copy_detection"] is True
    manifest = open_embeddings(tmp_path / "e").manifest
    assert (manifest.extra["copy_detection"], manifest.extra["dim"]) == (True, 512)
    model = next(entry for entry in manifest.inputs if entry["kind"] == "model")
    assert (model["spec"], model["size"]) == (f"sscd:{weights}", 64)
    assert "copy_detection: True" in dinov2("info", tmp_path / "e").err
    monkeypatch.chdir(tmp_path)
    again = dinov2("embed", few, "-m", f"sscd:{weights}", *line[4:], "--json")
    assert again.json["already_done"] is True
    dinov2("embed", few, "-m", "tiny", "-o", tmp_path / "b", *PLAIN)
    assert "copy_detection" not in open_embeddings(tmp_path / "b").manifest.extra


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime")
def test_onnx_with_workers_gives_what_one_process_gives(dinov2, few, tmp_path):
    weights = np.random.default_rng(0).normal(size=(192, 24)).astype(np.float32)
    file = onnx_file(tmp_path / "a.onnx", weights, shape=(4, 3, 64, 64), outputs=[("vectors", (4, 24))])
    for out, workers in (("a", 0), ("b", 2)):
        done = dinov2("embed", few, "-m", f"onnx:{file}", "-o", tmp_path / out, "--device", "cpu", "--workers", workers)
        assert done.code == 0, done.err
    first, second = (np.load(tmp_path / out / "img_emb/img_emb_0000.npy") for out in "ab")
    pooled = pixels_of(few, 64).numpy().reshape(10, 3, 8, 8, 8, 8).mean(axis=(3, 5)).reshape(10, 192) @ weights
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first.astype(np.float64), expected, atol=2e-3)
    assert "copy_detection" not in open_embeddings(tmp_path / "a").manifest.extra


def test_torchscript_gives_the_vectors_of_the_weights(dinov2, few, trunk, weights, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(SSCD(trunk, 64), torch.zeros(1, 3, 64, 64))
    script.save(tmp_path / "sscd.torchscript.pt")
    found = []
    for number, file in enumerate((weights, tmp_path / "sscd.torchscript.pt")):
        out = tmp_path / str(number)
        assert dinov2("embed", few, "-m", f"sscd:{file}?size=64", "-o", out, *PLAIN).code == 0
        found.append(np.load(out / "img_emb/img_emb_0000.npy").astype(np.float32))
    np.testing.assert_allclose(*found, atol=1e-4)


def test_bad_models_are_one_line_each(dinov2, few, trunk, weights, tmp_path):
    def refused(spec, *options, code=3):
        done = dinov2("embed", few, "-m", spec, "-o", tmp_path / "e", *PLAIN, *options)
        assert done.code == code, done.err
        assert len(done.err.strip().splitlines()) == 1, done.err
        assert not (tmp_path / "e").exists()
        return done.err

    assert "found nothing at" in refused(f"sscd:{tmp_path}/gone.pt")
    assert "found a directory at" in refused(f"sscd:{tmp_path}")
    (tmp_path / "text.torchscript.pt").write_text("hello")
    assert "text.torchscript.pt" in refused(f"sscd:{tmp_path}/text.torchscript.pt")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "no SSCD model among 1 weights (a.weight)" in refused(f"sscd:{tmp_path}/other.pt")
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"backbone.fc.bias": torch.zeros(3)}, tmp_path / "shape.pt")
    assert "1 of another shape: fc.bias [3] instead of [512]" in refused(f"sscd:{tmp_path}/shape.pt")
    assert "found pool 'mean': leave that out" in refused(f"sscd:{weights}", "--pool", "mean", code=2)
    assert "found patch tokens: leave that out" in refused(f"sscd:{weights}", "--patch", code=2)
    assert "found 'size=9'" in refused(f"sscd:{weights}?size=9", code=2)
    assert "found --image-size 96 beside ?size=64" in refused(f"sscd:{weights}?size=64", "--image-size", "96", code=2)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime")
def test_a_graph_that_gives_images_is_refused(dinov2, few, tmp_path):
    file = onnx_file(tmp_path / "a.onnx", np.zeros((192, 4), np.float32), outputs=[("map", ("batch", 3, 8, 8))])
    done = dinov2("embed", few, "-m", f"onnx:{file}", "-o", tmp_path / "e", *PLAIN)
    assert (done.code, len(done.err.strip().splitlines())) == (3, 1)
    assert "gives map tensor(float) ['batch', 3, 8, 8]; expected a float output of vectors" in done.err


def test_commands_that_need_tokens_say_so(dinov2, few, weights, tmp_path):
    for number in range(10):
        (tmp_path / "photos" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        image = next(few.glob(f"{number}.*"))
        (tmp_path / "photos" / str(number % 2) / image.name).write_bytes(image.read_bytes())
    data = f"{tmp_path}/photos?label=folder"
    where = ["--train", data, "--test", data, *PLAIN]
    done = dinov2("eval", "finetune", f"sscd:{weights}", "-o", tmp_path / "r", *where)
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    done = dinov2("eval", "knn", f"sscd:{weights}", "-o", tmp_path / "r", *where, "--set", "pool=mean")
    assert done.code == 2 and "one vector per image and has no tokens" in done.err
    assert not (tmp_path / "r" / "results.json").exists()
    done = dinov2("eval", "knn", f"sscd:{weights}", "-o", tmp_path / "k", *where, "--k", "3")  # one vector is enough
    assert done.code == 0, done.err
