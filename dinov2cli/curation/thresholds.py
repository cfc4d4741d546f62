"""From where on two images are copies: the threshold of every comparison, and why it is what it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dinov2cli.curation.tiers import Tier
from dinov2cli.search.hamming import BITS, RADIUS

COPY_DETECTION_THRESHOLD = 0.6
"""Cosine above which a copy-detection embedding (SSCD) calls two images copies (METHOD.md section 1)."""

COPY_DETECTION_AGAINST = 0.45
"""The same against a reference set, where a copy missed costs more than an image lost."""

BACKBONE_THRESHOLD = 0.95
"""For features of a general backbone, which are alike for look-alikes and not only for copies: strict on purpose.
Calibration finds the value for a model and a data set."""


@dataclass(frozen=True)
class Thresholds:
    """hash_radius: bits of 256 that may differ. embedding, against: cosines that must be exceeded, among the images
    and against a reference set. origin: where the cosines come from, in a few words."""

    hash_radius: int = RADIUS
    embedding: float = COPY_DETECTION_THRESHOLD
    against: float = COPY_DETECTION_AGAINST
    origin: str = "the paper's, for copy-detection embeddings"


def choose_thresholds(
    *,
    copy_detection: bool,
    embedding: float | None = None,
    against: float | None = None,
    hash_radius: int | None = None,
    measured: float | None = None,
    measured_radius: int | None = None,
) -> Thresholds:
    """What was asked for; else what calibration measured; else the paper's for a copy-detection embedding, and a strict
    one for any other model.

    Against a reference set the threshold of another model is the same as within the set: the paper's lower value is
    that of its copy-detection embedding.
    """
    radius = next(r for r in (hash_radius, measured_radius, RADIUS) if r is not None)
    if measured is not None:
        first = measured if embedding is None else embedding
        second = first if against is None else against
        origin = "measured on altered copies of these images"
    elif copy_detection:
        first = COPY_DETECTION_THRESHOLD if embedding is None else embedding
        second = COPY_DETECTION_AGAINST if against is None else against
        origin = "the paper's, for copy-detection embeddings"
    else:
        first = BACKBONE_THRESHOLD if embedding is None else embedding
        second = first if against is None else against
        origin = "strict, for features that are alike for look-alikes too; --calibrate measures it"
    return Thresholds(radius, first, second, "as asked" if embedding is not None else origin)


def rules(tiers: Sequence[Tier], thresholds: Thresholds, *, k: int, normalised: bool = False) -> list[dict[str, Any]]:
    """What every comparison that ran asks for, in words, with how many pairs it found."""
    bits = thresholds.hash_radius
    what = "cosine, less how near both are to the background," if normalised else "cosine"
    words = {
        "bytes": "the files are equal byte by byte",
        "pixels": "the decoded images are equal pixel by pixel",
        "perceptual": f"perceptual hashes differ in at most {bits} of {BITS} bits, in some orientation, and small "
        "colour pictures of both agree",
        "geometric": "rare local features agree in place over a large part of both, and so do the pixels there",
        "embedding": f"{what} above {thresholds.embedding:g} ({thresholds.origin}) and one among the {k} nearest of "
        "the other",
    }
    return [{"tier": tier.name, "edges": len(tier.edges), "rule": words[tier.name]} for tier in tiers]
