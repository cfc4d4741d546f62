"""Copies that hashes miss, found by local features: crops, turned pictures, overlays, pictures on a page.

    geometric_edges(source, known=[...]) -> Tier       the tier "geometric" of duplicate search
    geometric_search(source, known=[...]) -> Verified  the same with transforms, inliers, and what was turned down
    geometric_matches(source, reference) -> (similarity [N], row [N])   against a reference set
    verify_pairs(source, a, b) -> Verified             given pairs of another tier, as a veto

Three stages, each kept in `store`: features of every image, candidates that share rare ones, and the comparison of
each candidate pair; see search/local_features.py, local_candidates.py and local_verify.py. Needs OpenCV (the extra
`geometric`).
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinov2cli.curation.fingerprints import Images
from dinov2cli.curation.tiers import Tier
from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import Decoder, decode_image, open_image
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress, Store
from dinov2cli.search.components import component_labels
from dinov2cli.search.edges import Edges
from dinov2cli.search.local_candidates import Candidates, K, local_candidates
from dinov2cli.search.local_features import MOST, SIDE, LocalFeatures, Uint8, extract_local_features
from dinov2cli.search.local_verify import THRESHOLD, Verified, best_local_match, verified_edges
from dinov2cli.search.vectors import Float32, Int64

NAME = "geometric"

_OF_A_GROUP = 8
"""Images of a group of known copies that are looked at; the others resemble no other picture than these."""


def _unseen(stage: str) -> Progress | None:
    del stage
    return None


@dataclass(frozen=True)
class Settings:
    """How to look, the same for all functions here.

    most: features of an image; k: candidates of an image; threshold: share of texture that must agree (see
    search/local_verify.py); workers: threads; memory: bytes, or None; scratch: folder for a temporary file where
    features do not fit; store, key, reference_key: where finished blocks are kept, and which images they are of
    (fingerprints of the source and of the reference, where there is one); progress(stage) gives the callback of a
    stage: "features", "candidates", "pairs".
    """

    most: int = MOST
    k: int = K
    threshold: float = THRESHOLD
    seed: int = 0
    workers: int = 1
    memory: int | None = None
    scratch: Path | None = None
    store: Store | None = None
    key: str = ""
    reference_key: str = ""
    progress: Callable[[str], Progress | None] = _unseen
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if not (0 < self.threshold <= 1 and self.most >= 1 and self.k >= 1):
            raise UserError(
                f"geometric verification: found threshold {self.threshold}, {self.most} features, {self.k} candidates; "
                "expected a threshold in 0 .. 1 and at least one of the others"
            )


DEFAULTS = Settings()


def geometric_edges(source: Images, *, known: Sequence[Edges] = (), settings: Settings = DEFAULTS) -> Tier:
    """Copies among the images of a source, as the tier "geometric"; see `geometric_search`."""
    return geometric_tier(geometric_search(source, known=known, settings=settings), settings.threshold)


def geometric_tier(verified: Verified, threshold: float = THRESHOLD) -> Tier:
    """The accepted pairs as a tier of duplicate search."""
    return Tier(NAME, verified.edges, threshold)


def geometric_search(source: Images, *, known: Sequence[Edges] = (), settings: Settings = DEFAULTS) -> Verified:
    """Copies among the images of a source.

    known: edges of the tiers before (bytes, pixels, perceptual). Images they join are not compared with each other,
    and of a large group only some are looked at. Images that cannot be read match nothing. Raises UserError where
    OpenCV is not installed.
    """
    rows = len(source)
    src = np.concatenate([np.zeros(0, np.int64), *(e.src for e in known)])
    dst = np.concatenate([np.zeros(0, np.int64), *(e.dst for e in known)])
    groups = component_labels(rows, src, dst)
    features = local_features(source, settings=settings, wanted=_first_of(groups), name="source")
    candidates = local_candidates(
        features,
        k=settings.k,
        groups=groups,
        seed=settings.seed,
        store=settings.store,
        key=_key(settings, "candidates", groups),
        progress=settings.progress("candidates"),
        ranks=settings.ranks,
    )
    copies = np.bincount(groups, minlength=rows)[groups] - 1 if rows else None
    return _verified(features, candidates, None, copies, settings, groups)


def geometric_matches(source: Images, reference: Images, *, settings: Settings = DEFAULTS) -> tuple[Float32, Int64]:
    """For every image the reference image that it shows again: similarity [N], row [N]; -inf and -1 where none."""
    # The features of the source are the same for every reference.
    ours = local_features(source, settings=replace(settings, reference_key=""), name="source")
    theirs = local_features(reference, settings=replace(settings, key=""), name="reference")
    candidates = local_candidates(
        ours,
        theirs,
        k=settings.k,
        seed=settings.seed,
        store=settings.store,
        key=_key(settings, "reference"),
        progress=settings.progress("candidates"),
        ranks=settings.ranks,
    )
    verified = _verified(ours, candidates, theirs, None, settings)
    return best_local_match(verified, len(source))


def verify_pairs(source: Images, a: Int64, b: Int64, *, settings: Settings = DEFAULTS) -> Verified:
    """Which of the pairs a [P], b [P] of images, found by other means, are copies; mirrored ones too.

    Only images that occur in a pair are read. What is rare is known from these pairs alone.
    """
    a, b = np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"pairs: expected two arrays of one length, found {a.shape} and {b.shape}")
    wanted = np.zeros(len(source), dtype=bool)
    wanted[a], wanted[b] = True, True
    features = local_features(source, settings=settings, wanted=wanted, name="source")
    mirrored = np.arange(2 * len(a)) >= len(a)
    votes = np.zeros(2 * len(a), dtype=np.float32)
    nowhere = np.zeros(len(features.codes), dtype=np.uint16)
    candidates = Candidates(np.tile(a, 2), np.tile(b, 2), mirrored, votes, nowhere)
    return _verified(features, candidates, None, None, settings, wanted)


def local_features(
    source: Images,
    *,
    settings: Settings = DEFAULTS,
    wanted: npt.NDArray[np.bool_] | None = None,
    name: str = "source",
) -> LocalFeatures:
    """Features of the images of a source; of those not `wanted` [N] and those that cannot be read there are none."""
    reader = _Reader(source)
    return extract_local_features(
        lambda row: reader.pixels(row) if wanted is None or wanted[row] else None,
        len(source),
        most=settings.most,
        workers=settings.workers,
        memory=settings.memory,
        scratch=settings.scratch,
        store=settings.store,
        key=_key(settings, name, *([] if wanted is None else [wanted])),
        progress=settings.progress("features"),
        ranks=settings.ranks,
    )


def _verified(
    features: LocalFeatures,
    candidates: Candidates,
    reference: LocalFeatures | None,
    copies: Int64 | None,
    settings: Settings,
    *parts: np.ndarray,
) -> Verified:
    return verified_edges(
        features,
        candidates,
        reference,
        threshold=settings.threshold,
        copies=copies,
        workers=settings.workers,
        store=settings.store,
        key=_key(settings, "pairs", *parts),
        progress=settings.progress("pairs"),
        ranks=settings.ranks,
    )


def _key(settings: Settings, name: str, *parts: np.ndarray) -> str:
    """What a stage's results depend on beside its own settings: the images, and arrays that choose among them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    return f"{name} {settings.key} {settings.reference_key} {settings.most} {digest.hexdigest()[:16]}"


def _first_of(groups: Int64) -> npt.NDArray[np.bool_]:
    """[N] whether a row is among the first of its group."""
    order = np.argsort(groups, kind="stable")
    place = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    wanted = np.zeros(len(groups), dtype=bool)
    wanted[order] = place < _OF_A_GROUP
    return wanted


class _Reader:
    """Pixels of images for finding features: a large JPEG is decoded to a fraction of its size, which is quicker."""

    def __init__(self, source: Images) -> None:
        self._source = source
        self._local = threading.local()
        self._reading = threading.Lock()

    def pixels(self, row: int) -> Uint8 | None:
        name = self._source.ids[row]
        try:
            with self._reading:  # sources are read by one thread
                data = self._source.read(row)
            opened = open_image(data, name=name)
            longest = max(opened.height, opened.width)
            shrink = next((s for s in (8, 4, 2) if longest >= s * SIDE), 1)
            if shrink == 1 or opened.orientation != 1:
                return decode_image(data, name=name)
            if not hasattr(self._local, "decoder"):
                self._local.decoder = Decoder()
            return self._local.decoder.stored(opened, shrink)
        except BadImage:
            return None
