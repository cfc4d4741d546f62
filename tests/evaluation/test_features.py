import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation import tasks
from dinov2cli.evaluation.features import Features, extract, extract_source, pooled_dim
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer


class Tensors:
    def __init__(self, images):
        self.images = images


@pytest.fixture(scope="module")
def backbone():
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=5,
        num_heads=3,
        num_register_tokens=2,
        layerscale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


PREPROCESS = Preprocess(resize=32, crop=32)


def test_pools_are_the_tokens_after_the_final_norm(backbone, images):
    with torch.no_grad():
        output = backbone(PREPROCESS.normalize(images))
    expected = {
        "cls": output.cls,
        "mean": output.patches.mean(1),
        "cls+mean": torch.cat([output.cls, output.patches.mean(1)], 1),
    }
    for pool, tokens in expected.items():
        (features,) = extract(backbone, [Tensors(images)], preprocess=PREPROCESS, pool=pool, patches=True)
        assert torch.allclose(features.pooled, tokens, atol=1e-6)
        assert features.pooled.shape[1] == pooled_dim(48, pool)
        assert torch.allclose(features.patches, output.patches, atol=1e-6)
        assert features.class_tokens is None


def test_linear_features_agree_with_the_plain_forward(backbone, images):
    (features,) = extract(backbone, [Tensors(images)], preprocess=PREPROCESS, last_blocks=4)
    (plain,) = extract(backbone, [Tensors(images)], preprocess=PREPROCESS, pool="cls+mean")
    assert features.class_tokens.shape == (7, 4, 48)
    assert torch.allclose(features.class_tokens[:, -1], plain.pooled[:, :48], atol=1e-5)
    assert torch.allclose(features.averaged_patches, plain.pooled[:, 48:], atol=1e-5)
    with torch.no_grad():
        (_, first) = backbone.intermediate(PREPROCESS.normalize(images), [1])[0]
    assert torch.allclose(features.class_tokens[:, 0], first, atol=1e-5)  # oldest first
    (all_blocks,) = extract(backbone, [Tensors(images)], preprocess=PREPROCESS, last_blocks=99)
    assert all_blocks.class_tokens.shape == (7, 5, 48)


def test_batches_stream_one_by_one_with_their_own_object(backbone, images):
    asked = []

    def batches():
        for start in range(0, 7, 3):
            asked.append(start)
            yield Tensors(images[start : start + 3])

    rates = []
    stream = extract(backbone, batches(), preprocess=PREPROCESS, on_rate=lambda n, s: rates.append((n, s)))
    first = next(stream)
    assert asked == [0] and torch.equal(first.batch.images, images[:3])
    rest = list(stream)
    assert [done for done, _ in rates] == [3, 6, 7] and all(seconds > 0 for _, seconds in rates)
    (whole,) = extract(backbone, [Tensors(images)], preprocess=PREPROCESS)
    joined = torch.cat([part.pooled for part in [first, *rest]])
    assert torch.allclose(joined, whole.pooled, atol=1e-5)


def test_mixed_precision_is_close_and_still_float32_out(backbone, images):
    (full,) = extract(backbone, [Tensors(images)], preprocess=PREPROCESS, last_blocks=2)
    (half,) = extract(backbone, [Tensors(images)], preprocess=PREPROCESS, last_blocks=2, precision="bf16")
    assert half.pooled.dtype == half.class_tokens.dtype == half.averaged_patches.dtype == torch.float32
    assert not torch.equal(full.pooled, half.pooled)
    assert torch.nn.functional.cosine_similarity(full.pooled, half.pooled).min() > 0.99
    assert not half.pooled.requires_grad


def test_unknown_names_fail_before_the_first_image(backbone):
    def never():
        raise AssertionError("an image was read")
        yield

    with pytest.raises(UserError, match=r"^pool 'max' is not known: expected one of cls, mean, cls\+mean$"):
        next(extract(backbone, never(), preprocess=PREPROCESS, pool="max"))
    with pytest.raises(UserError, match=r"precision: found 'fp8'; expected"):
        next(extract(backbone, never(), preprocess=PREPROCESS, precision="fp8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Red and green images, a little noise; one file of the training set is not an image."""
    root = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for channel, name in enumerate(("red", "green")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (40, 40, 3))
                pixels[..., channel] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    (root / "train" / "red" / "03.png").write_bytes(b"not an image")
    return root


def test_source_to_benchmarks(backbone, folders):
    train_source = open_source(str(folders / "train"), label_from="folder")
    test_source = open_source(str(folders / "test"), label_from="folder")
    train = extract_source(backbone, train_source, preprocess=PREPROCESS, last_blocks=4, batch_size=5)
    test = extract_source(backbone, test_source, preprocess=PREPROCESS, last_blocks=4, batch_size=5)
    assert len(train) == 23 and len(test) == 10
    bad = train_source.ids.index("red/03.png")
    assert bad not in train.index
    assert np.array_equal(train.labels, train_source.labels[train.index])

    found = tasks.knn(train, test, ks=[5, 50])
    assert found.class_names == ["green", "red"]
    assert found.result.ks == (5, 23) and found.result.correct(5).all()
    nearest = train_source.paths[found.train_index[found.result.neighbours[0, 0]]]
    assert "green" in nearest and "green" in test_source.paths[found.test_index[0]]

    alone = tasks.knn(train, None, ks=[5])
    assert alone.result.leave_one_out and len(alone.result.ranks[5]) == 23

    probe = tasks.linear(train, test, seed=0, steps=100)
    assert probe.result.correct().mean() == 1.0
    assert np.array_equal(probe.test_labels, found.test_labels)


def test_unlabelled_images_are_left_out_and_rows_still_point_home():
    def features(index, labels):
        x = np.eye(4, dtype=np.float32)[np.asarray(labels) % 4]
        return Features(np.asarray(index), x, np.asarray(labels), None, None, None, 0.0)

    train = features([0, 2, 4, 6], [0, -1, 1, 0])
    test = features([1, 3, 5], [1, -1, 0])
    found = tasks.knn(train, test, ks=[1])
    assert found.train_index.tolist() == [0, 4, 6] and found.test_index.tolist() == [1, 5]
    assert found.result.correct(1).tolist() == [True, True]
    assert found.train_index[found.result.neighbours[0, 0]] == 4
    with pytest.raises(InputError, match=r"^b has 1 class that a lacks \(3\)"):
        tasks.knn(train, features([0], [3]), train_spec="a", test_spec="b")
    with pytest.raises(ValueError, match="needs features extracted with last_blocks > 0"):
        tasks.linear(train, test, seed=0)
