"""Features of a source, computed once: block by block into a store, by whatever process was at it, and read again.

What a block depends on makes its key: weights, pixels, preprocessing, numbers of the device. Labels are not part of
it: they are the source's own, whenever they are asked for.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2cli.data.loader import View, row_ranges
from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import parse_spec
from dinov2cli.evaluation.features import Dealt, Features, deal_features
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.search.blocks import Arrays, Stage

if TYPE_CHECKING:
    from dinov2cli.evaluation.tasks.trial import Trial

BLOCK = 1024  # rows that are kept together; a killed command loses at most one block
LAST_BLOCKS = 4  # of which class tokens are kept
_COLUMNS = ("label", "group", "is_query", "mask", "depth")  # options of a DATA string that leave the pixels alone
_FORMAT = 1


class _Memory:
    """A stage that is forgotten with the process."""

    def __init__(self) -> None:
        self._blocks: dict[int, Arrays] = {}

    def load(self, start: int) -> Arrays | None:
        return self._blocks.get(start)

    def save(self, start: int, arrays: Arrays) -> None:
        self._blocks[start] = arrays


def features_key(trial: "Trial", source: ImageSource, view: View | None) -> dict[str, Any]:
    """All that the features of a source depend on, as plain values."""
    options = {key: value for key, value in parse_spec(source.spec).options.items() if key not in _COLUMNS}
    return {
        "format": _FORMAT,
        "model": {key: value for key, value in trial.model.fingerprint.items() if key != "file"},
        "preprocess": asdict(trial.model.preprocess),
        "view": None if view is None else view.name,
        "data": {"hash": source.content_hash(), "rows": len(source), "options": options},
        "precision": trial.precision,
        "device": trial.device.type,
    }


def cached_features(trial: "Trial", source: ImageSource, view: View | None = None, *, keep: bool = True) -> Features:
    """Features of a source: from the trial's cache as far as they are there, the rest computed and (`keep`) put there.

    Under a launch the ranks share what is missing; the main process alone gets rows. Counts unreadable images in
    `trial.bad_images(source)`, also those of blocks that were there. Raises what `deal_features` and `check` raise.
    """
    stage: Stage = _Memory()
    if keep and trial.cache is not None and trial.ranks.main:
        stage = trial.cache.stage("features", features_key(trial, source, view))
    starts = range(0, len(source), BLOCK)
    found: dict[int, Arrays | None] = {}
    if trial.ranks.main:
        found = {start: stage.load(start) for start in starts}
    missing = trial.ranks.first(lambda: [start for start in starts if found[start] is None])
    if missing:
        for start, computed in _computed(trial, source, view, missing):
            stage.save(start, computed)
            found[start] = computed
    blocks = [arrays for start in starts if (arrays := found.get(start)) is not None]
    trial.ranks.together(lambda: _count_bad(trial, source, blocks))
    return _joined(trial, source, blocks)


def _computed(
    trial: "Trial", source: ImageSource, view: View | None, starts: Sequence[int]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(start, arrays) of every missing block as soon as it is complete, on the main process; nothing on the others."""
    ranges = [
        part
        for start in starts
        for part in row_ranges(start, min(start + BLOCK, len(source)), trial.batch_size, within=BLOCK)
    ]
    network = trial.model.network.to(trial.device)
    blocks = {} if isinstance(network, Descriptor) else {"last_blocks": LAST_BLOCKS}
    with (
        trial.progress(f"features of {source.spec}", sum(stop - start for start, stop in ranges)) as advance,
        deal_features(
            network,
            source,
            ranges,
            preprocess=trial.model.preprocess,
            view=view,
            workers=trial.workers,
            ranks=trial.ranks,
            precision=trial.precision,
            **blocks,
        ) as results,
    ):
        parts: list[Dealt] = []
        began = time.perf_counter()
        # The other ranks get no results, and must walk through them all the same.
        for (start, stop), dealt in zip(ranges, results, strict=trial.ranks.main):
            parts.append(dealt)
            advance(stop - start)
            if stop % BLOCK == 0 or stop == len(source):
                arrays = _arrays(parts, isinstance(network, VisionTransformer))
                arrays["seconds"] = np.array([time.perf_counter() - began])
                yield start // BLOCK * BLOCK, arrays
                parts, began = [], time.perf_counter()


def _arrays(parts: Sequence[Dealt], is_last_token: bool) -> dict[str, np.ndarray]:
    """What is kept of a block: features of its readable images, names and reasons of the others.

    is_last_token: the pooled vector is the last class token, and need not be kept twice.
    """
    failures = [failure for failed, _ in parts for failure in failed]
    seen = [features for _, features in parts if features is not None]
    arrays = {
        "index": np.concatenate([np.zeros(0, np.int64), *(part.batch.index for part in seen)]),
        "bad_names": np.array([name for name, _ in failures], dtype=np.str_),
        "bad_reasons": np.array([reason for _, reason in failures], dtype=np.str_),
    }
    if seen:
        digests = b"".join(bytes.fromhex(digest) for part in seen for digest in part.batch.sha256)
        arrays["digests"] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        for name in ("pooled", "class_tokens", "averaged_patches"):
            values = [value.numpy() for part in seen if (value := getattr(part, name)) is not None]
            if values:
                arrays[name] = np.concatenate(values)
        if is_last_token:
            del arrays["pooled"]
    return arrays


def _count_bad(trial: "Trial", source: ImageSource, blocks: Sequence[Arrays]) -> None:
    bad = trial.bad_images(source)
    for arrays in blocks:
        for name, reason in zip(arrays["bad_names"].tolist(), arrays["bad_reasons"].tolist(), strict=True):
            bad.add(name, reason)
    bad.check(len(source))


def _joined(trial: "Trial", source: ImageSource, blocks: Sequence[Arrays]) -> Features:
    index = _together(blocks, "index", np.zeros(0, np.int64))
    network = trial.model.network
    none = np.zeros((0, network.embed_dim), np.float32)
    tokens = _together(blocks, "class_tokens", None)
    pooled = _together(blocks, "pooled", None)
    if pooled is None:
        pooled = none if tokens is None else tokens[:, -1]
    return Features(
        index=index,
        labels=None if source.labels is None else source.labels[index],
        label_names=source.label_names,
        class_tokens=pooled[:, None] if tokens is None else tokens,
        averaged_patches=_together(blocks, "averaged_patches", None if isinstance(network, Descriptor) else none),
        pooled=pooled,
        digests=_together(blocks, "digests", np.zeros((0, 32), np.uint8)),
        seconds=float(_together(blocks, "seconds", np.zeros(0)).sum()),
    )


def _together(blocks: Sequence[Mapping[str, Any]], name: str, empty: Any) -> Any:
    """The arrays of that name one after another, copied once; `empty` where there are none."""
    found = [arrays[name] for arrays in blocks if name in arrays]
    return np.concatenate(found) if found else empty
