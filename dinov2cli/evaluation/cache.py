"""Features of a source, computed once: block by block into a store, by whatever process was at it, and read again.

What a block depends on makes its key: weights, pixels, preprocessing, numbers of the device. Labels are not part of
it: they are the source's own, whenever they are asked for.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2cli.data.loader import View, row_ranges
from dinov2cli.data.source import ImageSource
from dinov2cli.errors import UserError, WorkError
from dinov2cli.evaluation.features import Dealt, Features, deal_features
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.search.blocks import Arrays, Stage

if TYPE_CHECKING:
    from dinov2cli.evaluation.tasks.trial import Trial

BLOCK = 1024  # rows that are kept together; a killed command loses at most one block
LAST_BLOCKS = 4  # of which class tokens are kept
# Options of a DATA string that leave the pixels of its images alone.
_COLUMNS = ("label", "group", "is_query", "mask", "depth", "stream")
_FORMAT = 1
_ROWS = ("index", "digests", "pooled", "class_tokens", "averaged_patches")


class _Memory:
    """A stage that is forgotten with the process."""

    def __init__(self) -> None:
        self._blocks: dict[int, Arrays] = {}

    def load(self, start: int) -> Arrays | None:
        return self._blocks.get(start)

    def save(self, start: int, arrays: Arrays) -> None:
        self._blocks[start] = arrays


def pixel_options(source: ImageSource) -> list[Any]:
    """What DATA strings say of the pixels that are read (`?image=COLUMN`), also those of the sources behind a selection
    or embeddings: `content_hash` knows the files only."""
    own = {key: value for key, value in source.options.items() if key not in _COLUMNS}
    return [own, *(pixel_options(one) for one in source.behind)]


def features_key(trial: "Trial", source: ImageSource, view: View | None) -> dict[str, Any]:
    """All that the features of a source depend on, as plain values."""
    return {
        "format": _FORMAT,
        "model": {key: value for key, value in trial.model.fingerprint.items() if key != "file"},
        "config": trial.model.config,
        "preprocess": asdict(trial.model.preprocess),
        "view": None if view is None else view.name,
        "data": {"hash": source.content_hash(), "rows": len(source), "options": pixel_options(source)},
        "precision": trial.precision,
        "device": trial.device.type,
    }


def cached_features(trial: "Trial", source: ImageSource, view: View | None = None, *, keep: bool = True) -> Features:
    """Features of a source: from the trial's cache as far as they are there, the rest computed and (`keep`) put there.

    Under a launch the ranks share what is missing; the main process alone gets rows. Counts unreadable images in
    `trial.bad_images(source)`, also those of blocks that were there. Raises what `deal_features` and `check` raise.
    """
    stage: Stage = _Memory()
    main = trial.ranks.main
    if keep and trial.cache is not None and main:
        stage = _Forgiving(trial.cache.stage("features", features_key(trial, source, view)), trial.warn)
    starts = range(0, len(source), BLOCK)
    missing = trial.ranks.first(lambda: [start for start in starts if _whole(stage.load(start)) is None])
    if missing:
        for start, computed in _computed(trial, source, view, missing):
            stage.save(start, computed)
    # Read one after another into the arrays that they make together: never two copies of all of them.
    return _joined(trial, source, [start for start in starts if main], stage)


def _whole(arrays: Arrays | None) -> Arrays | None:
    """A block, unless some of it was lost on disk."""
    return None if arrays is None or not {"index", "bad_names", "bad_reasons", "seconds"} <= set(arrays) else arrays


class _Forgiving:
    """A stage of the cache; where it cannot be written the user is told once, and blocks are kept in memory instead."""

    def __init__(self, stage: Stage, warn: Callable[[str], None]) -> None:
        self._stage, self._warn = stage, warn
        self._instead: _Memory | None = None

    def load(self, start: int) -> Arrays | None:
        kept = None if self._instead is None else self._instead.load(start)
        return self._stage.load(start) if kept is None else kept

    def save(self, start: int, arrays: Arrays) -> None:
        if self._instead is None:
            try:
                return self._stage.save(start, arrays)
            except (UserError, WorkError) as error:
                self._warn(f"features are not kept for other commands ({error}); --cache names another place")
                self._instead = _Memory()
        return self._instead.save(start, arrays)


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
    label = f"features of {source.spec}" + ("" if view is None else f", {view.name}")
    with (
        trial.progress(label, sum(stop - start for start, stop in ranges)) as advance,
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


def _joined(trial: "Trial", source: ImageSource, starts: Sequence[int], stage: Stage) -> Features:
    """All blocks together, and their unreadable images counted."""
    bad = trial.bad_images(source)
    network = trial.model.network
    width = network.embed_dim
    table = _Table(len(source) if starts else 0)

    def fill() -> float:
        seconds = 0.0
        for start in starts:
            arrays = _whole(stage.load(start))
            if arrays is None:
                raise WorkError("features that were there a moment ago are gone; run the same command again")
            for name, reason in zip(arrays["bad_names"].tolist(), arrays["bad_reasons"].tolist(), strict=True):
                bad.add(name, reason)
            table.add({name: arrays[name] for name in _ROWS if name in arrays}, len(arrays["index"]))
            seconds += float(arrays["seconds"].sum())
        bad.check(len(source))
        return seconds

    seconds = trial.ranks.together(fill)
    index = table.column("index", np.zeros(0, np.int64))
    tokens, pooled = table.column("class_tokens"), table.column("pooled")
    if pooled is None:
        pooled = np.zeros((0, width), np.float32) if tokens is None else tokens[:, -1]
    return Features(
        index=index,
        labels=None if source.labels is None else source.labels[index],
        label_names=source.label_names,
        class_tokens=pooled[:, None] if tokens is None else tokens,
        averaged_patches=table.column(
            "averaged_patches", None if isinstance(network, Descriptor) else np.zeros((0, width), np.float32)
        ),
        pooled=pooled,
        digests=table.column("digests", np.zeros((0, 32), np.uint8)),
        seconds=seconds,
    )


class _Table:
    """Columns of at most `rows` rows, filled part by part."""

    def __init__(self, rows: int) -> None:
        self._rows, self._filled = rows, 0
        self._columns: dict[str, np.ndarray] = {}

    def add(self, arrays: Mapping[str, Any], rows: int) -> None:
        for name, values in arrays.items():
            if len(values):
                if name not in self._columns:
                    self._columns[name] = np.empty((self._rows, *values.shape[1:]), values.dtype)
                self._columns[name][self._filled : self._filled + rows] = values
        self._filled += rows

    def column(self, name: str, empty: Any = None) -> Any:
        return self._columns[name][: self._filled] if name in self._columns else empty
