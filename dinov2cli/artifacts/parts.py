"""Finished blocks of a long command, kept inside its output until it is complete."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.artifacts.output import write_aside

FOLDER = "parts"


class Parts:
    """The `parts/` folder of an output: one folder per stage, one `.npz` file per finished block.

    A run that is killed at any moment loses the blocks it was at and no other; the same command loads the rest. The
    folder's name holds a hash of what the stage's results depend on, so that parts of other settings are not taken.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / FOLDER

    def stage(self, name: str, key: Mapping[str, object]) -> "PartStage":
        """The stage `name` whose results depend on `key` (plain values)."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return PartStage(self.path / f"{name}-{digest}")

    def remove(self) -> None:
        """Delete all parts: the command has finished and its result is written."""
        shutil.rmtree(self.path, ignore_errors=True)


class PartStage:
    """Finished blocks of one stage, by the row at which they begin."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, start: int) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays of a block; None where it is not there, or its file is truncated or damaged."""
        try:
            with np.load(self._file(start), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}  # reading checks every array's checksum
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
            return None

    def save(self, start: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write the arrays of a block aside and rename them into place. Raises WorkError on a full disk."""

        def write(path: Path) -> None:
            with open(path, "wb") as handle:
                np.savez(handle, allow_pickle=False, **arrays)

        write_aside(self._file(start), write)

    def starts(self) -> list[int]:
        """Rows at which finished blocks begin, sorted."""
        return sorted(int(file.stem) for file in self.path.glob("[0-9]*.npz"))

    def _file(self, start: int) -> Path:
        return self.path / f"{start:012d}.npz"
