"""Images that lie as files on disk: a folder, or a text file of paths.

`datasets`' imagefolder builder is not used: it guesses splits and labels from folder names and drops what it does not
understand. Nor is `datasets` imported, which would cost a second and 80 MB for a sorted list of paths.
"""

import logging
import os
import re
import stat
from collections import Counter
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import pyarrow as pa

from dinov2cli.data.bad import BadImage
from dinov2cli.data.beside import TARGET_ROLES, target_files, without_targets
from dinov2cli.data.source import ImageSource, hash_files
from dinov2cli.data.spec import IMAGE_EXTENSIONS, PARQUET_EXTENSIONS, TAR_EXTENSIONS, DataSpec
from dinov2cli.errors import InputError

logger = logging.getLogger(__name__)

# 16 bytes for each of the pixels that the pixel limit allows fit in; a larger "image" would only fill the memory.
_MAX_FILE_BYTES = 4 << 30
_UNPRINTABLE = re.compile(rb"[\x00-\x1f\x7f]|\\(?=x[0-9a-f]{2})")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


class FileSource(ImageSource):
    """Image files on disk, named by their path below `root`.

    The ids of a folder never leave it; those of a list are paths as they were written, also absolute ones and ones that
    begin with '..': whoever writes files named after ids must not join them to a folder.
    """

    def __init__(
        self, spec: DataSpec, kind: str, root: str, names: list[str], targets: dict[str, list[str]] | None = None
    ) -> None:
        """targets: for 'mask' and 'depth' a path for every image, '' where it has none."""
        super().__init__(spec, kind)
        self._root = root
        self._targets = {
            role: pa.array(map(os.fsencode, found), pa.large_binary()) for role, found in (targets or {}).items()
        }
        # In Arrow, not as Python strings: forked workers share them without copying pages on reference counts.
        # As bytes: a file name need not be UTF-8.
        self._files = pa.array(map(os.fsencode, names), pa.large_binary())

    def __len__(self) -> int:
        return len(self._files)

    def name(self, row: int) -> str:
        return printable(self._file(row))

    def read(self, row: int, role: str = "image") -> bytes:
        if role != "image":
            target = bytes(self._targets[role][int(row)].as_py())
            if not target:
                raise BadImage(self.name(row), f"no {role} of that name")
            return read_file(target, f"{self.name(row)} ({role})")
        return read_file(os.path.join(os.fsencode(self._root), self._file(row)), self.name(row))

    def has_role(self, role: str) -> bool:
        return role == "image" or role in self._targets

    def _file(self, row: int) -> bytes:
        return bytes(self._files[int(row)].as_py())

    @cached_property
    def ids(self) -> list[str]:
        return [printable(file) for file in self._files.to_pylist()]

    @cached_property
    def paths(self) -> list[str]:
        root = os.fsencode(self._root)
        files = self._files.to_pylist()
        return [os.path.join(root, file).decode("utf-8", "backslashreplace") for file in files]

    def content_hash(self) -> str:
        root = os.fsencode(self._root)
        files = self._files.to_pylist()
        own = ((name, os.path.join(root, file)) for name, file in zip(self.ids, files, strict=True))
        targets = ((role, path) for role, found in self._targets.items() for path in found.to_pylist())
        return hash_files(chain(own, targets))


def open_folder(spec: DataSpec) -> ImageSource:
    """Every image below a folder, sorted by path; a folder that holds only Parquet or tar files is opened as those.

    Folders below it that cannot be opened are passed over and named in one warning.

    Raises:
        InputError: it cannot be opened, nothing in it, or no images (the message counts what is there instead).
    """
    root = _absolute(spec)
    try:
        found = scan_folder(root)
    except OSError as error:
        raise InputError(
            f"{spec.location}: the folder cannot be opened ({error.strerror}); allow yourself to read it, "
            "or give another one"
        ) from error
    if found.closed:
        logger.warning("passed over %s", _folders(found.closed))
    if found.images:
        _refuse_columns(spec)
        names = without_targets(spec, root, found.images)
        return FileSource(spec, "folder", root, names, target_files(spec, root, names))
    parquet = [os.path.join(root, name) for name in found.others if name.lower().endswith(PARQUET_EXTENSIONS)]
    if parquet:
        from dinov2cli.data.tables import open_parquet, split_files

        return open_parquet(spec, split_files(parquet, spec.options.get("split"), spec.location))
    tars = [os.path.join(root, name) for name in found.others if name.lower().endswith(TAR_EXTENSIONS)]
    if tars:
        from dinov2cli.data.tar import open_tar

        _refuse_stream(spec, "tar shards")
        return open_tar(spec, tars)
    raise InputError(f"{spec.location}: {_why_no_images(found)}")


class Found(NamedTuple):
    """What lies below a folder: paths relative to it, sorted, with '/' between parts.

    images, others: files with and without the extension of an image. closed: 'name (reason)' of unreadable folders.
    """

    images: list[str]
    others: list[str]
    closed: list[str]


