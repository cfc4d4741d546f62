"""Weight names of the three ecosystems, as pure functions on state dicts: official DINOv2 (ours), Hugging Face, timm.

Every function passes keys it does not know through unchanged, so that `load_strict` names them; nothing is dropped
in silence. Tensors are never copied unless they must be cut or joined.
"""

import math
import re
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2cli.errors import InputError
from dinov2cli.models.blocks import swiglu_hidden

StateDict = dict[str, Tensor]

# Keys beside a backbone that are no part of it: heads and the buffers of losses.
HEAD_PREFIXES = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", "linear_head.", "classifier.", "head.")

_HF_FIXED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_HF_LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}
# transformers 5 renames modules in memory; its save_pretrained writes the old names, a plain state_dict() the new.
_HF_IN_MEMORY = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
_HF_PARTS = {
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}


def detect_format(state: Mapping[str, Any]) -> str:
    """'official', 'hf' or 'timm' by the names alone. Raises InputError if the names are of no DINOv2 backbone."""
    keys = list(state)
    if any(key.endswith(("rope_embed.periods", "storage_tokens")) for key in keys):
        raise InputError("these are DINOv3 weights, expected DINOv2: the architectures differ")
    if any("patch_embeddings.projection." in key for key in keys):
        return "hf"
    if not any(key.endswith("patch_embed.proj.weight") for key in keys):
        raise InputError(f"no DINOv2 backbone among {len(keys)} weights: {_some(keys)}")
    return "official" if any(key.endswith("mask_token") for key in keys) else "timm"


def from_official(checkpoint: Mapping[str, Any]) -> StateDict:
    """Backbone weights of an official file under our names.

    Takes a plain backbone, a training checkpoint (`teacher` before `model`, `state_dict`, `student`), the `backbone.`
    prefix, wrappers' prefixes (`module.`, `_orig_mod.`, FSDP) and chunked blocks (`blocks.CHUNK.i.`, i counted over
    all chunks). Known head weights beside a backbone are left out; see `heads_from_official`.
    """
    state = _unwrap(checkpoint)
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value for key, value in state.items() if not key.startswith(HEAD_PREFIXES)
        }
    return {
        re.sub(r"^blocks\.(?:\d+\.)?(\d+)\.", r"blocks.\1.", key): value
        for key, value in state.items()
        if not key.startswith(HEAD_PREFIXES)
    }


def heads_from_official(checkpoint: Mapping[str, Any]) -> dict[str, StateDict]:
    """Projection heads of an official training checkpoint, `dino_head` and `ibot_head` if present, under our names.

    The prototypes may be stored by either weight-norm of torch, or as a plain matrix (then the gain is its norms).
    """
    state = _unwrap(checkpoint)
    heads: dict[str, StateDict] = {}
    for name in ("dino_head", "ibot_head"):
        head = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if not head:
            continue
        for new, old in (("weight_g", "original0"), ("weight_v", "original1")):
            parametrized = f"last_layer.parametrizations.weight.{old}"
            if parametrized in head:
                head[f"last_layer.{new}"] = head.pop(parametrized)
        if "last_layer.weight" in head:
            weight = head.pop("last_layer.weight")
            head["last_layer.weight_v"] = weight
            head["last_layer.weight_g"] = weight.norm(dim=-1, keepdim=True)
        heads[name] = head
    return heads


def to_hf(state: Mapping[str, Tensor], names: Container[str] | None = None) -> StateDict:
    """Our names to the names transformers keeps on disk. A backbone without LayerScale gets gains of 1.

    `names` are those of the whole backbone where `state` is a part of it.
    """
    names = state if names is None else names
    fixed = {ours: hf for hf, ours in _HF_FIXED.items()}
    layer = {ours: hf for hf, ours in _HF_LAYER.items()}
    result: StateDict = {}
    for key, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias)?", key)
        if match is None:
            result[fixed.get(key, key)] = value
            continue
        prefix, name, suffix = f"encoder.layer.{match[1]}.", match[2], match[3] or ""
        if name == "attn.qkv":
            for part, chunk in zip(_HF_PARTS[name], value.chunk(3), strict=True):
                result[f"{prefix}{part}{suffix}"] = chunk
        else:
            result[f"{prefix}{layer.get(name, name)}{suffix}"] = value
        if name == "norm1" and f"blocks.{match[1]}.ls1.gamma" not in names:
            for scale in ("layer_scale1", "layer_scale2"):
                result[f"{prefix}{scale}.lambda1"] = torch.ones_like(value)
    return result


