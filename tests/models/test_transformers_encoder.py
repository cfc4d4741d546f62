"""Comparators of transformers: tokens and pooled vectors against the models themselves, read in another way."""

import json
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dinov2cli.errors import InputError, UserError
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.export import save_hf
from dinov2cli.models.load import canonical_spec, load_model
from tests.models import transformers_models as small

transformers = pytest.importorskip("transformers")

LIMIT = 1e-5


@dataclass
class Family:
    """A way to read a model: where its vision part is, its blocks, its final norm, and how many tokens are special."""

    model: str
    tower: str = ""
    blocks: str = "layers"
    norm: str | None = "layernorm"
    special: int = 1
    pooled: str = "class"
    depth: int = 3


BLOCKS = [
    Family("clip", "vision_model", "encoder.layers", "post_layernorm", pooled="projected"),
    Family("clip_vision", "", "encoder.layers", "post_layernorm"),
    Family("clip_projected", "vision_model", "encoder.layers", "post_layernorm", pooled="projected"),
    Family("llava", "vision_tower", "encoder.layers", "post_layernorm"),
    Family("siglip", "vision_model", "encoder.layers", "post_layernorm", special=0, pooled="head"),
    Family("siglip_vision", "", "encoder.layers", "post_layernorm", special=0, pooled="head"),
    Family("siglip2", "vision_model", "encoder.layers", "post_layernorm", special=0, pooled="head"),
    Family("vit"),
    Family("vit_classifier", "vit"),
    Family("mae", "vit"),
    Family("beit_mean", "beit", norm=None, pooled="normed mean"),
    Family("beit_class"),
    Family("data2vec", blocks="encoder.layer", norm=None, pooled="normed mean"),
    Family("deit", "deit", special=2),
    Family("ijepa", special=0, pooled="mean"),
    Family("dinov2", blocks="encoder.layer"),
    Family("dinov2_registers", blocks="encoder.layer", special=4),
    Family("dinov3", blocks="model.layer", norm="norm", special=5),
]
MAPS = ["convnext", "regnet", "resnet", "swin", "dinov3_convnext"]
named = pytest.mark.parametrize("family", BLOCKS, ids=lambda family: family.model)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def images(height=64, width=64, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.fixture
def saved(tmp_path, randomise):
    def make(name):
        theirs = randomise(getattr(small, name)()).eval()
        theirs.save_pretrained(tmp_path / name)
        return theirs, load_model(f"transformers:{tmp_path / name}")

    return make


def watched(family, theirs, x):
    """All tokens [B, T, D] after each block, caught as they leave it while the model runs, and the tower."""
    tower = theirs.get_submodule(family.tower)
    caught = []

    def note(_module, _inputs, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(note) for block in tower.get_submodule(family.blocks)]
    sides = (x.shape[2] // 16, x.shape[3] // 16)
    extra = {"interpolate_pos_encoding": True}
    order = None
    if family.model == "mae":  # let it shuffle, and put its patches back
        theirs.config.mask_ratio = 0.0
        order = torch.argsort(torch.rand(len(x), sides[0] * sides[1]), dim=1)
        extra["noise"] = torch.argsort(order, dim=1).float()
    if family.model.startswith("dino"):
        extra = {}
    if family.model == "siglip2":
        patches = nn.functional.unfold(x, 16, stride=16).transpose(1, 2).unflatten(2, (3, 16, 16))
        x = patches.permute(0, 1, 3, 4, 2).flatten(2)
        extra = {"pixel_attention_mask": torch.ones(x.shape[:2]), "spatial_shapes": torch.tensor([sides] * len(x))}
    with torch.no_grad():
        tower(x, **extra)
    for hook in hooks:
        hook.remove()
    if order is not None:
        back = torch.argsort(torch.argsort(torch.argsort(order, dim=1), dim=1), dim=1)
        caught = [
            torch.cat([one[:, :1], one[:, 1:].gather(1, back[..., None].expand(-1, -1, 32))], 1) for one in caught
        ]
    return caught, tower


def expected_pooled(family, theirs, tower, last, normed):
    patches = normed[:, family.special :]
    match family.pooled:
        case "projected":
            return normed[:, 0] @ theirs.visual_projection.weight.T
        case "head":
            return tower.head(normed)
        case "mean":
            return patches.mean(1)
        case "normed mean":
            return tower.pooler.layernorm(last[:, 1:].mean(1))
    return normed[:, 0]


@named
@torch.no_grad()
def test_tokens_and_pooled_vector_are_those_of_the_model(saved, family):
    theirs, loaded = saved(family.model)
    ours = loaded.encoder
    assert isinstance(ours, Encoder) and not ours.training and not loaded.random
    assert (ours.depth, ours.embed_dim, ours.patch_size, loaded.name) == (3, 32, 16, f"transformers:{family.model}")
    for size in ((64, 64), (48, 96)):
        caught, tower = watched(family, theirs, images(*size))
        assert len(caught) == 3
        norm = tower.get_submodule(family.norm) if family.norm else nn.Identity()
        for normed in (True, False):
            seen = ours.see(images(*size), [2, 0], norm=normed)
            for block, (patches, cls) in zip([2, 0], seen.tokens, strict=True):
                tokens = norm(caught[block]) if normed else caught[block]
                assert tokens.std() > 0.1
                torch.testing.assert_close(patches, tokens[:, family.special :], atol=LIMIT, rtol=LIMIT)
                stands_in = tokens.mean(1)
                if block == 2 and normed:
                    stands_in = seen.pooled
                torch.testing.assert_close(cls, tokens[:, 0] if family.special else stands_in, atol=LIMIT, rtol=LIMIT)
            pooled = expected_pooled(family, theirs, tower, caught[2], norm(caught[2]))
            torch.testing.assert_close(seen.pooled, pooled, atol=LIMIT, rtol=LIMIT)
            torch.testing.assert_close(ours(images(*size)), pooled, atol=LIMIT, rtol=LIMIT)


@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_the_last_stage_of_hierarchical_models(saved, name):
    theirs, loaded = saved(name)
    ours, x = loaded.encoder, images(64, 128)
    out = (theirs.resnet if name == "resnet" else theirs)(x)
    stride, width = (8, 16) if name == "swin" else (32, 32)
    assert (ours.depth, ours.patch_size, ours.embed_dim) == (1, stride, width)
    places = out.last_hidden_state
    if places.ndim == 4:
        places = torch.stack([places[:, :, i, j] for i in range(places.shape[2]) for j in range(places.shape[3])], 1)
    if name == "dinov3_convnext":
        places = places[:, 1:]
    assert places.shape[1] == 64 // stride * 128 // stride
    for norm in (True, False):
        seen = ours.see(x, [0], norm)
        torch.testing.assert_close(seen.tokens[0][0], places)
        torch.testing.assert_close(seen.tokens[0][1], out.pooler_output.flatten(1))
        torch.testing.assert_close(seen.pooled, out.pooler_output.flatten(1))


@pytest.mark.parametrize("name", ["clip", "mae", "regnet"])
def test_the_pooled_vector_has_gradients(saved, name):
    _, loaded = saved(name)
    loaded.network(images()).square().sum().backward()
    reached = [p for p in loaded.network.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > len(list(loaded.network.parameters())) // 2


@named
def test_shapes_are_known_without_weights(tmp_path, family):
    getattr(small, family.model)().save_pretrained(tmp_path / "m")
    loaded = load_model(f"transformers:{tmp_path / 'm'}", device="meta")
    assert loaded.encoder.device.type == "meta" and "sha256" not in loaded.fingerprint
    assert (loaded.encoder.depth, loaded.encoder.embed_dim, loaded.encoder.special) == (3, 32, family.special)


@torch.no_grad()
def test_a_directory_of_ours_gives_the_same_features(tmp_path, randomise):
    from dinov2cli.models.registry import build

    for registers in (0, 4):
        backbone = randomise(build("tiny", depth=2, num_register_tokens=registers, seed=1)).eval()
        save_hf(backbone, tmp_path / f"run{registers}" / "export", resize=73, crop=64)
        ours, other = (load_model(f"{scheme}{tmp_path / f'run{registers}'}") for scheme in ("", "transformers:"))
        assert other.name == f"transformers:run{registers}" and other.preprocess == ours.preprocess
        assert other.fingerprint["sha256"] == ours.fingerprint["sha256"] and other.fingerprint != ours.fingerprint
        for norm in (True, False):
            one_by_one = (model.encoder.intermediate(images(), [0, 1], norm) for model in (ours, other))
            for one, two in zip(*one_by_one, strict=True):
                torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.backbone(images()).cls, other.encoder(images()), atol=1e-4, rtol=1e-4)


def test_what_serves_which_command(saved):
    _, loaded = saved("dinov2")
    with pytest.raises(UserError) as caught:
        _ = loaded.backbone
    assert str(caught.value) == (
        "model transformers:dinov2 is only for comparisons; expected a DINOv2 backbone here: transformers: and "
        "baseline: models serve `dinov2 eval`"
    )


def test_image_sizes(tmp_path, saved):
    saved("vit"), saved("beit_mean")
    assert load_model(f"transformers:{tmp_path / 'vit'}", img_size=96).preprocess.crop == 96
    with pytest.raises(UserError) as caught:
        load_model(f"transformers:{tmp_path / 'vit'}", img_size=100)
    assert str(caught.value) == "image size 100 is not a multiple of the patch size 16: use 96 or 112"
    encoder = load_model(f"transformers:{tmp_path / 'vit'}").encoder
    for shape, words in (
        ((1, 64, 64), "1 channels"),
        ((3, 64, 60), "image size 64x60"),
        ((3, 8, 64), "image size 8x64"),
    ):
        with pytest.raises(UserError, match=words):
            encoder(torch.zeros(1, *shape))
    with pytest.raises(UserError, match="block 3 is not served: expected 0 to 2"):
        encoder.see(images(), [3])


def test_a_model_that_takes_one_size_only(tmp_path):
    vision = transformers.Aimv2VisionConfig(**small.VISION, **small.SQUARE)
    transformers.Aimv2VisionModel(vision).save_pretrained(tmp_path / "aim")
    assert load_model(f"transformers:{tmp_path / 'aim'}", img_size=64).preprocess.crop == 64
    with pytest.raises(UserError) as caught:
        load_model(f"transformers:{tmp_path / 'aim'}", img_size=96)
    message = str(caught.value)
    assert message.startswith("Aimv2VisionModel of transformers does not take images [3, 96, 96]")
    assert message.endswith("its own size is 64x64") and "\n" not in message


def test_a_size_that_the_patch_does_not_divide_is_kept(tmp_path):
    # As SigLIP's 384 pixels with patches of 14: the rest at the border is seen by no patch.
    config = transformers.SiglipVisionConfig(**small.VISION, image_size=60, patch_size=16)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "s")
    loaded = load_model(f"transformers:{tmp_path / 's'}", img_size=60)
    assert (loaded.preprocess.crop, loaded.encoder.patch_size) == (60, 16)
    assert loaded.encoder.see(images(60, 60), [2]).tokens[0][0].shape == (2, 9, 32)


def refusal(spec, error=InputError, **options):
    with pytest.raises(error) as caught:
        load_model(f"transformers:{spec}", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_directories_that_hold_no_image_encoder(tmp_path):
    gone = tmp_path / "gone"
    assert refusal(gone) == (
        f"model 'transformers:{gone}': found nothing at {gone}; expected a directory that transformers saved, or a hub "
        "name (owner/name)"
    )
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").touch()
    assert refusal(tmp_path / "pictures") == (
        f"{tmp_path}/pictures holds no model of transformers (found a.jpg): expected config.json and weights"
    )
    bert = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(**small.VISION)).save_pretrained(bert)
    assert refusal(bert) == (
        f"{bert}/config.json is of a model of type 'bert', which takes input_ids; expected an image encoder, or a "
        "model with one (vision_config)"
    )
    (bert / "config.json").write_text('{"model_type": "evaclip", "auto_map": {"AutoConfig": "code.Config"}}')
    assert "which this transformers cannot read" in refusal(bert) and "never executed" in refusal(bert)
    yolos = transformers.YolosConfig(**small.VISION, image_size=[64, 64], patch_size=16, num_detection_tokens=5)
    transformers.YolosModel(yolos).save_pretrained(tmp_path / "yolos")
    assert "YolosModel of transformers returns [1, 22, 32] for an image of 64 pixels" in refusal(tmp_path / "yolos")
    video = transformers.VideoMAEConfig(**small.VISION, **small.SQUARE)
    transformers.VideoMAEModel(video).save_pretrained(tmp_path / "video")
    assert "VideoMAEModel of transformers does not take images [3, 64, 64]" in refusal(tmp_path / "video")


def test_weights_that_are_damaged_or_do_not_fit(tmp_path):
    path = tmp_path / "m"
    small.vit().save_pretrained(path)
    weights, config = path / "model.safetensors", path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:2000])
    assert refusal(path).startswith(f"{path}: transformers cannot load this ViTModel (")
    weights.write_bytes(whole)
    config.write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    assert refusal(path).startswith(f"{path} does not hold the weights of a ViTModel: 16 are missing (layers.3.")
    config.write_text(text.replace('"hidden_size": 32', '"hidden_size": 64'))
    assert refusal(path).startswith(f"{path}: transformers cannot load this ViTModel (")
    config.write_text("{")
    assert refusal(path).startswith(f"{config} cannot be read as JSON")
    config.write_text(text)
    weights.unlink()
    assert "has a config.json but no model.safetensors" in refusal(path)


