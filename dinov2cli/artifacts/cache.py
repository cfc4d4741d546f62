"""Where features are kept between commands: a folder of block stores, the least recently used of which go first."""

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
        if stage.path.is_dir():
            os.utime(stage.path)
        return stage

    def trim(self, limit: int) -> int:
        """Delete the least recently used stages, never one of this command, until at most `limit` bytes are left.

        Returns how many bytes were deleted.
        """
        stages = [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []
        sizes = {path: sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in stages}
        total, deleted = sum(sizes.values()), 0
        for path in sorted(stages, key=lambda path: path.stat().st_mtime):
            if total - deleted <= limit:
                break
            if path not in self._used:
                shutil.rmtree(path, ignore_errors=True)
                deleted += sizes[path]
        return deleted
