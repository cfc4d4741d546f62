"""Which rows come when: exactly shuffled or block by block, and what is fetched ahead."""

import threading

import numpy as np
import pytest

from dinov2cli.bench.input_path import InMemory
from dinov2cli.data.order import block_order, epoch_order, windows
from dinov2cli.data.visits import Visits
from dinov2cli.errors import UserError

BOUNDARIES = np.arange(0, 121, 10)  # 12 blocks of 10 rows


class Blocky(InMemory):
    """120 rows in 12 blocks, of which `keep` stay ready; remembers what was fetched."""

    def __init__(self, keep: int | None = None, blocks: np.ndarray | None = BOUNDARIES) -> None:
        super().__init__([b"x"] * 120)
        self._kept, self._cut = keep, blocks
        self.fetched: list[int] = []
        self.came = threading.Condition()

    @property
    def blocks(self):
        return self._cut

    @property
    def keep(self):
        return self._kept

    def fetch(self, block: int) -> None:
        with self.came:
            self.fetched.append(block)
            self.came.notify_all()

    def wait_for(self, number: int) -> set[int]:
        with self.came:
            assert self.came.wait_for(lambda: len(self.fetched) >= number, timeout=20)
            return set(self.fetched)


def rows(visits: Visits, first: int, last: int) -> list[int]:
    found, epochs = visits.at(np.arange(first, last))
    assert epochs == [position // 120 for position in range(first, last)]
    return found


@pytest.mark.parametrize("source", [Blocky(blocks=None), Blocky()], ids=["no blocks", "all blocks are ready"])
def test_sets_that_are_read_at_random_are_shuffled_exactly(source):
    visits = Visits(source, 3)
    assert rows(visits, 0, 240) == [*epoch_order(3, 0, 120), *epoch_order(3, 1, 120)]


def test_streams_are_shuffled_by_blocks_within_what_is_kept():
    visits = Visits(Blocky(keep=6), 3, window=16)
    assert visits.window == 3  # half, for the next window comes meanwhile
    assert rows(visits, 0, 240) == [*block_order(3, 0, BOUNDARIES, 3), *block_order(3, 1, BOUNDARIES, 3)]
    visits.close()


@pytest.mark.parametrize("keep", [None, 100])
def test_either_can_be_asked_for(keep):
    for shuffle, expected in (("exact", epoch_order(3, 0, 120)), ("blocks", block_order(3, 0, BOUNDARIES, 4))):
        visits = Visits(Blocky(keep), 3, shuffle=shuffle, window=4)
        assert rows(visits, 0, 120) == expected.tolist()
        visits.close()
    with pytest.raises(
        UserError, match=r"data.shuffle: found blocks for demo:photos, whose images do not lie in blocks"
    ):
        Visits(Blocky(blocks=None), 3, shuffle="blocks")


def test_a_position_gives_the_same_rows_however_it_is_reached():
    whole = rows(Visits(Blocky(), 1, shuffle="blocks", window=4), 0, 300)
    visits = Visits(Blocky(), 1, shuffle="blocks", window=4)
    assert [row for first in range(0, 300, 50) for row in rows(visits, first, first + 50)] == whole
    assert rows(Visits(Blocky(), 1, shuffle="blocks", window=4), 170, 220) == whole[170:220]


def test_the_next_window_is_fetched_on_entering_one():
    source = Blocky(keep=6)
    visits = Visits(source, 3)
    here = windows(3, 0, BOUNDARIES, 3, 0)
    rows(visits, 0, 5)
    assert source.wait_for(6) == {*here.now, *here.following}
    rows(visits, 5, 25)  # still in the same window
    assert len(source.fetched) == 6
    rows(visits, 28, 33)
    rows(visits, 33, 38)
    later = windows(3, 0, BOUNDARIES, 3, 33)
    assert source.wait_for(12) == {*here.now, *here.following, *later.following}
    rows(visits, 119, 122)  # the last window, and into the next epoch
    rows(visits, 122, 124)
    assert set(windows(3, 1, BOUNDARIES, 3, 2).following) <= source.wait_for(24)
    visits.close()


def test_closed_and_begun_again_it_fetches_again():
    source = Blocky(keep=6)
    visits = Visits(source, 3)
    rows(visits, 0, 5)
    source.wait_for(6)
    visits.close()
    rows(visits, 0, 5)
    source.wait_for(12)


def test_nothing_is_fetched_where_everything_is_ready():
    source = Blocky()
    rows(Visits(source, 3, shuffle="blocks"), 0, 60)
    assert source.fetched == []
