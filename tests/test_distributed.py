"""Three processes share work: results in order, on whom they belong to; an error of one is raised by all, once."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from dinov2cli.distributed import ALONE, Ranks, join
from dinov2cli.errors import DinoError, InputError, UserError, WorkError
from tests.launch import launch

PROCESSES = 3


def square(number: int) -> int:
    if number < 0:
        raise InputError(f"{number} is negative")
    return number * number


def caught(work) -> list:
    """What kind of error `work` raised, its text, and the rank that met it."""
    try:
        work()
    except DinoError as error:
        return [type(error).__name__, str(error), error.rank]
    return ["nothing"]


def gathered(ranks: Ranks, numbers: list[int], fail_after: int | None = None) -> list[int]:
    """The squares that the main process gets; it fails when it has as many as `fail_after`."""
    found: list[int] = []
    with ranks.gather(map(square, ranks.share(numbers)), len(numbers)) as results:
        for result in results:
            found.append(result)
            if len(found) == fail_after:
                raise WorkError("the disk is full")
    return found


def only_on(ranks: Ranks, rank: int):
    if ranks.rank == rank:
        raise UserError(f"rank {rank} cannot")
    return ranks.rank


def scenarios(ranks: Ranks) -> dict:
    made: list[int] = []

    def make():
        made.append(ranks.rank)
        return {"made by": ranks.rank}

    seven = list(range(7))
    bad = [0, 1, 2, 3, -4, 5, 6]
    return {
        "share": list(ranks.share(seven)),
        "merge": list(ranks.merge(map(square, ranks.share(seven)), 7)),
        "merge main": list(ranks.merge(map(square, ranks.share(seven)), 7, main_only=True)),
        "merge nothing": list(ranks.merge(iter(()), 0)),
        "map": ranks.map(square, seven),
        "map error": caught(lambda: ranks.map(square, bad)),
        "merge main error": caught(lambda: list(ranks.merge(map(square, ranks.share(bad)), 7, main_only=True))),
        "first": ranks.first(make),
        "made": made,
        "first error": caught(lambda: ranks.first(lambda: square(-1))),
        "together": ranks.together(lambda: ranks.rank),
        "together error": caught(lambda: ranks.together(lambda: only_on(ranks, 2))),
        "together of all": caught(lambda: ranks.together(lambda: square(-2))),
        "error within": caught(lambda: ranks.together(lambda: ranks.map(square, bad))),
        "gather": gathered(ranks, seven),
        "gather error of a rank": caught(lambda: gathered(ranks, bad)),
        "gather error in the block": caught(lambda: gathered(ranks, seven, fail_after=2)),
        "gather error at the end": caught(lambda: gathered(ranks, seven, fail_after=7)),
        "still in step": ranks.map(square, seven),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(__file__, str(folder), processes=PROCESSES, module="")
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


SQUARES = [0, 1, 4, 9, 16, 25, 36]
NEGATIVE = ["InputError", "-4 is negative", 1]  # item 4 is rank 1's


def test_results_come_in_order_on_every_rank_or_on_the_main_one(found):
    assert [r["share"] for r in found] == [[0, 3, 6], [1, 4], [2, 5]]
    for name in ("merge", "map", "still in step"):
        assert [r[name] for r in found] == [SQUARES] * PROCESSES
    for name in ("merge main", "gather"):
        assert [r[name] for r in found] == [SQUARES, [], []]
    assert [r["merge nothing"] for r in found] == [[]] * PROCESSES


def test_the_main_process_makes_what_all_get(found):
    assert [r["first"] for r in found] == [{"made by": 0}] * PROCESSES
    assert [r["made"] for r in found] == [[0], [], []]
    assert [r["together"] for r in found] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("map error", NEGATIVE),
        ("merge main error", NEGATIVE),
        ("first error", ["InputError", "-1 is negative", 0]),
        ("together error", ["UserError", "rank 2 cannot", 2]),
        ("together of all", ["InputError", "-2 is negative", 0]),
        ("error within", NEGATIVE),
        ("gather error of a rank", NEGATIVE),
        ("gather error in the block", ["WorkError", "the disk is full", 0]),
        ("gather error at the end", ["WorkError", "the disk is full", 0]),
    ],
)
def test_an_error_of_one_rank_is_raised_by_all(found, name, error):
    assert [r[name] for r in found] == [error] * PROCESSES


def test_a_rank_that_dies_is_noticed_by_the_others(tmp_path):
    done = launch(__file__, str(tmp_path), "dies", processes=PROCESSES, module="")
    assert done.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "2.json"]
    for rank in (0, 2):
        kind, text, _ = json.loads((tmp_path / f"{rank}.json").read_text())
        assert kind == "LostRank"
        assert text.startswith(f"rank {rank} of 3 has lost another rank")


def test_alone_nothing_is_sent():
    assert gathered(ALONE, list(range(7))) == SQUARES == ALONE.map(square, range(7))
    assert ALONE.first(lambda: 5) == 5 == ALONE.together(lambda: 5)
    ALONE.wait()
    for work in (lambda: ALONE.map(square, [-4]), lambda: gathered(ALONE, [-4])):
        assert caught(work) == ["InputError", "-4 is negative", None]
    assert caught(lambda: gathered(ALONE, [1, 2], fail_after=1)) == ["WorkError", "the disk is full", None]


def main(folder: Path, how: str) -> None:
    ranks = join("cpu")
    if how == "dies":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, when it sees that one has gone
        if ranks.rank == 1:
            os._exit(9)
        result: object = caught(lambda: ranks.map(square, range(3)))
    else:
        result = scenarios(ranks)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), (sys.argv[2:] or [""])[0])
