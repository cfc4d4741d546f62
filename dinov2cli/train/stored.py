"""What lies in a checkpoint: the tensors of a backbone or a head, one by one, without the others beside them."""

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

# Names of the tensors of a network begin so in each part; see `tensors_of` and `SSLModel.teacher_side`. In a checkpoint
# of several students the student's name and a dot come first.
_NETWORK = {"teacher": "network.", "student": ""}
PARTS = tuple(_NETWORK)
_EXPORT = "export another step (--step)"


class StoredTensors:
    """The tensors of one module of a network in one part of a checkpoint, written by any number of ranks.

    `module` is `backbone`, `dino_head` or `ibot_head`; `part` is 'teacher' or 'student'; `name` is that of the student,
    where there are several. `shapes` are those of the module's tensors by their names in it, {} where the network has
    no such module; opening reads no tensor. `cure` ends the messages: what else to do about a checkpoint that cannot be
    read. Raises InputError where the part is missing, damaged, or without some of its shards.
    """

    def __init__(
        self, checkpoint: Path, module: str, part: str = "teacher", *, name: str = "", cure: str = _EXPORT
    ) -> None:
        self._path, self._cure = checkpoint / part, cure
        self._prefix = f"{name}." * bool(name) + f"{_NETWORK[part]}{module}."
        own = {
            key.removeprefix(self._prefix): held
            for key, held in _headers(self._path, cure).items()
            if key.startswith(self._prefix)
        }
        for key, held in own.items():
            # A lost shard leaves a hole, which the reader would fill with whatever is in memory.
            chunks = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in held.chunks}
            if sum(chunks.values()) != math.prod(held.size):
                raise InputError(
                    f"{self._path}: only a part of {key} is there, a shard is missing: "
                    f"copy the checkpoint again, or {cure}"
                )
        self.shapes: dict[str, torch.Size] = {key: held.size for key, held in own.items()}

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
            raise _unreadable(self._path, self._cure, error) from None
        return found


class StoredBackbone(StoredTensors):
    """The backbone in one part of a checkpoint. As `StoredTensors`, but InputError also where there is none."""

    def __init__(self, checkpoint: Path, part: str = "teacher", *, name: str = "", cure: str = _EXPORT) -> None:
        super().__init__(checkpoint, "backbone", part, name=name, cure=cure)
        if not self.shapes:
            raise InputError(f"{self._path} holds no backbone: its files are missing; {cure}")


def stored_students(checkpoint: Path, part: str = "teacher", *, cure: str = _EXPORT) -> list[str]:
    """Names of the students in a checkpoint, sorted; [""] where a model alone was trained, [] where there is none.

    Raises InputError where the part is missing or damaged.
    """
    inside = f"{_NETWORK[part]}backbone."
    found = {key[: key.index(inside)] for key in _headers(checkpoint / part, cure) if inside in key}
    return sorted(prefix.removesuffix(".") for prefix in found if not prefix or prefix.endswith("."))


def _headers(path: Path, cure: str) -> dict[str, TensorStorageMetadata]:
    """Shapes and places of all tensors of a part."""
    try:
        stored = HuggingFaceStorageReader(path=str(path)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _unreadable(path, cure, error) from None
    return {name: held for name, held in stored.items() if isinstance(held, TensorStorageMetadata)}


def _unreadable(path: Path, cure: str, error: BaseException) -> InputError:
    if not path.is_dir():
        again = "export again, or another step (--step)" if cure == _EXPORT else cure
        return InputError(f"{path} is not there: a run that goes on drops old checkpoints (checkpoint.keep); {again}")
    lines = str(error).strip().splitlines()
    reason = lines[-1] if lines else type(error).__name__
    return InputError(f"{path} cannot be read ({reason}): copy the checkpoint again, or {cure}")
