"""Images that lie as files on disk: a folder, or a text file of paths.

`datasets`' imagefolder builder is not used: it guesses splits and labels from folder names and drops what it does not
understand. The sorted list of paths goes into a `datasets.Dataset` instead.
"""

import os
from collections import Counter
from functools import cached_property

import datasets
import pyarrow as pa

from dinov2cli.data.source import ImageSource, hash_files
from dinov2cli.data.spec import IMAGE_EXTENSIONS, PARQUET_EXTENSIONS, TAR_EXTENSIONS, DataSpec
from dinov2cli.data.tables import read_file, split_files
from dinov2cli.errors import InputError


class FileSource(ImageSource):
    """Image files on disk, named by their path below `root`."""

    def __init__(self, spec: DataSpec, kind: str, root: str, names: list[str]) -> None:
        super().__init__(spec, kind)
        self._root = root
        # In Arrow, not as Python strings: forked workers share them without copying pages on reference counts.
        # As bytes: a file name need not be UTF-8.
        files = pa.array([os.fsencode(name) for name in names], pa.large_binary())
        self._files = datasets.Dataset(pa.table({"image": files}))

    def __len__(self) -> int:
        return len(self._files)

    def name(self, row: int) -> str:
        return self._file(row).decode("utf-8", "backslashreplace")

    def read(self, row: int, role: str = "image") -> bytes:
        del role
        return read_file(os.path.join(os.fsencode(self._root), self._file(row)), self.name(row))

    def _file(self, row: int) -> bytes:
        return bytes(self._files.data.column("image")[int(row)].as_py())

    @cached_property
    def ids(self) -> list[str]:
        files = self._files.data.column("image").to_pylist()
        return [file.decode("utf-8", "backslashreplace") for file in files]

    @cached_property
    def paths(self) -> list[str]:
        return [os.path.join(self._root, name) for name in self.ids]

    def content_hash(self) -> str:
        root = os.fsencode(self._root)
        files = self._files.data.column("image").to_pylist()
        return hash_files((name, os.path.join(root, file)) for name, file in zip(self.ids, files, strict=True))


def open_folder(spec: DataSpec) -> ImageSource:
    """Every image below a folder, sorted by path; a folder that holds only Parquet or tar files is opened as those.

    Raises:
        InputError: nothing in it, or no images (the message counts what is there instead).
    """
    root = os.path.abspath(spec.location)
    label = spec.options.get("label")
    images, others = scan_folder(root)
    if images:
        for key in spec.options:
            if key != "label":
                raise InputError(
                    f"{spec.location}: '{key}=' names a column, and a folder of images has none; "
                    f"leave it out{', and give the sub-folder itself' if key == 'split' else ''}"
                )
        if label not in (None, "folder"):
            raise InputError(
                f"{spec.location}: a folder of images has no column '{label}'; its labels are ?label=folder"
            )
        return FileSource(spec, "folder", root, images)
    parquet = [os.path.join(root, name) for name in others if name.lower().endswith(PARQUET_EXTENSIONS)]
    if parquet:
        from dinov2cli.data.tables import open_parquet

        return open_parquet(spec, split_files(parquet, spec.options.get("split"), spec.location))
    tars = [os.path.join(root, name) for name in others if name.lower().endswith(TAR_EXTENSIONS)]
    if tars:
        from dinov2cli.data.tar import open_tar

        return open_tar(spec, tars)
    if not others:
        raise InputError(
            f"{spec.location}: the folder is empty; expected images ({_some_extensions()}) in it or below it"
        )
    counts = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in others)
    found = ", ".join(f"{count} {extension}" for extension, count in counts.most_common(5))
    raise InputError(
        f"{spec.location}: no image among its {len(others)} file{'s' if len(others) > 1 else ''} ({found}); "
        f"expected {_some_extensions()}, .parquet or .tar"
    )


def scan_folder(root: str) -> tuple[list[str], list[str]]:
    """(images, other files) below a folder as sorted paths relative to it, with '/' between parts.

    Hidden files and folders and macOS' `__MACOSX` are passed over; linked folders are followed, each once.
    """
    images: list[str] = []
    others: list[str] = []
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        kept = []
        for child in sorted(folders):
            if child.startswith(".") or child == "__MACOSX":
                continue
            path = os.path.join(folder, child)
            if os.path.islink(path):
                target = os.path.realpath(path)
                if target in seen:
                    continue
                seen.add(target)
            kept.append(child)
        folders[:] = kept
        below = os.path.relpath(folder, root)
        prefix = "" if below == "." else below.replace(os.sep, "/") + "/"
        for name in names:
            if not name.startswith("."):
                is_image = os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
                (images if is_image else others).append(prefix + name)
    return sorted(images), sorted(others)


def open_list(spec: DataSpec) -> ImageSource:
    """The images named in a text file, one path a line, absolute or relative to that file's folder; or one image file.

    Blank lines and lines that begin with '#' are passed over; a path named twice counts once. With `?label=folder`
    the first folder of each relative path is the label.

    Raises:
        InputError: no path in it, none of them exists, or the file is not text.
    """
    path = os.path.abspath(spec.location)
    root = os.path.dirname(path)
    label = spec.options.get("label")
    if label not in (None, "folder"):
        raise InputError(f"{spec.location}: a list of paths has no column '{label}'; its labels are ?label=folder")
    if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS:
        return FileSource(spec, "list", root, [os.path.basename(path)])
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise InputError(f"{spec.location}: not a text file in UTF-8; expected one image path a line") from error
    except OSError as error:
        raise InputError(f"{spec.location}: cannot be opened ({error.strerror})") from error
    # Paths below the list's own folder become relative, so that ids and labels do not depend on where it lies.
    names = [_below(line, root) for line in lines if line and not line.startswith("#")]
    names = list(dict.fromkeys(names))
    if not names:
        raise InputError(f"{spec.location}: the list is empty; expected one image path a line")
    if not any(os.path.exists(os.path.join(root, name)) for name in names):
        raise InputError(
            f"{spec.location}: none of its {len(names)} paths exists (first: {names[0]}); "
            f"expected one image path a line, absolute or relative to {root}"
        )
    return FileSource(spec, "list", root, names)


def _below(line: str, root: str) -> str:
    name = os.path.normpath(line)
    if os.path.isabs(name) and name.startswith(root + os.sep):
        name = os.path.relpath(name, root)
    return name.replace(os.sep, "/")


def _some_extensions() -> str:
    return ".jpg, .png, .webp, .tif, …"
