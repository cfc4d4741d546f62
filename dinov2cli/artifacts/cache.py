"""Where features are kept between commands: a folder of block stores, the least recently used of which go first."""

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dinov2cli.artifacts.parts import Parts, PartStage

VARIABLE = "DINOV2_CACHE"


def default_cache() -> Path:
    """$DINOV2_CACHE, else `dinov2` in the user's cache folder."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dinov2"


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _looked_at(stage: Path) -> tuple[int, float]:
    """Bytes of a stage and when it was last used; (0, 0) of one that has gone."""
    size, used = 0, 0.0
    with contextlib.suppress(OSError):
        used = stage.stat().st_mtime
    for file in _entries(stage):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    return size, used


class FeatureCache:
    """Stages of blocks below one folder, shared by all commands; safe to delete at any time."""

    def __init__(self, folder: Path) -> None:
        self._parts = Parts(folder)
        self.folder = self._parts.path
        self._used: set[Path] = set()

    def stage(self, name: str, key: Mapping[str, object]) -> PartStage:
        """The stage of this name and key, marked as used now."""
        stage = self._parts.stage(name, key)
        self._used.add(stage.path)
        with contextlib.suppress(OSError):  # not there yet, gone since, or another user's
            os.utime(stage.path)
        return stage

    def trim(self, limit: int) -> int:
        """Delete the least recently used stages, never one of this command, until at most `limit` bytes are left.

        Returns how many bytes were deleted.
        """
        # Another command may delete or write here at the same time.
        found = {path: _looked_at(path) for path in _entries(self.folder)}
        sizes = {path: size for path, (size, _) in found.items()}
        total, deleted = sum(sizes.values()), 0
        for path in sorted(found, key=lambda path: found[path][1]):
            if total - deleted <= limit:
                break
            if path not in self._used:
                shutil.rmtree(path, ignore_errors=True)
                deleted += sizes[path]
        return deleted
