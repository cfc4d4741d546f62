"""Architectures by name: `vits14`, `vitb16`, `vitl14_reg4`, … and small sizes that train on a CPU."""

import difflib
import re
from typing import Any

import torch

from dinov2cli.errors import UserError
from dinov2cli.models.vit import VisionTransformer

# Paper Table 17 (S, B, L, g); `ti` is DeiT's tiny; `t` is made for two CPU cores. So shallow a model needs no gain
# near zero to train, and with gains of 1 its features tell images apart before training too.
SIZES: dict[str, dict[str, Any]] = {
    "t": {"embed_dim": 128, "depth": 4, "num_heads": 2, "ffn": "mlp", "img_size": 64, "layerscale": 1.0},
    "ti": {"embed_dim": 192, "depth": 12, "num_heads": 3, "ffn": "mlp"},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6, "ffn": "mlp"},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "ffn": "mlp"},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "ffn": "mlp"},
    "g": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn": "swiglu"},
}
ALIASES = {"tiny": "vitt8", "tiny_reg4": "vitt8_reg4"}
_PATTERN = re.compile(r"(?:dinov2_)?vit(?P<size>t|ti|s|b|l|g)(?P<patch>[1-9]\d*)(?:_reg(?P<registers>\d*))?")


def parse_architecture(arch: str) -> dict[str, Any] | None:
    """Keyword arguments of the named architecture, or None if the name is not one.

    Any patch size is understood (`vits8`), `_reg` means 4 registers, and the official hub names (`dinov2_vits14`)
    are taken too. The default image size is 224 rounded down to the patch grid, 64 for the `t` size.
    """
    match = _PATTERN.fullmatch(ALIASES.get(arch, arch))
    if match is None:
        return None
    kwargs = dict(SIZES[match["size"]])
    patch = int(match["patch"])
    registers = 0 if match["registers"] is None else int(match["registers"] or 4)
    size = kwargs.get("img_size", 224)
    kwargs |= {
        "patch_size": patch,
        "img_size": max(size // patch, 1) * patch,
        "num_register_tokens": registers,
        # The released models: plain ones interpolate by scale factor, register ones by size (METHOD: §8.13).
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": bool(registers),
    }
    return kwargs


def _standard_names() -> list[str]:
    names = ["tiny", "vitt8", "vitti14", "vitti16"]
    names += [f"vit{size}{patch}" for size in ("s", "b", "l", "g") for patch in (14, 16)]
    return names + [f"{name}_reg4" for name in names]


# The names worth listing; `parse_architecture` takes every patch size and register count.
ARCHITECTURES: dict[str, dict[str, Any]] = {name: parse_architecture(name) or {} for name in _standard_names()}


def architecture(arch: str, **overrides: Any) -> dict[str, Any]:
    """Constructor arguments of VisionTransformer for `arch`, with `overrides` on top (img_size=None is ignored).

    Raises UserError for an unknown name, with the nearest names and the list.
    """
    kwargs = parse_architecture(arch)
    if kwargs is None:
        raise UserError(unknown_architecture(arch))
    return kwargs | {key: value for key, value in overrides.items() if (key, value) != ("img_size", None)}


def build(arch: str, *, seed: int = 0, device: torch.device | str = "cpu", **overrides: Any) -> VisionTransformer:
    """A backbone with random weights that depend on `seed` alone; the global random state is neither read nor moved.

    `overrides` are VisionTransformer arguments. device="meta" gives shapes without memory. Raises UserError for an
    unknown name or numbers that do not fit together.
    """
    kwargs = architecture(arch, **overrides)
    with torch.device("meta"):
        model = VisionTransformer(**kwargs)
    if str(device) == "meta":
        return model
    # Drawn on the CPU whatever the device, so that a seed means the same weights everywhere.
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(device)


def suggest(arch: str) -> str:
    """'did you mean X? ' for a name near a known one, else ''."""
    near = difflib.get_close_matches(arch, ARCHITECTURES, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}? " if near else ""


def unknown_architecture(arch: str) -> str:
    """One-line message for a name that is no architecture."""
    plain = ", ".join(name for name in ARCHITECTURES if "_reg" not in name)
    return f"unknown architecture {arch!r}: {suggest(arch)}Known are {plain}, each also with _reg4"


def name_of(model: VisionTransformer) -> str:
    """Architecture name of a backbone, e.g. `vits14_reg4`, or a description of its numbers if it has none."""
    registers = f"_reg{model.num_register_tokens}" if model.num_register_tokens else ""
    for size, numbers in SIZES.items():
        if (numbers["embed_dim"], numbers["depth"], numbers["num_heads"]) == (
            model.embed_dim,
            model.depth,
            model.num_heads,
        ):
            return f"vit{size}{model.patch_size}{registers}"
    return f"vit-d{model.embed_dim}-l{model.depth}-h{model.num_heads}-p{model.patch_size}{registers}"
