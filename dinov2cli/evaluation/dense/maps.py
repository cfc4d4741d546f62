"""Token maps of a whole source in half precision, computed once: a head then trains for thousands of steps without a
forward pass. Blocks of rows are kept in a store; each rank computes, keeps and holds those that are its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.decode import decode_image, open_image
from dinov2cli.data.dense import fetch, in_order
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.evaluation.dense.tokens import Normalize, Sight, TokenMaps, Tokens, padding, seen_windows
from dinov2cli.search.blocks import Arrays, Stage, over_blocks

BLOCK = 16  # rows that are computed and kept together


@dataclass(frozen=True)
class Seeing:
    """How token maps are made: of which blocks of the model, what it sees of an image, where and in which numbers.

    mirrored: of each image's mirror image as well. norm: the final norm is applied to the tokens of each block.
    """

    encoder: Tokens
    normalize: Normalize
    sight: Sight
    blocks: tuple[int, ...]
    device: torch.device
    precision: str = "fp32"
    batch_size: int = 16
    mirrored: bool = False
    norm: bool = True

    def key(self) -> dict[str, Any]:
        """What maps depend on beside model and data, as plain values."""
        sight = self.sight
        return {
            "sight": [sight.shorter, sight.longest, sight.window, sight.stride, sight.scale],
            "blocks": list(self.blocks),
            "mirrored": self.mirrored,
            "norm": self.norm,
        }

    def of(self, images: Sequence[Tensor]) -> list[TokenMaps]:
        """Tokens of the windows of several resized images (uint8 [3, H, W]), see `seen_windows`."""
        return seen_windows(
            self.encoder, images, self.sight, self.blocks, normalize=self.normalize, device=self.device,
            batch_size=self.batch_size, precision=self.precision, norm=self.norm,
        )  # fmt: skip

    def bytes_of(self, height: int, width: int) -> int:
        """Memory that the maps of an image of that size take."""
        windows = self.sight.windows(*self.sight.size(height, width))
        size, window = self.encoder.patch_size, windows[0]
        left, right, top, bottom = padding(window.height, window.width, size)
        tokens = (window.height + top + bottom) // size * ((window.width + left + right) // size) + 1
        return 2 * len(windows) * (1 + self.mirrored) * tokens * len(self.blocks) * self.encoder.embed_dim


@dataclass
class MapSet:
    """Maps of a source. On every rank: rows int64 [n] (readable ones, in order), sizes int64 [n, 2] (height, width of
    the image files), digests uint8 [n, 32].

    By row, on the rank that holds it, on the CPU: maps float16 [views, windows, L * D, h, w] and cls float16
    [views, windows, L * D]; the second view is the mirror image's.
    """

    rows: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    maps: dict[int, Tensor] = field(default_factory=dict)
    cls: dict[int, Tensor] = field(default_factory=dict)

    def only(self, rows: npt.NDArray[np.int64]) -> "MapSet":
        """The same without the other rows."""
        chosen, wanted = np.isin(self.rows, rows), set(rows.tolist())
        maps = {row: value for row, value in self.maps.items() if row in wanted}
        cls = {row: value for row, value in self.cls.items() if row in wanted}
        return MapSet(self.rows[chosen], self.sizes[chosen], self.digests[chosen], maps, cls)


def expected_bytes(source: ImageSource, seeing: Seeing) -> int:
    """Memory that the maps of a source would take, over all ranks, if all images were as large as the first one."""
    for row in range(len(source)):
        try:
            opened = open_image(fetch(source, row), name=source.name(row))
        except BadImage:
            continue
        return len(source) * seeing.bytes_of(opened.height, opened.width)
    return 0


def map_set(
    source: ImageSource,
    seeing: Seeing,
    *,
    bad: BadImages,
    workers: int = 0,
    stage: Stage | None = None,
    ranks: Ranks = ALONE,
    advance: Callable[[int], None] | None = None,
) -> MapSet:
    """Maps of all readable images; unreadable ones are counted in `bad`. On every rank of a launch.

    stage: finished blocks, by the row at which they begin. advance(rows) is called after each block. Raises InputError
    for too many unreadable images, UserError for blocks or sizes that the model cannot serve.
    """
    read = _reader(source, seeing.sight)
    maps: dict[int, Tensor] = {}
    cls: dict[int, Tensor] = {}

    def work(start: int) -> dict[str, npt.NDArray[Any]]:
        found = stage.load(start) if stage is not None else None
        if found is None:
            found = _block(read, range(start, min(start + BLOCK, len(source))), seeing, workers)
            if stage is not None:
                stage.save(start, found)
        _unpack(found, maps, cls)
        return {name: np.asarray(found[name]) for name in ("rows", "sizes", "digests", "failures")}

    parts = []
    for part in over_blocks(work, len(source), BLOCK, ranks=ranks):
        parts.append(part)
        if advance is not None:
            advance(len(part["rows"]) + len(part["failures"]))
    for part in parts:
        for name, reason in part["failures"]:
            bad.add(str(name), str(reason))
    bad.check(len(source))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("rows", "sizes", "digests")}
    return MapSet(joined["rows"], joined["sizes"], joined["digests"], maps, cls)


@dataclass(frozen=True)
class _Image:
    row: int
    pixels: Tensor
    size: tuple[int, int]
    digest: npt.NDArray[np.uint8]


def _reader(source: ImageSource, sight: Sight) -> Callable[[int], _Image | BadImage]:
    def read(row: int) -> _Image | BadImage:
        try:
            data = fetch(source, row)
            pixels = decode_image(data, name=source.name(row))
        except BadImage as error:
            return error
        digest = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
        return _Image(row, sight.resized(torch.from_numpy(pixels).permute(2, 0, 1)), pixels.shape[:2], digest)

    return read


def _block(
    read: Callable[[int], _Image | BadImage], rows: Sequence[int], seeing: Seeing, workers: int
) -> dict[str, npt.NDArray[Any]]:
    """What is kept of a block: values of all maps one behind the other, and their shapes."""
    found = list(in_order(read, rows, workers))
    images = [image for image in found if isinstance(image, _Image)]
    views = [image.pixels for image in images]
    if seeing.mirrored:
        views = [view for pixels in views for view in (pixels, pixels.flip(2))]
    seen, number = seeing.of(views), 1 + seeing.mirrored
    maps = [torch.stack([one.maps for one in seen[first : first + number]]) for first in range(0, len(seen), number)]
    cls = [torch.stack([one.cls for one in seen[first : first + number]]) for first in range(0, len(seen), number)]
    failures = [(error.name, error.reason) for error in found if isinstance(error, BadImage)]
    return {
        "rows": np.array([image.row for image in images], dtype=np.int64),
        "sizes": np.array([image.size for image in images], dtype=np.int64).reshape(-1, 2),
        "digests": np.array([image.digest for image in images], dtype=np.uint8).reshape(-1, 32),
        "failures": np.array(failures, dtype=np.str_).reshape(-1, 2),
        "shapes": np.array([one.shape for one in maps], dtype=np.int64).reshape(-1, 5),
        "maps": _flat(maps),
        "cls": _flat(cls),
    }


def _flat(parts: Sequence[Tensor]) -> npt.NDArray[np.float16]:
    halves = [part.half().cpu().flatten() for part in parts]
    return (torch.cat(halves) if halves else torch.empty(0, dtype=torch.half)).numpy()


def _unpack(found: Arrays, maps: dict[int, Tensor], cls: dict[int, Tensor]) -> None:
    values, tokens = torch.from_numpy(found["maps"]), torch.from_numpy(found["cls"])
    at = token_at = 0
    for row, shape in zip(found["rows"].tolist(), found["shapes"].tolist(), strict=True):
        size, few = int(np.prod(shape)), int(np.prod(shape[:3]))
        maps[row] = values[at : at + size].view(shape)
        cls[row] = tokens[token_at : token_at + few].view(shape[:3])
        at, token_at = at + size, token_at + few
