"""Reads the files a model consists of, turning every failure into one line. No pickle is ever executed."""

import json
import logging
import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dinov2cli.errors import InputError
from dinov2cli.models.weights import HEAD_PREFIXES, StateDict

log = logging.getLogger(__name__)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory: one, or those its index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if shards:
            return [path / shard for shard in shards]
    hint = " (pytorch_model.bin is a pickle and is not read)" if (path / "pytorch_model.bin").is_file() else ""
    raise InputError(f"{path} has a config.json but no model.safetensors{hint}: save the model with safetensors")


def read_weights(path: Path, *, shapes_only: bool = False) -> StateDict:
    """All weights of a directory under the names on disk; weights of a head beside the backbone are logged.

    With `shapes_only` they are on the meta device, and only the files' headers are read.
    """
    state: StateDict = {}
    for file in weight_files(path):
        state |= read_safetensors(file, shapes_only=shapes_only)
    beside = sorted(key for key in state if key.startswith(HEAD_PREFIXES))
    if beside:
        log.info("%s: %d weights of a head are not used (%s)", path, len(beside), beside[0])
    return state


def read_safetensors(file: Path, *, shapes_only: bool = False) -> StateDict:
    """The tensors of one safetensors file, with `shapes_only` on the meta device (in float32) without reading them."""
    try:
        if not shapes_only:
            return load_file(file)
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error}): fetch or export it again") from None


def read_pth(file: Path, *, shapes_only: bool = False) -> dict[str, Any]:
    """The dict inside a `.pth` file, read with weights_only=True; with `shapes_only` its tensors on the meta device."""
    try:
        checkpoint = torch.load(file, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except UnpicklingError:
        raise InputError(
            f"{file} is no plain weights file: it is damaged or holds Python objects, which are never loaded; "
            "save its state_dict() alone"
        ) from None
    # A file that is no pickle at all may trip its reader anywhere.
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} cannot be read as a .pth file ({reason}): fetch or save it again") from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{file} holds a {type(checkpoint).__name__}, expected a state dict of weights")
    return checkpoint


def read_json(file: Path) -> dict[str, Any]:
    """The object inside a JSON file."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return value
