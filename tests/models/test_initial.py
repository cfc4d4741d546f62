"""The structured starting point: what each part promises, and that it stays a plain ViT."""

import numpy as np
import pytest
import torch

from dinov2cli.models.initial import patch_components, sincos_positions, structured_init
from dinov2cli.models.registry import build


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Pieces of a photograph: colours and neighbours are correlated, as in all images."""
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    return torch.stack([photo[:, y : y + 32, x : x + 32] for y in range(0, 384, 32) for x in range(0, 640, 32)])


@pytest.fixture(scope="module")
def backbone(images):
    vit = build("vitt4", img_size=32)
    structured_init(vit, images, torch.Generator().manual_seed(0))
    return vit


def test_components_whiten_the_patches_of_real_images(images):
    rows = patch_components(images, 4).double()
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double()
    outputs = (patches - patches.mean(0)) @ rows.t()
    covariance = outputs.t() @ outputs / len(outputs)
    variances = torch.from_numpy(np.sort(np.linalg.eigvalsh(np.cov(patches.numpy().T, bias=True)))[::-1].copy())
    torch.testing.assert_close(covariance, torch.diag(variances / (variances + 1e-2)), rtol=1e-4, atol=1e-5)


def test_positions_tell_near_from_far():
    positions = torch.nn.functional.normalize(sincos_positions(8, 64), dim=1)
    centre = 8 * 3 + 3
    similarity = (positions @ positions[centre]).view(8, 8)
    assert similarity.argmax() == centre
    assert similarity[3, 4] > similarity[3, 5] > similarity[3, 7]
    torch.testing.assert_close(similarity[3, 5], similarity[5, 3])
    assert sincos_positions(3, 30).shape == (9, 30)  # a width that 4 does not divide


def test_tokens_attend_to_tokens_like_themselves(backbone):
    dim, width = backbone.embed_dim, backbone.embed_dim // backbone.num_heads
    for block in backbone.blocks:
        query, key, value = block.attn.qkv.weight.detach().split(dim)
        for head in range(backbone.num_heads):
            rows = slice(head * width, (head + 1) * width)
            product = query[rows].t() @ key[rows]
            assert product.diagonal().mean() > 5 * (product - torch.diag(product.diagonal())).mean().abs()
            assert product.diagonal().mean() > 0.3
        assert (block.attn.proj.weight.detach() @ value).diagonal().mean() == pytest.approx(-0.4, abs=0.1)


def test_only_values_change_and_the_seed_decides_them(backbone, images):
    again = build("vitt4", img_size=32)
    structured_init(again, images, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), backbone.state_dict().values(), strict=True)
    )
    other = build("vitt4", img_size=32)
    structured_init(other, images, torch.Generator().manual_seed(1))
    assert not torch.equal(other.blocks[0].attn.qkv.weight, backbone.blocks[0].attn.qkv.weight)
    plain = build("vitt4", img_size=32)
    changed = {
        name for name, value in plain.state_dict().items() if not torch.equal(value, backbone.state_dict()[name])
    }
    assert {name.split(".")[-2] for name in changed if "." in name} == {"qkv", "proj"}
    assert torch.isfinite(backbone(images[:4]).prenorm).all()
