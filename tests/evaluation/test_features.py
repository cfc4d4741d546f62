import pytest
import torch

from dinov2cli.errors import UserError
from dinov2cli.evaluation.features import extract, pooled_dim
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
