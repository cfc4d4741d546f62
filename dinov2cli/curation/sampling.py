"""Balanced sampling without a query: a tree of k-means clusters, and a budget poured into it from the top."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.tables import Curated, dropped_table, kept_table, other_rows
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress
from dinov2cli.search.hierarchy import Hierarchy, default_levels, fit_hierarchy
from dinov2cli.search.kmeans import rank_in_group
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
    if not 1 <= target_size <= source.rows:
        raise UserError(
            f"--target-size {target_size}: the pool holds {source.rows} images; expected between 1 and that"
        )
    if strategy not in STRATEGIES:
        raise UserError(f"strategy '{strategy}': expected one of {', '.join(STRATEGIES)}")
    chosen_levels = list(levels) if levels else default_levels(source.rows)
    tree = fit_hierarchy(
        source,
        chosen_levels,
        resample_steps=resample_steps,
        iterations=iterations,
        spherical=spherical,
        seed=seed,
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
        "levels": chosen_levels,
        "empty_clusters": [int((level.assignment.sizes(level.kmeans.k) == 0).sum()) for level in tree.levels],
        "evenness_before": before,
        "evenness_after": after,
    }
    messages = [
        f"sampled {len(rows)} of {source.rows} images from {' > '.join(map(str, reversed(chosen_levels)))} clusters",
        f"evenness over the coarsest clusters (1 = all equal): {before:.3f} before, {after:.3f} after",
    ]
    return Curated(
        kept=kept_table(pool, rows, extra),
        dropped=dropped_table(pool, rest, reason="not_sampled"),
        rows=rows,
        summary=summary,
        messages=messages,
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
        below = np.zeros(len(parent), dtype=np.int64)
        for cluster in np.flatnonzero(budget):
            children = np.flatnonzero(parent == cluster)
            below[children] = waterfill(sizes[depth][children], int(budget[cluster]), rng)
        budget = below
    finest = tree.levels[0].assignment
    preference = finest.distance if strategy == "closest" else rng.random(len(finest.label))
    order = np.lexsort((np.arange(len(preference)), preference, finest.label))
    group = finest.label[order]
    return np.sort(order[rank_in_group(group) < budget[group]])


def waterfill(capacity: npt.ArrayLike, total: int, rng: np.random.Generator) -> Int64:
    """Shares of `total` over vessels of given capacities, [n]: all at one level, full ones excepted.

    The sum is exactly min(total, sum of capacities); what does not divide goes one each to vessels with room, drawn
    by `rng`.
    """
    room = np.asarray(capacity, dtype=np.int64)
    total = min(int(total), int(room.sum()))
    if total <= 0:
        return np.zeros(len(room), dtype=np.int64)
    # Largest whole level at which no more than `total` is poured: sum(min(room, level)) grows with the level.
    low, high = 0, int(room.max())
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(room, middle).sum()) <= total:
            low = middle
        else:
            high = middle - 1
    share = np.minimum(room, low)
    open_ = np.flatnonzero(room > low)
    left = total - int(share.sum())
    share[rng.permutation(open_)[:left]] += 1
    return share


def _spread(label: Int64, k: int) -> float:
    """Entropy of the cluster sizes over its maximum: 1 when all clusters hold equally many."""
    if k < 2:
        return 1.0
    share = np.bincount(label, minlength=k) / len(label)
    share = share[share > 0]
    return float(abs((share * np.log(share)).sum()) / np.log(k))
