"""Weights written piece by piece, against safetensors and transformers' own writers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dinov2cli.errors import InputError
from dinov2cli.models import shards
from dinov2cli.models.export import write_hf
from dinov2cli.models.files import read_weights
from dinov2cli.models.load import load_model
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.registry import build
from dinov2cli.models.shards import plan_files, write_weights
from dinov2cli.models.weights import to_hf

NUMBERS = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 56, "patch_size": 14}


def reader(model, asked):
    """What `write_weights` reads from; `asked` gets the names of every call."""
    state = model.state_dict()

    def read(names):
        asked.append(list(names))
        return {name: state[name] for name in names}

    return read


@pytest.mark.parametrize("overrides", [{}, {"layerscale": None}, {"ffn": "swiglu", "num_register_tokens": 4}])
@pytest.mark.parametrize("limit", [None, 20_000, 60_000, 1])
def test_any_limit_and_any_piece_give_the_same_weights(small, tmp_path, monkeypatch, overrides, limit):
    monkeypatch.setattr(shards, "_PIECE", 9_000)
    model, asked = small(**overrides), []
    skeleton = build("vits14", device="meta", **(NUMBERS | overrides))
    write_weights(skeleton, reader(model, asked), tmp_path, limit)
    expected = to_hf(model.state_dict())
    found = read_weights(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {name for names in asked for name in names} >= model.state_dict().keys() - {"blocks.0.ls1.gamma"}
    assert all(len(names) < len(expected) / 3 for names in asked)
    files = plan_files(skeleton, limit)
    assert [file.name for file in files] == sorted({*(p.name for p in tmp_path.glob("*.safetensors"))})
    if limit is not None:
        assert all(file.size <= limit or len(file.shapes) == 1 for file in files)
        # No two neighbours would have fitted into one file.
        assert all(a.size + 4 * next(iter(b.shapes.values())).numel() > limit for a, b in zip(files, files[1:]))  # noqa: B905, RUF007


def test_files_and_index_are_as_transformers_writes_them(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small()
    place = Preprocess(64, 56)
    write_hf(model, tmp_path / "ours", read=reader(model, []), preprocess=place, limit=100_000)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=100_000)
    ours, expected = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("ours", "theirs")
    )
    assert ours["metadata"]["total_size"] == expected["metadata"]["total_size"]
    assert ours["weight_map"].keys() == expected["weight_map"].keys()
    pattern = {len(name) for name in expected["weight_map"].values()}
    assert {len(name) for name in ours["weight_map"].values()} == pattern
    state = read_weights(tmp_path / "theirs")
    assert all(torch.equal(state[name], value) for name, value in read_weights(tmp_path / "ours").items())


def test_half_precision_weights_become_float32(small, tmp_path):
    model = small().to(torch.bfloat16)
    write_weights(model, reader(model, []), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert torch.equal(found["layernorm.weight"], model.norm.weight.float())


def test_a_model_in_several_files_is_told_from_another(small, tmp_path):
    model, other = small(), small()
    with torch.no_grad():
        other.norm.bias += 1  # in the last file
    for name, each in (("a", model), ("b", other)):
        write_hf(each, tmp_path / name, read=reader(each, []), preprocess=Preprocess(64, 56), limit=100_000)
    first, second = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert first.fingerprint["sha256"] != second.fingerprint["sha256"]
    assert torch.equal(second.backbone.norm.bias, other.norm.bias)
    next(tmp_path.glob("a/model-00002-of-*")).unlink()
    with pytest.raises(InputError, match=r"model-00002-of-\d+\.safetensors cannot be read"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("limit", [None, 100_000])
def test_shapes_are_read_without_weights(small, tmp_path, limit, monkeypatch):
    model = small(num_register_tokens=4)
    write_hf(model, tmp_path, read=reader(model, []), preprocess=Preprocess(64, 56), limit=limit)
    monkeypatch.setattr("dinov2cli.models.files.load_file", None)
    loaded = load_model(tmp_path, device="meta")
    assert {p.device.type for p in loaded.backbone.parameters()} == {"meta"}
    assert "sha256" not in loaded.fingerprint
    shapes = {name: value.shape for name, value in loaded.backbone.state_dict().items()}
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}
