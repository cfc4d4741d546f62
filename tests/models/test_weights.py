import pytest
import torch

from dinov2cli.errors import InputError
from dinov2cli.models import weights
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.registry import build

CASES = [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)]


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_hugging_face_names_round_trip(small, ffn, registers):
    state = small(ffn=ffn, num_register_tokens=registers).state_dict()
    hf = weights.to_hf(state)
    assert weights.detect_format(hf) == "hf"
    assert_same(weights.from_hf(hf), state)
    query = hf["encoder.layer.2.attention.attention.query.weight"]
    assert torch.equal(query, state["blocks.2.attn.qkv.weight"][:64])
    assert torch.equal(hf["encoder.layer.1.layer_scale2.lambda1"], state["blocks.1.ls2.gamma"])
    prefixed = {f"dinov2.{key}": value for key, value in hf.items()} | {"classifier.weight": torch.zeros(2, 128)}
    assert_same(weights.from_hf(prefixed), state)


@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_timm_names_round_trip_up_to_what_timm_cannot_hold(small, ffn, registers):
    model = small(ffn=ffn, num_register_tokens=registers, interpolate_offset=0.0)
    state = model.state_dict()
    timm = weights.to_timm(state)
    assert weights.detect_format(timm) == "timm"
    assert "mask_token" not in timm and "blocks.0.mlp.fc1.weight" in timm
    back = weights.from_timm(timm)
    assert set(back) == set(state) and back["mask_token"].abs().max() == 0
    other = small(seed=1, ffn=ffn, num_register_tokens=registers, interpolate_offset=0.0)
    weights.load_strict(other, back, "timm")
    for images in (torch.randn(1, 3, 56, 56), torch.randn(1, 3, 28, 42)):
        torch.testing.assert_close(other(images).patches, model(images).patches, atol=1e-5, rtol=0)
    assert timm["pos_embed"].shape[1] == 16 + (not registers)


def test_in_memory_names_of_transformers_5_are_understood(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, use_swiglu_ffn=True
    )
    theirs = transformers.Dinov2Model(config)
    theirs.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert_same(weights.from_hf(theirs.state_dict()), weights.from_hf(load_file(tmp_path / "model.safetensors")))


