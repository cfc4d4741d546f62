"""The frozen teacher's tokens kept on disk, for training that sees the same views of its images again (data.views).

    tokens.f16    rows [crops, 1 + N, D] of float16, one for each view of each image, a sparse file
    marks         what the rows are of, and a bit for each that is there

A row counts as there once its mark is: `flush` brings the rows to the disk first and then replaces the marks, so that a
process killed at any moment loses rows but never leaves a wrong one.
"""

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2cli.errors import WorkError
from dinov2cli.train.teacher import TeacherTokens

_DATA, _MARKS, _FORMAT = "tokens.f16", "marks", 1
_LARGEST = torch.finfo(torch.float16).max


def bytes_needed(*, images: int, views: int, crops: int, tokens: int, width: int) -> int:
    """Bytes of a full cache. Arguments as of `TokenCache`."""
    return images * views * (crops * tokens * width * 2) + len(_header("")) + -(-images * views // 8)


class TokenCache:
    """Tokens of `images` x `views`, each of `crops` crops with `tokens` (1 + N: class token and patches) of `width`.

    `key` says what they are of: the teacher, its precision and size, the images, crops, colours and seed. What is found
    in `folder` under another key, or damaged, is dropped, and `restarted` set. For one process at a time. Raises
    WorkError where the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        images: int,
        views: int,
        crops: int,
        tokens: int,
        width: int,
        key: Mapping[str, object],
    ) -> None:
        self.folder, self.images, self.views = Path(folder), images, views
        self._row = (crops, tokens, width)
        self._row_bytes = 2 * crops * tokens * width
        self.bytes_needed = bytes_needed(images=images, views=views, crops=crops, tokens=tokens, width=width)
        self._header = _header(json.dumps([_FORMAT, images, views, *self._row, dict(key)], sort_keys=True, default=str))
        self.restarted = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._there, self._fd = self._open()
            # Only for reading: a write through the mapping to a full disk would end the process by a signal.
            shape = (images * views, *self._row)
            self._stored = np.memmap(self.folder / _DATA, dtype=np.float16, mode="r", shape=shape)
        except (OSError, OverflowError) as error:
            raise self._unwritable(error) from error

    def __len__(self) -> int:
        """Number of rows that are there."""
        return int(self._there.sum())

    def fetch(
        self,
        sample: Tensor,
        view: Tensor,
        compute: Callable[[Tensor], TeacherTokens],
        *,
        device: torch.device | str = "cpu",
    ) -> TeacherTokens:
        """Tokens of the views `view` [B] of the images `sample` [B] (int64): float32 [C, D] and [C, N, D] on `device`.

        C = crops * B, crop after crop. `compute` is asked for the rows (int64 [b], positions in the batch) that are not
        there, if any, and gives their tokens in the same layout. All rows come back as they were stored, rounded to
        float16: a row is the same numbers whether it was there or not.

        Raises WorkError where the disk is full or a token is not finite or beyond float16's range, ValueError for
        images, views or tokens that are none of this cache's.
        """
        places = self._places(sample, view)
        missing = np.flatnonzero(~self._there[places])
        if len(missing):
            self._store(places[missing], compute(torch.from_numpy(missing)))
        rows = torch.from_numpy(self._stored[places]).to(device).float().transpose(0, 1).flatten(0, 1)
        return TeacherTokens(rows[:, 0], rows[:, 1:])

    def flush(self) -> None:
        """Bring what is there to the disk and mark it: a later process finds it. Raises WorkError if that fails."""
        path = self.folder / _MARKS
        partial = path.with_name(f".{_MARKS}.partial")
        try:
            os.fsync(self._fd)
            with open(partial, "wb") as file:
                file.write(self._header + np.packbits(self._there).tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Flush, and let go of the files."""
        self.flush()
        os.close(self._fd)

    def _open(self) -> tuple[np.ndarray, int]:
        """Marks of the rows, and the data file, both as they were left or empty."""
        data, marks = self.folder / _DATA, self.folder / _MARKS
        size = self.images * self.views * self._row_bytes
        there = self._read_marks()
        known = there is not None and data.is_file() and data.stat().st_size == size
        self.restarted = not known and marks.exists()
        if not known:
            # The marks go first, for good: they must never be found beside rows of another key.
            marks.unlink(missing_ok=True)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        file = os.open(data, os.O_RDWR | os.O_CREAT | (0 if known else os.O_TRUNC), 0o644)
        try:
            os.ftruncate(file, size)
        except (OSError, OverflowError):
            os.close(file)
            raise
        return there if known and there is not None else np.zeros(self.images * self.views, dtype=bool), file

    def _read_marks(self) -> np.ndarray | None:
        """Which rows are there; None where the marks are missing, of another key or damaged."""
        path, rows = self.folder / _MARKS, self.images * self.views
        if not path.is_file():
            return None
        stored = path.read_bytes()
        start = len(self._header)
        if stored[:start] != self._header or len(stored) != start + -(-rows // 8):
            return None
        return np.unpackbits(np.frombuffer(stored, dtype=np.uint8, offset=start), count=rows).astype(bool)

    def _places(self, sample: Tensor, view: Tensor) -> np.ndarray:
        samples, views = (part.detach().cpu().numpy().astype(np.int64) for part in (sample, view))
        for name, values, count in (("image", samples, self.images), ("view", views, self.views)):
            if values.ndim != 1 or ((values < 0) | (values >= count)).any():
                raise ValueError(f"{name}s {values.tolist()}: expected a row of numbers from 0 to {count - 1}")
        if len(samples) != len(views):
            raise ValueError(f"{len(samples)} images and {len(views)} views, expected as many")
        return samples * self.views + views

    def _store(self, places: np.ndarray, found: TeacherTokens) -> None:
        crops, tokens, width = self._row
        together = torch.cat([found.cls[:, None], found.patches], dim=1).detach()
        if tuple(together.shape) != (crops * len(places), tokens, width):
            raise ValueError(f"tokens {list(together.shape)}, expected {[crops * len(places), tokens, width]}")
        self._check_range(together)
        rows = together.half().unflatten(0, (crops, -1)).transpose(0, 1).contiguous().cpu().numpy()
        for place, row in zip(places.tolist(), rows, strict=True):
            try:
                self._write(memoryview(row).cast("B"), place * self._row_bytes)
            except OSError as error:
                raise self._unwritable(error) from error
        self._there[places] = True

    def _write(self, content: memoryview, offset: int) -> None:
        while len(content):
            written = os.pwrite(self._fd, content, offset)
            content, offset = content[written:], offset + written

    def _check_range(self, tokens: Tensor) -> None:
        if tokens.numel() == 0:
            return
        largest = float(tokens.float().abs().max())  # NaN, if there is one
        if not largest <= _LARGEST:
            raise WorkError(
                f"the teacher's tokens reach {largest:g}, the cache holds float16 up to {_LARGEST:g}: "
                "train without it (teacher.cache=false), or with the teacher in float32 if they are not finite"
            )

    def _unwritable(self, error: OSError | OverflowError) -> WorkError:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        return WorkError(
            f"cannot write the teacher's tokens to {self.folder}: {reason}; all of them take "
            f"{self.bytes_needed / 1e9:.3g} GB: make room and run the same command to continue from the last "
            "checkpoint, or train without them (teacher.cache=false)"
        )


def _header(described: str) -> bytes:
    return sha256(described.encode()).hexdigest().encode()
