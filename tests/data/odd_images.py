"""Image files as users have them: odd ones that must be read, broken ones that must be skipped with their reason."""

import io
import os
import re
import signal
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from dinov2cli.data.bad import BadImages
from dinov2cli.data.loader import iterate_images
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.errors import InputError

NO_IMAGE = "not an image that can be read"
TOO_LARGE = r".*more than the limit of 178956970( pixels)?"
DAMAGED = r"(truncated|corrupt) file.*"


def photo(seed: int, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of a few bytes that says it has that many (1-bit) pixels, all of them black."""
    rows = zlib.compress(bytes(1 << 16), 9)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def accepted() -> dict[str, tuple[bytes, tuple[int, int]]]:
    """name → (file, (width, height) as displayed)."""
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40))
    clear = photo(1).convert("RGBA")
    clear.putalpha(128)
    frames = {"save_all": True, "append_images": [photo(2)]}
    plain = (40, 30)
    files: dict[str, tuple[bytes, tuple[int, int]]] = {
        "exif-turned.jpg": (file_of(photo(0), "JPEG", exif=turned), (30, 40)),
        "progressive.jpeg": (file_of(photo(0), "JPEG", progressive=True), plain),
        "cmyk.jpg": (file_of(photo(0, mode="CMYK"), "JPEG"), plain),
        "cmyk.tif": (file_of(photo(0, mode="CMYK"), "TIFF"), plain),
        "grey.jpg": (file_of(photo(0, mode="L"), "JPEG"), plain),
        "palette.png": (file_of(photo(0, mode="P")), plain),
        "palette-clear.png": (file_of(photo(0, mode="P"), transparency=0), plain),
        "one-bit.png": (file_of(photo(0, mode="1")), plain),
        "one-bit.tif": (file_of(photo(0, mode="1"), "TIFF"), plain),
        "sixteen-bit.png": (file_of(grey16), plain),
        "sixteen-bit.tiff": (file_of(grey16, "TIFF"), plain),
        "float.tif": (file_of(photo(0, mode="L").convert("F"), "TIFF"), plain),
        "alpha.png": (file_of(clear), plain),
        "grey-alpha.png": (file_of(photo(0, mode="LA")), plain),
        "animated.gif": (file_of(photo(0), "GIF", **frames), plain),
        "animated.png": (file_of(photo(0), **frames), plain),
        "pages.tif": (file_of(photo(0), "TIFF", **frames), plain),
        "phone.jpg": (file_of(photo(0), "MPO", **frames), plain),  # two pictures in one JPEG
        "bitmap.bmp": (file_of(photo(0), "BMP"), plain),
        "portable.ppm": (file_of(photo(0), "PPM"), plain),
        "targa.tga": (file_of(photo(0), "TGA"), plain),
        "really-a-png.jpg": (file_of(photo(0)), plain),
        "tail.jpg": (file_of(photo(0), "JPEG") + b"appended by a camera" * 99, plain),
        "one-pixel.png": (file_of(photo(0, 1, 1)), (1, 1)),
        "column.png": (file_of(photo(0, 2, 5000)), (2, 5000)),
        "panorama.png": (file_of(photo(0, 30000, 30)), (30000, 30)),
    }
    for feature, name, options in (
        ("webp", "still.webp", {}),
        ("webp", "animated.webp", frames),
        ("avif", "still.avif", {}),
        ("jpg_2000", "still.jp2", {}),
    ):
        if features.check(feature):
            format = {"webp": "WEBP", "avif": "AVIF", "jp2": "JPEG2000"}[name.rpartition(".")[2]]
            files[name] = (file_of(photo(0), format, **options), plain)
    return files


def skipped() -> dict[str, tuple[bytes, str]]:
    """name → (file, pattern of the reason)."""
    jpeg = file_of(photo(0, 400, 300), "JPEG")
    png = file_of(photo(0, 400, 300))
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9))
    side = (65535, 65535)
    gif = b"GIF89a" + struct.pack("<HHBBBcHHHHB", *side, 0, 0, 0, b",", 0, 0, *side, 0) + b"\2\2\x44\1\0;"
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    return {
        "empty.jpg": (b"", "empty file"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated file"),
        "cut.png": (png[: len(png) // 2], "truncated file"),
        "cut-in-header.jpg": (jpeg[:20], DAMAGED + "|" + NO_IMAGE),
        "words.jpg": (b"To whom it may concern,\n", NO_IMAGE),
        "error-page.jpg": (b"<!DOCTYPE html><html><title>404 Not Found</title></html>", NO_IMAGE),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NO_IMAGE),
        "scan.jpg": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n", NO_IMAGE),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", NO_IMAGE),
        "zeros.jpg": (bytes(5000), NO_IMAGE),
        "bomb.png": (png_claiming(60_000, 60_000), TOO_LARGE),
        "bomb.gif": (gif, TOO_LARGE),
        "comment-bomb.png": (png_claiming(8, 8, comment), r"corrupt file \(.*too large.*\)"),
        "claims-more.png": (png_claiming(9000, 9000), DAMAGED),
        "iphone.heic": (heic, "HEIC, which .* `pip install pillow-heif`"),
        "iphone.HEIF": (heic, "HEIC, which .* `pip install pillow-heif`"),
    }


def special() -> dict[str, tuple[Callable[[Path], object], str]]:
    """name → (what puts it there, pattern of the reason), for what is no plain file."""
    return {
        "pipe.jpg": (os.mkfifo, "a named pipe, not a file"),
        "socket.jpg": (_socket, "a socket, not a file"),
        "broken-link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "a link to a file that does not exist"),
        "link-to-itself.jpg": (
            lambda path: path.symlink_to(path.name),
            r"cannot be opened \(Too many levels of symbolic links\)",
        ),
        "enormous.jpg": (_enormous, r"5\.0 GiB are more than the limit of 4 GiB"),
    }


NAMES = {
    "été à Zürich 猫.jpg".encode(): "été à Zürich 猫.jpg",
    b"caf\xe9.jpg": "caf\\xe9.jpg",
    b"caf\\xe9.jpg": "caf\\x5cxe9.jpg",  # another file, whose name has a backslash in it
    b"back\\slash.jpg": "back\\slash.jpg",
    b"two\nlines.jpg": "two\\x0alines.jpg",
    b"\x1b[2Jclear.jpg": "\\x1b[2Jclear.jpg",
    b"  spaces  .jpg": "  spaces  .jpg",
    b"IMG_0001.JPG": "IMG_0001.JPG",
    b"IMG_0001.jpg": "IMG_0001.jpg",
    b"-o.jpg": "-o.jpg",
    b"100% [draft] {1..3}?*.jpg": "100% [draft] {1..3}?*.jpg",
    b"n" * 251 + b".jpg": "n" * 251 + ".jpg",
    b"folder.jpg/inside.jpg": "folder.jpg/inside.jpg",
}
"""File names as bytes, and the ids they get."""


def write_all(root: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Fill a folder with every odd file there is: (id → size of those to be read, id → reason of the rest)."""
    root.mkdir(parents=True)
    good: dict[str, tuple[int, int]] = {}
    bad: dict[str, str] = {}
    for name, (data, size) in accepted().items():
        (root / name).write_bytes(data)
        good[name] = size
    for name, (data, reason) in skipped().items():
        (root / name).write_bytes(data)
        bad[name] = reason
    for name, (put, reason) in special().items():
        put(root / name)
        bad[name] = reason
    for seed, (raw, name) in enumerate(NAMES.items()):
        path = os.path.join(os.fsencode(root), raw)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path, "wb") as file:
                file.write(file_of(photo(100 + seed), "JPEG"))
        except OSError:  # macOS takes no name that is not UTF-8
            pytest.skip(f"the file system does not take the name {raw!r}")
        good[name] = (40, 30)
    (root / "link.jpg").symlink_to("grey.jpg")
    good["link.jpg"] = (40, 30)
    # Links to folders: to itself, to its parent, to nowhere. None of them adds an image.
    (root / "sub").mkdir()
    (root / "sub" / "up").symlink_to("..")
    (root / "sub" / "again").symlink_to("../folder.jpg")
    (root / "round").symlink_to("round")
    (root / "gone").symlink_to("nowhere")
    (root / ".hidden.jpg").write_bytes(b"of macOS, say")
    (root / "notes.txt").write_text("no image, and no name of one")
    return good, bad


