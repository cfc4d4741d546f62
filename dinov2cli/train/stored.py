"""The backbone inside a checkpoint: its tensors one by one, without the heads and the other parts beside it."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov2cli.errors import InputError

# Names of the backbone's tensors begin so in each part; see `tensors_of` and `SSLModel.teacher_side`.
_PREFIXES = {"teacher": "network.backbone.", "student": "backbone."}
PARTS = tuple(_PREFIXES)


class StoredBackbone:
    """The backbone in one part ('teacher' or 'student') of a checkpoint, written by any number of ranks.

    `shapes` are those of its tensors by their names in the backbone; opening reads no tensor. Raises InputError where
    the part is missing, damaged, or without some of its shards.
    """

    def __init__(self, checkpoint: Path, part: str = "teacher") -> None:
        self._path, self._prefix = checkpoint / part, _PREFIXES[part]
        try:
            stored = HuggingFaceStorageReader(path=str(self._path)).read_metadata().state_dict_metadata
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise self._unreadable(error) from None
        own = {
            name.removeprefix(self._prefix): held
            for name, held in stored.items()
            if name.startswith(self._prefix) and isinstance(held, TensorStorageMetadata)
        }
        if not own:
            raise InputError(f"{self._path} holds no backbone: its files are missing; export another step (--step)")
        for name, held in own.items():
            # A lost shard leaves a hole, which the reader would fill with whatever is in memory.
            chunks = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in held.chunks}
            if sum(chunks.values()) != math.prod(held.size):
                raise InputError(
                    f"{self._path}: only a part of {name} is there, a shard is missing: "
                    "copy the checkpoint again, or export another step (--step)"
                )
        self.shapes: dict[str, torch.Size] = {name: held.size for name, held in own.items()}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors, whole and in float32 on the CPU; nothing else is read. Raises InputError if that fails."""
        found = {name: torch.empty(self.shapes[name], dtype=torch.float32) for name in names}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(
                    {self._prefix + name: tensor for name, tensor in found.items()},
                    storage_reader=HuggingFaceStorageReader(path=str(self._path)),
                    no_dist=True,
                )
        except (OSError, SafetensorError, CheckpointException) as error:
            raise self._unreadable(error) from None
        return found

    def _unreadable(self, error: BaseException) -> InputError:
        if not self._path.is_dir():
            return InputError(
                f"{self._path} is not there: a run that goes on drops old checkpoints (checkpoint.keep); "
                "export again, or another step (--step)"
            )
        lines = str(error).strip().splitlines()
        return InputError(
            f"{self._path} cannot be read ({lines[-1] if lines else type(error).__name__}): "
            "copy the checkpoint again, or export another step (--step)"
        )
