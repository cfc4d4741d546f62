"""`manifest.json`: what an output directory is, what made it, and whether it is whole. Imports nothing heavy."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from dinov2cli.errors import InputError

FILE_NAME = "manifest.json"
SCHEMA = 1

# What each kind is called, what makes it, and what to do with it when it was given where another kind belongs.
_KINDS = {
    "embeddings": ("embeddings", "dinov2 embed", "give it to `dinov2 dedup` or `dinov2 curate`"),
    "selection": (
        "a selection",
        "dinov2 dedup, curate or pack",
        "give it as images to `dinov2 embed`, `dedup`, `curate` or `pretrain`",
    ),
    "run": (
        "a training run",
        "dinov2 pretrain or distill",
        "give it as a model: `dinov2 embed DATA -m RUN` or `dinov2 eval knn RUN`",
    ),
    "results": ("evaluation results", "dinov2 eval", "read its report.html or results.json"),
    "comparison": ("a comparison of results", "dinov2 eval compare", "read its report.html or comparison.json"),
    "demo": ("a demo's output", "dinov2 demo", "give one of the directories inside it"),
}


@dataclass
class Manifest:
    """The content of one `manifest.json`; `extra` holds the fields that belong to one kind only (as `dim`)."""

    kind: str
    schema: int = SCHEMA
    complete: bool = False
    rows: int | None = None
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    seed: int | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the manifest as indented JSON, keys in the order of the fields."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str) + "\n"


def plain(value: Any) -> Any:
    """Return a value as it comes back from JSON (tuples as lists, paths as text), so that it equals what was stored."""
    return json.loads(json.dumps(value, default=str))


def recorded_config(path: Path | str) -> dict[str, Any] | None:
    """Return the settings that the directory `path` was begun with; None where there is nothing that can be read."""
    try:
        return read_manifest(path).config if has_manifest(path) else None
    except InputError:
        return None


def config_hash(config: dict[str, Any]) -> str:
    """Return the sha256 of a resolved config, independent of key order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def environment() -> dict[str, str]:
    """Return the versions that shape a result, read from package metadata so that nothing heavy is imported."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("dinov2cli", "torch", "numpy", "datasets", "faiss-cpu", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_kind(kind: str) -> str:
    """Return a noun with article for a kind of artefact: `run` → `a training run`."""
    return _KINDS.get(kind, (f"an artefact of kind '{kind}'", "", ""))[0]


def has_manifest(path: Path | str) -> bool:
    """Tell whether `path` is a directory with a manifest."""
    return (Path(path) / FILE_NAME).is_file()


def read_manifest(path: Path | str) -> Manifest:
    """Read `path/manifest.json`.

    Raises InputError when it is absent, unreadable, or written by a newer schema.
    """
    path = Path(path)
    file = path / FILE_NAME
    if not file.is_file():
        what = "does not exist" if not path.exists() else f"has no {FILE_NAME}, so it was not written by dinov2"
        raise InputError(f"{path} {what}; give a directory made by dinov2 embed, dedup, curate, pretrain or eval")
    try:
        raw = json.loads(file.read_text())
        known = {f.name for f in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
        schema = int(manifest.schema)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} cannot be read as a manifest ({type(error).__name__}); the directory is damaged: make it again"
        ) from None
    if schema > SCHEMA:
        raise InputError(
            f"{path} has schema {schema}, this program reads up to {SCHEMA}; it was written by a newer dinov2cli: "
            "upgrade with `pip install -U dinov2cli`"
        )
    return manifest


def require_kind(path: Path | str, *kinds: str, complete: bool = True) -> Manifest:
    """Return the manifest of `path` if its kind is one of `kinds`.

    Raises InputError when it is another kind, naming the command to use instead, or when it was left unfinished.
    """
    manifest = read_manifest(path)
    if manifest.kind not in kinds:
        noun, _, cure = _KINDS.get(manifest.kind, (describe_kind(manifest.kind), "", "give another directory"))
        wanted = " or ".join(f"{describe_kind(k)} (made by {_KINDS[k][1]})" for k in kinds)
        raise InputError(f"{path} is {noun}, expected {wanted}; {cure}")
    if complete and not manifest.complete:
        raise InputError(
            f"{path} is unfinished (its run was stopped); "
            f"run `{manifest.command or _KINDS[manifest.kind][1]}` again to finish it"
        )
    return manifest
