"""A bounded folder of files that any process of a machine may make, and each of which is made once."""

import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from filelock import FileLock

from dinov2cli.errors import WorkError

_LOCKS = 64
_ABANDONED_SECONDS = 3600.0


class BlockCache:
    """At most `keep` files in a folder; beyond that the least recently asked for are removed.

    Files are written aside and renamed, under a lock: a file that is there is whole, and two processes that ask for it
    wait for one writer. Removing a file that others have mapped is harmless: its pages live until they let go. What a
    killed process leaves is one file '….partial' and locks, which are empty, few and free again at once; partials are
    removed after an hour.

    Args:
        folder: made when the first file is.
        keep: number of files, at least 1.
    """

    def __init__(self, folder: str, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def get(self, name: str, write: Callable[[BinaryIO], None]) -> str:
        """Path of a file, made by `write` if it is not there. It may be removed at any time: open it at once.

        Raises:
            WorkError: the folder cannot be written. Whatever `write` raises passes.
        """
        path = os.path.join(self.folder, name)
        if _touch(path):
            return path
        # A few locks for all files: one each would leave as many lock files as there are blocks in the set.
        lock = os.path.join(self.folder, f"{zlib.crc32(name.encode()) % _LOCKS:02d}.lock")
        partial = f"{path}.partial"
        try:
            os.makedirs(self.folder, exist_ok=True)
            file_lock = FileLock(lock)
            file_lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if not _touch(path):
                self._make(path, partial, write)
        finally:
            file_lock.release()
        return path

    def discard(self, name: str) -> None:
        """Remove a file, for example a damaged one."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, name))

    def _make(self, path: str, partial: str, write: Callable[[BinaryIO], None]) -> None:
        try:
            file = open(partial, "wb")  # noqa: SIM115 - an error of opening is told apart from one of writing
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            write(file)
            file.flush()
            file.close()
            os.replace(partial, path)
        except BaseException as error:
            with suppress(OSError):  # what a full disk did not take is still in the buffer, and would be refused again
                file.close()
            with suppress(OSError):
                os.unlink(partial)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        found: list[tuple[float, str]] = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(".partial"):
                    if time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                        os.unlink(entry.path)
                elif not entry.name.endswith(".lock"):
                    found.append((entry.stat().st_mtime, entry.path))
        for _, path in sorted(found, reverse=True)[self.keep :]:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _unwritable(self, error: OSError) -> WorkError:
        return WorkError(
            f"{self.folder}: cannot be written ({error.strerror or error}); "
            "set HF_DATASETS_CACHE to a folder that can, on a local disk"
        )


def _touch(path: str) -> bool:
    """Mark a file as used now; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # another user's file, or a disk for reading only: it can be used, but not marked
        return os.path.exists(path)
    return True
