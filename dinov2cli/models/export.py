"""Writes a backbone for other programs: Hugging Face directory, timm directory, official `.pth`."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov2cli import __version__
from dinov2cli.artifacts.output import write_aside
from dinov2cli.errors import InputError
from dinov2cli.models.files import read_json, read_pth
from dinov2cli.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, preprocessor_config
from dinov2cli.models.registry import name_of
from dinov2cli.models.shards import Read, write_weights
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.models.weights import to_timm


def hf_config(backbone: VisionTransformer) -> dict[str, Any]:
    """config.json for transformers. What it has no field for stands under `dinov2cli`, which it ignores."""
    registers = backbone.num_register_tokens
    ratio = backbone.mlp_ratio
    config: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "hidden_act": "gelu",
        "image_size": backbone.img_size,
        "patch_size": backbone.patch_size,
        "num_channels": backbone.in_chans,
        "qkv_bias": backbone.qkv_bias,
        "use_swiglu_ffn": backbone.ffn == "swiglu",
        "layer_norm_eps": backbone.norm_eps,
        "layerscale_value": 1.0 if backbone.layerscale is None else backbone.layerscale,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
        "dinov2cli": {
            "version": __version__,
            "architecture": name_of(backbone),
            "interpolate_offset": backbone.interpolate_offset,
            "interpolate_antialias": backbone.interpolate_antialias,
        },
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def save_hf(
    backbone: VisionTransformer,
    directory: Path | str,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    resize: int = 256,
    crop: int = 224,
    interpolation: str = "bicubic",
    card: str | None = None,
    card_data: Mapping[str, Any] | None = None,
) -> Path:
    """Write the directory that transformers' AutoModel and AutoImageProcessor load, and return it.

    `card` is markdown added to the model card, `card_data` further metadata for its header (license, datasets,
    base_model, eval_results with model_name …). Weights are stored as float32. Files are written aside and renamed,
    weights first, so that a directory with a config is whole.
    """
    state = backbone.state_dict()
    preprocess = Preprocess(resize, crop, tuple(mean), tuple(std), interpolation)
    return write_hf(
        backbone,
        directory,
        read=lambda names: {name: state[name] for name in names},
        preprocess=preprocess,
        card=card,
        card_data=card_data,
    )


def write_hf(
    backbone: VisionTransformer,
    directory: Path | str,
    *,
    read: Read,
    preprocess: Preprocess,
    limit: int | None = None,
    origin: Mapping[str, Any] | None = None,
    card: str | None = None,
    card_data: Mapping[str, Any] | None = None,
) -> Path:
    """As `save_hf`, of a backbone whose weights need not be in memory: `backbone` may be on the meta device.

    `read` is asked for the weights a few at a time, by their names in the backbone. They are written in files of at
    most `limit` bytes. `origin`, plain values, joins what config.json says under `dinov2cli`.
    """
    directory = Path(directory)
    write_weights(backbone, read, directory, limit)
    _write_json(directory / "preprocessor_config.json", preprocessor_config(preprocess))
    text = model_card(backbone, preprocess, directory.name, card, card_data)
    write_aside(directory / "README.md", lambda tmp: _write_text(tmp, text))
    config = hf_config(backbone)
    config["dinov2cli"] |= dict(origin or {})
    _write_json(directory / "config.json", config)
    return directory


def model_card(
    backbone: VisionTransformer,
    preprocess: Preprocess,
    name: str,
    card: str | None = None,
    card_data: Mapping[str, Any] | None = None,
) -> str:
    """Markdown of the model card with its metadata header."""
    from huggingface_hub import ModelCardData  # slow to import, needed only here

    header = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dino", "vision", "dinov2", "dinov2cli"],
    }
    data = ModelCardData(**(header | dict(card_data or {})))
    parameters = sum(p.numel() for p in backbone.parameters())
    registers = backbone.num_register_tokens
    body = f"""# {name}

A vision transformer trained with the DINOv2 method by dinov2cli {__version__}. It turns an image into one class token
and one token per {backbone.patch_size}x{backbone.patch_size} patch, both useful without fine-tuning.