@contextmanager
def no_waiting() -> Iterator[None]:
    """A pipe that is opened without care waits for ever: let the test fail instead."""

    def stop(*_: object) -> None:
        pytest.fail("still waiting for a file after a minute")  # no OSError, which the reader may expect

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def message(spec: object) -> str:
    """The one line with which a DATA string is refused."""
    with pytest.raises(InputError) as caught:
        open_source(str(spec))
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    return str(caught.value)


def sizes_of(source: ImageSource, bad: BadImages, workers: int = 0) -> dict[str, tuple[int, int]]:
    """id → (width, height) of everything that `iterate_images` reads."""
    sizes = {}
    for batch in iterate_images(source, resize=16, crop=16, batch_size=7, workers=workers, bad=bad):
        assert batch.images.shape == (len(batch), 3, 16, 16)
        for row, width, height in zip(batch.index, batch.width, batch.height, strict=True):
            sizes[source.ids[row]] = (int(width), int(height))
    return sizes


def explained(bad: BadImages, reasons: dict[str, str]) -> None:
    """Assert that just these images were counted, each with the reason of its pattern."""
    assert set(bad.names) == set(reasons)
    wrong = {name: found for name, found in bad.reasons.items() if not re.fullmatch(reasons[name], found)}
    assert not wrong


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the path of a socket may have about 100 characters only
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _enormous(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(5 << 30)  # takes no room: one large hole
