"""Masks and depth maps that lie as files in a folder of their own: `images?mask=../masks` pairs them by name.

`a/1.jpg` belongs to `a/1.png` (or .tif, .tiff, .npy) below that folder. Where the names carry endings, a pattern tells
both: `leftImg8bit?mask=../gtFine/*_gtFine_labelTrainIds.png` puts what an image's name shares with them for the star.
"""

import fnmatch
import os
from collections.abc import Sequence

from dinov2cli.data.spec import DataSpec
from dinov2cli.errors import InputError

TARGET_EXTENSIONS = (".png", ".tif", ".tiff", ".npy")
TARGET_ROLES = ("mask", "depth")


def target_files(spec: DataSpec, root: str, names: Sequence[str]) -> dict[str, list[str]]:
    """For each role that the spec names: a path for every image, '' where an image has none.

    root: the folder of the images, whose paths below it are `names`; a relative folder of targets is relative to it.
    Raises InputError: there is no such folder, or no file in it belongs to any image.
    """
    return {role: _matched(spec, role, root, names) for role in TARGET_ROLES if role in spec.options}


def target_folder(spec: DataSpec, role: str, root: str) -> tuple[str, str]:
    """(absolute folder, pattern of file names or '') that `?role=…` names. Raises InputError where there is none."""
    asked = os.path.normpath(os.path.join(root, spec.options[role]))
    folder, pattern = os.path.split(asked) if "*" in os.path.basename(asked) else (asked, "")
    if not os.path.isdir(folder):
        raise InputError(
            f"{spec.location}: {role}={spec.options[role]} names the folder {folder}, which does not exist; expected "
            "one with a file for every image, relative to the folder of the images"
        )
    if folder == root and not pattern:
        raise InputError(
            f"{spec.location}: {role}={spec.options[role]} is the folder of the images itself; expected another, or "
            f"a pattern that tells the two apart, as {role}=./*_{role}.png"
        )
    return folder, pattern


def without_targets(spec: DataSpec, root: str, names: Sequence[str]) -> list[str]:
    """The names of images: a mask that lies below the images' own folder is none."""
    for role in TARGET_ROLES:
        if role in spec.options:
            folder, pattern = target_folder(spec, role, root)
            prefix = "" if folder == root else f"{os.path.relpath(folder, root)}{os.sep}"
            names = [name for name in names if not (name.startswith(prefix) and _fits(name, pattern))]
    return list(names)


def _fits(name: str, pattern: str) -> bool:
    return not pattern or fnmatch.fnmatchcase(os.path.basename(name), pattern)


def _matched(spec: DataSpec, role: str, root: str, names: Sequence[str]) -> list[str]:
    folder, pattern = target_folder(spec, role, root)
    there = {
        os.path.relpath(os.path.join(below, file), folder)
        for below, _, files in os.walk(folder, followlinks=True)
        for file in files
    }
    found = [_of_pattern(name, pattern, there) if pattern else _of_name(name, there) for name in names]
    if not any(found):
        wanted = _wished(names[0], pattern) if names else "files"
        raise InputError(
            f"{spec.location}: none of its {len(names)} images has a {role} in {folder} ({len(there)} files there); "
            f"expected {wanted} for {names[0] if names else 'them'}"
        )
    return [os.path.join(folder, file) if file else "" for file in found]


def _of_name(name: str, there: set[str]) -> str:
    stem = os.path.splitext(name)[0]
    return next((stem + end for end in TARGET_EXTENSIONS if stem + end in there), "")


def _of_pattern(name: str, pattern: str, there: set[str]) -> str:
    """The file whose part for the star is the longest beginning of the image's name."""
    below, stem = os.path.split(os.path.splitext(name)[0])
    before, _, after = pattern.partition("*")
    files = (os.path.join(below, f"{before}{stem[:length]}{after}") for length in range(len(stem), 0, -1))
    return next((file for file in files if file in there), "")


def _wished(name: str, pattern: str) -> str:
    stem = os.path.splitext(name)[0]
    return pattern if pattern else f"{stem}{' or '.join(TARGET_EXTENSIONS)}"
