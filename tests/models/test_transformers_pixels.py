"""What comparators see: our pixels against those of transformers' own image processors, on photographs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.data.decode import resize_center_crop
from dinov2cli.data.demo_photos import photo_files
from dinov2cli.errors import InputError
from dinov2cli.models.load import load_model
from dinov2cli.models.preprocess import Preprocess, read_preprocess
from tests.models import transformers_models as small

transformers = pytest.importorskip("transformers")

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CASES = {
    # ViT, BEiT, SigLIP: squeezed into a square. CLIP: shorter side, centre crop. DeiT: both.
    "vit": ("ViTImageProcessor", {"size": {"height": 96, "width": 96}, "resample": 2} | HALF, (96, 96, True)),
    "old vit": ("ViTFeatureExtractor", {"size": 96, "resample": 2} | HALF, (96, 96, True)),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 96, "width": 96}, "resample": 3} | HALF, (96, 96, True)),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 96}, "crop_size": 96, "resample": 3}, (96, 96, False)),
    "old clip": ("CLIPFeatureExtractor", {"size": 96, "crop_size": 96, "resample": 3}, (96, 96, False)),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 128}, "crop_size": 96, "resample": 3}, (128, 96, False)),
    "deit": ("DeiTImageProcessor", {"size": {"height": 128, "width": 128}, "crop_size": 96}, (128, 96, True)),
    "beit": ("BeitImageProcessor", {"size": 128, "crop_size": 96, "do_center_crop": True} | HALF, (128, 96, True)),
    "lanczos": ("ViTImageProcessor", {"size": {"height": 96, "width": 96}, "resample": 1} | HALF, (96, 96, True)),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 96}, "crop_pct": 0.75}, (128, 96, False)),
    "large convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, (384, 384, True)),
    "efficientnet": (
        "EfficientNetImageProcessor",
        {"size": {"height": 96, "width": 96}, "resample": 3},
        (96, 96, True),
    ),
    "offset": (
        "EfficientNetImageProcessor",
        {"size": 96, "rescale_offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False, "include_top": False},
        (96, 96, True),
    ),
    "not normalised": ("ViTImageProcessor", {"size": 96, "do_normalize": False}, (96, 96, True)),
    "not rescaled": ("ViTImageProcessor", {"size": 96, "do_rescale": False, "image_mean": [128.0] * 3}, (96, 96, True)),
}


@pytest.fixture(scope="module")
def photos():
    files = photo_files()
    return [
        Image.open(files[name]).convert("RGB") for name in sorted(files) if name in ("astronaut", "chelsea", "coffee")
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixels") / "m"
    small.dinov2().save_pretrained(path)
    return path


def seen(preprocess, image):
    pixels = resize_center_crop(
        np.array(image),
        preprocess.resize,
        preprocess.crop,
        square=preprocess.square,
        interpolation=preprocess.interpolation,
    )
    return preprocess.normalize(pixels[None])[0]


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_the_image_processor(directory, photos, name):
    kind, numbers, shape = CASES[name]
    entry = "feature_extractor_type" if kind.endswith("Extractor") else "image_processor_type"
    (directory / "preprocessor_config.json").write_text(json.dumps({entry: kind, **numbers}))
    preprocess = load_model(f"transformers:{directory}").preprocess
    assert (preprocess.resize, preprocess.crop, preprocess.square) == shape
    theirs = transformers.AutoImageProcessor.from_pretrained(directory)
    assert len(photos) == 3
    for photo in photos:
        expected = theirs(photo, return_tensors="pt")["pixel_values"][0]
        levels = (seen(preprocess, photo) - expected).abs() * 255 * torch.tensor(preprocess.std)[:, None, None]
        assert expected.shape == levels.shape
        # Both resize in uint8, by filters that round a little differently.
        assert levels.mean() < 0.5 and levels.quantile(0.999) <= 2, (levels.mean(), levels.max())


def test_without_a_file_the_family_decides(tmp_path, caplog):
    for name, expected in {
        "clip_vision": (64, 64, False),
        "siglip": (64, 64, True),
        "deit": (73, 64, True),
        "convnext": (256, 224, False),
        "dinov3": (73, 64, False),
    }.items():
        getattr(small, name)().save_pretrained(tmp_path / name)
        found = load_model(f"transformers:{tmp_path / name}").preprocess
        assert (found.resize, found.crop, found.square) == expected, name
        assert caplog.messages[-1].endswith("px and what is usual in its family") and name in caplog.messages[-1]
    assert found.mean == Preprocess().mean


def test_a_processor_of_a_package_that_is_missing_is_read_from_its_numbers(tmp_path, monkeypatch):
    small.dinov3().save_pretrained(tmp_path / "m")
    numbers = {"image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2, "do_center_crop": None}
    numbers |= {"size": {"height": 96, "width": 96}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(numbers))

    def missing(*_args, **_options):
        raise ImportError("requires a package")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", missing)
    expected = Preprocess(96, 96, (0.1,) * 3, (0.2,) * 3, "bilinear", True)
    assert load_model(f"transformers:{tmp_path / 'm'}").preprocess == expected


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"size": {"height": 64, "width": 32}}, "a square or a shortest edge is expected"),
        ({"size": {"height": 64, "width": 64}, "do_center_crop": True, "crop_size": 96}, "crop of 96 pixels out of 64"),
        ({"size": {"height": 64, "width": 64}, "image_mean": [0.5]}, "three channels are expected"),
    ],
)
def test_what_cannot_be_done_is_refused(directory, numbers, words):
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **numbers}))
    with pytest.raises(InputError, match="its image processor cannot be read") as caught:
        load_model(f"transformers:{directory}")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_our_own_reader_knows_squares(directory):
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps({"size": {"height": 96, "width": 96}, "crop_size": {"height": 64, "width": 64}}))
    assert read_preprocess(file) == Preprocess(96, 64, square=True)
    file.write_text(json.dumps({"size": {"shortest_edge": 96}, "crop_size": 64}))
    assert read_preprocess(file) == Preprocess(96, 64)
