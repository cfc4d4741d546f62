"""Rates of groups of images, how far they lie apart, and whether that may be chance: two tables for all outcomes and
all axes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.evaluation.clustered import clustered_share_interval
from dinov2cli.fairness.outcomes import Outcome
from dinov2cli.fairness.permutation import Tested, holm, permutation_test
from dinov2cli.fairness.simultaneous import Compared, compare

if TYPE_CHECKING:
    from dinov2cli.fairness.axis import Axis

UNKNOWN = "unknown"

SHUFFLES = 10
"""For each comparison, over 1 - confidence: the fewest there are, so that a corrected p-value can be small enough."""


def _fields(kind: pa.DataType, names: str) -> list[tuple[str, pa.DataType]]:
    return [(name, kind) for name in names.split()]


GROUPS = pa.schema(
    _fields(pa.string(), "axis group metric better")
    + _fields(pa.bool_(), "known")
    + _fields(pa.int64(), "images clusters")
    + _fields(pa.bool_(), "enough")
    + _fields(pa.float64(), "value ci_low ci_high expected")
    + _fields(pa.bool_(), "best")
    + _fields(pa.float64(), "difference difference_low difference_high drop drop_low drop_high")
    + _fields(pa.float64(), "rest_difference p_value p_corrected")
    + _fields(pa.bool_(), "significant")
)
"""One row for each group of an axis, and for its images of unknown group, in each metric."""

GAPS = pa.schema(
    _fields(pa.string(), "axis metric better")
    + _fields(pa.int64(), "groups left_out unknown")
    + _fields(pa.string(), "best worst")
    + _fields(pa.float64(), "best_value worst_value gap gap_low gap_high drop drop_low drop_high p_value p_corrected")
    + _fields(pa.bool_(), "significant")
)
"""One row for each axis in each metric."""


@dataclass(frozen=True)
class Findings:
    """What `analyse` found: tables of schema GROUPS and GAPS."""

    groups: pa.Table
    gaps: pa.Table


@dataclass(frozen=True)
class _Family:
    """One outcome on one axis, which is tested once: what was found, and the tests if there is anything to test."""

    axis: "Axis"
    outcome: Outcome
    found: Compared
    tested: Tested | None = None

    @property
    def taken(self) -> npt.NDArray[np.int64]:
        """The images of the groups that are compared."""
        rows = self.found.rows
        return rows[np.isin(self.axis.codes[rows], self.found.enough)]

    @property
    def testable(self) -> bool:
        """Whether a test could find anything: outcomes that are all the same differ under no shuffle."""
        return self.found.pairs is not None and bool(np.ptp(self.outcome.values[self.taken]) > 0)

    @property
    def ends(self) -> tuple[int, int]:
        """Best and worst of the groups that are compared, as positions among these."""
        value = self.found.rates.value[self.found.enough]
        low, high = int(value.argmin()), int(value.argmax())
        return (low, high) if self.outcome.better == "low" else (high, low)


def analyse(
    outcomes: Sequence[Outcome],
    axes: "Sequence[Axis]",
    clusters: npt.NDArray[np.int64] | None,
    *,
    min_images: int,
    min_clusters: int,
    confidence: float,
    resamples: int,
    permutations: int,
    seed: int,
) -> Findings:
    """Every outcome on every axis: rates of all groups, and how far those with enough images lie apart.

    clusters: int64 [n], of images that are not independent (a person, a household), or None. Groups with fewer than
    `min_images` images or `min_clusters` clusters are shown, and take no part in gaps and tests. Intervals of single
    groups are pointwise; those of differences, drops and gaps hold at once for all pairs of groups of an axis. p-values
    of groups are corrected for the groups, and in `p_corrected` for all pairs of axis and metric that were tested
    (Bonferroni), those of gaps for the latter (Holm). There are at least as many shuffles as it takes for a corrected
    p-value to fall to a tenth of 1 - confidence. The random numbers of an axis and metric depend on their names and
    the seed, not on what else is analysed.
    """
    limits: dict[str, Any] = {
        "min_images": min_images,
        "min_clusters": min_clusters,
        "confidence": confidence,
        "resamples": resamples,
    }
    families = []
    for axis in axes:
        for outcome in outcomes:
            if outcome.axis in (None, axis.name):
                seeded = {**limits, "seed": _seed(seed, axis, outcome)}
                found = compare(outcome, axis.codes, len(axis.names), clusters, **seeded)
                families.append(_Family(axis, outcome, found))
    count = sum(family.testable for family in families)
    shuffles = max(permutations, int(np.ceil(SHUFFLES * count / (1 - confidence))))
    families = [_tested(family, clusters, shuffles, seed) if family.testable else family for family in families]
    corrected = holm([np.nan if family.tested is None else family.tested.gap for family in families])
    groups, gaps = [], []
    for family, p_value in zip(families, corrected, strict=True):
        groups += _group_rows(family, count, 1 - confidence)
        groups.append(_unknown_row(family, clusters, confidence))
        gaps.append(_gap_row(family, float(p_value), 1 - confidence))
    return Findings(_table(groups, GROUPS), _table(gaps, GAPS))


def _seed(seed: int, axis: "Axis", outcome: Outcome) -> int:
    return (seed << 32) + crc32(f"{axis.name}\0{outcome.metric}".encode())


def _tested(family: _Family, clusters: npt.NDArray[np.int64] | None, permutations: int, seed: int) -> _Family:
    rows = family.taken
    place = np.zeros(len(family.axis.names), dtype=np.int64)
    place[family.found.enough] = np.arange(len(family.found.enough))
    tested = permutation_test(
        family.outcome.values[rows],
        place[family.axis.codes[rows]],
        None if clusters is None else clusters[rows],
        permutations=permutations,
        seed=_seed(seed, family.axis, family.outcome),
    )
    return replace(family, tested=tested)


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; what is not finite is null."""
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not np.isfinite(value):
                row[name] = None
    return pa.Table.from_pylist(rows, schema)


