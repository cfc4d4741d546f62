"""Where an export is written: whether the place is free, holds the same export already, or something else.

A model directory carries no manifest. What it came from stands in its config.json (an official file: in its metadata);
while it is being written, in a file beside the weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2cli.artifacts.output import differing_keys, write_aside
from dinov2cli.errors import UserError

_MARK = ".dinov2-export.json"
_OWN = ("config.json", "preprocessor_config.json", "README.md")  # the config first: without it a directory is no model
_OTHERS = "choose another place (--overwrite never replaces files of others)"


@dataclass(frozen=True)
class Place:
    """What an export finds at `path`. `state`: 'new', 'continued', 'replaced' or 'already done'."""

    path: Path
    origin: dict[str, Any]
    state: str

    @property
    def done(self) -> bool:
        """Whether there is nothing to do."""
        return self.state == "already done"

    def begin(self) -> None:
        """Remove what an earlier export left, and mark a directory as being written."""
        if self.origin["format"] == "official":
            return
        clear(self.path)
        write_aside(self.path / _MARK, lambda aside: _write_json(aside, self.origin))

    def finish(self) -> None:
        """Take the mark away."""
        if self.path.is_dir():
            (self.path / _MARK).unlink(missing_ok=True)


def check_place(path: Path, origin: dict[str, Any], files: dict[str, int], *, run: Path, overwrite: bool) -> Place:
    """Look at `path`, where an export of `run` described by `origin` is to be written; nothing is changed.

    `files` are the names of its files of weights with the least bytes that each must have; '' is `path` itself.
    Raises UserError where the place does not suit the format or holds anything but an export that may be replaced.
    """
    here = path.resolve()
    if here == run.resolve() or run.resolve() in here.parents:
        raise UserError(f"-o {path} is inside the run {run}; choose a place outside")
    single = origin["format"] == "official"
    if single != (path.suffix in (".pth", ".pt")):
        wanted = "writes one file: give -o NAME.pth" if single else "writes a directory: give -o a name without .pth"
        raise UserError(f"-o {path}: --format {origin['format']} {wanted}")
    if not path.exists() or (path.is_dir() and not single and not any(path.iterdir())):
        return Place(path, origin, "new")
    if path.is_dir() == single:
        found, expected = ("a directory", "a file") if single else ("a file", "a directory")
        raise UserError(f"-o {path} is {found}, expected {expected} or nothing; {_OTHERS}")
    return Place(path, origin, _state(path, origin, files, overwrite))


def _state(path: Path, origin: dict[str, Any], files: dict[str, int], overwrite: bool) -> str:
    """What to do about the export at `path`."""
    from dinov2cli.models.export import read_origin

    whole = path.is_file() or (path / "config.json").is_file()
    found = read_origin(path) if whole else _marked(path)
    if found is None:
        what = "is a file" if path.is_file() else f"holds {sum(1 for _ in path.iterdir())} file(s)"
        raise UserError(f"-o {path} {what} that dinov2 did not write; {_OTHERS}")
    if overwrite:
        return "replaced"
    before = {key: found[key] for key in origin if key in found}
    if before != origin:
        changes = differing_keys(before, origin) if before else ["its origin is not recorded"]
        raise UserError(
            f"-o {path} holds another export: {'; '.join(changes)}; "
            "choose another place, or replace it with --overwrite"
        )
    if not whole:
        return "continued"
    if not all((path / name).is_file() and (path / name).stat().st_size >= size for name, size in files.items()):
        raise UserError(
            f"-o {path} holds this export in files of other sizes, or not all of it; choose another place, "
            "or write it again with --overwrite"
        )
    return "already done"


def clear(path: Path) -> None:
    """Remove from the directory `path` the files that an export consists of, and no others."""
    from dinov2cli.models.shards import is_weight_file

    if not path.is_dir():
        return
    for name in _OWN:
        (path / name).unlink(missing_ok=True)
    for file in list(path.iterdir()):
        if is_weight_file(file.name) or file.name.startswith(".aside-"):
            file.unlink(missing_ok=True)


def _marked(path: Path) -> dict[str, Any] | None:
    """What an export that was stopped was of; None without one."""
    try:
        found = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
