"""Fingerprints of a few files at a time: what one thread does while others do the same."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_small
from dinov2cli.search.framing import edges, may_be_framed
from dinov2cli.search.hashing import HASH_BYTES, THUMB, Uint8, hash_views, image_views, sharpness, view_kinds

Chunk = dict[str, npt.NDArray[Any]]
"""Fingerprints of n files with V views in all, row by row: width, height int32 [n], sha256 uint8 [n, 32], sharpness
float32 [n], reason str [n] (why it cannot be read; empty otherwise), views uint8 [n] (how many of the next are its
own); kind [V], bits [V, 32], thumbs [V, 12, 12, 3] uint8."""

_LEAST = 64
"""Pixels that the shorter side of a reduced picture keeps, for a hash of 36 x 36 points."""

_LEAST_FRAMED = 160
"""The same where the edge of a frame is to be found: a percent of it is the few bits by which copies differ."""


def fingerprint_files(files: Sequence[tuple[str, bytes | BadImage]]) -> Chunk:
    """Fingerprints of files given as (name, bytes or why there are none). Of files with equal bytes one is decoded."""
    rows = len(files)
    width, height = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    digest, sharp = np.zeros((rows, HASH_BYTES), np.uint8), np.zeros(rows, np.float32)
    reason, views = [""] * rows, [np.zeros((0, 1, 1, 3), np.uint8)] * rows
    seen: dict[bytes, int] = {}
    small: dict[int, Uint8] = {}
    for row, (name, data) in enumerate(files):
        if isinstance(data, BadImage):
            reason[row] = data.reason
            continue
        sha256 = hashlib.sha256(data).digest()
        digest[row] = np.frombuffer(sha256, np.uint8)
        if seen.setdefault(sha256, row) != row:
            continue
        try:
            small[row], height[row], width[row] = decode_small(data, name=name, least=_LEAST)
        except BadImage as error:
            reason[row] = error.reason
    for row, closer in _closer(small, files).items():
        views[row], sharp[row] = image_views(small[row], closer), sharpness(small[row])
    for row in range(rows):
        same = seen.get(digest[row].tobytes(), row)
        if same != row:
            reason[row], views[row], sharp[row] = reason[same], views[same], sharp[same]
            width[row], height[row] = width[same], height[same]
    digest[[bool(one) for one in reason]] = 0
    found: Chunk = {
        "width": width,
        "height": height,
        "sha256": digest,
        "sharpness": sharp,
        "reason": np.array(reason, "U"),
    }
    return found | _hashed(views)


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Several as one."""
    if not chunks:
        return fingerprint_files([])
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _closer(small: dict[int, Uint8], files: Sequence[tuple[str, bytes | BadImage]]) -> dict[int, Uint8 | None]:
    """A closer look at those images that seem to have a frame; None for the others."""
    closer: dict[int, Uint8 | None] = dict.fromkeys(small)
    if not small:
        return closer
    framed = may_be_framed(np.stack([edges(image) for image in small.values()]))
    for row, yes in zip(small, framed.tolist(), strict=True):
        name, data = files[row]
        if yes and isinstance(data, bytes):
            closer[row] = decode_small(data, name=name, least=_LEAST_FRAMED)[0]
    return closer


def _hashed(views: Sequence[Uint8]) -> Chunk:
    counts = np.array([len(one) for one in views], dtype=np.int64)
    some = [one for one in views if len(one)]
    if not some:
        none = {"kind": (0,), "bits": (0, HASH_BYTES), "thumbs": (0, THUMB, THUMB, 3)}
        return {"views": counts.astype(np.uint8), **{key: np.zeros(shape, np.uint8) for key, shape in none.items()}}
    bits, valid, thumbs = hash_views(np.concatenate(some))
    owner = np.repeat(np.arange(len(views)), counts)
    return {
        "views": np.bincount(owner[valid], minlength=len(views)).astype(np.uint8),
        "kind": np.concatenate([view_kinds(len(one)) for one in some])[valid],
        "bits": bits[valid],
        "thumbs": thumbs[valid],
    }