def _named(family: _Family) -> dict[str, Any]:
    return {"axis": family.axis.name, "metric": family.outcome.metric, "better": family.outcome.better}


def _group_rows(family: _Family, tested: int, level: float) -> list[dict[str, Any]]:
    found, rows = family.found, []
    place = {int(group): position for position, group in enumerate(found.enough)}
    for group, name in enumerate(family.axis.names):
        own = found.rows[family.axis.codes[found.rows] == group]
        row = {
            **_named(family),
            "group": name,
            "known": True,
            "images": len(own),
            "clusters": int(found.clusters[group]),
            **_rate(family.outcome, own, float(found.low[group]), float(found.high[group])),
            "enough": group in place,
            "best": False,
            "significant": False,
        }
        if group in place and found.pairs is not None:
            row |= _differences(family, place[group])
            if family.tested is not None:
                p_value = float(family.tested.groups[place[group]])
                corrected = min(1.0, p_value * tested)
                row |= {"p_value": p_value, "p_corrected": corrected, "significant": corrected <= level}
        rows.append(row)
    return rows


def _rate(outcome: Outcome, rows: npt.NDArray[np.int64], low: float, high: float) -> dict[str, Any]:
    if not len(rows):
        return {}
    expected = None if outcome.expected is None else float(outcome.expected[rows].mean())
    return {"value": float(outcome.values[rows].mean()), "ci_low": low, "ci_high": high, "expected": expected}


def _differences(family: _Family, position: int) -> dict[str, Any]:
    """Of a group that is compared: how far it lies from the best, and from all others together."""
    found, pairs = family.found, family.found.pairs
    assert pairs is not None
    value, images = found.rates.value[found.enough], found.images[found.enough]
    others = np.arange(len(value)) != position
    row: dict[str, Any] = {
        "rest_difference": float(value[position] - np.average(value[others], weights=images[others]))
    }
    best = family.ends[0]
    if position == best:
        return row | {"best": True}
    row |= {
        "difference": float(value[position] - value[best]),
        "difference_low": float(pairs.low[position, best]),
        "difference_high": float(pairs.high[position, best]),
    }
    if family.outcome.better == "high" and value[best] > 0:
        row |= {
            "drop": float((value[best] - value[position]) / value[best]),
            "drop_low": 1 - float(pairs.ratio_high[position, best]),
            "drop_high": 1 - float(pairs.ratio_low[position, best]),
        }
    return row


def _unknown_row(family: _Family, clusters: npt.NDArray[np.int64] | None, confidence: float) -> dict[str, Any]:
    """Of the images whose group is not known."""
    outcome = family.outcome
    rows = np.flatnonzero(outcome.counted & (family.axis.codes < 0))
    own = np.arange(len(rows)) if clusters is None else clusters[rows]
    low, high = clustered_share_interval(outcome.values[rows], own, confidence=confidence) if len(rows) else (0.0, 1.0)
    return {
        **_named(family),
        "group": UNKNOWN,
        "known": False,
        "images": len(rows),
        "clusters": len(np.unique(own)),
        **_rate(outcome, rows, low, high),
        "enough": False,
        "best": False,
        "significant": False,
    }


def _gap_row(family: _Family, corrected: float, level: float) -> dict[str, Any]:
    found, axis = family.found, family.axis
    row = {
        **_named(family),
        "groups": len(found.enough),
        "left_out": len(axis.names) - len(found.enough),
        "unknown": int((family.outcome.counted & (axis.codes < 0)).sum()),
        "significant": False,
    }
    if found.pairs is None:
        return row
    best, worst = (int(found.enough[end]) for end in family.ends)
    values = found.rates.value[[best, worst]]
    gap, gap_limits, drop_limits = float(np.ptp(values)), found.pairs.gap(), found.pairs.drop()
    row |= {"best": axis.names[best], "worst": axis.names[worst], "gap": gap}
    row |= {"best_value": float(values[0]), "worst_value": float(values[1])}
    row |= {"gap_low": gap_limits[0], "gap_high": gap_limits[1]}
    if family.outcome.better == "high" and values[0] > 0:
        row |= {"drop": gap / float(values[0]), "drop_low": drop_limits[0], "drop_high": drop_limits[1]}
    # Outcomes that are all the same show no difference, whatever the shuffle.
    p_value = 1.0 if family.tested is None else family.tested.gap
    corrected = 1.0 if family.tested is None else corrected
    return row | {"p_value": p_value, "p_corrected": corrected, "significant": corrected <= level}