| | |
| --- | --- |
| architecture | {name_of(backbone)} ({parameters / 1e6:.1f} M parameters, feed-forward {backbone.ffn}) |
| width, blocks, heads | {backbone.embed_dim}, {backbone.depth}, {backbone.num_heads} |
| register tokens | {registers} |
| position embedding | {backbone.grid}x{backbone.grid} patches ({backbone.img_size} px) |
| preprocessing | shorter side {preprocess.resize}, centre crop {preprocess.crop}, {preprocess.interpolation} |

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}").eval()
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
class_token, patch_tokens = tokens[:, 0], tokens[:, {1 + registers}:]
```

At image sizes other than {backbone.img_size} px the position embedding is resampled. {_interpolation_note(backbone)}
"""
    return f"---\n{data.to_yaml()}\n---\n\n{body}" + (f"\n{card.strip()}\n" if card else "")


def save_timm(
    backbone: VisionTransformer,
    directory: Path | str,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    resize: int = 256,
    crop: int = 224,
    interpolation: str = "bicubic",
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Write the directory that `timm.create_model("local-dir:DIR", pretrained=True)` loads, and return it.

    timm resamples positions to the exact size with antialias (pass dynamic_img_size=True to use other sizes), so a
    backbone with offset 0.1 gives slightly other features there at sizes other than its own. The mask token is lost.
    `origin`, plain values, stands in config.json under `dinov2cli`, which timm ignores.
    """
    directory = Path(directory)
    registers, swiglu = backbone.num_register_tokens, backbone.ffn == "swiglu"
    weights = _storable(to_timm(backbone.state_dict()))
    ratio = weights["blocks.0.mlp.fc1.weight"].shape[0] / backbone.embed_dim
    config: dict[str, Any] = {
        # The nearest of timm's own; model_args then say the rest. SwiGLU exists only in the giant's entry.
        "architecture": f"vit_{'giant' if swiglu else 'small'}_patch14_{'reg4_' if registers else ''}dinov2",
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": backbone.img_size,
            "patch_size": backbone.patch_size,
            "in_chans": backbone.in_chans,
            "embed_dim": backbone.embed_dim,
            "depth": backbone.depth,
            "num_heads": backbone.num_heads,
            "mlp_ratio": ratio + 1e-9,  # timm truncates ratio * width
            "qkv_bias": backbone.qkv_bias,
            "init_values": None if backbone.layerscale is None else 1e-5,
            **({"reg_tokens": registers, "no_embed_class": True} if registers else {}),
        },
        "pretrained_cfg": {
            "mean": list(mean),
            "std": list(std),
            "interpolation": interpolation,
            "crop_pct": crop / resize,
            "crop_mode": "center",
            "input_size": [backbone.in_chans, crop, crop],
            "fixed_input_size": True,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if origin is not None:
        config["dinov2cli"] = {"version": __version__, **origin}
    write_aside(directory / "model.safetensors", lambda tmp: save_file(weights, tmp, metadata={"format": "pt"}))
    _write_json(directory / "config.json", config)
    return directory


def save_official(
    backbone: VisionTransformer,
    file: Path | str,
    *,
    heads: Mapping[str, nn.Module] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Write a `.pth` with the official names and return its path.

    Without heads it is laid out as the released backbones; with heads ({"dino_head": …, "ibot_head": …}) as the
    official `teacher_checkpoint.pth`. The file has no place for the interpolation convention: official code and
    `load_model` take offset 0.1 for plain and exact size with antialias for register models. `origin`, plain values,
    comes back from `read_origin`.
    """
    file = Path(file)
    state: dict[str, Any] = OrderedDict(_storable(backbone.state_dict()))
    if heads:
        state = {f"backbone.{key}": value for key, value in state.items()}
        for name, head in heads.items():
            state |= {f"{name}.{key}": value for key, value in _storable(head.state_dict()).items()}
        state = OrderedDict(teacher=state)
    if origin is not None:
        # Where torch keeps the version of each module in a state dict: loading looks at its own keys alone.
        state._metadata = {"": {"version": 1, "dinov2cli": dict(origin)}}  # type: ignore[attr-defined]
    write_aside(file, lambda tmp: torch.save(state, tmp))
    return file


def read_origin(place: Path) -> dict[str, Any] | None:
    """What was written as `origin` to a directory or an official file ({} if nothing was); None where `place` is not
    what this program wrote, or cannot be read."""
    try:
        if place.is_file():
            metadata = getattr(read_pth(place, shapes_only=True), "_metadata", {})
            found = metadata.get("", {}).get("dinov2cli")
        else:
            config = read_json(place / "config.json")
            # transformers passes the entry on to whatever is trained further from an export.
            found = None if "transformers_version" in config else config.get("dinov2cli")
    except (InputError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def _interpolation_note(backbone: VisionTransformer) -> str:
    offset, antialias = backbone.interpolate_offset, backbone.interpolate_antialias
    if not offset and antialias == bool(backbone.num_register_tokens):
        return "transformers does it exactly as in training."
    return (
        f"In training it was done with offset {offset} and antialias {antialias} (config.json, `dinov2cli`); "
        "transformers has no such setting, so its features differ slightly there. At the native size they are equal."
    )


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 CPU tensors that are no views of larger ones, as safetensors demands; copied only where they must be."""
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    return {key: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for key, t in plain.items()}


def _write_json(file: Path, value: Any) -> None:
    write_aside(file, lambda tmp: _write_text(tmp, json.dumps(value, indent=2) + "\n"))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
