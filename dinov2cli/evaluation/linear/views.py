"""Training the linear heads on features of random views of the images: another view in every epoch."""

from collections.abc import Iterator, Mapping

import numpy as np

from dinov2cli.errors import WorkError
from dinov2cli.search.blocks import Arrays, Stage, Store


class LatestView:
    """A store for the features of one view: its blocks take the place of those of the view before.

    So a killed command loses one block of features, and the disk never holds more than one view.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def stage(self, name: str, key: Mapping[str, object]) -> Stage:
        """The stage of all views: what tells them apart is left out of the key, and kept with every block."""
        view = str(key.get("view"))
        others = {part: value for part, value in key.items() if part != "view"}
        return _Latest(self._store.stage(f"{name}-of-views", others), view)


class _Latest:
    def __init__(self, stage: Stage, view: str) -> None:
        self._stage, self._view = stage, view

    def load(self, start: int) -> Arrays | None:
        arrays = self._stage.load(start)
        if arrays is None or str(arrays["view"]) != self._view:
            return None
        return {name: value for name, value in arrays.items() if name != "view"}

    def save(self, start: int, arrays: Arrays) -> None:
        self._stage.save(start, {**arrays, "view": np.array(self._view)})


def stretches(step: int, steps: int, views: int) -> Iterator[tuple[int, int]]:
    """(view, step to train to) of what is left of `steps` from `step` on, shared evenly among the views.

    A view without a step of its own (fewer steps than views) is left out.
    """
    for view in range(views):
        until = -(-(view + 1) * steps // views)
        if until > step:
            yield view, until
            step = until


def same_rows(before: np.ndarray, now: np.ndarray, name: str) -> None:
    """Raise WorkError unless the same images [n] could be read as in the pass before, for labels belong to them."""
    if not np.array_equal(before, now):
        changed = len(np.setxor1d(before, now))
        raise WorkError(
            f"{name}: {changed} images could be read in one pass and not in another; expected the same images in every "
            "pass: look after the disk or the network they come from, and run the same command again"
        )