def test_code_that_comes_with_weights_is_named_where_they_do_not_fit(tmp_path):
    small.clip_vision().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "auto_map": {"AutoModel": "modeling.EvaModel"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    message = refusal(tmp_path / "m")
    assert "does not hold the weights of a CLIPVisionModel: 16 are missing (encoder.layers.3." in message
    assert message.endswith("and code of its own, which is never executed")


@torch.no_grad()
def test_beit_without_a_pooling_norm_of_its_own(tmp_path, randomise):
    config = transformers.BeitConfig(**small.VISION, **small.SQUARE, use_mean_pooling=True, use_mask_token=True)
    theirs = randomise(transformers.BeitForMaskedImageModeling(config)).eval()
    theirs.save_pretrained(tmp_path / "m")
    loaded = load_model(f"transformers:{tmp_path / 'm'}")
    mean = theirs.beit(images()).last_hidden_state[:, 1:].mean(1)
    expected = nn.functional.layer_norm(mean, (32,), eps=config.layer_norm_eps)
    torch.testing.assert_close(loaded.network(images()), expected, atol=LIMIT, rtol=LIMIT)


def test_plain_pickles_are_read_and_others_are_not(tmp_path, randomise):
    theirs = randomise(small.vit()).eval()
    theirs.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    loaded = load_model(f"transformers:{tmp_path / 'm'}")
    torch.testing.assert_close(loaded.network(images()), theirs(images()).last_hidden_state[:, 0])
    assert loaded.fingerprint["file"].endswith("pytorch_model.bin")
    torch.save({"run": print}, tmp_path / "m" / "pytorch_model.bin")
    assert refusal(tmp_path / "m").startswith(f"{tmp_path}/m: transformers cannot load this ViTModel (")


def test_without_transformers_one_line_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    assert refusal(tmp_path, UserError) == (
        f"model 'transformers:{tmp_path}' needs transformers: pip install 'dinov2cli[compare]'"
    )


def test_hub_names_go_through_a_snapshot(tmp_path, monkeypatch):
    import huggingface_hub

    small.vit().save_pretrained(tmp_path / "m")
    asked = {}

    def snapshot(name, revision=None, allow_patterns=None):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_model("transformers:google/vit@main").name == "transformers:google/vit"
    assert (asked["name"], asked["revision"]) == ("google/vit", "main")
    assert not any(pattern.endswith((".bin", ".py", ".pth")) for pattern in asked["patterns"])


def test_specs_mean_the_same_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert canonical_spec("transformers:m") == f"transformers:{tmp_path.resolve() / 'm'}"
    assert canonical_spec("m") == str(tmp_path.resolve() / "m")
    assert canonical_spec("sscd:m/x.pt?size=64") == f"sscd:{tmp_path.resolve() / 'm/x.pt'}?size=64"
    for spec in ("transformers:owner/name", "baseline:pixels", "vits14", "owner/name"):
        assert canonical_spec(spec) == spec


def test_loading_is_quiet_and_leaves_logging_as_it_was(tmp_path, capfd):
    from transformers.utils import logging as theirs

    small.clip().save_pretrained(tmp_path / "m")
    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    capfd.readouterr()
    with_file = tmp_path / "m" / "preprocessor_config.json"
    with_file.write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", "size": 64, "crop_size": 64}))
    logging.getLogger("dinov2cli").propagate = True
    load_model(f"transformers:{tmp_path / 'm'}")
    assert capfd.readouterr() == ("", "")
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before
