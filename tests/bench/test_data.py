"""The input path's benchmark: every figure is there, and the reference makes the same crops. No timing is asserted."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from dinov2cli.bench.data import lines, run
from dinov2cli.bench.input_path import crops_of, sample_of
from dinov2cli.bench.pillow_pipeline import pillow_sample
from dinov2cli.data.augment import IMAGENET_STD, Augment
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.decode import decode_image, open_image
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError

SMALL = MultiCrop(global_size=48, local_size=24, local_number=2)


@pytest.fixture(scope="module")
def figures():
    return run("cpu", 0, "demo:photos?count=40", images=8, arch=None, crop=SMALL, rounds=1)


def test_every_figure_is_there(figures):
    assert set(figures["parts"]) == {"read", "decode", "crop", "colour", "transfer"}
    assert all(value > 0 for value in figures["parts"].values())
    for name in ("images_per_s", "speedup", "speedup_crops", "speedup_on_cpu", "pillow_ms", "loader_gain"):
        assert figures[name] > 0
    assert figures["crop_bytes"] == 3 * (2 * 48**2 + 2 * 24**2)
    assert figures["memory_ratio"] == 0.25  # bytes and floats
    assert figures["pillow_ms"] > figures["pillow_crops_ms"]
    assert "model" not in figures and "mixing" not in figures


def test_figures_hang_together(figures):
    f, parts = figures, figures["parts"]
    cut = parts["decode"] + parts["crop"]
    assert f["images_per_s"] == pytest.approx(1e3 / (parts["read"] + cut))
    assert f["speedup"] == pytest.approx(f["pillow_ms"] / cut)
    assert f["speedup_crops"] == pytest.approx(f["pillow_crops_ms"] / cut)
    assert f["speedup_on_cpu"] == pytest.approx(f["pillow_ms"] / (cut + parts["colour"]))
    assert f["scaled"]["gain"] == pytest.approx(cut / (f["scaled"]["decode"] + f["scaled"]["crop"]))
    assert f["packed"]["gain"] == pytest.approx(cut / (f["packed"]["decode"] + f["packed"]["crop"]))
    assert f["loader_gain"] == f["loader"]["2"] / f["loader"]["1"]
    assert f["batches_mib"] == 3 * 64 * f["crop_bytes"] / 2**20


def test_people_read_the_same_figures(figures):
    text = "\n".join(lines(figures))
    assert f"a worker makes {figures['images_per_s']:.0f} images/s and hands on 17 kB each" in text
    assert "all of it on the CPU" in text


def test_a_model_says_how_many_workers_it_needs(monkeypatch):
    found = run("cpu", 0, "demo:photos?count=40", images=4, arch="tiny", crop=MultiCrop(32, 16, 2), rounds=1)
    model = found["model"]
    assert model["workers"] == int(np.ceil(model["images_per_s"] / found["images_per_s"]))
    assert model["colour_share"] == pytest.approx(found["parts"]["colour"] * model["images_per_s"] / 1e3)
    needed = 1e14 / (model["gflop"] * 1e9) / found["images_per_s"]
    assert model["workers_per_100_tflops"] == pytest.approx(needed)
    assert model["gflop"] > 0 and "tiny trains" in "\n".join(lines(found))


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [("vits14", (224, 98, 8)), ("vitb16", (224, 96, 8)), ("vits7", (224, 98, 8)), ("tiny", (32, 16, 4))],
)
def test_crops_are_those_a_model_is_trained_on(arch, sizes):
    crop = crops_of(arch)
    assert (crop.global_size, crop.local_size, crop.local_number) == sizes


def test_unknown_models_are_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="unknown architecture 'nothing'"):
        run("cpu", 0, "demo:photos?count=40", arch="nothing")


def test_sets_that_lie_in_blocks_say_how_they_are_mixed(tmp_path):
    source = open_source("demo:photos?count=40")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for row in range(20 * shard, 20 * shard + 20):
                data, member = source.read(row), tarfile.TarInfo(f"{row}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found = run("cpu", 0, str(tmp_path), images=4, arch=None, crop=SMALL, rounds=1)
    assert found["mixing"]["blocks"] == found["mixing"]["exact_blocks"] == 2
    assert "2.0 blocks in a batch of 40 (exactly: 2.0)" in "\n".join(lines(found))


def test_images_can_be_enlarged_to_camera_files():
    sample = sample_of(open_source("demo:photos?count=40"), 2, 0.5)
    assert len(sample.files) == 2 and sample.pixels == pytest.approx(5e5, rel=0.01)
    assert open_image(sample.files[0], name="x").image.format == "JPEG"


def test_a_set_without_readable_images_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"junk")
    with pytest.raises(InputError, match="none of the 1 images looked at can be read"):
        sample_of(open_source(str(tmp_path)), 5, None)


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_the_reference_makes_the_same_crops(name):
    """Same boxes, flips and colours: what is left are Pillow's roundings, its coarse hues and its box-built blur."""
    buffer = io.BytesIO()
    Image.fromarray(getattr(photographs, name)()).save(buffer, "JPEG", quality=95)
    data, crop, augment = buffer.getvalue(), MultiCrop(), Augment()
    for sample in range(6):
        expected = pillow_sample(data, crop, augment, seed=3, epoch=1, sample=sample)
        crops = crop(decode_image(data, name="x"), 3, 1, sample)
        one = np.array([sample])
        ours = augment(crops[0][:, None], crops[1][:, None], seed=3, epoch=one * 0 + 1, sample=one)
        mine = [image for part in ours for image in part[:, 0]]
        deviation = torch.tensor(IMAGENET_STD)[:, None, None] * 255
        for image, reference in zip(mine, expected, strict=True):
            difference = ((image - torch.from_numpy(reference)) * deviation).abs()
            assert difference.mean() < 4  # of 255
