"""What a classifier answers to the images of a source, under one or several sets of weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from dinov2cli.data.bad import BadImages
from dinov2cli.data.loader import Reading, read_ranges, row_ranges
from dinov2cli.data.source import ImageSource
from dinov2cli.device import autocast
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.features import view_of
from dinov2cli.evaluation.finetuning.model import Classifier
from dinov2cli.evaluation.scores import true_class_ranks
from dinov2cli.models.preprocess import Preprocess

Weights = Mapping[str, Tensor]
"""Parameters by name, to be used instead of the model's own; none: its own."""


@dataclass(frozen=True)
class Answers:
    """For n readable images: their rows in the source int64 [n], sha256 uint8 [n, 32], and by name of the weights
    classes before the true one int64 [n], predicted class int64 [n] and its probability float32 [n]."""

    rows: np.ndarray
    digests: np.ndarray
    ranks: dict[str, np.ndarray]
    predictions: dict[str, np.ndarray]
    confidences: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def accuracy(self, name: str) -> float:
        """Share of images whose true class comes first."""
        return float((self.ranks[name] == 0).mean())


def answer(
    model: Classifier,
    weights: Mapping[str, Weights],
    source: ImageSource,
    labels: np.ndarray,
    *,
    preprocess: Preprocess,
    device: torch.device,
    precision: str,
    batch_size: int,
    workers: int = 0,
    bad: BadImages | None = None,
    ranks: Ranks = ALONE,
    advance: Callable[[int], None] | None = None,
) -> Answers:
    """Answers to all images of `source`, whose classes are `labels` (int64 [len(source)]), on every rank.

    Each image is read once, as `preprocess` shows it, whatever the number of weights; the ranks share the images.
    Raises InputError for too many unreadable images, WorkError for logits that are not finite.
    """
    bad = BadImages() if bad is None else bad
    ranges = row_ranges(0, len(source), batch_size)
    view = view_of(preprocess)
    readings = read_ranges(source, ranks.share(ranges), view=view, workers=workers)
    training = model.training
    model.eval()
    parts: list[_Part] = []
    for part in ranks.merge(_answered(model, weights, readings, labels, preprocess, device, precision), len(ranges)):
        for name, reason in part.failures:
            bad.add(name, reason)
        parts.append(part)
        if advance is not None:
            advance(len(part.rows) + len(part.failures))
    model.train(training)
    bad.check(len(source))
    if not sum(len(part.rows) for part in parts):
        raise InputError(f"{source.spec}: none of {len(source)} images can be read; repair the set")
    return Answers(
        np.concatenate([part.rows for part in parts]),
        np.frombuffer(b"".join(part.digests for part in parts), np.uint8).reshape(-1, 32),
        *({name: np.concatenate([part.found[name][kind] for part in parts]) for name in weights} for kind in range(3)),
    )


@dataclass(frozen=True)
class _Part:
    """Of one range: rows, digests one after another, (ranks, predictions, confidences) by name, and failures."""

    rows: np.ndarray
    digests: bytes
    found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    failures: Sequence[tuple[str, str]]


def _answered(
    model: Classifier,
    weights: Mapping[str, Weights],
    readings: Iterator[Reading],
    labels: np.ndarray,
    preprocess: Preprocess,
    device: torch.device,
    precision: str,
) -> Iterator[_Part]:
    for reading in readings:
        batch = reading.batch
        truth = torch.from_numpy(labels[batch.index]).to(device)
        images = preprocess.normalize(batch.images.to(device))
        found = {name: _judged(model, own, images, truth, precision) for name, own in weights.items()}
        digests = b"".join(bytes.fromhex(digest) for digest in batch.sha256)
        yield _Part(batch.index, digests, found, reading.failures)


@torch.no_grad()
def _judged(
    model: Classifier, weights: Weights, images: Tensor, truth: Tensor, precision: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not len(images):
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0, np.float32)
    with autocast(images.device, precision):
        logits: Tensor = functional_call(model, dict(weights), (images,))
    if not bool(torch.isfinite(logits).all()):
        raise WorkError(
            "the fine-tuned model gives NaN or infinite logits: its training diverged; lower `lr`, set `clip`, or "
            "train in fp32 (--precision fp32)"
        )
    confidence = logits.softmax(dim=1).amax(dim=1).cpu().numpy()
    return true_class_ranks(logits, truth).cpu().numpy(), logits.argmax(dim=1).cpu().numpy(), confidence
