"""Features of a source, computed once and kept: what is shared, what is not, and what a stopped command leaves."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2cli.artifacts.cache import FeatureCache
from dinov2cli.artifacts.embeddings import EmbeddingsWriter
from dinov2cli.artifacts.output import Output
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


def two_columns(tmp_path, shift=0):
    """A table with two image columns, whose pictures differ."""
    rng = np.random.default_rng(shift)
    cells = {name: [] for name in ("left", "right")}
    for row in range(12):
        for name in cells:
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
            cells[name].append({"bytes": buffer.getvalue(), "path": f"{name}{row}.png"})
    labels = {"label": list(range(12)), "other": list(range(12))[::-1]}
    pq.write_table(pa.table({**cells, **labels}), tmp_path / "d.parquet")
    return tmp_path / "d.parquet"


def test_columns_of_one_table_are_different_pixels_also_behind_embeddings(tmp_path):
    file, store = two_columns(tmp_path), Counting(tmp_path / "cache")
    left, right = (open_source(f"{file}?image={name}") for name in ("left", "right"))
    assert left.content_hash() == right.content_hash()  # of the file
    trial = Trial(model(), right, left, cache=store)
    found = [trial.features(source).pooled for source in (left, right)]
    assert not np.allclose(found[0], found[1]) and not trial.same_images
    for name in ("left", "right"):
        out = Output.open(tmp_path / name, "embeddings", command="test", config={})
        writer = EmbeddingsWriter(out, 48)
        source = open_source(f"{file}?image={name}")
        rows = {"id": source.ids, "image_path": source.paths, "width": [32] * 12, "height": [32] * 12}
        table = pa.table({**rows, "sha256": ["0" * 64] * 12, "source": [source.spec] * 12, "row": list(range(12))})
        writer.write_shard(0, np.zeros((12, 48), np.float32), table, None)
        writer.finish(12)
    behind = [trial.features(open_source(str(tmp_path / name))).pooled for name in ("left", "right")]
    np.testing.assert_array_equal(behind, found)


def test_the_same_images_have_the_same_labels_too(tmp_path):
    file = two_columns(tmp_path)
    one, other = (open_source(f"{file}?image=left&label={name}") for name in ("label", "other"))
    assert Trial(model(), one, open_source(one.spec)).same_images
    assert not Trial(model(), one, other).same_images


def test_a_cache_that_cannot_be_written_is_told_and_done_without(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    source, said = open_source(str(folder)), []
    trial = Trial(model(), source, cache=FeatureCache(tmp_path / "file"), warn=said.append)
    found = trial.features(source)
    np.testing.assert_array_equal(found.pooled, Trial(model(), source).features(source).pooled)
    assert len(said) == 1 and "--cache names another place" in said[0]


def test_a_block_that_lost_arrays_is_computed_again(folder, tmp_path):
    source, store = open_source(str(folder)), Counting(tmp_path / "cache")
    whole = Trial(model(), source, cache=store).features(source)
    stage = next((tmp_path / "cache" / "parts").iterdir())
    np.savez(stage / f"{8:012d}.npz", index=np.zeros(3, np.int64))
    store.saved.clear()
    again = Trial(model(), source, cache=store).features(source)
    assert store.saved == [8]
    np.testing.assert_array_equal(again.class_tokens, whole.class_tokens)


def test_two_commands_may_trim_at_once(tmp_path):
    for number in range(40):
        FeatureCache(tmp_path).stage("features", {"n": number}).save(0, {"x": np.zeros(1000, np.float32)})
    with ThreadPoolExecutor(8) as pool:
        deleted = list(pool.map(lambda _: FeatureCache(tmp_path).trim(0), range(8)))
    assert sum(deleted) > 40 * 4000 and not list((tmp_path / "parts").iterdir())
