"""How evenly a choice covers its pool: clusters, sources and nearness to query sets, before and after.

One clustering of the pool serves all choices made from it, whatever policy made them, so that their figures compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.curation.query_sets import QuerySet
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.search.blocks import Progress, Store
from dinov2cli.search.kmeans import assign, fit_kmeans
from dinov2cli.search.neighbours import best_match, top_k
from dinov2cli.search.vectors import Int64, SubsetVectors, Vectors, as_vectors, sample_rows

QUANTILE = 0.5
SAMPLE = 10_000
_SHOWN_SOURCES = 20


@dataclass(frozen=True)
class Balance:
    """How evenly images lie over k clusters. entropy: of the shares, in nats; evenness: over its maximum log(k);
    effective: exp(entropy), the number of equally large clusters with that entropy; gini: 0 all equal, 1 - 1/k all in
    one; empty: clusters without an image."""

    entropy: float
    evenness: float
    effective: float
    gini: float
    empty: int


@dataclass(frozen=True)
class Share:
    """A part of the images: its share in the pool and among the kept ones (0 .. 1)."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Coverage:
    """Figures of a choice. counts: images per cluster before and after [k] each. sources: shares by the column
    `source_column`. near: share near each query set, with its cosine in `thresholds`."""

    clusters: int
    before: Balance
    after: Balance
    counts: tuple[Int64, Int64]
    source_column: str | None = None
    sources: list[Share] = field(default_factory=list)
    near: list[Share] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    sample: int = SAMPLE

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, without the counts of single clusters."""
        near = [
            {name: _or_none(v) for name, v in {**vars(share), "cosine": value}.items()}
            for share, value in zip(self.near, self.thresholds, strict=True)
        ]
        return {
            "clusters": self.clusters,
            "before": vars(self.before),
            "after": vars(self.after),
            "sources": {"column": self.source_column, "shares": [vars(share) for share in self.sources]},
            "near": {"quantile": QUANTILE, "sample": self.sample, "sets": near},
        }


def balance(counts: npt.ArrayLike) -> Balance:
    """The evenness of counts [k] over clusters; all zeros count as even over none."""
    values = np.asarray(counts, dtype=np.float64)
    share = values[values > 0] / max(values.sum(), 1.0)
    entropy = float(-(share * np.log(share)).sum()) + 0.0
    evenness = entropy / np.log(len(values)) if len(values) > 1 else 1.0
    return Balance(entropy, evenness, float(np.exp(entropy)), gini(values), int((values == 0).sum()))


def gini(counts: npt.ArrayLike) -> float:
    """Gini coefficient of counts [k]: half the mean absolute difference of two of them over their mean."""
    values = np.sort(np.asarray(counts, dtype=np.float64))
    n, total = len(values), values.sum()
    if n == 0 or total == 0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ values / (n * total))


def default_clusters(rows: int) -> int:
    """Clusters to measure on: one per 32 images, from 2 to 1,000."""
    return min(rows, max(2, min(rows // 32, 1000)))


def measure(
    pool: pa.Table,
    vectors: Vectors | npt.NDArray[np.floating],
    rows: Int64,
    *,
    clusters: int | None = None,
    queries: Sequence[QuerySet] = (),
    iterations: int = 20,
    sample: int = SAMPLE,
    seed: int = 0,
    memory: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Coverage:
    """The coverage of the pool by its kept `rows` [K].

    clusters: of the k-means they are counted over (see `default_clusters`). The shares near query sets are estimates
    over at most `sample` random images of the pool, of the kept ones and of each set; see `near_share`.
    """
    source = as_vectors(vectors)
    k = min(clusters or default_clusters(source.rows), source.rows)
    kept: dict[str, Any] = {"store": store, "name": "coverage"}
    kmeans = fit_kmeans(source, k, iterations=iterations, seed=seed + 7919, memory=memory, ranks=ranks, **kept)
    label = assign(source, kmeans, progress=progress, ranks=ranks, **kept).label
    before, after = np.bincount(label, minlength=k), np.bincount(label[rows], minlength=k)
    column = _source_column(pool)
    near = [near_share(source, rows, query, sample=sample, seed=seed, ranks=ranks) for query in queries]
    return Coverage(
        clusters=k,
        before=balance(before),
        after=balance(after),
        counts=(before, after),
        source_column=column,
        sources=[] if column is None else source_shares(pool.column(column), rows),
        near=[share for share, _ in near],
        thresholds=[value for _, value in near],
        sample=sample,
    )


def near_share(
    vectors: Vectors | npt.NDArray[np.floating],
    rows: Int64,
    query: QuerySet,
    *,
    quantile: float = QUANTILE,
    sample: int = SAMPLE,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> tuple[Share, float]:
    """The share of images near a query set before and after, and the cosine from which on an image counts as near.

    That cosine is the `quantile` of what the set's images have to their nearest other one: by the median, an image is
    near when it lies closer to one of them than half of them to each other. NaN for a set of a single image.
    """
    source, theirs = as_vectors(vectors), as_vectors(query.vectors)
    theirs = SubsetVectors(theirs, sample_rows(theirs.rows, sample, seed))
    if theirs.rows < 2:
        return Share(query.name, float("nan"), float("nan")), float("nan")
    own, _ = top_k(theirs, 1, index="flat", ranks=ranks)
    threshold = float(np.quantile(own[:, 0].astype(np.float64), quantile))

    def share(of: Int64) -> float:
        if not len(of):
            return float("nan")
        picked = SubsetVectors(source, of[sample_rows(len(of), sample, seed)])
        similarity, _ = best_match(picked, theirs, index="flat", ranks=ranks)
        return float((similarity >= threshold).mean())

    return Share(query.name, share(np.arange(source.rows)), share(rows)), threshold


def source_shares(column: pa.ChunkedArray, rows: Int64, *, shown: int = _SHOWN_SOURCES) -> list[Share]:
    """The share of each value of a column before and after, the largest first; what is beyond `shown` as `others`."""
    encoded = column.combine_chunks().cast(pa.string()).dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    names = [str(name) for name in encoded.dictionary.to_pylist()] + ["none"]
    code = pc.fill_null(encoded.indices.cast(pa.int64()), len(names) - 1).to_numpy(zero_copy_only=False)
    before = np.bincount(code, minlength=len(names))
    after = np.bincount(code[rows], minlength=len(names))
    shares = np.stack([before / max(1, before.sum()), after / max(1, after.sum())])
    order = np.argsort(-before, kind="stable")
    order = order[before[order] > 0]
    found = [Share(names[i], float(shares[0, i]), float(shares[1, i])) for i in order[:shown].tolist()]
    if len(order) > shown:
        rest = shares[:, order[shown:]].sum(axis=1)
        found.append(Share(f"{len(order) - shown} others", float(rest[0]), float(rest[1])))
    return found


def coverage_messages(found: Coverage) -> list[str]:
    """The figures in sentences."""
    before, after = found.before, found.after
    lines = [
        f"evenness over {found.clusters:,} clusters (1 = all equal): {before.evenness:.3f} before, "
        f"{after.evenness:.3f} after; as even as {before.effective:,.0f} equal clusters before, "
        f"{after.effective:,.0f} after; Gini {before.gini:.3f} before, {after.gini:.3f} after"
    ]
    lines += [
        f"near {share.name} (cosine {value:.3f} or more): {share.before:.1%} of the pool, {share.after:.1%} of the kept"
        for share, value in zip(found.near, found.thresholds, strict=True)
        if np.isfinite(value)
    ]
    return lines


def _source_column(pool: pa.Table) -> str | None:
    """The column that tells where images come from: `source` where it has several values, else `label`."""
    for name in ("source", "label"):
        if name in pool.column_names and pc.count_distinct(pool.column(name)).as_py() > 1:
            return name
    return None


def _or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
