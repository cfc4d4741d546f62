"""Images made small once, so that training decodes small JPEGs: what becomes of one file, and of the rows of a source.

Pixels are those of `decode_image` (upright RGB, no colour profile). The shorter side is scaled down to the size asked,
never up, by antialiased bicubic; a panorama keeps its aspect. They are stored as JPEG, those made smaller with half
the chroma (4:2:0). A file that needs none of this is copied byte for byte, so it loses nothing: a JPEG, PNG or WebP of
RGB or 8-bit grey pixels, without transparency, further frames or a rotation in its EXIF, whose shorter side is at most
the size.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2cli.artifacts.packed_shards import PackedImage
from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.decode import decode_image, resize_uint8
from dinov2cli.data.source import ImageSource
from dinov2cli.data.workers import DEADLY, Hand, Pool
from dinov2cli.distributed import ALONE, Ranks

_COPIED = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
_LONGEST_JPEG = 65_500
_TASK_ROWS = 16
_PNG_DEPTH = 24  # offset of the bits per channel in a PNG file

Item = PackedImage | tuple[str, str]
"""An image, or the name of one that cannot be read and the reason."""


def pack_image(data: bytes, *, name: str, size: int, quality: int = 95) -> PackedImage:
    """Make one image file small.

    Args:
        data: the whole file.
        name: how to call the image in errors.
        size: the most that the shorter side may have, in pixels.
        quality: of JPEG, 1 to 100.

    Raises:
        BadImage: not an image, truncated, corrupt, or too large.
    """
    pixels_HWC = decode_image(data, name=name)
    height, width = pixels_HWC.shape[:2]
    extension = _reusable(data) if min(width, height) <= size else None
    packed = data if extension else _small_jpeg(pixels_HWC, size, quality)
    digest = hashlib.sha256(data).hexdigest()
    return PackedImage(packed, extension or ".jpg", width, height, digest, len(data), extension is not None)


def packed_size(width: int, height: int, size: int) -> tuple[int, int]:
    """New width and height in pixels: the shorter side at most `size`, and none longer than a JPEG can have."""
    scale = min(1.0, size / min(width, height), _LONGEST_JPEG / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


@contextmanager
def stream_packed(
    source: ImageSource,
    rows: npt.NDArray[np.int64],
    *,
    size: int,
    quality: int = 95,
    workers: int = 0,
    bad: BadImages | None = None,
    start: int = 0,
    advance: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Iterator[PackedImage | str]]:
    """For a `with` block: the packed images of the rows `rows[start:]`, in order, or the reason why there is none.

    Each rank packs a share, by `workers` processes; the main process gets all, the others nothing, but they must
    iterate. `bad` counts the unreadable ones, with those counted before. What the block raises is raised by all ranks.

    Raises:
        InputError: too many unreadable images.
    """
    tasks = [(first, min(first + _TASK_ROWS, len(rows))) for first in range(start, len(rows), _TASK_ROWS)]
    mine = ranks.share(tasks)
    workers = min(workers, len(mine))
    own = Pool(_Packer(source, rows, size, quality), workers, ahead=2 * workers).run(mine)
    with ranks.gather(own, len(tasks)) as results:
        yield _counted(results, BadImages() if bad is None else bad, len(rows), advance)


def _counted(
    results: Iterator[list[Item]], bad: BadImages, total: int, advance: Callable[[int], None] | None
) -> Iterator[PackedImage | str]:
    for found in results:
        for item in found:
            if isinstance(item, PackedImage):
                yield item
                continue
            bad.add(*item)
            bad.check(total)
            yield item[1]
        if advance is not None:
            advance(len(found))


class _Packer:
    """Turns (first, stop) into the packed images of `rows[first:stop]`; runs in a worker."""

    def __init__(self, source: ImageSource, rows: npt.NDArray[np.int64], size: int, quality: int) -> None:
        self._source = source
        self._rows = rows
        self._size = size
        self._quality = quality

    def __call__(self, task: tuple[int, int], hand: Hand) -> list[Item]:
        return [self._one(int(row), hand) for row in self._rows[slice(*task)]]

    def name(self, item: int) -> str:
        return self._source.name(item)

    def _one(self, row: int, hand: Hand) -> Item:
        name = self._source.name(row)
        if hand.deadly(row):
            return name, DEADLY
        hand.hold(row)
        try:
            return pack_image(self._source.read(row), name=name, size=self._size, quality=self._quality)
        except BadImage as error:
            return name, error.reason


def _reusable(data: bytes) -> str | None:
    """The extension of a file that may be stored as it is; None where it must be encoded anew. It can be decoded."""
    with Image.open(io.BytesIO(data)) as image:
        extension = _COPIED.get(image.format or "")
        if extension is None or image.mode not in ("RGB", "L") or image.has_transparency_data:
            return None
        if getattr(image, "n_frames", 1) > 1 or (extension == ".png" and data[_PNG_DEPTH] != 8):
            return None
        try:
            upright = int(image.getexif().get(0x0112, 1)) == 1
        except Exception:  # a damaged EXIF block, which the decoder passes over
            upright = True
        return extension if upright else None


def _small_jpeg(pixels_HWC: np.ndarray, size: int, quality: int) -> bytes:
    width, height = packed_size(pixels_HWC.shape[1], pixels_HWC.shape[0], size)
    small_CHW = resize_uint8(pixels_HWC, height, width)
    buffer = io.BytesIO()
    small_HWC = small_CHW.permute(1, 2, 0).contiguous().numpy()
    # Half the chroma decodes a quarter sooner. What keeps its size is mostly no photo: drawings would lose by it.
    subsampling = "4:2:0" if small_HWC.shape != pixels_HWC.shape else "4:4:4"
    Image.fromarray(small_HWC).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()