def scan_folder(root: str) -> Found:
    """List the files below a folder, without a look at the files themselves.

    Hidden files and folders and macOS' `__MACOSX` are passed over. Linked folders are followed, but not where the walk
    comes by anyway: so loops end, and no image is there twice because of a link to a folder.

    Raises:
        OSError: the folder itself cannot be opened.
    """
    found = Found([], [], [])
    real_root = os.path.realpath(root)
    walked = {real_root}
    waiting = [("", real_root)]
    while waiting:
        below, real = waiting.pop()
        folders = []
        try:
            with os.scandir(os.path.join(root, below)) as listing:
                for entry in listing:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if _is_folder(entry):
                        folders.append(entry)
                    elif name[name.rfind(".") :].lower() in IMAGE_EXTENSIONS:
                        found.images.append(below + name)
                    else:
                        found.others.append(below + name)
        except OSError as error:
            if not below:
                raise
            found.closed.append(f"{printable(os.fsencode(below.rstrip('/')))} ({error.strerror})")
        # In the order of names, for of several links to one folder the first is followed.
        folders.sort(key=lambda entry: entry.name)
        entered = ((entry.name, _enter(entry, real, walked)) for entry in folders)
        waiting += reversed([(f"{below}{name}/", inside) for name, inside in entered if inside])
    for names in found:
        names.sort()
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where one may not look: for the reader to explain
        return False


def _enter(entry: os.DirEntry[str], parent: str, walked: set[str]) -> str | None:
    """Real path of a folder that the walk shall go into, or None.

    walked: tops of the trees that are walked, the set's own and the targets of links; a followed link adds its target.
    """
    if entry.name == "__MACOSX":
        return None
    if not entry.is_symlink():
        real = os.path.join(parent, entry.name)
        return None if real in walked else real
    top = real = os.path.realpath(entry.path)
    while top not in walked and top != os.path.dirname(top):
        top = os.path.dirname(top)
    # What the walk passes over (a hidden store with links to its parts) it does not come by.
    parts = os.path.relpath(real, top).split(os.sep) if real != top else []
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    if top in walked and not hidden:
        return None
    walked.add(real)
    return real


def read_file(path: str | bytes, name: str) -> bytes:
    """Bytes of a regular file.

    Raises:
        BadImage: it is missing, unreadable, too large, or something else than a file; one file must not stop a run.
    """
    try:
        # Not to wait for a writer where the name turns out to be a pipe.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(handle)
            _refuse_others(status, name)
            with open(handle, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        link = os.path.islink(path)
        raise BadImage(name, "a link to a file that does not exist" if link else "the file does not exist") from error
    except OSError as error:
        if os.path.exists(path):
            _refuse_others(os.stat(path), name)  # a socket cannot even be opened
        raise BadImage(name, f"cannot be opened ({error.strerror})") from error


def _refuse_others(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadImage(name, f"{_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a file")
    if status.st_size > _MAX_FILE_BYTES:
        raise BadImage(name, f"{status.st_size / 2**30:.1f} GiB are more than the limit of {_MAX_FILE_BYTES >> 30} GiB")


def printable(name: bytes) -> str:
    """A file name as one line of text: control characters and what is not UTF-8 as '\\xHH'. No two names look alike."""
    escaped = _UNPRINTABLE.sub(lambda match: b"\\x%02x" % match[0][0], name)
    return escaped.decode("utf-8", "backslashreplace")


def open_list(spec: DataSpec) -> ImageSource:
    """The images named in a text file, one path a line, absolute or relative to that file's folder; or one image file.

    Blank lines and lines that begin with '#' are passed over; a path named twice counts once. With `?label=folder`
    the first folder of each relative path is the label.

    Raises:
        InputError: no path in it, none of them exists, or the file is not text, or what it is called is none.
    """
    path = _absolute(spec)
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


def _absolute(spec: DataSpec) -> str:
    path = os.path.abspath(spec.location)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{printable(os.fsencode(path))}: this path is not UTF-8, so no manifest can name it; "
            "rename it, or give a link to it (`ln -s`)"
        ) from error
    return path


def _below(line: str, root: str) -> str:
    name = os.path.normpath(line)
    if os.path.isabs(name) and name.startswith(root + os.sep):
        name = os.path.relpath(name, root)
    return name.replace(os.sep, "/")


def _some_extensions() -> str:
    return ".jpg, .png, .webp, .tif, …"


def _refuse_columns(spec: DataSpec) -> None:
    label = spec.options.get("label")
    _refuse_stream(spec, "images")
    for key in spec.options:
        if key not in ("label", *TARGET_ROLES):
            raise InputError(
                f"{spec.location}: '{key}=' names a column, and a folder of images has none; "
                f"leave it out{', and give the sub-folder itself' if key == 'split' else ''}"
            )
    if label not in (None, "folder"):
        raise InputError(f"{spec.location}: a folder of images has no column '{label}'; its labels are ?label=folder")


def _refuse_stream(spec: DataSpec, what: str) -> None:
    if "stream" in spec.options:
        raise InputError(
            f"{spec.location}: stream= is for Parquet files, and this folder holds {what}, which are read where they "
            "lie anyway; leave it out"
        )


def _why_no_images(found: Found) -> str:
    if found.closed:
        return f"no image found, passed over {_folders(found.closed)}; allow yourself to read what is below"
    if not found.others:
        return f"the folder is empty; expected images ({_some_extensions()}) in it or below it"
    counts = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in found.others)
    listed = ", ".join(f"{count} {extension}" for extension, count in counts.most_common(5))
    files = f"{len(found.others)} file{'s' if len(found.others) > 1 else ''}"
    return f"no image among its {files} ({listed}); expected {_some_extensions()}, .parquet or .tar"


def _folders(closed: list[str]) -> str:
    shown = ", ".join(closed[:3]) + (", …" if len(closed) > 3 else "")
    return f"{len(closed)} folder{'s' if len(closed) > 1 else ''} that cannot be opened: {shown}"
