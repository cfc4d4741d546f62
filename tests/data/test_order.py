import io
import tarfile

import numpy as np
import pytest

from dinov2cli.data.order import block_order, epoch_order, exact_mixing, mixing, windows
from dinov2cli.data.source import open_source


def bounds(sizes) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))).astype(np.int64)


def walk(seed: int, epoch: int, boundaries: np.ndarray, window: int):
    """Every window of an epoch by `windows` alone: (start, stop, blocks, blocks of the next)."""
    position = 0
    while position < boundaries[-1]:
        now, following, stop = windows(seed, epoch, boundaries, window, position)
        assert stop > position
        yield position, stop, now, following
        position = stop


def test_exact_order_is_what_it_always_was():
    assert epoch_order(0, 0, 8).tolist() == [4, 2, 1, 7, 3, 0, 6, 5]  # a changed bit would break every resumed run
    assert epoch_order(1, 2, 8).tolist() == [1, 5, 4, 3, 2, 6, 7, 0]


def test_block_order_is_what_it_was():
    assert block_order(0, 0, bounds([3, 2, 0, 4, 5]), 2).tolist() == [1, 2, 0, 7, 6, 8, 5, 13, 11, 12, 9, 4, 10, 3]


@pytest.mark.parametrize("case", range(100))
def test_every_row_once_and_windows_tell_where(case):
    """For blocks of any sizes, also empty ones, and windows wider than the set."""
    random = np.random.default_rng(case)
    sizes = random.integers(0, [2, 13][case % 2], random.integers(1, 30)).tolist()
    sizes[-1] += not any(sizes)
    window, seed, epoch = (int(random.integers(low, high)) for low, high in ((1, 9), (0, 2**62), (0, 2**40)))
    boundaries = bounds(sizes)
    order = block_order(seed, epoch, boundaries, window)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(sum(sizes)))
    assert (order == block_order(seed, epoch, boundaries, window)).all()
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    met: list[int] = []
    announced = None
    for start, stop, now, following in walk(seed, epoch, boundaries, window):
        assert set(block_of[order[start:stop]].tolist()) == set(now.tolist())
        assert 1 <= len(now) <= window
        assert announced is None or announced == now.tolist()
        middle = windows(seed, epoch, boundaries, window, (start + stop) // 2)
        assert middle.now.tolist() == now.tolist() and middle.stop == stop
        announced = following.tolist()
        met += now.tolist()
    assert sorted(met) == [block for block, size in enumerate(sizes) if size]
    if met:  # the last window announces the first of the next epoch
        assert announced == windows(seed, epoch + 1, boundaries, window, 0).now.tolist()


def test_windows_are_of_about_one_size():
    lengths = [len(now) for _, _, now, _ in walk(0, 0, bounds([5] * 33), 16)]
    assert sorted(lengths) == [11, 11, 11]


def test_seeds_and_epochs_differ_in_blocks_and_in_rows():
    boundaries = bounds([50] * 20)
    orders = [block_order(seed, epoch, boundaries, 4) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    firsts = [set(windows(seed, epoch, boundaries, 4, 0).now.tolist()) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert firsts[0] != firsts[1] != firsts[2] != firsts[0]
    assert all((a != b).mean() > 0.9 for a, b in ((orders[0], orders[1]), (orders[0], orders[2])))
    alone = block_order(0, 0, boundaries, 1).reshape(20, 50) % 50  # windows of one size are not shuffled alike
    assert len({tuple(rows) for rows in alone.tolist()}) == 20


def test_rows_of_a_window_are_shuffled_uniformly():
    """Each of 3 x 2 rows of a window at each place equally often; chi-square with 25 degrees of freedom."""
    boundaries = bounds([2, 2, 2])
    counts = np.zeros((6, 6))
    epochs = 6000
    for epoch in range(epochs):
        counts[np.arange(6), block_order(7, epoch, boundaries, 3)] += 1
    expected = epochs / 6
    assert ((counts - expected) ** 2 / expected).sum() < 60  # p = 1e-4


def test_blocks_share_a_window_equally_often():
    boundaries = bounds([1] * 12)
    together = np.zeros((12, 12))
    epochs = 3000
    for epoch in range(epochs):
        for _, _, now, _ in walk(3, epoch, boundaries, 4):
            together[np.ix_(now, now)] += 1
    pairs = together[~np.eye(12, dtype=bool)] / epochs
    assert np.abs(pairs - 3 / 11).max() < 0.05


@pytest.mark.parametrize("blocks, rows, window, batch", [(64, 100, 16, 64), (64, 100, 4, 50), (30, 40, 5, 25)])
def test_measured_mixing_is_the_closed_form(blocks, rows, window, batch):
    boundaries = bounds([rows] * blocks)
    runs = [mixing(block_order(0, epoch, boundaries, window), boundaries, batch) for epoch in range(30)]
    measured = np.mean(runs, axis=0)
    # Straight from the docstring, with C(kr - r, B) / C(kr, B) as a product.
    n = window * rows
    missed = np.prod([(n - rows - i) / (n - i) for i in range(batch)])
    assert measured[0] == pytest.approx(window * (1 - missed), rel=0.005)
    assert measured[1] == pytest.approx((rows - 1) / (n - 1), rel=0.02)
    assert exact_mixing(np.full(window, rows), batch) == pytest.approx((window * (1 - missed), (rows - 1) / (n - 1)))
    exact = np.mean([mixing(epoch_order(0, epoch, n := blocks * rows), boundaries, batch) for epoch in range(30)], 0)
    assert exact[0] == pytest.approx(measured[2], rel=0.005) and exact[1] == pytest.approx(measured[3], rel=0.05)


def test_mixing_of_orders_that_do_not_mix():
    boundaries = bounds([8, 0, 8])
    assert mixing(np.arange(16), boundaries, 8)[:2] == (1.0, 1.0)
    alternating = np.stack([np.arange(8), np.arange(8, 16)], axis=1).ravel()
    assert mixing(alternating, boundaries, 2)[:2] == (2.0, 0.0)
    one_window = mixing(block_order(0, 0, boundaries, 2), boundaries, 16)
    assert one_window.blocks == one_window.exact_blocks == 2
    assert one_window.same_block == pytest.approx(one_window.exact_same_block) == pytest.approx(7 / 15)


def test_what_makes_no_sense_is_refused():
    for boundaries, window in (([0, 5], 0), ([1, 5], 1), ([0, 5, 4], 1), ([], 1)):
        with pytest.raises(ValueError):
            block_order(0, 0, np.array(boundaries, dtype=np.int64), window)
    for position in (-1, 5):
        with pytest.raises(ValueError):
            windows(0, 0, np.array([0, 5]), 1, position)
    with pytest.raises(ValueError):
        mixing(np.arange(5), np.array([0, 5]), 6)
    assert block_order(0, 0, np.array([0]), 3).tolist() == []


def test_shards_are_blocks(tmp_path, encode):
    for shard, names in enumerate(["ab", "", "cde"]):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for name in [*(f"{letter}.png" for letter in names), "note.txt"]:  # the middle one without an image
                info = tarfile.TarInfo(name)
                info.size = len(encode(0))
                tar.addfile(info, io.BytesIO(encode(0)))
    source = open_source(str(tmp_path))
    assert source.blocks is not None and source.blocks.tolist() == [0, 2, 2, 5]
    assert source.keep is None
    source.fetch(0)
    assert open_source(str(tmp_path / "0.tar")).blocks.tolist() == [0, 2]


def test_folders_have_no_blocks(picture_folder):
    assert open_source(str(picture_folder)).blocks is None
