"""The backbone against transformers' Dinov2Model and Dinov2WithRegistersModel, always through files on disk."""

import itertools

import pytest
import torch

from dinov2cli.models.export import save_hf
from dinov2cli.models.load import load_model
from dinov2cli.models.registry import build

transformers = pytest.importorskip("transformers")

LIMIT = 1e-5
CASES = list(itertools.product(["mlp", "swiglu"], [0, 4]))
SIZES = [(56, 56), (28, 28), (98, 98), (42, 70)]  # native first


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tokens(model, images):
    """All tokens after the final norm, of ours or theirs."""
    with torch.no_grad():
        out = model(images)
    if hasattr(out, "last_hidden_state"):
        return out.last_hidden_state
    return torch.cat([out.cls[:, None], out.registers, out.patches], dim=1)


def difference(ours, theirs, size, batch=2):
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))
    expected = tokens(theirs, images)
    assert expected.std() > 0.5  # a constant output would prove nothing
    return (tokens(ours, images) - expected).abs().max().item()


@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_a_model_saved_by_transformers_gives_the_same_features(tmp_path, randomise, ffn, registers):
    numbers = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "use_swiglu_ffn": ffn == "swiglu",
    }
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**numbers, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config)
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**numbers))
    randomise(theirs).eval().save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    assert (loaded.backbone.ffn, loaded.backbone.num_register_tokens) == (ffn, registers)
    assert not loaded.random and not loaded.backbone.training
    for size in SIZES:
        assert difference(loaded.backbone, theirs, size) <= LIMIT, size


@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_a_saved_backbone_loads_in_transformers(tmp_path, small, ffn, registers):
    # With this convention transformers' own resampling is the same; the other is tested below.
    ours = small(ffn=ffn, num_register_tokens=registers, interpolate_offset=0.0, interpolate_antialias=bool(registers))
    save_hf(ours, tmp_path / "export", resize=64, crop=56)
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(theirs).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for size in SIZES:
        assert difference(ours, theirs.eval(), size) <= LIMIT, size

    theirs.save_pretrained(tmp_path / "again")  # and back: transformers keeps our own config entry
    again = load_model(tmp_path / "again").backbone
    for key, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_the_offset_convention_survives_the_export_but_transformers_ignores_it(tmp_path, small):
    ours = small(interpolate_offset=0.1, interpolate_antialias=False)
    save_hf(ours, tmp_path, resize=64, crop=56)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    loaded = load_model(tmp_path).backbone
    assert difference(ours, theirs, (56, 56)) <= LIMIT
    assert difference(ours, theirs, (28, 28)) > 1e-3
    images = torch.randn(1, 3, 28, 28)
    assert torch.equal(tokens(ours, images), tokens(loaded, images))


@pytest.mark.parametrize("arch", ["vits14", "vits14_reg4"])
def test_full_size_parity(tmp_path, randomise, arch):
    registers = arch.endswith("reg4")
    ours = build(arch, img_size=518, interpolate_offset=0.0).eval()
    randomise(ours)
    save_hf(ours, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert theirs.config.image_size == 518 and getattr(theirs.config, "num_register_tokens", 0) == 4 * registers
    for size in [(224, 224), (98, 140)]:
        assert difference(ours, theirs, size, batch=1) <= LIMIT, size
    if not registers:
        assert difference(ours, theirs, (518, 518), batch=1) <= LIMIT


def test_masked_patches_are_treated_as_in_transformers(tmp_path, small):
    ours = small()
    save_hf(ours, tmp_path, resize=64, crop=56)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    images, masks = torch.randn(2, 3, 56, 56), torch.rand(2, 16) < 0.5
    with torch.no_grad():
        expected = theirs(images, bool_masked_pos=masks).last_hidden_state
        out = ours(images, masks)
    assert (torch.cat([out.cls[:, None], out.patches], dim=1) - expected).abs().max() <= LIMIT


def test_transformers_processor_reads_the_preprocessing(tmp_path, small):
    import numpy as np
    from PIL import Image

    save_hf(small(), tmp_path, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), resize=64, crop=56)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    # Already 64 px high, so that only the crop and the normalisation act, which must be exact.
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    theirs = torch.as_tensor(np.asarray(processor(Image.fromarray(pixels))["pixel_values"][0]))
    crop = torch.from_numpy(pixels[4:60, 12:68].copy()).permute(2, 0, 1)[None]
    ours = load_model(tmp_path).preprocess.normalize(crop)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