def from_hf(state: Mapping[str, Tensor]) -> StateDict:
    """transformers' names, on disk or in memory, to ours. A task model's prefix is cut and its head left out."""
    result: StateDict = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for raw_key, value in state.items():
        key = re.sub(r"^(dinov2|dinov2_with_registers)\.", "", raw_key)
        if key.startswith(HEAD_PREFIXES):
            continue
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+?)(\.weight|\.bias)?", key)
        if match is None:
            result[_HF_FIXED.get(key, key)] = value
            continue
        name, suffix = _HF_IN_MEMORY.get(match[2], match[2]), match[3] or ""
        whole = next((ours for ours, names in _HF_PARTS.items() if name in names), None)
        if whole is not None:
            parts.setdefault(f"blocks.{match[1]}.{whole}{suffix}", {})[name] = value
        elif name in _HF_LAYER:
            result[f"blocks.{match[1]}.{_HF_LAYER[name]}{suffix}"] = value
        else:
            result[key] = value
    for target, found in parts.items():
        names = next(names for ours, names in _HF_PARTS.items() if f".{ours}." in target)
        if set(found) == set(names):
            result[target] = torch.cat([found[name] for name in names])
        else:  # leave the lone pieces under a name that the strict load will report
            result |= {f"{target} ({name} alone)": value for name, value in found.items()}
    if result.get("register_tokens") is not None and result["register_tokens"].shape[1] == 0:
        del result["register_tokens"]
    return result


def to_timm(state: Mapping[str, Tensor]) -> StateDict:
    """Our names to timm's. The mask token has no place there; with registers the class position joins the token."""
    result = {
        key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): value
        for key, value in state.items()
        if key != "mask_token"
    }
    if "register_tokens" in result:
        result["reg_token"] = result.pop("register_tokens")
        result["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        result["pos_embed"] = state["pos_embed"][:, 1:]
    return result


def from_timm(state: Mapping[str, Tensor]) -> StateDict:
    """timm's names to ours. The mask token, which timm drops, comes back as zeros, its initial value."""
    result: StateDict = {}
    for key, value in state.items():
        if key.startswith(HEAD_PREFIXES):
            continue
        match = re.fullmatch(r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", key)
        if match is not None and _packed_swiglu(state, match[1]):
            key = f"blocks.{match[1]}.mlp.{'w12' if match[2] == 'fc1' else 'w3'}.{match[3]}"
        result[key] = value
    if "reg_token" in result:
        result["register_tokens"] = result.pop("reg_token")
        if "pos_embed" in result:
            position = result["pos_embed"]
            result["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    if "cls_token" in result and "mask_token" not in result:
        result["mask_token"] = torch.zeros_like(result["cls_token"][0])
    return result


def infer_architecture(state: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """Constructor arguments of VisionTransformer from weights under our names.

    The number of heads leaves no trace in the shapes: unless given it is width / 64, as in every released model.
    The interpolation convention leaves none either: scale factor with offset 0.1 for plain models, exact size with
    antialias for register models (METHOD: §8.13). Raises InputError if the shapes are of no such model.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise InputError(f"not a whole DINOv2 backbone: {_some(missing)} missing among {len(state)} weights")
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"].shape[1] - 1
    grid = math.isqrt(positions)
    if grid**2 != positions:
        raise InputError(f"the position embedding has {positions} patches, expected a square number")
    if num_heads is None and embed_dim % 64:
        raise InputError(f"cannot tell the number of heads: width {embed_dim} is not a multiple of 64; export as hf")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    swiglu = "blocks.0.mlp.w3.weight" in state
    hidden = state["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    return {
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)),
        "num_heads": num_heads or embed_dim // 64,
        "mlp_ratio": _mlp_ratio(embed_dim, hidden, swiglu),
        "ffn": "swiglu" if swiglu else "mlp",
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_register_tokens": registers,
        "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": bool(registers),
    }


def load_strict(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load weights that must fit exactly.

    Raises InputError naming `source`, with counts and first names of missing, unexpected and wrongly shaped weights.
    """
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    found = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise InputError(f"{source} does not fit this model of {len(own)} weights; {'; '.join(found)}")
    model.load_state_dict(dict(state))


def _unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """The flat state dict inside a checkpoint, without wrappers' prefixes."""
    for name in ("teacher", "model", "state_dict", "student"):
        if isinstance(checkpoint.get(name), Mapping):
            return _unwrap(checkpoint[name])
    state = {
        re.sub(r"(^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)", "", key): value
        for key, value in checkpoint.items()
    }
    for name in ("teacher.", "student."):  # a checkpoint of the whole training model
        if any(key.startswith(f"{name}backbone.") for key in state):
            return {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
    return state


def _packed_swiglu(state: Mapping[str, Tensor], block: str) -> bool:
    """Whether timm's fc1 holds gate and value together: then it is twice as wide as fc2's input."""
    first, second = state.get(f"blocks.{block}.mlp.fc1.weight"), state.get(f"blocks.{block}.mlp.fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def _mlp_ratio(embed_dim: int, hidden: int, swiglu: bool) -> float:
    """The ratio whose hidden width is `hidden`, 4 where that fits. Raises InputError if there is none."""
    widths = {r: swiglu_hidden(embed_dim, r) if swiglu else int(embed_dim * r) for r in (4.0, hidden / embed_dim)}
    if swiglu:
        widths[1.5 * hidden / embed_dim] = swiglu_hidden(embed_dim, 1.5 * hidden / embed_dim)
    for ratio, width in widths.items():
        if width == hidden:
            return ratio
    raise InputError(f"feed-forward width {hidden} does not follow from model width {embed_dim}")


def _some(keys: list[str], limit: int = 3) -> str:
    """The first few names and how many more."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
