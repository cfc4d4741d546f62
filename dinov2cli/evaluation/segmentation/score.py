"""A trained head on a test set: pixels counted image by image, shared among the ranks, kept block by block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.data.bad import BadImage, BadImages
from dinov2cli.data.dense import Pair, read_pairs
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import InputError
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.segmentation.head import LinearSegmenter, Overlaps, overlaps, segment
from dinov2cli.evaluation.segmentation.labels import Labelling
from dinov2cli.search.blocks import Stage, kept, over_blocks

BLOCK = 8  # images that are segmented and kept together


@dataclass(frozen=True)
class Scored:
    """rows int64 [n] of the source that could be read, their overlaps, and digests uint8 [n, 32] of the images."""

    rows: npt.NDArray[np.int64]
    overlaps: Overlaps
    digests: npt.NDArray[np.uint8]


def score(
    head: LinearSegmenter,
    seeing: Seeing,
    source: ImageSource,
    labelling: Labelling,
    *,
    bad: BadImages,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    resize_target: bool = False,
    workers: int = 0,
    stage: Stage | None = None,
    ranks: Ranks = ALONE,
    advance: Callable[[int], None] | None = None,
) -> Scored:
    """Segment every image at its own size and count. On every rank, with the same head; all get everything.

    Raises InputError for masks that do not fit (size, numbers), and where every pixel of all images is ignored.
    """
    head.eval()
    assert labelling.classes is not None
    classes = labelling.classes

    def work(start: int) -> dict[str, npt.NDArray[Any]]:
        rows = range(start, min(start + BLOCK, len(source)))
        found: list[Pair | BadImage] = list(
            read_pairs(source, rows, "mask", workers=workers, resize_target=resize_target)
        )
        pairs = [pair for pair in found if isinstance(pair, Pair)]
        failures = [(error.name, error.reason) for error in found if isinstance(error, BadImage)]
        # Before the model runs: a wrong mask shall not cost a minute.
        truths = [labelling.read(pair.target, pair.name) for pair in pairs]
        answers = segment(head, seeing, [pair.image for pair in pairs], scales=scales, mirror=mirror)
        counts = overlaps(truths, answers, classes)
        return {
            "rows": np.array([pair.row for pair in pairs], dtype=np.int64),
            "digests": np.array([pair.digest for pair in pairs], dtype=np.uint8).reshape(-1, 32),
            "failures": np.array(failures, dtype=np.str_).reshape(-1, 2),
            "counts": np.stack([counts.truth, counts.predicted, counts.both]),
        }

    parts = []
    for part in over_blocks(kept(work, stage), len(source), BLOCK, ranks=ranks):
        parts.append(part)
        for name, reason in part["failures"]:
            bad.add(str(name), str(reason))
        bad.check(len(source))
        if advance is not None:
            advance(len(part["rows"]) + len(part["failures"]))
    truth, predicted, both = np.concatenate([np.asarray(part["counts"]) for part in parts], axis=1)
    if not truth.any():
        raise InputError(f"{source.spec}: every pixel of its masks is ignored; expected some of the {classes} classes")
    rows, digests = (np.concatenate([np.asarray(part[name]) for part in parts]) for name in ("rows", "digests"))
    return Scored(rows, Overlaps(truth, predicted, both), digests)
