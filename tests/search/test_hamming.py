"""Search for near hashes: against all pairs computed in full, through every index, block by block and from a store."""

import numpy as np
import pytest

from dinov2cli.search.bits import bit_index, expected_recall
from dinov2cli.search.hamming import HashTable, best_hash_match, hash_edges, near_twins
from dinov2cli.search.hashing import turn_bits


def random_table(rng: np.random.Generator, rows: int) -> HashTable:
    """Hashes as of so many photographs, and thumbnails to go with them."""
    bits = rng.integers(0, 256, (rows, 32), dtype=np.uint8)
    thumbs = rng.integers(0, 256, (rows, 12, 12, 3), dtype=np.uint8)
    return HashTable(rows, np.arange(rows), np.zeros(rows, np.uint8), bits, thumbs)


def flipped(bits: np.ndarray, count: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hashes [N, 32] with `count` [N] bits of each turned over."""
    order = rng.random((len(bits), 256)).argsort(axis=1)
    return bits ^ np.packbits(order < count[:, None], axis=1)


@pytest.fixture(scope="module")
def planted() -> tuple[HashTable, np.ndarray, np.ndarray]:
    """300 hashes and a turned, altered copy of each: the table, and orientation and differing bits of the copies."""
    from dinov2cli.search.hashing import oriented

    rng = np.random.default_rng(5)
    base = random_table(rng, 300)
    number, count = rng.integers(0, 8, 300), rng.integers(0, 48, 300)
    turned = np.stack([turn_bits(base.bits[i : i + 1], o)[0] for i, o in enumerate(number)])
    thumbs = np.stack([oriented(base.thumbs[i : i + 1], o)[0] for i, o in enumerate(number)])
    both = HashTable(
        600,
        np.arange(600),
        np.zeros(600, np.uint8),
        np.concatenate([base.bits, flipped(turned, count, rng)]),
        np.concatenate([base.thumbs, thumbs]),
    )
    return both, number, count


def all_pairs(table: HashTable, radius: int) -> dict[tuple[int, int], int]:
    """Least distance over the 8 orientations of every pair within the radius, by comparing all of them."""
    found = {}
    words = np.unpackbits(table.bits, axis=1).astype(np.int32)
    for orientation in range(8):
        turned = np.unpackbits(turn_bits(table.bits, orientation), axis=1).astype(np.int32)
        distance = turned.sum(1)[:, None] + words.sum(1)[None] - 2 * turned @ words.T
        for a, b in np.argwhere(distance <= radius).tolist():
            if a < b:
                found[a, b] = min(found.get((a, b), 999), int(distance[a, b]))
    return found


@pytest.mark.parametrize("flat_below", [10**9, 0], ids=["flat", "tables"])
def test_edges_are_those_of_all_pairs(planted, monkeypatch, flat_below):
    monkeypatch.setattr("dinov2cli.search.bits._FLAT_BELOW", flat_below)
    monkeypatch.setattr("dinov2cli.search.hamming._QUERY_ROWS", 1000)
    table, _, count = planted
    expected = all_pairs(table, 31)
    assert len(expected) == (count <= 31).sum() > 150
    found = hash_edges(table, radius=31)
    got = zip(found.src.tolist(), found.dst.tolist(), found.similarity.tolist(), strict=True)
    assert {(a, b): round(256 * (1 - s)) for a, b, s in got} == expected


def test_tables_find_as_many_as_they_should(monkeypatch):
    """Copies at every distance among many hashes, with keys as long as those of a million."""
    monkeypatch.setattr("dinov2cli.search.bits._KEY_BITS", (16, 16))
    monkeypatch.setattr("dinov2cli.search.bits._FLAT_BELOW", 0)
    rng = np.random.default_rng(4)
    base = rng.integers(0, 256, (6000, 32), dtype=np.uint8)
    count = np.repeat([10, 20, 31, 44], 1500)
    query, row, differ = bit_index(base).within(flipped(base, count, rng), 44)
    hit = np.zeros(6000, bool)
    hit[query[query == row]] = True
    np.testing.assert_array_equal(differ[query == row], count[hit])
    for distance in (10, 20, 31, 44):
        expected = expected_recall(10**6, distance)
        assert hit[count == distance].mean() == pytest.approx(expected, abs=0.03)
    assert expected_recall(10**6, 20) > 0.999 and expected_recall(10**6, 31) > 0.985
    assert len(query) == hit.sum()  # each pair once, and no chance match


def test_a_full_bucket_is_searched_in_parts(monkeypatch):
    monkeypatch.setattr("dinov2cli.search.bits._FLAT_BELOW", 0)
    monkeypatch.setattr("dinov2cli.search.bits._PAIRS", 1000)
    base = np.zeros((300, 32), np.uint8)
    base[:, 0] = np.arange(300) % 8
    query, row, differ = bit_index(base).within(base[:20], 44)
    assert len(query) == 20 * 300
    np.testing.assert_array_equal(differ, np.bitwise_count(base[query, 0] ^ base[row, 0]))


def test_best_match_is_the_nearest(planted):
    table, _, count = planted
    ours, theirs = table.views(np.arange(300, 600)), table.views(np.arange(300))
    ours = HashTable(300, ours.owner - 300, ours.kind, ours.bits, ours.thumbs)
    theirs = HashTable(300, theirs.owner, theirs.kind, theirs.bits, theirs.thumbs)
    similarity, row = best_hash_match(ours, theirs, radius=31)
    near = count <= 31
    np.testing.assert_array_equal(row, np.where(near, np.arange(300), -1))
    np.testing.assert_allclose(similarity[near], 1 - count[near] / 256, atol=1e-6)
    assert np.isneginf(similarity[~near]).all()


def test_near_hashes_of_pictures_that_look_different_are_no_match(planted):
    table, _, count = planted
    rng = np.random.default_rng(1)
    other = HashTable(600, table.owner, table.kind, table.bits, rng.integers(0, 256, table.thumbs.shape, np.uint8))
    assert len(hash_edges(other, radius=31)) == 0
    pages = HashTable(600, table.owner, np.ones(600, np.uint8), table.bits, table.thumbs.copy())
    assert len(hash_edges(pages, radius=31)) == (count <= 31).sum()  # the very same look
    noisy = pages.thumbs[300:].astype(int) + rng.normal(0, 27, pages.thumbs[300:].shape)
    pages.thumbs[300:] = np.clip(noisy, 0, 255)
    assert len(hash_edges(pages, radius=31)) == 0  # two pages must agree more closely than
    whole = HashTable(600, table.owner, np.zeros(600, np.uint8), table.bits, pages.thumbs)
    assert len(hash_edges(whole, radius=31)) == (count <= 31).sum()  # two photographs


def test_a_thousand_equal_hashes_make_a_star():
    rng = np.random.default_rng(2)
    one = random_table(rng, 1)
    bits, thumbs = one.bits.repeat(1000, 0), one.thumbs.repeat(1000, 0)
    many = HashTable(1000, np.arange(1000), np.zeros(1000, np.uint8), bits, thumbs)
    found = hash_edges(many)
    assert len(found) == 999 and (found.src == 0).all() and (found.similarity == 1).all()


def test_several_views_of_an_image_join_it_once():
    rng = np.random.default_rng(3)
    table = random_table(rng, 3)
    owner = np.array([0, 1, 1, 2])
    index = np.array([0, 1, 0, 2])  # the second view of image 1 is that of image 0
    views = HashTable(3, owner, np.array([0, 1, 2, 0], np.uint8), table.bits[index], table.thumbs[index])
    found = hash_edges(views)
    assert (found.src.tolist(), found.dst.tolist()) == ([0], [1])


class Memory:
    """A store that counts what is computed."""

    def __init__(self) -> None:
        self.blocks: dict[str, dict[str, np.ndarray]] = {}
        self.saved = 0

    def stage(self, name, key):
        outer = self

        class Stage:
            def load(self, start):
                return outer.blocks.get(f"{name} {sorted(key.items())} {start}")

            def save(self, start, arrays):
                outer.saved += 1
                outer.blocks[f"{name} {sorted(key.items())} {start}"] = dict(arrays)

        return Stage()


def test_a_search_continues_from_its_store(planted, monkeypatch):
    monkeypatch.setattr("dinov2cli.search.hamming._QUERY_ROWS", 800)
    table = planted[0]
    store = Memory()
    whole = hash_edges(table, radius=31, store=store)
    blocks = store.saved
    assert blocks == 6
    del store.blocks[next(iter(store.blocks))]
    again = hash_edges(table, radius=31, store=store)
    assert store.saved == blocks + 1
    np.testing.assert_array_equal(whole.src, again.src)
    np.testing.assert_array_equal(whole.similarity, again.similarity)
    hash_edges(table, radius=20, store=store)  # another radius finds nothing of it
    other = HashTable(600, table.owner, table.kind, table.bits ^ 1, table.thumbs)
    hash_edges(other, radius=31, store=store)
    assert store.saved == blocks + 1 + 2 * blocks


def test_twins_are_near_as_they_are_and_not_turned(planted):
    table, number, count = planted
    rows, found = near_twins(table, table, itself=True)
    twins = {(int(a), int(b)) for a, b in zip(rows, found, strict=True) if a < b}
    assert twins == {(i, 300 + i) for i in np.flatnonzero((number == 0) & (count <= 16)).tolist()}
    rows, found = near_twins(table, table, itself=False)
    assert len(rows) == 600 + 2 * len(twins)
    empty = HashTable(0, table.owner[:0], table.kind[:0], table.bits[:0], table.thumbs[:0])
    assert len(near_twins(table, empty, itself=False)[0]) == 0 == len(hash_edges(empty))
