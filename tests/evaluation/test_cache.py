"""Features of a source, computed once and kept: what is shared, what is not, and what a stopped command leaves."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.artifacts.cache import FeatureCache
from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation import cache
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer


def model(seed=0):
    backbone = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=5,
        num_heads=3,
        layerscale=1.0,
        generator=torch.Generator().manual_seed(seed),
    ).eval()
    return LoadedModel(backbone, "small", Preprocess(resize=32, crop=32), True, {"arch": "small", "seed": seed})


@pytest.fixture
def folder(tmp_path):
    """25 pictures of noise in two classes, and a file that is no picture."""
    rng = np.random.default_rng(0)
    for row in range(25):
        place = tmp_path / "images" / ("even", "odd")[row % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(place / f"{row:02d}.png")
    (tmp_path / "images" / "odd" / "05b.png").write_bytes(b"not an image")
    return tmp_path / "images"


class Counting:
    """A store that counts what is computed."""

    def __init__(self, path: Path) -> None:
        self._parts, self.saved = Parts(path), []

    def stage(self, name, key):
        stage = self._parts.stage(name, key)
        outer, save = self, stage.save

        def counted(start, arrays):
            outer.saved.append(start)
            save(start, arrays)

        stage.save = counted
        return stage


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 8)


def test_features_are_those_of_a_plain_forward(folder):
    source = open_source(f"{folder}?label=folder")
    loaded = model()
    found = Trial(loaded, source, batch_size=3).features(source)
    bad = source.ids.index("odd/05b.png")
    assert found.index.tolist() == [row for row in range(26) if row != bad]
    pixels = [np.asarray(Image.open(folder / source.ids[row]).resize((32, 32), Image.BICUBIC)) for row in found.index]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    with torch.no_grad():
        blocks = loaded.backbone.intermediate(loaded.preprocess.normalize(images), [1, 2, 3, 4])
    tokens = torch.stack([cls for _, cls in blocks], 1).numpy()
    np.testing.assert_allclose(found.class_tokens, tokens, atol=0.03)  # Pillow's filter is not torch's
    np.testing.assert_allclose(found.averaged_patches, blocks[-1][0].mean(1).numpy(), atol=0.03)
    np.testing.assert_array_equal(found.pooled, found.class_tokens[:, -1])
    assert [source.label_names[label] for label in found.labels] == [source.ids[row][:-7] for row in found.index]
    file = hashlib.sha256((folder / source.ids[found.index[4]]).read_bytes()).digest()
    assert bytes(found.digests[4]) == file
    np.testing.assert_array_equal(found.pool("cls+mean")[:, 48:], found.averaged_patches)
    with pytest.raises(UserError, match="expected one of auto, cls, mean"):
        found.pool("max")


def test_what_is_kept_is_read_again_bit_for_bit_and_bad_images_count_again(folder, tmp_path):
    source, store = open_source(str(folder)), Counting(tmp_path / "cache")
    first = Trial(model(), source, cache=store)
    before = first.features(source)
    assert store.saved == [0, 8, 16, 24]
    again = Trial(model(), source, cache=store, max_bad_fraction=0.5)
    after = again.features(source)
    assert store.saved == [0, 8, 16, 24]
    for name in ("index", "class_tokens", "averaged_patches", "pooled", "digests"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert before.seconds == after.seconds > 0
    assert again.bad_images(source).reasons == first.bad_images(source).reasons
    assert list(again.bad_images(source).reasons) == ["odd/05b.png"]


def test_a_stopped_command_loses_one_block(folder, tmp_path):
    source, store = open_source(str(folder)), Counting(tmp_path / "cache")
    Trial(model(), source, cache=store).features(source)
    stage = next((tmp_path / "cache" / "parts").iterdir())
    (stage / f"{8:012d}.npz").unlink()
    (stage / f"{16:012d}.npz").write_bytes((stage / f"{16:012d}.npz").read_bytes()[:100])  # truncated by a full disk
    store.saved.clear()
    whole = Trial(model(), source).features(source)
    mended = Trial(model(), source, cache=store).features(source)
    assert store.saved == [8, 16]
    np.testing.assert_array_equal(whole.class_tokens, mended.class_tokens)


@dataclass(frozen=True)
class Flipped:
    name: str = "flipped"
    size: int = 32

    def __call__(self, pixels, row):
        return torch.from_numpy(pixels[:32, 31::-1].copy()).permute(2, 0, 1)


def test_only_the_same_pixels_of_the_same_model_are_shared(folder, tmp_path):
    source, store = open_source(str(folder)), Counting(tmp_path / "cache")
    trial = Trial(model(), source, cache=store)
    trial.features(source)
    store.saved.clear()
    labelled = open_source(f"{folder}?label=folder")
    assert trial.features(labelled).labels is not None and store.saved == []  # labels are no pixels
    for other in (
        replace(trial, model=model(seed=1)),
        replace(trial, model=replace(model(), preprocess=Preprocess(resize=40, crop=32))),
        replace(trial, precision="bf16"),
    ):
        other.features(source)
        assert store.saved == [0, 8, 16, 24]
        store.saved.clear()
    plain, flipped = trial.features(source), trial.features(source, view=Flipped())
    assert store.saved == []  # a view is kept only when asked
    assert not np.allclose(plain.pooled, flipped.pooled)
    trial.features(source, view=Flipped(), keep=True)
    assert store.saved == [0, 8, 16, 24]
    (folder / "odd" / "01.png").write_bytes((folder / "odd" / "03.png").read_bytes())
    store.saved.clear()
    trial.features(open_source(str(folder)))
    assert store.saved == [0, 8, 16, 24]  # the data have changed


class Means(Descriptor):
    def __init__(self):
        super().__init__(3, 32)

    def forward(self, images):
        return images.mean((2, 3))


def test_a_descriptor_has_one_vector_and_no_patches(folder):
    source = open_source(str(folder))
    loaded = LoadedModel(Means(), "means", Preprocess(resize=32, crop=32), False, {"arch": "means"})
    found = Trial(loaded, source).features(source)
    assert found.class_tokens.shape == (25, 1, 3) and found.averaged_patches is None
    np.testing.assert_array_equal(found.pool("cls"), found.pooled)
    with pytest.raises(UserError, match="one vector per image and has no tokens; found pool 'mean'"):
        found.pool("mean")


def test_too_many_unreadable_images_end_it_also_from_the_cache(folder, tmp_path):
    for row in range(12):
        (folder / f"bad{row}.png").write_bytes(b"x")
    source, store = open_source(str(folder)), Counting(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(InputError, match=r"13 of 38 images cannot be read, the limit is 1\.0%"):
            Trial(model(), source, cache=store).features(source)
    assert store.saved == [0, 8, 16, 24, 32]


def test_the_least_recently_used_features_go_first(tmp_path):
    import os

    store = FeatureCache(tmp_path)
    for number in range(3):
        stage = FeatureCache(tmp_path).stage("features", {"n": number})
        stage.save(0, {"x": np.zeros(1000, np.float32)})
        os.utime(stage.path, (number, number))
    kept = store.stage("features", {"n": 0})  # the oldest, but of this command
    os.utime(kept.path, (0, 0))
    assert store.trim(10**9) == 0
    assert store.trim(9000) > 4000
    assert kept.load(0) is not None and FeatureCache(tmp_path).stage("features", {"n": 1}).load(0) is None
    assert FeatureCache(tmp_path).stage("features", {"n": 2}).load(0) is not None
    assert FeatureCache(tmp_path / "nowhere").trim(0) == 0
