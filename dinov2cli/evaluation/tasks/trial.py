"""One model on the data of one task: what a task is given to work with."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2cli.data.bad import BadImages
from dinov2cli.data.loader import View
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.evaluation.cache import cached_features, pixel_options
from dinov2cli.evaluation.features import Features
from dinov2cli.models.load import LoadedModel
from dinov2cli.search.blocks import Store

Advance = Callable[[int], None]


def _silent(_text: str) -> None:
    return


@contextlib.contextmanager
def _no_progress(_label: str, _total: int | None, _unit: str = "images") -> Iterator[Advance]:
    yield lambda _count: None


@dataclass
class Trial:
    """One model, the sources and the means of a task.

    train is None where the task needs none; others: further sources by name. device and precision: where and in which
    numbers the frozen model computes (`autocast(device, precision)`). confidence and resamples: of intervals. store:
    where long stages keep finished blocks, so that a killed command goes on (`store.stage(name, key)`); cache: where
    features are kept between commands; folder: in the output, for files that a task makes besides its figures; each
    None where nothing is to be kept. say, warn and progress(label, total, unit) speak to the user.
    """

    model: LoadedModel
    test: ImageSource
    train: ImageSource | None = None
    others: dict[str, ImageSource] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    max_bad_fraction: float = 0.01
    confidence: float = 0.95
    resamples: int = 2000
    ranks: Ranks = ALONE
    folder: Path | None = None
    store: Store | None = None
    cache: Store | None = None
    say: Callable[[str], None] = _silent
    warn: Callable[[str], None] = _silent
    progress: Callable[..., Any] = _no_progress
    digests: dict[str, np.ndarray] = field(default_factory=dict)
    bad: dict[str, BadImages] = field(default_factory=dict)

    def features(self, source: ImageSource, *, view: View | None = None, keep: bool | None = None) -> Features:
        """Features of all readable images of a source; computed once, kept in the cache, shared by all tasks.

        view: how pixels become what the model sees, if not by its own preprocessing (see `data.loader.View`); such
        features are kept only if `keep` asks for it. To be called on every process of a launch; the main process alone
        gets rows. Raises what `deal_features` raises, and InputError for too many unreadable images.
        """
        found = cached_features(self, source, view, keep=view is None if keep is None else keep)
        self.note_digests(source, found.digests)
        return found

    def bad_images(self, source: ImageSource) -> BadImages:
        """The count of unreadable images of a source, which stops the command when there are too many."""
        return self.bad.setdefault(source.spec, BadImages(self.max_bad_fraction))

    def note_digests(self, source: ImageSource, digests: np.ndarray) -> None:
        """Tell the hashes of the images that were used, uint8 [n, 32] (sha256 of each file): train and test must not
        share any, and the user is warned where they do."""
        self.digests[source.spec] = digests

    @property
    def same_images(self) -> bool:
        """Whether train and test are the same rows of the same data, with the same labels."""
        train, test = self.train, self.test
        if train is None or len(train) != len(test):
            return False
        return (
            train.content_hash() == test.content_hash()
            and pixel_options(train) == pixel_options(test)
            and train.ids == test.ids
            and np.array_equal(_labels(train), _labels(test))
        )


def _labels(source: ImageSource) -> np.ndarray:
    return np.zeros(0, np.int64) if source.labels is None else source.labels