def official_layouts(state):
    """The forms in which the official code leaves a backbone."""
    chunked = {}
    for key, value in state.items():  # block_chunks=2 over 3 blocks: i counts on through the chunks
        parts = key.split(".")
        chunked[".".join(["blocks", str(int(parts[1]) // 2), *parts[1:]]) if parts[0] == "blocks" else key] = value
    backbone = {f"backbone.{key}": value for key, value in state.items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(1), "ibot_head.last_layer.weight_g": torch.zeros(1)}
    student = {f"backbone.{key}": torch.full_like(value, 7) for key, value in state.items()}
    both = {f"teacher.{k}": v for k, v in (backbone | heads).items()} | {f"student.{k}": v for k, v in student.items()}
    return {
        "plain": state,
        "chunked": chunked,
        "teacher checkpoint": {"teacher": backbone | heads, "student": student, "iteration": 3},
        "chunked teacher": {"teacher": {f"backbone.{key}": value for key, value in chunked.items()}},
        "whole training model": {"model": both, "iteration": 3},
        "ddp": {f"module.{key}": value for key, value in backbone.items()},
        "compiled": {f"_orig_mod.{key}": value for key, value in state.items()},
        "fsdp": {key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): v for key, v in backbone.items()},
        "state_dict": {"state_dict": state, "epoch": 1},
    }


LAYOUTS = ["plain", "chunked", "teacher checkpoint", "chunked teacher", "whole training model", "ddp", "compiled"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "fsdp", "state_dict"])
def test_official_layouts_give_the_same_backbone(small, layout):
    state = small(num_register_tokens=4).state_dict()
    assert_same(weights.from_official(official_layouts(state)[layout]), state)
    assert weights.detect_format(weights.from_official(official_layouts(state)[layout])) == "official"


def test_heads_of_a_training_checkpoint_in_all_three_forms():
    head = ProjectionHead(8, 12, hidden=6, bottleneck=4)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    state = head.state_dict()
    mlp = {key: value for key, value in state.items() if key.startswith("mlp")}
    new_style = mlp | {
        "last_layer.parametrizations.weight.original0": state["last_layer.weight_g"],
        "last_layer.parametrizations.weight.original1": state["last_layer.weight_v"],
    }
    plain = mlp | {"last_layer.weight": head.last_layer(torch.eye(head.last_layer.weight_v.shape[1])).t().detach()}
    x = torch.randn(3, 8)
    for form in (state, new_style, plain):
        checkpoint = {"teacher": {f"dino_head.{key}": value for key, value in form.items()}}
        heads = weights.heads_from_official(checkpoint)
        assert list(heads) == ["dino_head"]
        other = ProjectionHead(8, 12, hidden=6, bottleneck=4)
        weights.load_strict(other, heads["dino_head"], "head")
        torch.testing.assert_close(other(x), head(x))


@pytest.mark.parametrize(
    "numbers",
    [
        {"ffn": "swiglu", "num_register_tokens": 4, "interpolate_offset": 0.0, "interpolate_antialias": True},
        {"img_size": 28, "patch_size": 4, "in_chans": 5, "layerscale": None},
        {"qkv_bias": False, "mlp_ratio": 2.0},
        {"ffn": "swiglu", "mlp_ratio": 3.0},
    ],
)
def test_the_architecture_is_read_off_the_shapes(small, numbers):
    model = small(embed_dim=128, **numbers)
    inferred = weights.infer_architecture(model.state_dict())
    assert inferred["num_heads"] == 2
    for key, value in numbers.items():
        if key != "mlp_ratio":
            assert inferred[key] == value
    from dinov2cli.models.vit import VisionTransformer

    weights.load_strict(VisionTransformer(**inferred), model.state_dict(), "itself")


def test_released_sizes_are_inferred():
    for arch in ("vits14", "vitb14_reg4", "vitg14"):
        model = build(arch, device="meta", img_size=518)
        inferred = weights.infer_architecture(model.state_dict())
        for key in ("embed_dim", "depth", "num_heads", "ffn", "num_register_tokens", "img_size", "interpolate_offset"):
            assert inferred[key] == getattr(model, key)
        assert inferred["mlp_ratio"] == 4


def test_every_misfit_is_named(small):
    model = small()
    state = model.state_dict()
    for i in range(3):
        del state[f"blocks.{i}.norm1.bias"]
    del state["norm.bias"]
    state |= {"extra": torch.zeros(1), "cls_token": torch.zeros(1, 1, 3)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        weights.load_strict(model, state, "x.pth")
    assert str(caught.value) == (
        "x.pth does not fit this model of 49 weights; 4 missing: blocks.0.norm1.bias, blocks.1.norm1.bias, "
        "blocks.2.norm1.bias and 1 more; 1 unexpected: extra; "
        "1 of another shape: cls_token [1, 1, 3] instead of [1, 1, 64]"
    )
    assert_same(model.state_dict(), before)


def test_incomplete_and_foreign_weights_are_explained(small):
    state = small().state_dict()
    hf = weights.to_hf(state)
    del hf["encoder.layer.0.attention.attention.key.weight"]
    with pytest.raises(
        InputError, match=r"1 missing: blocks\.0\.attn\.qkv\.weight; 2 unexpected: blocks\.0\.attn\.qkv"
    ):
        weights.load_strict(small(), weights.from_hf(hf), "x")
    with pytest.raises(InputError, match="these are DINOv3 weights, expected DINOv2: the architectures differ"):
        weights.detect_format(state | {"storage_tokens": torch.zeros(1)})
    with pytest.raises(InputError, match=r"no DINOv2 backbone among 1 weights: layer1\.conv"):
        weights.detect_format({"layer1.conv": torch.zeros(1)})
    with pytest.raises(InputError, match="not a whole DINOv2 backbone: cls_token missing among 48 weights"):
        weights.infer_architecture({key: value for key, value in state.items() if key != "cls_token"})
    with pytest.raises(InputError, match="the position embedding has 12 patches, expected a square number"):
        weights.infer_architecture(state | {"pos_embed": torch.zeros(1, 13, 64)})
    with pytest.raises(InputError, match="cannot tell the number of heads: width 32 is not a multiple of 64"):
        weights.infer_architecture(small(embed_dim=32).state_dict())
