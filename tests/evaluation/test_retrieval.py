import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dinov2cli.artifacts.parts import Parts
from dinov2cli.errors import InputError
from dinov2cli.evaluation.retrieval import ranking as retrieval
from dinov2cli.evaluation.retrieval.ranking import (
    ANY,
    EASY,
    HARD,
    JUNK,
    LEVELS,
    Truth,
    average_precision_of,
    level_scores,
    rank_rows,
)


def vectors(n, dim=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def truths(queries, database, seed=0, most=12):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(queries):
        rows = rng.choice(database, size=rng.integers(1, most), replace=False)
        found.append(Truth(rows, rng.integers(0, 3, len(rows))))
    return found


def order_of(query, database):
    """Rows of the database by float64 cosine."""
    unit = database / np.linalg.norm(database.astype(np.float64), axis=1, keepdims=True)
    return np.argsort(-(unit @ (query / np.linalg.norm(query.astype(np.float64)))), kind="stable")


def trapezoids(places, total):
    """The area as the codes of Oxford and Holidays add it up, one right image after another."""
    area = 0.0
    for number, place in enumerate(places):
        left = 1.0 if place == 0 else number / place
        area += (left + (number + 1) / (place + 1)) / 2 / total
    return area


@pytest.mark.parametrize("counted", [0, 64])
def test_ranks_are_those_of_a_sort_in_float64(monkeypatch, counted):
    monkeypatch.setattr(retrieval, "_COUNTED", counted)  # 0: by one sort; 64: one by one
    queries, database = vectors(9, seed=1), vectors(200)
    known = truths(9, 200)
    found = rank_rows(queries, 7 * database, known)
    for number, (query, truth) in enumerate(zip(queries, known, strict=True)):
        order = order_of(query, database)
        place = np.argsort(order)
        assert found.ranks[number].tolist() == place[truth.rows].tolist()
        left = order[~np.isin(order, truth.rows[truth.grades == JUNK])]
        assert found.nearest[number].tolist() == left[:10].tolist()
        unit = database[left[:10]] / np.linalg.norm(database[left[:10]], axis=1, keepdims=True)
        assert found.similarities[number] == pytest.approx(unit @ query / np.linalg.norm(query), abs=1e-5)


@pytest.mark.parametrize("counted", [0, 64])
def test_equal_similarities_are_ranked_by_row(monkeypatch, counted):
    monkeypatch.setattr(retrieval, "_COUNTED", counted)
    database = np.eye(4, dtype=np.float32)[[0, 1, 0, 1, 1, 0, 2, 1]]  # cosines of exactly 0 and 1
    truth = Truth(np.array([3, 6, 0, 7, 1]), np.array([EASY, EASY, HARD, EASY, JUNK]))
    found = rank_rows(np.eye(4, dtype=np.float32)[[1]], database, [truth], nearest=5)
    assert found.ranks[0].tolist() == [1, 7, 4, 3, 0]
    assert found.nearest[0].tolist() == [3, 4, 7, 0, 2]


def test_fewer_images_than_neighbours_leave_places_empty():
    truth = Truth(np.array([0, 1]), np.array([JUNK, EASY]))
    found = rank_rows(vectors(1), vectors(3), [truth])
    assert sorted(found.nearest[0].tolist()) == [-1, 1, 2]
    assert found.nearest[0, -1] == -1 and np.isneginf(found.similarities[0, -1])


def test_ranks_do_not_depend_on_the_blocks_and_finished_blocks_are_not_done_again(monkeypatch, tmp_path):
    queries, database, known = vectors(20, seed=1), vectors(90), truths(20, 90)
    whole = rank_rows(queries, database, known)
    monkeypatch.setattr(retrieval, "_BLOCK_ROWS", 6)
    asked = []
    original = retrieval._of_query

    def counted(*arguments):
        asked.append(1)
        if len(asked) == 15:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(retrieval, "_of_query", counted)
    with pytest.raises(KeyboardInterrupt):
        rank_rows(queries, database, known, store=Parts(tmp_path))
    again = rank_rows(queries, database, known, store=Parts(tmp_path))
    assert len(asked) == 15 + 20 - 12  # two blocks of six were finished
    assert np.array_equal(np.concatenate(again.ranks), np.concatenate(whole.ranks))
    assert np.array_equal(again.nearest, whole.nearest)
    # Another truth finds nothing of that.
    rank_rows(queries, database, truths(20, 90, seed=5), store=Parts(tmp_path))
    assert len(asked) == 15 + 20 - 12 + 20


def test_average_precision_by_steps_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for size in (1, 3, 40):
        places = np.sort(rng.choice(60, size, replace=False))
        scores = -np.arange(60.0)
        expected = average_precision_score(np.isin(np.arange(60), places), scores)
        assert average_precision_of(places, area="step") == pytest.approx(expected, abs=1e-12)
        assert average_precision_of(places) == pytest.approx(trapezoids(places, size), abs=1e-12)


def test_average_precision_worked_by_hand():
    # Right images in places 1 and 3: (1 + 1) / 2 over half of the recall, (1/2 + 2/3) / 2 over the other.
    assert average_precision_of(np.array([0, 2])) == pytest.approx(0.5 + 7 / 24)
    assert average_precision_of(np.array([0, 2]), area="step") == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision_of(np.array([0, 1, 2])) == average_precision_of(np.array([0, 1, 2]), area="step") == 1.0


RIGHT = {"easy": {EASY}, "medium": {EASY, HARD}, "hard": {HARD}, "": {EASY, HARD}}


@pytest.mark.parametrize("level", [*LEVELS, ANY], ids=lambda level: level.name or "any")
def test_levels_are_scored_on_rankings_without_what_they_ignore(level):
    queries, database, known = vectors(40, seed=1), vectors(80), truths(40, 80, most=30)
    scores = level_scores(rank_rows(queries, database, known), known, level, ks=(1, 5, 10))
    for number, (query, truth) in enumerate(zip(queries, known, strict=True)):
        grade = dict(zip(truth.rows.tolist(), truth.grades.tolist(), strict=True))
        right = [row for row, of in grade.items() if of in RIGHT[level.name]]
        ranking = [row for row in order_of(query, database) if row in right or row not in grade]
        if not right:
            assert np.isnan(scores.average_precision[number])
            continue
        places = [place for place, row in enumerate(ranking) if row in right]
        assert scores.average_precision[number] == pytest.approx(trapezoids(places, len(right)), abs=1e-12)
        for k in (1, 5, 10):
            used = min(places[-1] + 1, k)
            assert scores.precision_at[k][number] == sum(place < used for place in places) / used
            assert scores.found_at[k][number] == any(place < k for place in places)


def test_the_three_protocols_count_what_the_paper_says():
    """Ranking: hard, junk, easy, other, hard. Easy passes over hard and junk, hard over easy and junk."""
    database = np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.2, 0.8]], np.float32)
    truth = Truth(np.array([0, 1, 2, 4]), np.array([HARD, JUNK, EASY, HARD]))
    ranking = rank_rows(np.array([[1, 0]], np.float32), database, [truth])
    assert ranking.ranks[0].tolist() == [0, 1, 2, 4]
    found = {level.name: level_scores(ranking, [truth], level, area="step").average_precision[0] for level in LEVELS}
    assert found == pytest.approx({"easy": 1.0, "medium": (1 + 1 + 3 / 4) / 3, "hard": (1 + 2 / 3) / 2})


def test_precision_looks_no_further_than_the_last_right_image():
    """Ranking: right, other, right, and seven more: as in the code of revisited Oxford, k = 5 looks at three."""
    database = np.stack([np.cos(np.arange(10) / 10), np.sin(np.arange(10) / 10)], axis=1).astype(np.float32)
    truth = Truth(np.array([0, 2]), np.array([EASY, EASY]))
    ranking = rank_rows(np.array([[1, 0]], np.float32), database, [truth])
    found = level_scores(ranking, [truth], ANY, ks=(1, 2, 5))
    assert {k: values[0] for k, values in found.precision_at.items()} == pytest.approx({1: 1, 2: 1 / 2, 5: 2 / 3})


def test_vectors_that_are_not_finite_are_refused():
    broken = vectors(5)
    broken[3, 2] = np.nan
    with pytest.raises(InputError, match="row 3 holds NaN"):
        rank_rows(vectors(1), broken, truths(1, 4, most=3))
