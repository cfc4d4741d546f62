"""What the study of geography has beside groups: households, the curve over income, concepts with the largest gaps."""

import re
from collections.abc import Sequence
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.evaluation.clustered import clustered_share_interval
from dinov2cli.fairness.attributes import Attributes, texts
from dinov2cli.fairness.axis import Axis
from dinov2cli.fairness.curve import smoothed
from dinov2cli.fairness.outcomes import Outcome

CURVE = pa.schema([(name, pa.float64()) for name in ("income", "value", "low", "high")])
CONCEPTS = pa.schema(
    [("concept", pa.string()), ("images", pa.int64()), ("low_group", pa.string()), ("high_group", pa.string())]
    + [(name, pa.int64()) for name in ("low_images", "high_images")]
    + [(name, pa.float64()) for name in ("low_value", "high_value", "gap", "ci_low", "ci_high")]
)
_FEWEST = 10  # images that a curve is drawn through
# Dollar Street's pictures lie in a folder for each home: media/Bangladesh 10/image/….
_HOME = re.compile(r"/media/([^/]+)/")


def households(
    attributes: Attributes, column: str | None, country: str, income: str
) -> tuple[list[str | None] | None, str]:
    """The household of every image, and how it was found, in words.

    By the column, else by the home's folder in Dollar Street's `url`, else homes of one country with one income count
    as the same. None where nothing tells. Raises InputError for a column that does not exist.
    """
    table = attributes.table
    if column is not None:
        return texts(attributes, column), f"column {column}"
    if "url" in table.column_names:
        found = [_HOME.search(unquote(url or "")) for url in texts(attributes, "url")]
        if sum(home is not None for home in found) > len(found) / 2:
            return [None if home is None else home.group(1) for home in found], "home in the column url"
    if {country, income} <= set(table.column_names):
        pairs = zip(texts(attributes, country), texts(attributes, income), strict=True)
        names = [None if None in pair else "\0".join(map(str, pair)) for pair in pairs]
        return names, f"{country} and {income} together"
    return None, "every image alone"


def income_curve(
    income: Axis,
    outcome: Outcome,
    clusters: npt.NDArray[np.int64] | None,
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> pa.Table:
    """The rate of an outcome as a smooth function of income, with the interval of every point (schema CURVE).

    Smoothed over the logarithm of income, by resampled households. Empty with fewer than ten images of known income.
    """
    assert income.values is not None
    rows = np.flatnonzero(outcome.counted & (income.values > 0))
    if len(rows) < _FEWEST or np.ptp(income.values[rows]) == 0:
        return CURVE.empty_table()
    found = smoothed(
        np.log10(income.values[rows]),
        outcome.values[rows],
        None if clusters is None else clusters[rows],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    return pa.table([10**found.x, found.value, found.low, found.high], schema=CURVE)


def concept_gaps(
    concepts: Sequence[list[str] | None],
    income: Axis,
    outcome: Outcome,
    clusters: npt.NDArray[np.int64] | None,
    *,
    min_images: int,
    confidence: float,
) -> pa.Table:
    """Rates of every concept among the poorest and the richest group, largest difference first (schema CONCEPTS).

    Only concepts with `min_images` counted images in both. The interval is that of this one difference, of the two
    groups' limits (Newcombe 1998): among many concepts some leave out zero by chance.
    """
    last = len(income.names) - 1
    rows_of: dict[str, list[int]] = {}
    for row in np.flatnonzero(outcome.counted & np.isin(income.codes, (0, last))).tolist():
        for concept in concepts[row] or ():
            rows_of.setdefault(concept, []).append(row)
    found = []
    for concept, listed in rows_of.items():
        rows = np.array(listed)
        poor, rich = (rows[income.codes[rows] == code] for code in (0, last))
        if min(len(poor), len(rich)) < min_images:
            continue
        ends = [_rate(outcome, own, clusters, confidence) for own in (poor, rich)]
        counts = (len(poor), len(rich))
        names = (income.names[0], income.names[last])
        found.append((concept, len(rows), *names, *counts, ends[0][0], ends[1][0], *_difference(*ends)))
    found.sort(key=lambda row: (-abs(row[7] - row[6]), row[0]))
    return pa.Table.from_pylist([dict(zip(CONCEPTS.names, row, strict=True)) for row in found], CONCEPTS)


_Rate = tuple[float, float, float]


def _rate(
    outcome: Outcome, rows: npt.NDArray[np.int64], clusters: npt.NDArray[np.int64] | None, confidence: float
) -> _Rate:
    own = rows if clusters is None else clusters[rows]
    values = outcome.values[rows]
    return float(values.mean()), *clustered_share_interval(values, own, confidence=confidence)


def _difference(first: _Rate, second: _Rate) -> _Rate:
    """(value, low, high) of the second less the first, two independent rates with their limits."""
    (p, low_p, high_p), (q, low_q, high_q) = first, second
    change = q - p
    return change, change - float(np.hypot(q - low_q, high_p - p)), change + float(np.hypot(high_q - q, p - low_p))
