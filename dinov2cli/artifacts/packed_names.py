"""File names for packed images: made from their ids, unique, and never outside the folder they are put in."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

_MAX_PART = 100  # bytes of one folder or file name; file systems take 255, less what is put before and behind
_MAX_WHOLE = 240
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|#{}\[\]]')
_SUFFIX = re.compile(r"(?<=.)\.[A-Za-z0-9]{1,5}$")
_LIKE_A_FILE = re.compile(r"\.(jpg|png|webp)$", re.IGNORECASE)


def safe_names(ids: Iterable[str]) -> list[str]:
    """A relative path with '/' for each id, without extension and without a dot in its last part.

    'cat/1.jpg' gives 'cat/1'. Absolute paths, '..', hidden names, characters that shells or file systems treat
    specially and over-long names are replaced; a name that an earlier id has taken (also in other case) is told apart
    by a digest of the id. The same ids in the same order give the same names.
    """
    taken: set[str] = set()
    names = []
    for identifier in ids:
        name = base = _safe(identifier)
        number = 1
        while (key := unicodedata.normalize("NFC", name).casefold()) in taken:
            name = f"{base}-{_digest(identifier)}" + (f"-{number}" if number > 1 else "")
            number += 1
        taken.add(key)
        names.append(name)
    return names


def _safe(identifier: str) -> str:
    parts = [part for part in identifier.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        return "image"
    *folders, last = parts
    # WebDataset ends the key of a sample at the first dot of the last part.
    stem = _SUFFIX.sub("", last).replace(".", "_")
    name = "/".join([*(_part(_LIKE_A_FILE.sub(r"_\1", folder)) for folder in folders), _part(stem)])
    return name if len(name.encode()) <= _MAX_WHOLE else f"{_part(parts[0])}/{_digest(identifier)}"


def _part(text: str) -> str:
    # Hidden names and macOS' shadow folder would be passed over when the folder is read as images.
    clean = _UNSAFE.sub("_", text).replace("__MACOSX", "MACOSX").strip()
    clean = "_" + clean[1:] if clean.startswith(".") else clean or "_"
    if len(clean.encode()) <= _MAX_PART:
        return clean
    return clean.encode()[: _MAX_PART - 9].decode(errors="ignore") + f"-{_digest(text)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
