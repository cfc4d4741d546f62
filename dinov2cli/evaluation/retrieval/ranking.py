"""Instance retrieval: where in the exact ranking of a database the images of the same object stand, and the scores of
that (Philbin et al. 2007; Jegou et al. 2008, INRIA Holidays; Radenovic et al. 2018, revisited Oxford and Paris).

Ranks are counted, not sorted out: of every query the whole row of similarities is made, a block of queries at a time.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dinov2cli.search.blocks import Progress, Store, kept, over_blocks
from dinov2cli.search.vectors import as_vectors

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Area = Literal["trapezoid", "step"]

JUNK, EASY, HARD = 0, 1, 2
NEAREST = 10
_BLOCK_BYTES = 128 << 20
_BLOCK_ROWS = 256
# With more rows to rank than this, one sort of all similarities is cheaper than counting for each.
_COUNTED = 64


@dataclass(frozen=True)
class Truth:
    """What is known about a query. rows: int64 [m] distinct rows of the database; grades: int64 [m], JUNK (taken out of
    the ranking, as the query itself), EASY (the same object; the only grade where nobody told degrees) or HARD."""

    rows: Int64
    grades: Int64


@dataclass(frozen=True)
class Level:
    """Which grades count as right and which are passed over."""

    name: str
    right: tuple[int, ...]
    ignored: tuple[int, ...]


ANY = Level("", (EASY, HARD), (JUNK,))
LEVELS = (
    Level("medium", (EASY, HARD), (JUNK,)),
    Level("hard", (HARD,), (EASY, JUNK)),
    Level("easy", (EASY,), (HARD, JUNK)),
)
"""The protocols of Radenovic et al. 2018, section 3; medium, which the DINOv2 paper quotes first, comes first."""


@dataclass(frozen=True)
class Ranking:
    """ranks: for each query int64 [m], the place of its `Truth.rows` among all N rows of the database (0 = first);
    nearest: int64 [Q, k] rows of the first that are not JUNK (-1 where there are no more); similarities: float32
    [Q, k] cosines (-inf there)."""

    ranks: list[Int64]
    nearest: Int64
    similarities: npt.NDArray[np.float32]


@dataclass(frozen=True)
class LevelScores:
    """Per query, float64 [Q], NaN where a query has nothing to be found at this level: the average precision, and for
    each k the precision of the first k and whether (1 or 0) one of the first k is right."""

    average_precision: Floats
    precision_at: dict[int, Floats]
    found_at: dict[int, Floats]


def rank_rows(
    queries: npt.NDArray[np.floating],
    database: npt.NDArray[np.floating],
    truths: Sequence[Truth],
    *,
    device: str | torch.device = "cpu",
    nearest: int = NEAREST,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Ranking:
    """Rank the database [N, D] by cosine to every query [Q, D], most similar first, equal ones by row; exact.

    Needs about 128 MB or four rows of N float32, whichever is more, beside the vectors. `store` keeps the ranks of
    finished blocks of queries. Raises InputError for vectors that are not finite.
    """
    if len(queries) != len(truths):
        raise ValueError(f"{len(queries)} queries need as many truths, got {len(truths)}")
    asked, among = as_vectors(queries), as_vectors(database)
    columns = torch.from_numpy(among.block(0, among.rows)).to(device)
    k = min(nearest, among.rows)
    block = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * max(1, among.rows))))

    def work(start: int) -> dict[str, npt.NDArray[np.generic]]:
        vectors = torch.from_numpy(asked.block(start, min(start + block, asked.rows))).to(device)
        found = [
            _of_query(row, truth, k)
            for row, truth in zip((vectors @ columns.T).cpu().numpy(), truths[start : start + block], strict=True)
        ]
        ranks, rows, cosines = zip(*found, strict=True)
        return {"ranks": np.concatenate(ranks), "nearest": np.stack(rows), "similarities": np.stack(cosines)}

    stage = None
    if store is not None:
        key = {"vectors": _digest(queries, database), "truth": _truth_digest(truths), "k": k, "block": block}
        stage = store.stage("retrieval", key)
    parts = list(over_blocks(kept(work, stage), len(truths), block, progress=progress))
    ends = np.cumsum([len(truth.rows) for truth in truths])[:-1]
    ranks = np.concatenate([np.zeros(0, np.int64), *(part["ranks"] for part in parts)])
    return Ranking(
        np.split(ranks.astype(np.int64), ends),
        np.concatenate([np.zeros((0, k), np.int64), *(part["nearest"] for part in parts)]).astype(np.int64),
        np.concatenate([np.zeros((0, k), np.float32), *(part["similarities"] for part in parts)]).astype(np.float32),
    )


def _of_query(
    similarity: npt.NDArray[np.float32], truth: Truth, k: int
) -> tuple[Int64, Int64, npt.NDArray[np.float32]]:
    """Ranks of the rows of one truth, and the first k rows without its junk, of similarities [N]."""
    rows = truth.rows
    if len(rows) > _COUNTED:
        places = np.empty(len(similarity), dtype=np.int64)
        places[np.argsort(-similarity, kind="stable")] = np.arange(len(similarity))
        ranks = places[rows]
    else:
        own = similarity[rows]
        ranks = np.array(
            [
                np.count_nonzero(similarity > value) + np.count_nonzero(similarity[:row] == value)
                for row, value in zip(rows, own, strict=True)
            ],
            dtype=np.int64,
        )
    left = similarity.copy()
    left[rows[truth.grades == JUNK]] = -np.inf
    # Whatever ties with the k-th is a candidate, so that equal ones are taken by row.
    candidates = np.flatnonzero(left >= np.partition(left, len(left) - k)[len(left) - k])
    first = candidates[np.argsort(-left[candidates], kind="stable")][:k]
    return ranks, np.where(np.isneginf(left[first]), -1, first), left[first]


def level_scores(
    ranking: Ranking, truths: Sequence[Truth], level: Level, *, ks: Sequence[int] = (), area: Area = "trapezoid"
) -> LevelScores:
    """The scores of every query at one level; junk and the level's ignored grades are taken out of the ranking first.

    Precision at k is that of the code of revisited Oxford and Paris: k shrinks to the place of the last right image
    where that comes earlier, so that a query with two right images can reach 1 at k = 10.
    """
    precisions = np.full(len(truths), np.nan)
    precision_at = {k: np.full(len(truths), np.nan) for k in ks}
    found_at = {k: np.full(len(truths), np.nan) for k in ks}
    for number, (truth, ranks) in enumerate(zip(truths, ranking.ranks, strict=True)):
        right = np.sort(ranks[np.isin(truth.grades, level.right)])
        if not len(right):
            continue
        ignored = np.sort(ranks[np.isin(truth.grades, level.ignored)])
        places = right - np.searchsorted(ignored, right)
        precisions[number] = average_precision_of(places, area=area)
        for k in ks:
            used = min(int(places[-1]) + 1, k)
            precision_at[k][number] = np.count_nonzero(places < used) / used
            found_at[k][number] = float(places[0] < k)
    return LevelScores(precisions, precision_at, found_at)


def average_precision_of(places: Int64, *, area: Area = "trapezoid") -> float:
    """Average precision of one query from the places (0 = first, ascending) of all its right images.

    `step` is the mean precision at the right images (TREC, scikit-learn). `trapezoid` joins the points of the curve of
    precision over recall by lines, as the code of Oxford 5k, Holidays and revisited Oxford and Paris does: it is lower,
    except where all right images stand first.
    """
    hits = np.arange(1, len(places) + 1)
    after = hits / (places + 1)
    if area == "step":
        return float(after.mean())
    before = np.divide(hits - 1, places, out=np.ones(len(places)), where=places > 0)
    return float((before + after).mean() / 2)


def _digest(*arrays: npt.NDArray[np.floating]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _truth_digest(truths: Sequence[Truth]) -> str:
    digest = hashlib.sha256()
    for truth in truths:
        digest.update(len(truth.rows).to_bytes(8, "little"))
        digest.update(truth.rows.astype(np.int64).tobytes())
        digest.update(truth.grades.astype(np.int64).tobytes())
    return digest.hexdigest()
