"""Frozen features of images, batch by batch: what `embed` streams to disk and every benchmark is fed by.

Knows nothing of files or labels; images come as uint8 batches and go as float32 features on the CPU.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data.bad import BadImages
from dinov2cli.data.loader import Batch, CentreView, Reading, View, read_ranges
from dinov2cli.data.source import ImageSource
from dinov2cli.device import autocast
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

Pool = Literal["cls", "mean", "cls+mean"]
POOLS: tuple[Pool, ...] = ("cls", "mean", "cls+mean")

Rate = Callable[[int, float], None]
"""Called after every batch with (images done, seconds since the first batch was asked for)."""


class ImageBatch(Protocol):
    """Anything with uint8 images [n, 3, H, W], for example `data.loader.Batch`."""

    @property
    def images(self) -> Tensor: ...


B = TypeVar("B", bound=ImageBatch)
Network = VisionTransformer | Encoder | Descriptor


@dataclass
class FeatureBatch(Generic[B]):
    """Features of one batch, float32 on the CPU. `batch` is the very object that came in (its index, sizes, hashes)."""

    batch: B
    pooled: Tensor  # [n, D], [n, 2D] for cls+mean
    patches: Tensor | None = None  # [n, N, D] after the final norm
    class_tokens: Tensor | None = None  # [n, blocks, D] of the last blocks after the final norm, oldest first
    averaged_patches: Tensor | None = None  # [n, D] of the last block


@dataclass
class Features:
    """Features of a whole source; row i belongs to row `index[i]` of the source (unreadable images have no row).

    class_tokens: of the last L blocks after the final norm, oldest first (a descriptor's one vector: L = 1);
    averaged_patches: of the last block, None for a descriptor; pooled: the vector this kind of model is used by.
    """

    index: np.ndarray  # int64 [n]
    labels: np.ndarray | None  # int64 [n], -1 where an image has none
    label_names: list[str] | None
    class_tokens: np.ndarray  # float32 [n, L, D]
    averaged_patches: np.ndarray | None  # float32 [n, D]
    pooled: np.ndarray  # float32 [n, P]
    digests: np.ndarray  # uint8 [n, 32]: sha256 of each file
    seconds: float  # of the extraction, whenever that was

    def __len__(self) -> int:
        return len(self.index)

    def pool(self, pool: str = "auto") -> np.ndarray:
        """Vectors float32 [n, P]: `auto` (what this kind of model is used by), `cls`, `mean` or `cls+mean`.

        Raises UserError for an unknown name, and for tokens where a descriptor has none.
        """
        if pool not in ("auto", *POOLS):
            raise UserError(f"pool {pool!r} is not known: expected one of auto, {', '.join(POOLS)}")
        if pool in ("auto", "cls"):
            return self.pooled if pool == "auto" else self.class_tokens[:, -1]
        if self.averaged_patches is None:
            raise UserError(f"this model gives one vector per image and has no tokens; found pool {pool!r}: use auto")
        if pool == "mean":
            return self.averaged_patches
        return np.concatenate([self.class_tokens[:, -1], self.averaged_patches], axis=1)


def view_of(preprocess: Preprocess) -> CentreView:
    """How a model wants its images to be brought to its size."""
    return CentreView(preprocess.resize, preprocess.crop, preprocess.square, preprocess.interpolation)


def pooled_dim(embed_dim: int, pool: Pool) -> int:
    """Length of the pooled vector of a backbone with this embed_dim."""
    return 2 * embed_dim if pool == "cls+mean" else embed_dim


def _pool(cls_BD: Tensor, patches_BND: Tensor, pool: Pool) -> Tensor:
    if pool == "cls":
        return cls_BD
    mean_BD = patches_BND.mean(dim=1)
    return mean_BD if pool == "mean" else torch.cat([cls_BD, mean_BD], dim=1)


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU: a view would hold, and send to other processes, all tokens of the batch."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def extract(
    backbone: Network,
    batches: Iterable[B],
    *,
    preprocess: Preprocess,
    pool: Pool = "cls",
    patches: bool = False,
    last_blocks: int = 0,
    precision: str = "fp32",
    on_rate: Rate | None = None,
) -> Iterator[FeatureBatch[B]]:
    """Yield the features of every batch, on the device of `backbone`, which must be in eval mode.

    `pool` picks class token, mean of patch tokens or both concatenated, all after the final norm. `patches` keeps the
    patch tokens too. `last_blocks` > 0 adds what the linear probe reads: the class tokens of that many last blocks (all
    blocks, if the backbone has fewer) and the averaged patches of the last. Vectors are not L2-normalised.
    A descriptor gives its one vector as `pooled`, and nothing else; for an `Encoder` the pool cls means the vector that
    it is used by.
    Raises UserError for an unknown pool or precision, and for tokens of a descriptor.
    """
    check_wanted(backbone, pool, patches=patches, last_blocks=last_blocks)
    device = backbone.cls_token.device if isinstance(backbone, VisionTransformer) else backbone.device
    autocast(device, precision)  # an unknown name must fail before the first image is read
    done, started = 0, time.perf_counter()
    for batch in batches:
        with torch.inference_mode(), autocast(device, precision):
            images = preprocess.normalize(batch.images.to(device, non_blocking=True))
            if isinstance(backbone, Descriptor):
                features = FeatureBatch(batch, _kept(backbone(images).float()))
            else:
                features = _token_features(backbone, batch, images, pool, patches, last_blocks)
        done += len(batch.images)
        if on_rate is not None:
            on_rate(done, time.perf_counter() - started)
        yield features


def check_wanted(backbone: Network, pool: Pool, *, patches: bool = False, last_blocks: int = 0) -> None:
    """Raise UserError for an unknown pool, and for tokens where a descriptor has none."""
    if pool not in POOLS:
        raise UserError(f"pool {pool!r} is not known: expected one of {', '.join(POOLS)}")
    if isinstance(backbone, Descriptor) and (pool != "cls" or patches or last_blocks > 0):
        found = "patch tokens" if patches else "tokens of its last blocks" if last_blocks > 0 else f"pool {pool!r}"
        raise UserError(f"this model gives one vector per image and has no tokens; found {found}: leave that out")


def _token_features(
    backbone: VisionTransformer | Encoder, batch: B, images: Tensor, pool: Pool, patches: bool, last_blocks: int
) -> FeatureBatch[B]:
    """What `extract` yields for a batch, of normalised images [n, 3, S, S]."""
    blocks = range(max(0, backbone.depth - max(last_blocks, 1)), backbone.depth)
    used: Tensor | None = None
    if isinstance(backbone, Encoder):
        looked = backbone.see(images, list(blocks))
        seen, used = looked.tokens, looked.pooled.float()
    elif last_blocks > 0:
        seen = backbone.intermediate(images, list(blocks), norm=True)
    else:
        output = backbone(images)
        seen = [(output.patches, output.cls)]
    patch_tokens, cls = seen[-1]
    tokens = torch.stack([cls for _, cls in seen], dim=1) if last_blocks > 0 else None
    patch_tokens = patch_tokens.float()
    vectors = used if used is not None and pool == "cls" else _pool(cls.float(), patch_tokens, pool)
    return FeatureBatch(
        batch=batch,
        pooled=_kept(vectors),
        patches=_kept(patch_tokens) if patches else None,
        class_tokens=tokens.float().cpu() if tokens is not None else None,
        averaged_patches=patch_tokens.mean(dim=1).cpu() if tokens is not None else None,
    )


@contextmanager
def stream_features(
    backbone: Network,
    source: ImageSource,
    ranges: Sequence[tuple[int, int]],
    *,
    preprocess: Preprocess,
    workers: int = 0,
    bad: BadImages | None = None,
    ranks: Ranks = ALONE,
    **what: Any,
) -> Iterator[Iterator[FeatureBatch[Batch]]]:
    """For a `with` block: features of the ranges of rows, in order, on the main process (nothing on the others).

    Each rank decodes and forwards its share of the ranges. A range without a readable image gives nothing; the pixels
    (`batch.images`) are left behind. `bad` counts the unreadable images of all ranks. `what` is given to `extract`.
    What the block raises is raised by all ranks. Raises what `extract` raises, and InputError for too many unreadable.
    """
    with deal_features(
        backbone, source, ranges, preprocess=preprocess, workers=workers, ranks=ranks, **what
    ) as results:
        yield _counted(results, BadImages() if bad is None else bad, len(source))


Dealt = tuple[list[tuple[str, str]], FeatureBatch[Batch] | None]
"""Of one range of rows: (name, reason) of the images that could not be read, and features if there was any image."""


@contextmanager
def deal_features(
    backbone: Network,
    source: ImageSource,
    ranges: Sequence[tuple[int, int]],
    *,
    preprocess: Preprocess,
    view: View | None = None,
    workers: int = 0,
    ranks: Ranks = ALONE,
    **what: Any,
) -> Iterator[Iterator[Dealt]]:
    """As `stream_features`, but one result for every range, and unreadable images are not counted.

    view: how pixels become what the model sees; by default `preprocess`'s own.
    """
    mine = ranks.share(ranges)
    view = view_of(preprocess) if view is None else view
    readings = read_ranges(source, mine, view=view, workers=workers)
    own = _dealt(backbone, readings, preprocess=preprocess, **what)
    with ranks.gather(own, len(ranges)) as results:
        yield results


def _dealt(backbone: Network, readings: Iterator[Reading], **what: Any) -> Iterator[Dealt]:
    """What a rank sends for each of its ranges."""
    for found in readings:
        features = None
        if len(found.batch):
            (features,) = extract(backbone, [found.batch], **what)
            features.batch = replace(found.batch, images=found.batch.images.new_empty((0, 3, 0, 0)))
        yield found.failures, features


def _counted(results: Iterator[Dealt], bad: BadImages, total: int) -> Iterator[FeatureBatch[Batch]]:
    for failures, features in results:
        for name, reason in failures:
            bad.add(name, reason)
        bad.check(total)
        if features is not None:
            yield features
