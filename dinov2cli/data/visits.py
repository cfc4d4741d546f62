"""Which rows training visits at which positions, and fetching of the blocks that come next."""

import contextlib
import threading
from typing import Literal

import numpy as np

from dinov2cli.data.order import block_order, epoch_order, windows
from dinov2cli.data.source import ImageSource
from dinov2cli.errors import DinoError, UserError

Shuffle = Literal["auto", "exact", "blocks"]
_FETCHERS = 4


class Visits:
    """Rows of a source by position: epoch after epoch, each in an order of its own that (seed, epoch) decides.

    `shuffle` blocks mixes the rows of `window` blocks (tar shards, row groups) at a time, see `data/order.py`; auto
    does so for streams, whose blocks must be fetched. Raises UserError where there are no blocks.
    """

    def __init__(self, source: ImageSource, seed: int, *, shuffle: Shuffle = "auto", window: int = 16) -> None:
        self._source, self._seed, self._rows = source, seed, len(source)
        blocks = source.blocks
        if shuffle == "blocks" and blocks is None:
            raise UserError(
                f"data.shuffle: found blocks for {source.spec}, whose images do not lie in blocks; expected tar shards "
                "or a stream of Parquet files; use exact"
            )
        by_blocks = shuffle == "blocks" or (shuffle == "auto" and source.keep is not None)
        self._blocks = blocks if by_blocks else None
        # Half of what is kept: the other half is for the window that is fetched meanwhile.
        self.window = window if source.keep is None else max(1, min(window, source.keep // 2))
        self._orders: dict[int, np.ndarray] = {}
        self._fetched_until = -1
        self._closed = threading.Event()

    def at(self, positions: np.ndarray) -> tuple[list[int], list[int]]:
        """(rows, epochs) at these positions (int64, rising), counted over all epochs."""
        epochs = positions // self._rows
        wanted = np.unique(epochs).tolist()
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in wanted}
        if self._blocks is not None and self._source.keep is not None:
            self._fetch_ahead(int(positions[0]))
        places = (positions % self._rows).tolist()
        numbers = epochs.tolist()
        return [int(self._orders[epoch][place]) for epoch, place in zip(numbers, places, strict=True)], numbers

    def close(self) -> None:
        """Fetch nothing more."""
        self._closed.set()
        self._closed, self._fetched_until = threading.Event(), -1

    def _order(self, epoch: int) -> np.ndarray:
        if self._blocks is None:
            return epoch_order(self._seed, epoch, self._rows)
        return block_order(self._seed, epoch, self._blocks, self.window)

    def _fetch_ahead(self, position: int) -> None:
        """On entering a window fetch the next one, in threads: whoever reads a block that is not there yet waits."""
        if position < self._fetched_until:
            return
        assert self._blocks is not None
        epoch, place = divmod(position, self._rows)
        here = windows(self._seed, epoch, self._blocks, self.window, place)
        blocks = [*here.now.tolist(), *here.following.tolist()]
        for first in range(_FETCHERS):
            # Daemons: nobody shall wait at the end of a run for a block that the network does not give.
            threading.Thread(target=self._fetch, args=(blocks[first::_FETCHERS], self._closed), daemon=True).start()
        self._fetched_until = epoch * self._rows + here.stop

    def _fetch(self, blocks: list[int], closed: threading.Event) -> None:
        for block in blocks:
            if closed.is_set():
                return
            with contextlib.suppress(DinoError, OSError):  # met again, and told, by whoever reads the block
                self._source.fetch(block)
