"""How the tiles of `demo:photos` are cut from photographs.

Every photograph is divided into cells; a quarter of them, spread evenly, belong to the test split. A test tile lies
within one such cell, a training tile touches none nor a margin around it: no pixel is shared, at any scale. Tiles
vary in place, scale (0.75 to 1.5 source pixels per pixel), mirror image, brightness, contrast, saturation and white
balance, so that mean colour alone does not tell the photograph. A known share of the training set are planted copies.
"""

import importlib.util
import io
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from dinov2cli.errors import InputError

VERSION = 1  # part of the fingerprint: raise it when the pixels of a tile change
COPY_KINDS = ("jpeg", "resize", "crop", "flip")

# Photographs (no drawings, charts or test patterns) that ship inside the wheels of the two packages.
_PHOTOS = {
    "skimage": (
        "data",
        (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "grass.png",
            "gravel.png",
        )
        + ("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg")
        + ("rocket.jpg", "text.png"),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
_CELL = 128  # wanted side of a cell in pixels
_MARGIN = 4  # pixels kept free around test cells
_MIN_CONTRAST = 10.0  # standard deviation of grey: an empty sky or a black border is no sample of a photograph
_CANDIDATES = 10  # places tried per tile; the one that overlaps least with earlier tiles is taken


@dataclass(frozen=True)
class PlantedCopy:
    """One planted near-duplicate: ids, rows, and the way it was made (one of COPY_KINDS)."""

    copy_id: str
    original_id: str
    kind: str
    copy_row: int
    original_row: int


@dataclass(frozen=True)
class Tiles:
    """The plan of one split: everything needed to make each tile, no pixels.

    photo int64 [n]; box int64 [n, 4] (left, top, right, bottom in the photograph); look float64 [n, 7] (mirror,
    brightness, contrast, saturation, gains of R, G, B); original int64 [n] (row it copies, else -1); kind int64 [n]
    (index into COPY_KINDS where it is a copy); draw float64 [n, 3] (parameters of the copy, uniform in 0..1).
    """

    split: str
    size: int
    names: list[str]
    ids: list[str]
    photo: np.ndarray
    box: np.ndarray
    look: np.ndarray
    original: np.ndarray
    kind: np.ndarray
    draw: np.ndarray
    version: int = VERSION

    def __len__(self) -> int:
        return len(self.ids)

    def planted(self) -> list[PlantedCopy]:
        """The copies, in row order."""
        return [
            PlantedCopy(self.ids[row], self.ids[source], COPY_KINDS[self.kind[row]], row, source)
            for row, source in enumerate(self.original.tolist())
            if source >= 0
        ]


@lru_cache(maxsize=1)
def photo_files() -> dict[str, str]:
    """Name → path of the photographs, in alphabetical order.

    Raises:
        InputError: a package or a file is missing.
    """
    found = {}
    for package, (folder, files) in _PHOTOS.items():
        module = importlib.util.find_spec(package)  # located, not imported
        places = list(module.submodule_search_locations or []) if module else []
        for file in files:
            path = os.path.join(places[0], *folder.split("/"), file) if places else ""
            if not os.path.isfile(path):
                raise InputError(
                    f"demo:photos: {file} of {package} is missing; "
                    "run `pip install --force-reinstall scikit-image scikit-learn`"
                )
            found[file.partition(".")[0]] = path
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def _photos() -> list[Image.Image]:
    photos = []
    for path in photo_files().values():
        with Image.open(path) as image:
            photos.append(image.convert("RGB"))
    return photos


def held_out_cells(width: int, height: int) -> np.ndarray:
    """Boxes of the test split in a photograph: int64 [m, 4] (left, top, right, bottom)."""
    columns, rows = max(3, round(width / _CELL)), max(1, round(height / _CELL))
    xs = np.linspace(0, width, columns + 1).astype(np.int64)
    ys = np.linspace(0, height, rows + 1).astype(np.int64)
    cells = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns) if (c + 2 * r) % 4 == 0]
    return np.array(cells, dtype=np.int64)


