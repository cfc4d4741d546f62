"""Writes the weights of a Hugging Face directory in files of bounded size, holding only a piece of them in memory."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from dinov2cli.artifacts.output import write_aside
from dinov2cli.models.weights import StateDict, to_hf

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Takes names of weights, as the backbone has them, and returns those weights."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PIECE = 64 * 2**20  # bytes read at a time: large enough that opening the files again costs nothing
_FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file to be written: its name, and the shapes of its tensors by their names on disk, in order."""

    name: str
    shapes: dict[str, torch.Size]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(map(_bytes, self.shapes.values()))


def plan_files(backbone: nn.Module, limit: int | None = None) -> list[WeightFile]:
    """The files for the weights of `backbone` (which may be on the meta device) in float32: one, or several of at most
    `limit` bytes each, in the order of the model. Only a tensor larger than the limit makes a larger file, alone."""
    groups: list[dict[str, torch.Size]] = [{}]
    room = limit
    for name, tensor in to_hf(_shapes_of(backbone)).items():
        if room is not None and limit is not None:
            if _bytes(tensor.shape) > room and groups[-1]:
                groups.append({})
                room = limit
            room -= _bytes(tensor.shape)
        groups[-1][name] = tensor.shape
    if len(groups) == 1:
        return [WeightFile(SINGLE, groups[0])]
    return [
        WeightFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def write_weights(backbone: nn.Module, read: Read, directory: Path, limit: int | None = None) -> None:
    """Write the files of `plan_files` to `directory`, and the index that transformers wants for several.

    `backbone` gives names and shapes, `read` the weights: what it returns is let go before it is asked for more.
    """
    own = _shapes_of(backbone)
    origin = {made: name for name, tensor in own.items() for made in to_hf({name: tensor}, own)}
    files = plan_files(backbone, limit)
    for file in files:

        def write(path: Path, file: WeightFile = file) -> None:
            with open(path, "wb") as handle:
                _write_header(handle, file.shapes)
                for names in _pieces(file.shapes):
                    _write_piece(handle, names, read, origin, own)

        write_aside(directory / file.name, write)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(file.size for file in files)},
            "weight_map": {name: file.name for file in files for name in file.shapes},
        }
        text = json.dumps(index, indent=2) + "\n"
        write_aside(directory / INDEX, lambda path: _write_text(path, text))


def is_weight_file(name: str) -> bool:
    """Whether a file of this name is one that `write_weights` makes."""
    return name in (SINGLE, INDEX) or _SHARD.fullmatch(name) is not None


def _shapes_of(backbone: nn.Module) -> StateDict:
    return {name: tensor.detach().to("meta") for name, tensor in backbone.state_dict().items()}


def _pieces(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """The names in runs of about `_PIECE` bytes."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _bytes(shape) > _PIECE:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape)
    yield names


def _write_piece(
    handle: BinaryIO, names: Sequence[str], read: Read, origin: Mapping[str, str], own: Mapping[str, Tensor]
) -> None:
    found = to_hf(read(list(dict.fromkeys(origin[name] for name in names))), own)
    for name in names:
        data = found[name].detach().to("cpu", torch.float32).contiguous()
        handle.write(data.numpy().astype("<f4", copy=False).data)


def _write_header(handle: BinaryIO, shapes: Mapping[str, torch.Size]) -> None:
    """What comes before the tensors: the length of a JSON text, and the text, padded so that they begin aligned.

    Written here because safetensors' own writer wants all tensors of a file at once.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + _bytes(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little") + text)


def _bytes(shape: torch.Size) -> int:
    return math.prod(shape) * _FLOAT


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
