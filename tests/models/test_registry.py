import pytest
import torch

from dinov2cli.errors import UserError
from dinov2cli.models.registry import ARCHITECTURES, architecture, build, name_of, parse_architecture

# Parameters of the released backbones with their 518 px position grid, in the official model card's rounding.
RELEASED = {"vits14": 22.1, "vitb14": 86.6, "vitl14": 304.4, "vitg14": 1136.5}


@pytest.mark.parametrize(("arch", "millions"), RELEASED.items())
def test_sizes_are_those_of_the_released_models(arch, millions):
    model = build(arch, device="meta", img_size=518)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert model.grid == 37 and model.embed_dim // model.num_heads == 64


def test_names_say_patch_and_registers():
    assert architecture("vitb16")["patch_size"] == 16
    keys = ("num_register_tokens", "interpolate_offset", "interpolate_antialias")
    for name in ("vits14_reg", "vits14_reg4", "dinov2_vits14_reg"):
        assert [architecture(name)[key] for key in keys] == [4, 0.0, True]
    assert [architecture("vits14")[key] for key in keys] == [0, 0.1, False]
    assert architecture("vits8")["img_size"] == 224 and architecture("vits13")["img_size"] == 221
    assert architecture("vitg14")["ffn"] == "swiglu" and architecture("vitl14")["ffn"] == "mlp"
    assert architecture("tiny") == architecture("vitt8")
    assert parse_architecture("vits0") is None and parse_architecture("resnet50") is None


def test_every_listed_name_builds_and_is_recognised():
    for name in ARCHITECTURES:
        if not name.startswith("tiny"):
            assert name_of(build(name, device="meta")) == name
    assert name_of(build("tiny", depth=2, device="meta")) == "vit-d128-l2-h2-p8"


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = build("tiny", seed=5), build("tiny", seed=5), build("tiny", seed=6)
    assert torch.equal(before, torch.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.pos_embed, other.pos_embed)


def test_initial_weights_follow_the_method():
    model = build("vits14_reg4", depth=2)
    assert 0.5e-6 < model.cls_token.std() < 2e-6
    assert 0.5e-6 < model.register_tokens.std() < 2e-6
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.mask_token.abs().max() == 0
    block = model.blocks[1]
    assert torch.equal(block.ls1.gamma, torch.full((384,), 1e-5))
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.fc1.bias.abs().max() == 0
    assert model.patch_embed.proj.weight.abs().max() <= 1 / (3 * 14 * 14) ** 0.5


def test_direct_construction_is_initialised_too():
    from dinov2cli.models.vit import VisionTransformer

    numbers = architecture("tiny")
    direct = VisionTransformer(**numbers, generator=torch.Generator().manual_seed(3))
    for key, value in build("tiny", seed=3).state_dict().items():
        assert torch.equal(value, direct.state_dict()[key])


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError) as caught:
        build("vit_s14")
    assert str(caught.value) == (
        "unknown architecture 'vit_s14': did you mean vits14 or vits16? Known are tiny, vitt8, vitti14, vitti16, "
        "vits14, vits16, vitb14, vitb16, vitl14, vitl16, vitg14, vitg16, each also with _reg4"
    )