@lru_cache(maxsize=8)
def plan_tiles(split: str, *, count: int, size: int, seed: int, copies: float) -> Tiles:
    """Choose the tiles of one split; a pure function of its arguments (and cached as such).

    Args:
        split: 'train' or 'test'.
        count: tiles in all, planted copies included. Photographs share them by the square root of their area.
        size: side of a tile in pixels.
        seed: of places, looks and copies.
        copies: share of `count` that are planted copies of other tiles, no tile being copied twice.
    """
    names = list(photo_files())
    n_copies = round(copies * count)
    n_originals = count - n_copies
    sides = np.array([np.sqrt(image.width * image.height) for image in _photos()])
    shares = _apportion(sides, n_originals)
    boxes = []
    for number, (image, share) in enumerate(zip(_photos(), shares, strict=True)):
        random = np.random.Generator(np.random.Philox(key=[seed, 2 * number + (split == "test")]))
        boxes.append(_choose_boxes(image, split, int(share), size, random))
    random = np.random.Generator(np.random.Philox(key=[seed, 1000 + (split == "test")]))
    photo = np.repeat(np.arange(len(names)), shares)
    look = _draw_looks(n_originals, random)
    source = random.permutation(n_originals)[:n_copies]
    # Rows in random order, copies anywhere among the originals.
    place = random.permutation(count)
    every = np.concatenate([np.arange(n_originals), source])  # the original behind each tile
    original = np.full(count, -1, dtype=np.int64)
    original[place[n_originals:]] = place[source]
    base = np.empty(count, dtype=np.int64)
    base[place] = every
    kind = np.zeros(count, dtype=np.int64)
    kind[place[n_originals:]] = np.arange(n_copies) % len(COPY_KINDS)
    photo = photo[base]
    ids = [
        f"{names[p]}/{split}-{row:05d}.{'jpg' if o >= 0 and COPY_KINDS[k] == 'jpeg' else 'png'}"
        for row, (p, o, k) in enumerate(zip(photo, original, kind, strict=True))
    ]
    draw = random.random((count, 3))
    return Tiles(split, size, names, ids, photo, np.concatenate(boxes)[base], look[base], original, kind, draw)


def encode_tile(tiles: Tiles, row: int) -> bytes:
    """The image file of one tile: PNG, or JPEG for the copies of that kind."""
    pixels = _render(tiles, row)
    buffer = io.BytesIO()
    if tiles.original[row] < 0:
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    kind, (a, b, c), size = COPY_KINDS[tiles.kind[row]], tiles.draw[row].tolist(), tiles.size
    image = Image.fromarray(pixels)
    if kind == "jpeg":
        image.save(buffer, "JPEG", quality=15 + round(20 * a))
        return buffer.getvalue()
    if kind == "resize":
        side = round(size * (0.5 + 0.3 * a))
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    elif kind == "crop":  # 80 % of the area
        side = round(size * 0.8**0.5)
        left, top = round(b * (size - side)), round(c * (size - side))
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _render(tiles: Tiles, row: int) -> np.ndarray:
    photo = _photos()[tiles.photo[row]]
    # Cut before resizing: the filter must not reach pixels outside the box, they may belong to the other split.
    tile = photo.crop(tuple(tiles.box[row].tolist())).resize((tiles.size, tiles.size), Image.Resampling.BICUBIC)
    mirror, brightness, contrast, saturation, *gains = tiles.look[row].tolist()
    pixels = np.asarray(tile, dtype=np.float32)
    if mirror > 0:
        pixels = pixels[:, ::-1]
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    pixels = grey[..., None] * (1 - saturation) + pixels * saturation
    pixels = pixels * (np.array(gains, dtype=np.float32) * brightness)
    mean = pixels.mean()
    return np.clip(np.round((pixels - mean) * contrast + mean), 0, 255).astype(np.uint8)


