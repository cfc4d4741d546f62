"""What a dense head is trained on at every step: stored token maps, or images read and augmented on the way.

Which examples make a batch is a pure function of the seed and the step, whatever the number of ranks; each rank brings
its part. Examples of different sizes stand in different parts of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2cli.data.bad import BadImage
from dinov2cli.data.dense import Pair, Target, augmented, in_order, pair_random, read_pair
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import InputError
from dinov2cli.evaluation.dense.maps import MapSet, Seeing
from dinov2cli.evaluation.dense.tokens import Sight, TokenMaps

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Examples of one size, on the CPU: targets [b, H, W] and either tokens or images (uint8 [b, 3, H, W])."""

    targets: Tensor
    tokens: TokenMaps | None = None
    images: Tensor | None = None

    def seen(self, seeing: Seeing) -> tuple[TokenMaps, Tensor]:
        """Float32 tokens and the targets, on the device; images go through the model here."""
        targets = self.targets.to(seeing.device, non_blocking=True)
        if self.tokens is not None:
            maps, cls = self.tokens.maps.to(seeing.device), self.tokens.cls.to(seeing.device)
            return TokenMaps(maps.float(), cls.float()), targets
        assert self.images is not None
        found = seeing.of(list(self.images))
        return TokenMaps(torch.cat([one.maps for one in found]), torch.cat([one.cls for one in found])), targets


def drawn(count: int, batch_size: int, step: int, seed: int) -> list[tuple[int, int]]:
    """(example, epoch) of the batch of a step: every example once in an epoch, in an order of its own."""
    places = [divmod(step * batch_size + place, count) for place in range(batch_size)]
    return [(int(_order(count, seed, epoch)[at]), epoch) for epoch, at in places]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, epoch]).permutation(count)


class StoredBatches:
    """Windows of stored maps. `targets`: of the rows that this rank holds, [H, W] at the size at which the model sees
    the image. An example is one window of one image; of images with two views a view is drawn."""

    def __init__(self, found: MapSet, targets: dict[int, Tensor], sight: Sight, *, batch_size: int, seed: int) -> None:
        self._found, self._targets, self._sight = found, targets, sight
        self._batch_size, self._seed = batch_size, seed
        counts = [len(sight.windows(*sight.size(*size))) for size in found.sizes.tolist()]
        self._rows = np.repeat(found.rows, counts)
        self._windows = np.concatenate([np.arange(count) for count in counts])

    def __len__(self) -> int:
        """Examples of an epoch, over all ranks."""
        return len(self._rows)

    def __call__(self, step: int) -> list[Part]:
        """This rank's parts of the batch of a step; perhaps none."""
        parts: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for example, epoch in drawn(len(self), self._batch_size, step, self._seed):
            row, number = int(self._rows[example]), int(self._windows[example])
            if row not in self._found.maps:
                continue
            maps, target = self._found.maps[row], self._targets[row]
            view = int(np.random.default_rng([self._seed, epoch, example]).integers(len(maps)))
            target = target.flip(1) if view else target
            target = self._sight.windows(*target.shape)[number].of(target)
            chosen = (maps[view, number], self._found.cls[row][view, number], target)
            parts.setdefault(tuple(target.shape), []).append(chosen)
        return [
            Part(torch.stack(targets), TokenMaps(torch.stack(maps), torch.stack(cls)))
            for maps, cls, targets in (zip(*alike, strict=True) for alike in parts.values())
        ]


@dataclass(frozen=True)
class Augmentation:
    """Random scale (uniform in a range), crop to at most a window's side, and mirror image."""

    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5


class ReadBatches:
    """Images of a source and their targets, read at every step; `rows` are those that can be read.

    prepared(target, name) turns what a file stores into a tensor [H, W].
    """

    def __init__(
        self,
        source: ImageSource,
        role: str,
        rows: Rows,
        sight: Sight,
        prepared: Callable[[Target, str], Tensor],
        *,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        workers: int = 0,
        resize_target: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._source, self._role, self._rows, self._sight, self._prepared = source, role, rows, sight, prepared
        self._augmentation, self._batch_size, self._seed = augmentation, batch_size, seed
        self._workers, self._resize_target, self._ranks = workers, resize_target, ranks

    def __len__(self) -> int:
        """Examples of an epoch: images, of each of which one window is drawn."""
        return len(self._rows)

    def __call__(self, step: int) -> list[Part]:
        """This rank's parts of the batch of a step. Raises InputError for a file that cannot be read any more."""
        mine = self._ranks.share(drawn(len(self), self._batch_size, step, self._seed))
        return _by_size(list(in_order(self._one, mine, self._workers)))

    def _one(self, example: tuple[int, int]) -> tuple[Tensor, Tensor]:
        row, epoch = int(self._rows[example[0]]), example[1]
        try:
            pair = read_pair(self._source, row, self._role, resize_target=self._resize_target)
        except BadImage as error:
            raise InputError(f"{error}: it could be read before; do not change data under a running command") from error
        pair = self.framed(pair, pair_random(self._seed, epoch, row))
        return pair.image, self._prepared(pair.target, pair.name)

    def framed(self, pair: Pair, random: np.random.Generator) -> Pair:
        side, chosen = self._sight.window, self._augmentation
        shorter = min(self._sight.size(*pair.size))
        return augmented(pair, random, shorter=shorter, scale=chosen.scale, crop=(side, side), flip=chosen.flip)


def _by_size(examples: Sequence[tuple[Tensor, Tensor]]) -> list[Part]:
    parts: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for image, target in examples:
        parts.setdefault(tuple(target.shape), []).append((image, target))
    return [
        Part(torch.stack([target for _, target in alike]), images=torch.stack([image for image, _ in alike]))
        for alike in parts.values()
    ]
