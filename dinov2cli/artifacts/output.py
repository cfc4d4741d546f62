"""An output directory being written: opened, resumed or refused by its manifest; files are renamed into place."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dinov2cli.artifacts import manifest as manifests
from dinov2cli.artifacts.manifest import Manifest
from dinov2cli.errors import InputError, UserError, WorkError

_ASIDE = ".aside-"
_LOCK = ".lock"


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line with the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkError(
                f"the disk is full while writing {path}; free some space and run the same command again to continue"
            ) from None
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot write {path}: {reason}; choose another place with -o") from None


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name in its own folder, flush it to disk, then rename it to `path`."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Numbers of processes repeat on other machines and in containers that share a disk.
        aside = path.with_name(f"{_ASIDE}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
        try:
            write(aside)
            with open(aside, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


class Output:
    """One output directory. Make it with `Output.open`; finish it with `finish`.

    `done` is true when the directory already holds the finished work of the same command with the same settings;
    `resumed` when it holds a part of it.
    """

    def __init__(self, path: Path, manifest: Manifest, *, done: bool, resumed: bool, lock: Any) -> None:
        self.path = path
        self.manifest = manifest
        self.done = done
        self.resumed = resumed
        self._lock = lock
        self._follows = False
        self._written: dict[str, dict[str, Any]] = {}
        self._started = time.monotonic()

    @classmethod
    def open(
        cls,
        path: Path | str,
        kind: str,
        *,
        command: str,
        config: dict[str, Any],
        seed: int | None = None,
        inputs: list[dict[str, Any]] | None = None,
        overwrite: bool = False,
    ) -> "Output":
        """Open `path` for the work described by `config` and `inputs`; create, resume, or find it done.

        `config` holds only what shapes the result. Raises UserError when the place cannot be written, is in use by
        another process, holds something else, or holds the same kind made with other settings (listing the keys).
        """
        path = Path(path)
        config = manifests.plain(config)
        fresh = Manifest(
            kind=kind,
            command=command,
            config=config,
            config_hash=manifests.config_hash(config),
            seed=seed,
            inputs=manifests.plain(inputs or []),
            environment=manifests.environment(),
        )
        old = inspect_output(path, fresh, overwrite=overwrite)
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
            if old is None and overwrite:
                _empty(path)
        if old is not None and old.complete and _files_whole(path, old):
            return cls(path, old, done=True, resumed=False, lock=lock)
        out = cls(path, fresh, done=False, resumed=old is not None, lock=lock)
        if old is not None:
            fresh.seconds = old.seconds
            for stale in path.rglob(f"{_ASIDE}*"):
                stale.unlink(missing_ok=True)
        out._save()
        return out

    @classmethod
    def follow(cls, path: Path | str, manifest: Manifest, *, done: bool, resumed: bool) -> "Output":
        """The same output in another process of the launch: `write` and `finish` there change nothing on disk."""
        out = cls(Path(path), manifest, done=done, resumed=resumed, lock=None)
        out._follows = True
        return out

    def write(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write the file `name` (relative to the directory) through `write(temporary_path)`; return its path."""
        target = self.path / name
        if self._follows:
            return target
        write_aside(target, write)
        self._written[name] = {"size": target.stat().st_size, "sha256": file_sha256(target)}
        return target

    def write_text(self, name: str, text: str) -> Path:
        """Write a UTF-8 text file."""
        return self.write(name, lambda p: _write_text(p, text))

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as indented JSON."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")

    def write_table(self, name: str, table: Any) -> Path:
        """Write a pyarrow Table as Parquet."""
        import pyarrow.parquet as pq

        return self.write(name, lambda p: pq.write_table(table, p))

    def finish(self, rows: int | None = None, **extra: Any) -> Manifest:
        """Record every file with size and sha256, mark the directory complete, and release it."""
        if self._follows:
            self.manifest.rows = rows
            self.manifest.extra.update(manifests.plain(extra))
            return self.manifest
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if file.is_file() and name not in self._written and name not in (manifests.FILE_NAME, _LOCK):
                self._written[name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
        self.manifest.rows = rows
        self.manifest.complete = True
        self.manifest.extra.update(manifests.plain(extra))
        self.manifest.files = dict(sorted(self._written.items()))
        self.manifest.seconds = round(self.manifest.seconds + time.monotonic() - self._started, 3)
        self._save()
        self.close()
        return self.manifest

    def close(self) -> None:
        """Release the directory without finishing it; a later run continues it."""
        if self._lock is not None:
            if not self.manifest.complete:
                self.manifest.seconds = round(self.manifest.seconds + time.monotonic() - self._started, 3)
                with contextlib.suppress(UserError, WorkError):
                    self._save()
            self._lock.close()
            (self.path / _LOCK).unlink(missing_ok=True)
            self._lock = None

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _save(self) -> None:
        write_aside(self.path / manifests.FILE_NAME, lambda p: _write_text(p, self.manifest.to_json()))


def inspect_output(path: Path | str, fresh: Manifest, *, overwrite: bool = False) -> Manifest | None:
    """Return the manifest of earlier work at `path` that `fresh` may continue, or None when the place is free.

    Changes nothing on disk. Raises UserError as `Output.open` does.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"-o {path} is a file, expected a directory; choose another place")
    if not path.is_dir() or not any(child.name != _LOCK for child in path.iterdir()):
        return None
    if not manifests.has_manifest(path):
        count = sum(1 for _ in path.iterdir())
        raise UserError(
            f"-o {path} holds {count} file(s) that dinov2 did not write; choose an empty or a new directory "
            "(--overwrite never deletes files of others)"
        )
    try:
        old = manifests.read_manifest(path)
    except InputError as error:  # a manifest.json of something else, perhaps: never delete what may not be ours
        raise UserError(f"-o {path}: {error}; choose another place (--overwrite does not touch this one)") from None
    if overwrite:
        _refuse_own_inputs(path, fresh)
        return None
    if not old.complete and all(child.name in (_LOCK, manifests.FILE_NAME) for child in path.iterdir()):
        return None  # stopped before its first file: nothing to lose, whatever its settings were
    if old.kind != fresh.kind:
        raise UserError(
            f"-o {path} holds {manifests.describe_kind(old.kind)}; choose another directory, "
            "or replace it with --overwrite"
        )
    changes = differing_keys(old.config, fresh.config) + _input_changes(old.inputs, fresh.inputs)
    if changes:
        raise UserError(
            f"-o {path} was made with other settings: {'; '.join(changes)}; choose another directory, "
            "or start over with --overwrite"
        )
    return old


def _refuse_own_inputs(path: Path, fresh: Manifest) -> None:
    here = path.resolve()
    for entry in fresh.inputs:
        text = str(entry.get("spec", ""))
        place = Path(text if Path(text).exists() else text.partition("?")[0])
        if place.exists() and (place.resolve() == here or here in place.resolve().parents):
            raise UserError(
                f"-o {path} holds the input {text}, which --overwrite would delete first; choose another place"
            )


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """List the keys whose values differ between two nested configs, as `a.b: 1 → 2`."""
    lines: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        name, before, after = f"{prefix}{key}", old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before} → {after}")
    return lines


def _input_changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    lines = [] if len(old) == len(new) else [f"number of inputs: {len(old)} → {len(new)}"]
    for before, after in zip(old, new, strict=False):
        if before.get("spec") != after.get("spec"):
            lines.append(f"input: {before.get('spec')} → {after.get('spec')}")
        elif before != after:
            lines.append(f"input {after.get('spec')} has changed since")
    return lines


def _files_whole(path: Path, manifest: Manifest) -> bool:
    for name, entry in manifest.files.items():
        if "checkpoints/" in name:
            continue  # they serve to continue; whoever deletes those of a finished run saves disk
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"]:
            return False
    return True


def _take_lock(path: Path) -> Any:
    handle = open(path / _LOCK, "a")  # noqa: SIM115 - held until close()
    try:
        # A record lock, which forked loader workers do not inherit: they outlive a killed run by seconds.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        handle.close()
        raise UserError(
            f"-o {path} is being written by another dinov2 process; wait for it or choose another place"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        # A file system without locks, as some of clusters are: whoever runs two commands at once there must know.
    return handle


def _empty(path: Path) -> None:
    for child in path.iterdir():
        if child.name == _LOCK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