def _draw_looks(n: int, random: np.random.Generator) -> np.ndarray:
    columns = [
        np.where(random.random(n) < 0.5, 1.0, -1.0),
        random.uniform(0.7, 1.3, n),
        random.uniform(0.7, 1.3, n),
        random.uniform(0.0, 1.2, n),
        *(random.uniform(0.85, 1.15, n) for _ in range(3)),
    ]
    return np.stack(columns, axis=1)


def _choose_boxes(image: Image.Image, split: str, count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """int64 [count, 4]: places allowed for the split, with content, spread as evenly as random draws allow."""
    cells = held_out_cells(image.width, image.height)
    largest = int((cells[:, 2:] - cells[:, :2]).min())
    low, high = min(0.75 * size, largest), min(1.5 * size, largest)
    n = count * _CANDIDATES * 8
    side = np.exp(random.uniform(np.log(low), np.log(high), n)).astype(np.int64)
    if split == "test":
        cell = cells[random.integers(len(cells), size=n)]
        left = cell[:, 0] + (random.random(n) * (cell[:, 2] - cell[:, 0] - side + 1)).astype(np.int64)
        top = cell[:, 1] + (random.random(n) * (cell[:, 3] - cell[:, 1] - side + 1)).astype(np.int64)
        allowed = np.ones(n, dtype=bool)
    else:
        left = (random.random(n) * (image.width - side + 1)).astype(np.int64)
        top = (random.random(n) * (image.height - side + 1)).astype(np.int64)
        allowed = _sum_in(_forbidden(image, cells), left, top, side) == 0
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    mean = _sum_in(grey, left, top, side) / side**2
    variance = np.maximum(_sum_in(grey**2, left, top, side) / side**2 - mean**2, 0)
    boxes = np.stack([left, top, left + side, top + side], axis=1)
    # First the allowed ones with content in the order drawn, then the allowed ones with most of it.
    rich = np.flatnonzero(allowed & (variance >= _MIN_CONTRAST**2))
    poor = np.flatnonzero(allowed & (variance < _MIN_CONTRAST**2))
    wanted = np.concatenate([rich, poor[np.argsort(-variance[poor], kind="stable")]])
    pool = boxes[wanted[: min(count * _CANDIDATES, max(len(rich), count * 6))]]
    if len(pool) < count:
        raise InputError(
            f"demo:photos: one photograph has {len(pool)} places for tiles of size={size}, its share of the count is "
            f"{count}; expected a smaller count or size"
        )
    return _spread(pool, count)


def _forbidden(image: Image.Image, cells: np.ndarray) -> np.ndarray:
    mask = np.zeros((image.height, image.width))
    for left, top, right, bottom in cells.tolist():
        mask[max(top - _MARGIN, 0) : bottom + _MARGIN, max(left - _MARGIN, 0) : right + _MARGIN] = 1
    return mask


def _sum_in(values_HW: np.ndarray, left: np.ndarray, top: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Sum of the values in each box, by an integral image."""
    total = np.pad(values_HW, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    right, bottom = left + side, top + side
    return total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]


def _spread(pool: np.ndarray, count: int) -> np.ndarray:
    """Best-candidate sampling: of each group of candidates the one that overlaps least with those taken before."""
    groups = np.array_split(pool, count)
    taken = np.empty((count, 4), dtype=np.int64)
    for number, group in enumerate(groups):
        before = taken[:number]
        low = np.maximum(group[:, None, :2], before[None, :, :2])
        high = np.minimum(group[:, None, 2:], before[None, :, 2:])
        shared = np.maximum(high - low, 0).prod(-1)
        area = (group[:, 2:] - group[:, :2]).prod(-1)[:, None] + (before[:, 2:] - before[:, :2]).prod(-1) - shared
        worst = (shared / area).max(axis=1, initial=0.0)
        taken[number] = group[int(worst.argmin())]
    return taken


def _apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers proportional to the weights that add up to `total` (largest remainders)."""
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole
