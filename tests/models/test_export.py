import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from safetensors import safe_open

from dinov2cli.errors import UserError
from dinov2cli.models.export import hf_config, save_hf, save_official, save_timm
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.load import load_model
from dinov2cli.models.preprocess import Preprocess, default_preprocess, read_preprocess
from dinov2cli.models.registry import build


def test_hugging_face_directory_is_complete(small, tmp_path):
    model = small(num_register_tokens=4)
    out = save_hf(model, tmp_path / "x", resize=64, crop=56, card="## Training\nHere.", card_data={"license": "mit"})
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert "encoder.layer.0.attention.attention.query.weight" in names  # the names on disk, not in memory
        assert file.get_tensor("embeddings.register_tokens").shape == (1, 4, 64)
    config = json.loads((out / "config.json").read_text())
    assert config == hf_config(model) and config["architectures"] == ["Dinov2WithRegistersModel"]
    assert (
        config["image_size"] == 56
        and config["layer_norm_eps"] == 1e-6
        and config["dinov2cli"]["interpolate_offset"] == 0.1
    )


def test_model_card_is_valid_metadata_and_says_what_matters(small, tmp_path):
    from huggingface_hub import EvalResult, ModelCard

    result = EvalResult(
        task_type="image-classification",
        dataset_type="digits",
        dataset_name="demo:digits",
        metric_type="accuracy",
        metric_value=0.9,
    )
    data = {"license": "apache-2.0", "model_name": "x", "eval_results": [result], "datasets": ["owner/photos"]}
    save_hf(small(), tmp_path / "x", resize=64, crop=56, card="## Training\nOn photographs.", card_data=data)
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-feature-extraction"
    assert {"dino", "vision"} <= set(card.data.tags) and card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_value == 0.9
    assert "On photographs." in card.text and "features differ slightly" in card.text
    save_hf(small(interpolate_offset=0.0), tmp_path / "y", resize=64, crop=56)
    assert "exactly as in training" in ModelCard.load(tmp_path / "y" / "README.md").text


def test_exports_of_a_half_precision_or_training_model_are_float32(small, tmp_path):
    model = small().to(torch.bfloat16).train()
    save_hf(model, tmp_path / "x", resize=64, crop=56)
    with safe_open(tmp_path / "x" / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118 - no mapping
    loaded = load_model(tmp_path / "x")
    assert loaded.backbone.cls_token.dtype == torch.float32
    torch.testing.assert_close(loaded.backbone.cls_token, model.cls_token.float())


def test_official_file_has_the_released_layout(small, tmp_path):
    model, head = small(), ProjectionHead(64, 8, hidden=8, bottleneck=4)
    plain = torch.load(save_official(model, tmp_path / "p.pth"), weights_only=True)
    assert set(plain) == set(model.state_dict())
    both = torch.load(save_official(model, tmp_path / "t.pth", heads={"dino_head": head}), weights_only=True)
    assert set(both) == {"teacher"}
    assert "backbone.blocks.2.mlp.fc1.weight" in both["teacher"]
    assert torch.equal(both["teacher"]["dino_head.last_layer.weight_v"], head.last_layer.weight_v)


def test_an_unwritable_place_is_explained(small, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/model.safetensors: .*; choose another place"):
        save_hf(small(), tmp_path / "file")


def test_preprocess_defaults_follow_the_size():
    assert default_preprocess(518, 14) == Preprocess(256, 224)
    assert default_preprocess(56, 14) == Preprocess(64, 56)
    assert default_preprocess(221, 13).crop == 221
    assert Preprocess(crop=225).fitted(14).crop == 224


def test_other_processors_are_read(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"size": 518, "crop_size": 518, "resample": 2, "do_center_crop": False}))
    assert read_preprocess(file) == Preprocess(518, 518, interpolation="bilinear")
    file.write_text(json.dumps({"size": {"height": 98, "width": 98}, "do_normalize": False, "do_center_crop": False}))
    # Height and width ask for a square, whatever the aspect: so does transformers.
    assert read_preprocess(file) == Preprocess(98, 98, (0.0,) * 3, (1.0,) * 3, square=True)


class Hollow(types.ModuleType):
    """A module in which every name is a class, and every name in such a class a string."""

    class Meta(type):
        def __getattr__(cls, name):
            return name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Hollow.Meta(name, (), {})


class HollowTorchvision:
    """Import hook: torchvision's wheels cannot be imported beside a CPU build of torch, and parity needs none of it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] != "torchvision":
            return None
        loader = types.SimpleNamespace(create_module=lambda spec: Hollow(spec.name), exec_module=lambda _: None)
        return ModuleSpec(name, loader, is_package=True)


@pytest.fixture(scope="module")
def timm():
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [HollowTorchvision, *sys.meta_path])
        yield pytest.importorskip("timm")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("timm", "torchvision"):
            del sys.modules[name]


@pytest.mark.parametrize(("ffn", "registers"), [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)])
def test_timm_gives_the_same_features(small, tmp_path, timm, ffn, registers):
    antialias = {"interpolate_offset": 0.0, "interpolate_antialias": True}
    model = small(embed_dim=128, ffn=ffn, num_register_tokens=registers, **antialias)
    save_timm(model, tmp_path / "t", resize=64, crop=56)
    theirs = timm.create_model(f"local-dir:{tmp_path}/t", pretrained=True, dynamic_img_size=True).eval()
    for size in [(56, 56), (28, 28), (98, 42)]:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            out = model(images)
            expected = theirs.forward_features(images)
        found = torch.cat([out.cls[:, None], out.registers, out.patches], dim=1)
        assert (found - expected).abs().max() <= 1e-5


def test_timm_config_names_the_nearest_entry(tmp_path):
    expected = {
        "vits14": "vit_small_patch14_dinov2",
        "vits14_reg4": "vit_small_patch14_reg4_dinov2",
        "vitg14": "vit_giant_patch14_dinov2",
        "vitg14_reg4": "vit_giant_patch14_reg4_dinov2",
    }
    for arch, entry in expected.items():
        small_one = build(arch, depth=1, embed_dim=64, num_heads=1)
        config = json.loads((save_timm(small_one, tmp_path / arch) / "config.json").read_text())
        assert config["architecture"] == entry
        assert config["model_args"]["embed_dim"] == 64 and config["model_args"]["depth"] == 1
        assert config["pretrained_cfg"]["crop_pct"] == 224 / 256
