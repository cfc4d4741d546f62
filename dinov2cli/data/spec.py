"""The DATA grammar: one string names a set of images, the same way in every command.

`parse_spec` looks at the string and at the names on disk, never into an image, and imports nothing heavy.
Errors are `InputError`s of one line: what was given, what was found there, what to do.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from dinov2cli.artifacts.manifest import has_manifest, read_manifest
from dinov2cli.errors import InputError

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
    | {".pbm", ".pnm", ".jp2", ".avif", ".tga"}
    # Pillow alone cannot read these: skipped and named, rather than passed over in silence.
    | {".heic", ".heif", ".hif"}
)
TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz")
PARQUET_EXTENSIONS = (".parquet", ".pq")
LIST_EXTENSIONS = (".txt", ".lst", ".list")

COLUMN_KEYS = ("image", "label", "mask", "depth", "group", "is_query")
DEMOS: dict[str, tuple[str, ...]] = {
    "photos": ("split", "count", "size", "seed", "copies"),
    "digits": ("split", "count", "size"),
}
_KEYS: dict[str, tuple[str, ...]] = {
    "folder": (*COLUMN_KEYS, "split", "stream"),
    "parquet": (*COLUMN_KEYS, "split", "stream"),
    "tar": COLUMN_KEYS,
    "list": ("label",),
    "hub": (*COLUMN_KEYS, "split", "config", "revision", "stream"),
    "selection": ("label", "group", "is_query"),
    "embeddings": ("label", "group", "is_query"),
}
# What a directory of another kind is good for, for the user who gave it as DATA.
_NOT_IMAGES = {
    "run": "a run directory (made by `dinov2 pretrain`), it holds a model and no images: use it as MODEL, "
    "as in `dinov2 embed DATA -m {path} -o OUT`",
    "results": "a results directory (made by `dinov2 eval`), it holds figures and no images: read {path}/report.html",
    "demo": "the output of `dinov2 demo`, it holds the results of several commands: give one of the directories in it",
}
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class DataSpec:
    """One parsed DATA string.

    kind: folder | tar | parquet | list | hub | selection | embeddings | demo. A folder that turns out to hold only
    parquet or tar files is opened as such by `open_source`.
    location: path as the user wrote it, hub name, or demo name. options: the `?key=value` part.
    """

    kind: str
    location: str
    options: dict[str, str] = field(default_factory=dict)

    def canonical(self) -> str:
        """The DATA string that opens the same images from any working directory: paths made absolute."""
        location = self.location
        if self.kind == "hub":
            location = "hf:" + (str(Path(location).resolve()) if is_local_hub(location) else location)
        elif self.kind == "demo":
            location = "demo:" + location
        else:
            location = os.path.abspath(location)
        options = "&".join(f"{key}={quote(value, safe='/:, ')}" for key, value in sorted(self.options.items()))
        return f"{location}?{options}" if options else location

    def files(self) -> list[str]:
        """Paths after brace expansion, in order. Raises InputError naming the files that are missing."""
        paths = expand_braces(self.location)
        missing = [path for path in paths if not os.path.exists(path)]
        if missing:
            shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise InputError(
                f"{self.location}: {len(missing)} of its {len(paths)} files do not exist ({shown}); "
                "correct the range in braces or fetch the missing shards"
            )
        return paths


def parse_spec(text: str) -> DataSpec:
    """Parse one DATA string.

    Raises:
        InputError: nothing is there, it is of a kind that holds no images, or a `?key` is unknown.
    """
    if not text:
        raise InputError(
            "DATA is empty; expected a folder, a .tar, a .parquet, a text file of paths, hf:owner/name or demo:photos"
        )
    location, options = _split_options(text)
    if text.startswith("demo:"):
        return _demo_spec(location.removeprefix("demo:"), options)
    if text.startswith("hf:"):
        name = location.removeprefix("hf:")
        if not name:
            raise InputError("'hf:' names no dataset; write hf:owner/name, for example hf:frgfm/imagenette?split=train")
        if is_local_hub(name) and not os.path.isdir(name):
            raise InputError(_missing(name, "a local copy of a hub dataset"))
        kind, location = "hub", name
    else:
        kind = _kind_on_disk(location)
    _check_keys(kind, location, options)
    return DataSpec(kind, location, options)


def is_local_hub(name: str) -> bool:
    """True when the name behind `hf:` is a directory on disk (`hf:./copy`, `hf:/data/copy`), not a hub name."""
    return name.startswith((".", "/"))


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..015}` (zero-padded as written) and `{a,b}` as a shell does; other text is kept.

    Raises:
        InputError: the two ends of a range are not numbers.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    choices: Sequence[str]
    if ".." in body:
        first, _, last = body.partition("..")
        if not (first.isdigit() and last.isdigit()):
            raise InputError(f"{pattern}: '{{{body}}}' is not a range of numbers; write for example {{000..015}}")
        step = 1 if int(last) >= int(first) else -1
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]


def suggestion(word: str, words: Sequence[str]) -> str:
    """' Did you mean …?' ready to append, or an empty string."""
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    if "?" not in text or os.path.exists(text):  # a file may really be called "what?.parquet"
        return text, {}
    location, _, query = text.rpartition("?")
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise InputError(
                f"{text}: '{part}' after the '?' is not key=value; write for example {location}?label=label"
            )
        options[key] = unquote(value)
    return location, options


def _demo_spec(name: str, options: dict[str, str]) -> DataSpec:
    if name not in DEMOS:
        known = " and ".join(f"demo:{demo}" for demo in DEMOS)
        raise InputError(f"demo:{name}: there is no such demo set; the demo sets are {known}")
    _reject_unknown(f"demo:{name}", options, DEMOS[name])
    return DataSpec("demo", name, options)


def _kind_on_disk(location: str) -> str:
    lower = location.lower()
    if _BRACES.search(location) and not os.path.exists(location):
        if lower.endswith(TAR_EXTENSIONS):
            return "tar"
        if lower.endswith(PARQUET_EXTENSIONS):
            return "parquet"
        raise InputError(
            f"{location}: braces are expanded for .tar and .parquet files only; end the pattern with one of them"
        )
    if not os.path.exists(location):
        raise InputError(_missing(location, "a folder, a .tar, a .parquet or a text file of paths"))
    if os.path.isdir(location):
        return _kind_of_directory(location)
    if lower.endswith(TAR_EXTENSIONS):
        return "tar"
    if lower.endswith(PARQUET_EXTENSIONS):
        return "parquet"
    suffix = Path(lower).suffix
    if suffix in LIST_EXTENSIONS or suffix in IMAGE_EXTENSIONS:
        return "list"
    found = f"a {suffix} file" if suffix else "a file without extension"
    unpack = "; unpack it and give the folder" if suffix in (".zip", ".7z", ".rar") else ""
    raise InputError(
        f"{location}: {found} is not a set of images{unpack or ''}; expected a folder, a .tar, a .parquet, "
        "or a text file of paths (.txt)"
    )


def _kind_of_directory(path: str) -> str:
    try:
        kind = read_manifest(path).kind if has_manifest(path) else "folder"
    except (InputError, OSError):  # somebody else's manifest.json; a closed folder is told of later
        return "folder"
    if kind in _NOT_IMAGES:
        raise InputError(f"{path}: this is {_NOT_IMAGES[kind].format(path=path)}")
    return kind if kind in ("selection", "embeddings") else "folder"


def _check_keys(kind: str, location: str, options: dict[str, str]) -> None:
    _reject_unknown(location, options, _KEYS[kind])


def _reject_unknown(location: str, options: dict[str, str], known: Sequence[str]) -> None:
    for key in options:
        if key not in known:
            raise InputError(
                f"{location}: unknown key '{key}' after the '?'{suggestion(key, known)}; known here: {', '.join(known)}"
            )


def _missing(location: str, expected: str) -> str:
    path = Path(location)
    parent = path.parent
    if not parent.is_dir():
        return f"{location}: no such path, its folder {parent} does not exist either; expected {expected}"
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        names = []
    hint = suggestion(path.name, names)
    if not hint and re.fullmatch(r"[\w.-]+/[\w.-]+", location):
        hint = f"; for a dataset of the Hugging Face hub write hf:{location}"
    return f"{location}: no such file or folder; expected {expected}{hint}"
