"""Images as fine-tuning sees them: one random crop of each training image, some rows of a source."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dinov2cli.data.augment import Augment
from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import over_blocks

_HASHED = 4096  # images of a rank between two exchanges


class Rows(ImageSource):
    """Some rows of a source, in rising order, as a source of their own; row i is `rows[i]` of the other."""

    def __init__(self, source: ImageSource, rows: np.ndarray) -> None:
        """rows: int64 [n], rising."""
        self.spec, self.kind, self._options = source.spec, source.kind, {}
        self.source, self.rows = source, np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int, role: str = "image") -> bytes:
        return self.source.read(int(self.rows[row]), role)

    def name(self, row: int) -> str:
        return self.source.name(int(self.rows[row]))

    @property
    def ids(self) -> list[str]:
        return _picked(self.source.ids, self.rows)

    @property
    def paths(self) -> list[str]:
        return _picked(self.source.paths, self.rows)

    @property
    def columns(self) -> pa.Table:
        return self.source.columns.take(self.rows)

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.rows]

    @property
    def label_names(self) -> list[str] | None:
        return self.source.label_names

    def has_role(self, role: str) -> bool:
        return self.source.has_role(role)

    def origin(self, row: int) -> tuple[str, int]:
        return self.source.origin(int(self.rows[row]))

    @property
    def blocks(self) -> np.ndarray | None:
        whole = self.source.blocks
        return None if whole is None else np.searchsorted(self.rows, whole)

    @property
    def keep(self) -> int | None:
        return self.source.keep

    def fetch(self, block: int) -> None:
        self.source.fetch(block)

    def content_hash(self) -> str:
        return self.source.content_hash()


def _picked(names: Sequence[str], rows: np.ndarray) -> list[str]:
    return [names[row] for row in rows.tolist()]


class _OneCrop(MultiCrop):
    """A single crop of every image: the first global one of a multi-crop."""

    def _kinds(self) -> tuple[tuple[int, int, tuple[float, float]], ...]:
        return ((1, self.global_size, self.global_scale),)


class _Loader(CropLoader):
    """The loader of pretraining with room for that one crop only."""

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size = self._crop.global_size
        return {"crops": ((1, self._batch_size, size, size, 3), torch.uint8)}


@dataclass(frozen=True)
class Look:
    """How a training image is shown: a random box of at least `smallest` of its area, brought to `size` x `size`
    pixels, mirrored with probability `flip`, with brightness, contrast and saturation jittered by up to `jitter`."""

    size: int
    smallest: float = 0.08
    flip: float = 0.5
    jitter: float = 0.3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


class Seen(NamedTuple):
    """Crops of a batch, uint8 [B, 3, S, S], which hold until the next one is asked for; their rows and epochs [B]."""

    crops: Tensor
    rows: np.ndarray
    epochs: np.ndarray


class Views:
    """Endless batches of shuffled training images; order and crops are functions of (seed, epoch, row) alone.

    batch: images of this rank. Unreadable images are replaced by others and counted in `bad`, see `CropLoader`.
    Raises UserError for a look out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        look: Look,
        *,
        batch: int,
        seed: int,
        workers: int,
        bad: BadImages,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 < look.smallest <= 1 or not 0 <= look.jitter <= 1:
            raise UserError(
                f"smallest crop {look.smallest} and jitter {look.jitter} found, expected shares above 0 (jitter: from "
                "0) and up to 1; correct these settings"
            )
        self._crop = _OneCrop(global_size=look.size, global_scale=(look.smallest, 1.0), flip=look.flip)
        self._batch, self._workers, self._bad = batch, workers, bad
        self._rank, self._world_size = rank, world_size
        self._source, self._seed = source, seed
        self._augment = Augment(
            jitter=(look.jitter, look.jitter, look.jitter, 0.0),
            jitter_probability=float(look.jitter > 0),
            gray_probability=0.0,
            solarize_probability=0.0,
            mean=look.mean,
            std=look.std,
        )

    def batches(self, first: int = 0) -> Iterator[Seen]:
        """Batches from number `first` on. Raises InputError for too many unreadable images."""
        loader = _Loader(
            self._source,
            crop=self._crop,
            batch_size=self._batch,
            seed=self._seed,
            workers=self._workers,
            start_step=first,
            rank=self._rank,
            world_size=self._world_size,
            bad=self._bad,
        )
        for batch in loader:
            yield Seen(batch["crops"][0], batch["index"].numpy(), batch["epoch"].numpy())

    def coloured(self, seen: Seen, part: slice, device: torch.device) -> Tensor:
        """Some images of a batch as normalised float32 [n, 3, S, S] on `device`."""
        rows, epochs = seen.rows[part], seen.epochs[part]
        parameters = self._augment.parameters(self._seed, epochs, rows, np.zeros(len(rows), np.int64))
        parameters = replace(parameters, blur=np.zeros(len(rows), bool))
        return self._augment.apply(seen.crops[part].to(device), parameters)


def digests(source: ImageSource, ranks: Ranks = ALONE) -> np.ndarray:
    """sha256 of the files of all readable images, uint8 [n, 32], on every rank; the ranks share the reading."""

    def block(start: int) -> bytes:
        found = []
        for row in range(start, min(start + _HASHED, len(source))):
            with contextlib.suppress(BadImage):  # it was counted where it was to be shown
                found.append(hashlib.sha256(source.read(row)).digest())
        return b"".join(found)

    return np.frombuffer(b"".join(over_blocks(block, len(source), _HASHED, ranks=ranks)), np.uint8).reshape(-1, 32)
