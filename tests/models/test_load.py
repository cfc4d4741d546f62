"""Every form of MODEL, and the text of every refusal."""

import hashlib
import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov2cli.artifacts.output import Output
from dinov2cli.errors import InputError, UserError
from dinov2cli.models.export import save_hf, save_official, save_timm
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.load import load_model
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.registry import build


def same_weights(a, b):
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


@pytest.fixture(scope="module")
def backbone():
    model = build("tiny", depth=1, seed=3)
    with torch.no_grad():
        model.mask_token.uniform_()
    return model


@pytest.fixture
def exported(backbone, tmp_path):
    return save_hf(backbone, tmp_path / "export", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize=73, crop=64)


def refusal(spec, error=InputError, **options):
    with pytest.raises(error) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hugging_face_directory(backbone, exported):
    loaded = load_model(str(exported))
    assert same_weights(backbone, loaded.backbone)
    assert (loaded.name, loaded.random, loaded.backbone.training) == ("export", False, False)
    assert loaded.preprocess == Preprocess(73, 64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
    assert (loaded.backbone.interpolate_offset, loaded.backbone.interpolate_antialias) == (0.1, False)
    file = exported / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert loaded.fingerprint == {"file": str(file), "sha256": digest}


def test_without_our_entry_the_convention_is_that_of_transformers(backbone, exported):
    config = json.loads((exported / "config.json").read_text())
    del config["dinov2cli"]
    (exported / "config.json").write_text(json.dumps(config))
    (exported / "preprocessor_config.json").unlink()
    loaded = load_model(exported)
    assert (loaded.backbone.interpolate_offset, loaded.backbone.interpolate_antialias) == (0.0, False)
    assert loaded.preprocess == Preprocess(resize=73, crop=64)  # the run's own size, in proportion 256 : 224


def test_run_directory_gives_its_export(backbone, tmp_path):
    run = tmp_path / "my-run"
    with Output.open(run, kind="run", command="dinov2 pretrain", config={}, seed=0, inputs=[]) as out:
        message = refusal(run)
        assert message == (
            f"{run} is a run without an export yet: let it finish (run the same command again to continue it), "
            "or take the model out of a checkpoint with `dinov2 export`"
        )
        save_hf(backbone, run / "export", resize=73, crop=64)
        out.finish()
    loaded = load_model(run)
    assert loaded.name == "my-run" and same_weights(backbone, loaded.backbone)
    assert loaded.fingerprint["file"] == str(run / "export" / "model.safetensors")


def test_another_kind_of_output_is_sent_to_its_command(tmp_path):
    with Output.open(tmp_path / "e", kind="embeddings", command="dinov2 embed", config={}, seed=0, inputs=[]) as out:
        out.finish(rows=0)
    assert refusal(tmp_path / "e").startswith(
        f"{tmp_path}/e is embeddings, expected a training run (made by dinov2 pretrain or distill)"
    )


def test_official_file_with_and_without_heads(backbone, tmp_path):
    save_official(backbone, tmp_path / "plain.pth")
    head = ProjectionHead(128, 16, hidden=8, bottleneck=4)
    save_official(backbone, tmp_path / "teacher.pth", heads={"dino_head": head, "ibot_head": head})
    for name in ("plain", "teacher"):
        loaded = load_model(tmp_path / f"{name}.pth")
        assert loaded.name == name and same_weights(backbone, loaded.backbone)
        assert loaded.backbone.num_heads == 2
        assert (loaded.backbone.interpolate_offset, loaded.preprocess.crop) == (0.1, 64)
    released = build("vits14", depth=1, img_size=518)
    save_official(released, tmp_path / "released.pth")
    assert load_model(tmp_path / "released.pth").preprocess == Preprocess()


def test_lone_safetensors_file_of_any_names(backbone, exported, tmp_path):
    assert same_weights(backbone, load_model(exported / "model.safetensors").backbone)


def test_timm_directory(backbone, tmp_path):
    save_timm(backbone, tmp_path / "timm", resize=73, crop=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    loaded = load_model(tmp_path / "timm")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded.backbone(images).cls, backbone.eval()(images).cls)
    assert loaded.preprocess == Preprocess(73, 64, (0.5,) * 3, (0.5,) * 3)
    assert (loaded.backbone.interpolate_offset, loaded.backbone.interpolate_antialias) == (0.0, True)


def test_sharded_weights(backbone, exported):
    state = load_file(exported / "model.safetensors")
    keys = sorted(state)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in halves.items():
        save_file({key: state[key] for key in part}, exported / name)
    index = {"weight_map": {key: name for name, part in halves.items() for key in part}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    (exported / "model.safetensors").unlink()
    assert same_weights(backbone, load_model(exported).backbone)


def test_architecture_name_gives_random_weights_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_model("tiny", seed=4)
    assert caplog.messages == ["model tiny has random weights (seed 4): its features are those of an untrained network"]
    assert loaded.random and loaded.fingerprint == {"arch": "tiny", "img_size": 64, "seed": 4}
    assert same_weights(loaded.backbone, build("tiny", seed=4))
    assert (loaded.preprocess.resize, loaded.preprocess.crop) == (73, 64)
    assert load_model("tiny", img_size=32).backbone.grid == 4


def test_image_size_moves_crop_and_resize_together(exported):
    preprocess = load_model(exported, img_size=128).preprocess
    assert (preprocess.resize, preprocess.crop) == (146, 128)
    message = refusal(exported, UserError, img_size=100)
    assert message == "image size 100 is not a multiple of the patch size 8: use 96 or 104"


def test_hub_name_goes_through_a_snapshot(backbone, exported, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(name, revision=None, allow_patterns=None):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = load_model("facebook/dinov2-small@v1")
    assert loaded.name == "facebook/dinov2-small" and same_weights(backbone, loaded.backbone)
    assert (asked["name"], asked["revision"]) == ("facebook/dinov2-small", "v1")
    assert not any(pattern.endswith((".bin", ".pth")) for pattern in asked["patterns"])

    def unreachable(name, **_):
        raise OSError("the network is down\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert refusal("facebook/dinov2-small") == (
        "model 'facebook/dinov2-small' is no directory here and could not be fetched from the Hugging Face hub "
        "(the network is down): check the name and the network, or give a local directory"
    )


def test_unknown_models_are_answered_with_the_nearest_names(tmp_path, monkeypatch):
    known = (
        "Expected a run or model directory, a .pth file, a hub name (owner/name) or an architecture (tiny, vitt8, "
        "vitti14, vitti16, vits14, vits16, vitb14, vitb16, vitl14, vitl16, vitg14, vitg16, each also with _reg4); "
        "to compare with: transformers:DIR, baseline:pixels, baseline:histogram"
    )
    assert refusal("vits_14") == f"model 'vits_14' not found: did you mean vits14 or vits16? {known}"
    missing = str(tmp_path / "gone")
    assert refusal(missing) == f"model {missing!r} not found: {known}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert refusal("runs/first") == f"model 'runs/first' not found: {known}"  # a path, no hub name
    assert refusal("weights/file.pth") == f"model 'weights/file.pth' not found: {known}"
    assert refusal("sscd:x.pt") == "model 'sscd:x.pt': found nothing at x.pt; expected a file"


def test_folders_that_hold_no_model(tmp_path, exported):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").touch()
    expected = (
        "expected a run with export/, or config.json with model.safetensors of a Hugging Face Dinov2 or timm model"
    )
    assert refusal(tmp_path / "pictures") == f"{tmp_path}/pictures holds no model (found a.jpg): {expected}"

    config = exported / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"dinov2"', '"vit"', 1))
    assert refusal(exported) == (
        f"{config} is of a model of type 'vit', expected dinov2 or dinov2_with_registers (Hugging Face) or a timm "
        f"config; transformers:{exported} takes any image encoder to `dinov2 eval`"
    )
    config.write_text("{")
    assert refusal(exported).startswith(f"{config} cannot be read as JSON")
    config.write_text(text.replace('"hidden_size": 128', '"hidden_size": "wide"'))
    assert refusal(exported).startswith(f"{config} does not describe a DINOv2 model (ValueError:")
    config.write_text(text.replace('"image_size": 64', '"image_size": 65'))
    assert refusal(exported) == f"{exported}: img_size 65 is not a multiple of the patch size 8: use 64 or 72"
    config.write_text(text.replace('"image_size": 64', '"image_size": 128'))
    assert refusal(exported) == (
        f"{exported} does not fit this model of 21 weights; 1 of another shape: pos_embed [1, 65, 128] instead of "
        "[1, 257, 128]"
    )
    config.write_text(text)
    (exported / "preprocessor_config.json").write_text('{"size": {"longest": 3}}')
    assert refusal(exported).startswith(f"{exported}/preprocessor_config.json cannot be read as a preprocessor")
    (exported / "model.safetensors").unlink()
    (exported / "pytorch_model.bin").touch()
    assert refusal(exported) == (
        f"{exported} has a config.json but no model.safetensors (pytorch_model.bin is a pickle and is not read): "
        "save the model with safetensors"
    )


class Payload:
    """Would touch a file if it were unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_dangerous_files(tmp_path, exported):
    file = tmp_path / "bad.pth"
    for content in (b"", b"not weights at all", b"hello world", pickle.dumps(Payload(tmp_path / "touched"))):
        file.write_bytes(content)
        assert refusal(file).startswith(f"{file} ")
    torch.save(Payload(tmp_path / "touched"), file)
    assert refusal(file) == (
        f"{file} is no plain weights file: it is damaged or holds Python objects, which are never loaded; "
        "save its state_dict() alone"
    )
    assert not (tmp_path / "touched").exists()
    torch.save([1, 2], file)
    assert refusal(file) == f"{file} holds a list, expected a state dict of weights"
    torch.save({"layer1.conv": torch.zeros(1), "epoch": 3}, file)
    assert refusal(file).startswith(f"{file}: no DINOv2 backbone among 2 weights: layer1.conv, epoch")
    torch.save(build("tiny", depth=1).state_dict() | {"odd": torch.zeros(2)}, file)
    assert refusal(file) == f"{file} does not fit this model of 21 weights; 1 unexpected: odd"
    (tmp_path / "notes.txt").write_text("x")
    assert refusal(tmp_path / "notes.txt") == (
        f"{tmp_path}/notes.txt is not a model: expected a directory or a file ending in .pth, .pt, .safetensors"
    )
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert refusal(exported).startswith(f"{weights} cannot be read as safetensors (")
