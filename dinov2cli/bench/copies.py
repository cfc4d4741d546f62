"""`dinov2 bench copies [DATA]`: precision and recall of duplicate removal on altered copies made from your images.

The set (curation/copies.py) is written into a folder and goes through the tiers as any folder of images does. Two
files are joined when they end in one group. Pairwise precision: of all joined pairs the share that were made from
one original. Recall of a kind of edit: the share of its copies that end in the group of their original.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2cli.curation.copies import DISTRACTORS, KINDS, ORIGINAL, Truth, sampled_set, write_set
from dinov2cli.curation.dedup import dedup
from dinov2cli.curation.fingerprints import fingerprint_images, pool_from_images
from dinov2cli.curation.local import LocalMatcher
from dinov2cli.curation.verify import Settings
from dinov2cli.data.demo import PhotoTiles
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.errors import UserError

DEFAULT_DATA = "demo:photos?count=800&size=128&copies=0"
"""Photographs that need no download; 201 of the tiles share no pixel."""

_EXAMPLES = 10

Labels = npt.NDArray[np.int64]
Method = Callable[[ImageSource], Labels]
"""From a source of N images to the group [N] of each; images alone have a number of their own."""


def run(
    *,
    data: str | None = None,
    seed: int = 0,
    device: str = "auto",
    originals: int = 300,
    others: int = 100,
    synthetic: int = 20,
    templates: int = 8,
    kinds: Iterable[str] = KINDS,
    methods: dict[str, Method] | None = None,
    folder: str | None = None,
) -> dict[str, Any]:
    """Make the set from up to `originals` images of `data` and judge each method on it.

    others, synthetic, templates, kinds: see `sampled_set`. methods: what to judge, by name; default: all that are
    installed (`default_methods`). folder: where to put the set and leave it; default: a temporary place.

    Returns `data`, `seed`, `images`, `originals`, `make_seconds` and `methods`: by name the figures of `judged`, with
    `seconds` and `images_per_s` (files read and decoded included). Nothing runs on a GPU here. Raises UserError for a
    device other than auto or cpu.
    """
    if device not in ("auto", "cpu"):
        raise UserError(f"bench copies --device {device}: the comparisons run on the CPU; expected auto or cpu")
    source = distinct(open_source(DEFAULT_DATA if data is None else data))
    with ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="copies-"))
        started = time.perf_counter()
        files = sampled_set(
            source,
            originals=originals,
            others=others,
            seed=seed,
            kinds=tuple(kinds),
            synthetic=synthetic,
            templates=templates,
        )
        truth = write_set(files, Path(place))
        made = time.perf_counter() - started
        written = open_source(place)
        assert list(written.ids) == truth.names
        found = {}
        for name, method in (default_methods() if methods is None else methods).items():
            started = time.perf_counter()
            labels = method(written)
            seconds = time.perf_counter() - started
            found[name] = judged(labels, truth) | {"seconds": seconds, "images_per_s": len(truth) / seconds}
    return {
        "data": source.spec,
        "seed": seed,
        "images": len(truth),
        "originals": truth.kinds.count(ORIGINAL),
        "make_seconds": made,
        "methods": found,
    }


def default_methods() -> dict[str, Method]:
    """What `dinov2 dedup` does without a model, by tier: each with those before it. The last needs OpenCV."""
    methods: dict[str, Method] = {
        "exact": lambda source: by_tiers(source, perceptual=False),
        "perceptual": by_tiers,
        "geometric": lambda source: by_tiers(source, geometric=True),
    }
    if importlib.util.find_spec("cv2") is None:
        del methods["geometric"]
    return methods


def by_tiers(
    source: ImageSource, *, perceptual: bool = True, geometric: bool = False, workers: int = 2, **options: Any
) -> Labels:
    """Groups by bytes and pixels, where `perceptual` by hash, where `geometric` by local features; `options` go to
    `dedup`."""
    prints = fingerprint_images(source, workers=workers)
    prints = prints if perceptual else prints.exact_only()
    local = LocalMatcher(source, settings=Settings(workers=workers)) if geometric else None
    found = dedup(pool_from_images(source, prints), fingerprints=prints, local=local, **options)
    assert found.groups is not None
    return labels_of(source.ids, found.groups.column("id").to_pylist(), found.groups.column("group").to_pylist())


def labels_of(ids: Iterable[str], members: Iterable[str], groups: Iterable[int]) -> Labels:
    """Group of every id, from the table of groups; ids that are not in it get numbers of their own."""
    group = dict(zip(members, groups, strict=True))
    first = max(group.values(), default=-1) + 1
    return np.array([group.get(name, first + row) for row, name in enumerate(ids)], dtype=np.int64)


def judged(labels: Labels, truth: Truth) -> dict[str, Any]:
    """Figures of a grouping beside the truth.

    `precision`, `recall`, `f1` over all pairs (precision is 1 where nothing is joined); `mean_recall` over kinds;
    `recall_by_kind`; `precision_by_kind`: of the joined pairs one end of which is of this kind; `false_merges`: by
    kind of file the share that is in one group with a file of something else; `most_mixed`: how many different
    originals and distractors the worst group holds; `wrong`: some pairs of names joined wrongly, one of a group;
    `missed`: by kind the names of some copies that were not found.
    """
    _, group = np.unique(np.array(truth.groups), return_inverse=True)
    _, label = np.unique(labels, return_inverse=True)
    kinds = np.array(truth.kinds)
    _, cell = np.unique(np.stack([label, group]), axis=1, return_inverse=True)
    cell = cell.ravel()
    # Files joined to each file, and those of them that belong to it.
    joined = (np.bincount(label)[label] - 1).astype(np.int64)
    right = (np.bincount(cell)[cell] - 1).astype(np.int64)
    belong = (np.bincount(group)[group] - 1).astype(np.int64)
    precision = _share(right.sum(), joined.sum(), empty=1.0)
    recall = _share(right.sum(), belong.sum(), empty=1.0)
    home = np.full(group.max() + 1, -1, dtype=np.int64)
    home[group[kinds == ORIGINAL]] = label[kinds == ORIGINAL]
    found = label == home[group]
    here = [kind for kind in KINDS if (kinds == kind).any()]
    recalls = {kind: float(found[kinds == kind].mean()) for kind in here}
    present = [kind for kind in (ORIGINAL, *KINDS, *DISTRACTORS) if (kinds == kind).any()]
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "mean_recall": float(np.mean(list(recalls.values()))) if recalls else 1.0,
        "recall_by_kind": recalls,
        "precision_by_kind": {k: _share(right[kinds == k].sum(), joined[kinds == k].sum(), empty=1.0) for k in here},
        "false_merges": {kind: float((joined > right)[kinds == kind].mean()) for kind in present},
        "most_mixed": int(np.bincount(label[np.unique(cell, return_index=True)[1]]).max()),
        "missed": {
            kind: [truth.names[row] for row in np.flatnonzero((kinds == kind) & ~found)[:_EXAMPLES].tolist()]
            for kind, share in recalls.items()
            if share < 1
        },
        "wrong": _wrong_pairs(label, group, truth),
    }


def distinct(source: ImageSource) -> ImageSource:
    """A source without known copies: of demo photographs the tiles that share no pixel; any other as it is."""
    if not isinstance(source, PhotoTiles):
        return source
    tiles = source.tiles
    taken: list[int] = []
    for row in np.flatnonzero(tiles.original < 0).tolist():
        left, top, right, bottom = tiles.box[row]
        rivals = tiles.box[[other for other in taken if tiles.photo[other] == tiles.photo[row]]]
        apart = (rivals[:, 0] >= right) | (rivals[:, 2] <= left) | (rivals[:, 1] >= bottom) | (rivals[:, 3] <= top)
        if apart.all():
            taken.append(row)
    return _Subset(source, taken)


class _Subset(ImageSource):
    """Some rows of another source."""

    def __init__(self, inner: ImageSource, rows: list[int]) -> None:
        self.spec, self.kind, self._options = inner.spec, inner.kind, {}
        self._inner, self._rows = inner, rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int, role: str = "image") -> bytes:
        return self._inner.read(self._rows[row], role)

    @property
    def ids(self) -> list[str]:
        return [self._inner.ids[row] for row in self._rows]

    @property
    def paths(self) -> list[str]:
        return [self._inner.paths[row] for row in self._rows]

    def content_hash(self) -> str:
        return self._inner.content_hash()


def _share(part: int | np.integer, whole: int | np.integer, *, empty: float) -> float:
    return float(part / whole) if whole else empty


def _wrong_pairs(label: Labels, group: Labels, truth: Truth) -> list[list[str]]:
    """A pair that was joined wrongly out of each of the first ten groups that hold one."""
    order = np.lexsort((group, label))
    mixed = (label[order[:-1]] == label[order[1:]]) & (group[order[:-1]] != group[order[1:]])
    at = np.flatnonzero(mixed)
    _, first = np.unique(label[order[at]], return_index=True)
    return [[truth.names[order[i]], truth.names[order[i + 1]]] for i in at[first][:_EXAMPLES].tolist()]


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for people: a column per method."""
    found = figures["methods"]
    width = max(9, *(len(name) + 2 for name in found)) if found else 9
    one: dict[str, Any] = next(iter(found.values()), {"recall_by_kind": {}, "false_merges": {}})

    def row(title: str, values: Iterable[str]) -> str:
        return f"  {title:<20}" + "".join(value.rjust(width) for value in values)

    def shares(title: str, *path: str) -> str:
        values = []
        for method in found.values():
            value: Any = method
            for step in path:
                value = value[step]
            values.append(f"{100 * value:.1f}%")
        return row(title, values)

    return [
        f"{figures['images']} files made of {figures['originals']} originals of {figures['data']}, seed "
        f"{figures['seed']}, in {figures['make_seconds']:.1f} s",
        row("", found),
        shares("precision of pairs", "precision"),
        shares("recall of pairs", "recall"),
        shares("F1 of pairs", "f1"),
        shares("mean recall of kinds", "mean_recall"),
        row("images/s", [f"{method['images_per_s']:.0f}" for method in found.values()]),
        "recall by kind of edit: copies found in the group of their original",
        *(shares(kind, "recall_by_kind", kind) for kind in one["recall_by_kind"]),
        "false merges: files found in one group with something else",
        *(shares(kind, "false_merges", kind) for kind in one["false_merges"]),
        row("most mixed group", [str(method["most_mixed"]) for method in found.values()]),
    ]
