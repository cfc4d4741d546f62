"""Sampling without a query: a budget poured into a tree of k-means clusters, evenly over flat ones, or at random."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.tables import Curated, dropped_table, kept_table, other_rows
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.balanced import fit_balanced
from dinov2cli.search.blocks import Progress, Store
from dinov2cli.search.hierarchy import Hierarchy, default_levels, fit_hierarchy
from dinov2cli.search.kmeans import Assignment, rank_in_group
from dinov2cli.search.vectors import Int64, Vectors, as_vectors

STRATEGIES = ("random", "closest")


def sample_balanced(
    pool: pa.Table,
    vectors: Vectors | npt.NDArray[np.floating],
    target_size: int,
    *,
    levels: Sequence[int] | None = None,
    resample_steps: int = 5,
    iterations: int = 10,
    strategy: str = "random",
    spherical: bool = True,
    seed: int = 0,
    memory: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """Exactly `target_size` rows of the pool, spread over its clusters as evenly as their sizes allow.

    The pool is clustered in `levels` (see `fit_hierarchy`; by default about 32 rows per finest cluster and a tenth
    of the clusters at each further level) and sampled by `sample_tree` (Vo et al. 2024, section 3.3). strategy:
    `random` rows of the finest clusters, or those `closest` to the centroid. Deterministic by seed. kept has the
    columns `cluster` (finest) and `cluster_top` (coarsest). All `ranks` get the result. Raises UserError for a target
    the pool cannot give.
    """
    source = as_vectors(vectors, unit=spherical)
    _check(source.rows, target_size, strategy)
    chosen_levels = list(levels) if levels else default_levels(source.rows, target=target_size)
    tree = fit_hierarchy(
        source,
        chosen_levels,
        resample_steps=resample_steps,
        iterations=iterations,
        spherical=spherical,
        seed=seed,
        memory=memory,
        store=store,
        progress=progress,
        ranks=ranks,
    )
    rows = sample_tree(tree, target_size, strategy=strategy, seed=seed)
    labels = tree.labels()
    extra = {"cluster": pa.array(labels[0][rows], pa.int64()), "cluster_top": pa.array(labels[-1][rows], pa.int64())}
    rest = other_rows(source.rows, rows)
    before, after = _spread(labels[-1], chosen_levels[-1]), _spread(labels[-1][rows], chosen_levels[-1])
    summary = {
        "images": source.rows,
        "kept": len(rows),
        "mode": "balanced",
        "levels": chosen_levels,
        "empty_clusters": [int((level.assignment.sizes(level.kmeans.k) == 0).sum()) for level in tree.levels],
        "evenness_before": before,
        "evenness_after": after,
    }
    shown = " > ".join(f"{k:,}" for k in reversed(chosen_levels))
    messages = [
        f"sampled {len(rows):,} of {source.rows:,} images from {shown} clusters",
        f"evenness over the coarsest clusters (1 = all equal): {before:.3f} before, {after:.3f} after",
    ]
    return Curated(
        kept=kept_table(pool, rows, extra),
        dropped=dropped_table(pool, rest, reason="not_sampled"),
        rows=rows,
        summary=summary,
        messages=messages,
    )


def sample_bounded(
    pool: pa.Table,
    vectors: Vectors | npt.NDArray[np.floating],
    target_size: int,
    *,
    clusters: int | None = None,
    slack: float = 2.0,
    iterations: int = 20,
    strategy: str = "random",
    spherical: bool = True,
    seed: int = 0,
    memory: int | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """Exactly `target_size` rows, as many from each of `clusters` clusters of bounded size (balanced k-means).

    No cluster holds more than ceil(slack x N / clusters) rows (see `fit_balanced`; by default one per 32 rows, at most
    100,000). With slack 1 all are equally large: the sample follows the density of the pool, spread evenly over its
    regions. More slack makes it flatter, towards a draw from plain k-means. kept has the column `cluster`. Raises
    UserError for a target the pool cannot give.
    """
    source = as_vectors(vectors, unit=spherical)
    _check(source.rows, target_size, strategy)
    k = min(clusters or default_levels(source.rows)[0], source.rows)
    kmeans, found = fit_balanced(
        source, k, slack=slack, iterations=iterations, spherical=spherical, seed=seed, memory=memory, ranks=ranks
    )
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xF1A7]))
    sizes = found.sizes(kmeans.k)
    budget = waterfill(sizes, target_size, rng)
    rows, share = _draw(found, budget, strategy, rng), budget[sizes > 0]
    summary = {
        "images": source.rows,
        "kept": len(rows),
        "mode": "balanced-kmeans",
        "clusters": kmeans.k,
        "empty_clusters": int((sizes == 0).sum()),
        "largest_cluster": int(sizes.max()),
        "slack": slack,
    }
    messages = [
        f"sampled {len(rows):,} of {source.rows:,} images from {kmeans.k:,} clusters of at most "
        f"{int(sizes.max()):,} images, {int(share.min()):,} to {int(share.max()):,} of each"
    ]
    return Curated(
        kept=kept_table(pool, rows, {"cluster": pa.array(found.label[rows], pa.int64())}),
        dropped=dropped_table(pool, other_rows(source.rows, rows), reason="not_sampled"),
        rows=rows,
        summary=summary,
        messages=messages,
    )


def sample_random(pool: pa.Table, target_size: int, *, seed: int = 0) -> Curated:
    """`target_size` rows of the pool, each as likely as any other: what other choices are compared with.

    Deterministic by seed and the order of the pool. Raises UserError for a target the pool cannot give.
    """
    _check(pool.num_rows, target_size, "random")
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x4A4D]))
    rows = np.sort(rng.choice(pool.num_rows, size=target_size, replace=False)).astype(np.int64)
    return Curated(
        kept=kept_table(pool, rows),
        dropped=dropped_table(pool, other_rows(pool.num_rows, rows), reason="not_sampled"),
        rows=rows,
        summary={"images": pool.num_rows, "kept": len(rows), "mode": "random"},
        messages=[f"drew {len(rows):,} of {pool.num_rows:,} images at random"],
    )


def sample_tree(tree: Hierarchy, target: int, *, strategy: str = "random", seed: int = 0) -> Int64:
    """Rows sampled from a tree, sorted: the target is poured over the coarsest clusters, each cluster's share over
    its children, and so on; at the bottom rows are taken at random or nearest to the centroid first."""
    labels = tree.labels()
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xBA1A]))
    sizes = [np.bincount(label, minlength=level.kmeans.k) for label, level in zip(labels, tree.levels, strict=True)]
    budget = waterfill(sizes[-1], target, rng)
    for depth in range(len(tree.levels) - 2, -1, -1):
        parent = tree.levels[depth + 1].assignment.label  # of every cluster of this level
        budget = waterfill_groups(sizes[depth], parent, budget, rng)
    return _draw(tree.levels[0].assignment, budget, strategy, rng)


def _draw(assignment: Assignment, budget: Int64, strategy: str, rng: np.random.Generator) -> Int64:
    """`budget` [k] rows of every cluster, sorted: at random, or those nearest to the centroid first (ties by row)."""
    rows = len(assignment.label)
    preference = assignment.distance if strategy == "closest" else rng.random(rows)
    order = np.lexsort((np.arange(rows), preference, assignment.label))
    group = assignment.label[order]
    return np.sort(order[rank_in_group(group) < budget[group]])


def waterfill(capacity: npt.ArrayLike, total: int, rng: np.random.Generator) -> Int64:
    """Shares of `total` over vessels of given capacities, [n]: all at one level, full ones excepted.

    The sum is exactly min(total, sum of capacities); what does not divide goes one each to vessels with room, drawn
    by `rng`.
    """
    room = np.asarray(capacity, dtype=np.int64)
    return waterfill_groups(room, np.zeros(len(room), dtype=np.int64), np.array([max(0, total)]), rng)


def waterfill_groups(capacity: npt.ArrayLike, group: Int64, totals: Int64, rng: np.random.Generator) -> Int64:
    """`waterfill` for many groups of vessels at once: shares [n] of `totals` [G] over vessels of `group` [n] in
    0 .. G - 1.

    In a group with capacities c_0 <= c_1 <= ... a total T fills the first i vessels, and the n - i others to the
    level (T - c_0 - ... - c_{i-1}) / (n - i), for the least i with c_0 + ... + c_{i-1} + (n - i) c_i > T. One sort
    finds it for all groups.
    """
    room = np.asarray(capacity, dtype=np.int64)
    if not len(room):
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((room, group))
    room, mine = room[order], group[order]
    place = rank_in_group(mine)
    size = np.bincount(mine, minlength=len(totals))
    before = np.cumsum(room) - room
    before -= before[np.flatnonzero(place == 0)][np.cumsum(place == 0) - 1]  # sums start anew in every group
    rest = size[mine] - place
    spills = before + rest * room > totals[mine]
    # The least such i of every group; a group without one is filled to the brim.
    first = np.full(len(totals), len(room) + 1, dtype=np.int64)
    np.minimum.at(first, mine[spills], np.flatnonzero(spills))
    share = room.copy()
    open_ = np.arange(len(room)) >= first[mine]
    at = first[mine[open_]]
    left, vessels = totals[mine[open_]] - before[at], rest[at]
    share[open_] = left // vessels
    lucky = np.lexsort((rng.random(len(at)), mine[open_]))
    extra = np.empty(len(at), dtype=bool)
    extra[lucky] = rank_in_group(mine[open_][lucky]) < (left % vessels)[lucky]
    share[open_] += extra
    result = np.empty_like(share)
    result[order] = share
    return result


def _check(rows: int, target_size: int, strategy: str) -> None:
    if not 1 <= target_size <= rows:
        raise UserError(f"--target-size {target_size}: the pool holds {rows} images; expected between 1 and that")
    if strategy not in STRATEGIES:
        raise UserError(f"strategy '{strategy}': expected one of {', '.join(STRATEGIES)}")


def _spread(label: Int64, k: int) -> float:
    """Entropy of the cluster sizes over its maximum: 1 when all clusters hold equally many."""
    if k < 2:
        return 1.0
    share = np.bincount(label, minlength=k) / len(label)
    share = share[share > 0]
    return float(abs((share * np.log(share)).sum()) / np.log(k))
