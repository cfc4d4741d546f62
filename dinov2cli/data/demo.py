"""`demo:photos` and `demo:digits`: real images that ship in scikit-image and scikit-learn; no download."""

import hashlib
import importlib.util
import io
import os
from abc import abstractmethod
from functools import cached_property

import numpy as np
import pyarrow as pa
from PIL import Image

from dinov2cli.data.demo_photos import PlantedCopy, Tiles, encode_tile, photo_files, plan_tiles
from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import DataSpec, parse_spec
from dinov2cli.errors import InputError

_CACHED_IMAGES = 10_000
_DIGITS_TRAIN = 1347  # of 1,797 in the order of the file: later digits are by other writers than earlier ones


class DemoSource(ImageSource):
    """Encoded images made on demand and kept in memory. Subclasses make one image and name it."""

    def __init__(self, spec: DataSpec, split: str) -> None:
        super().__init__(spec, "demo")
        self.split = split
        self._made: dict[int, bytes] = {}

    @abstractmethod
    def _make(self, row: int) -> bytes: ...

    def read(self, row: int, role: str = "image") -> bytes:
        del role
        row = int(row)
        data = self._made.get(row)
        if data is None:
            data = self._make(row)
            if len(self._made) < _CACHED_IMAGES:
                self._made[row] = data
        return data

    @cached_property
    def paths(self) -> list[str]:
        location = self.spec.partition("?")[0]
        return [f"{location}/{name}" for name in self.ids]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_made": {}}


class PhotoTiles(DemoSource):
    """Tiles of photographs; label = photograph. See `demo_photos` for how they are cut."""

    def __init__(self, spec: DataSpec, tiles: Tiles) -> None:
        super().__init__(spec, tiles.split)
        self.tiles = tiles

    def __len__(self) -> int:
        return len(self.tiles)

    def _make(self, row: int) -> bytes:
        return encode_tile(self.tiles, row)

    def name(self, row: int) -> str:
        return self.tiles.ids[row]

    @cached_property
    def ids(self) -> list[str]:
        return list(self.tiles.ids)

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None]:
        return self.tiles.photo.astype(np.int64), list(self.tiles.names)

    @cached_property
    def columns(self) -> pa.Table:
        return pa.table({"photo": [self.tiles.names[photo] for photo in self.tiles.photo]})

    def content_hash(self) -> str:
        digest = hashlib.sha256(repr((self.tiles.version, self.spec, len(self))).encode())
        for path in photo_files().values():
            with open(path, "rb") as file:
                digest.update(file.read())
        return digest.hexdigest()


class Digits(DemoSource):
    """scikit-learn's 1,797 handwritten digits (8 x 8, 17 grey levels) enlarged; label = digit."""

    def __init__(self, spec: DataSpec, split: str, size: int, count: int | None) -> None:
        super().__init__(spec, split)
        table = np.loadtxt(_digits_file(), delimiter=",", dtype=np.int16)
        part = table[:_DIGITS_TRAIN] if split == "train" else table[_DIGITS_TRAIN:]
        if count is not None and count > len(part):
            raise InputError(f"demo:digits: count={count}, but the {split} split has {len(part)} images")
        self._table = part if count is None else part[:count]
        self._size = size

    def __len__(self) -> int:
        return len(self._table)

    def _make(self, row: int) -> bytes:
        grey = np.round(self._table[row, :64].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(grey).resize((self._size, self._size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def name(self, row: int) -> str:
        return f"{self._table[row, 64]}/{self.split}-{row:04d}.png"

    @cached_property
    def ids(self) -> list[str]:
        return [self.name(row) for row in range(len(self))]

    def _own_labels(self) -> tuple[np.ndarray, list[str] | None]:
        return self._table[:, 64].astype(np.int64), [str(digit) for digit in range(10)]

    def content_hash(self) -> str:
        return hashlib.sha256(self._table.tobytes() + repr((self.spec, self._size)).encode()).hexdigest()


def open_demo(spec: DataSpec) -> ImageSource:
    """`demo:photos?split=train|test&count=N&size=64&seed=0&copies=0.1`, `demo:digits?split=train|test&count=N&size=32`.

    Defaults: 2,000 training tiles (a tenth of them planted copies) or 500 test tiles (none) of 64 x 64 pixels.

    Raises:
        InputError: an option is not a number or out of range, or scikit-image / scikit-learn is not installed.
    """
    split = spec.options.get("split", "train")
    if split not in ("train", "test"):
        raise InputError(f"demo:{spec.location}: split={split}; expected train or test")
    if spec.location == "digits":
        count = int(_number(spec, "count", 0, 0, 1797))
        return Digits(spec, split, int(_number(spec, "size", 32, 8, 1024)), count or None)
    train = split == "train"
    tiles = plan_tiles(
        split,
        count=int(_number(spec, "count", 2000 if train else 500, 40, 1_000_000)),
        size=int(_number(spec, "size", 64, 16, 512)),
        seed=int(_number(spec, "seed", 0, 0, 2**31)),
        copies=_number(spec, "copies", 0.1 if train else 0.0, 0, 0.5),
    )
    return PhotoTiles(spec, tiles)


def demo_truth(spec: str) -> list[PlantedCopy]:
    """The planted copies of a `demo:photos` set: which image was made from which, and how.

    Raises:
        InputError: the DATA string is not demo:photos.
    """
    source = open_demo(parse_spec(spec)) if spec.startswith("demo:") else None
    if not isinstance(source, PhotoTiles):
        raise InputError(f"{spec}: only demo:photos has planted copies")
    return source.tiles.planted()


def _number(spec: DataSpec, key: str, default: float, low: float, high: float) -> float:
    text = spec.options.get(key)
    if text is None:
        return default
    try:
        value = float(text) if key == "copies" else int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise InputError(f"demo:{spec.location}: {key}={text}; expected a number from {low:g} to {high:g}")
    return value


def _digits_file() -> str:
    # The file is read directly: importing scikit-learn for it takes a second.
    found = importlib.util.find_spec("sklearn")
    folder = list(found.submodule_search_locations or []) if found else []
    path = os.path.join(folder[0], "datasets", "data", "digits.csv.gz") if folder else ""
    if not os.path.isfile(path):
        raise InputError("demo:digits: scikit-learn is not installed; run `pip install scikit-learn`")
    return path
