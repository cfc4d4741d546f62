"""Folds of whole clusters, so that no classifier is judged on a person or a household that it was trained on."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dinov2cli.errors import InputError, UserError

Int64 = npt.NDArray[np.int64]


def folds_there_are(
    labels: Int64, class_names: Sequence[str], clusters: Int64, folds: int, spec: str
) -> tuple[int, list[str]]:
    """How many folds there can be of the `folds` asked for, and a note where these are fewer.

    labels: int64 [n], places in `class_names`, -1 for none; spec: the set, for errors. Raises UserError for fewer than
    two folds, InputError where all labelled images are of one class or of one cluster.
    """
    if folds < 2:
        raise UserError(f"folds is {folds}, expected 2 or more: use 5")
    seen, among = np.unique(labels[labels >= 0]), len(np.unique(clusters[labels >= 0]))
    if len(seen) < 2:
        found = f"one class ({class_names[seen[0]]})" if len(seen) else "no label"
        raise InputError(f"{spec} has {found}, so there is nothing to tell apart; expected two classes or more")
    if among < 2:
        raise InputError(
            f"{spec}: all {int((labels >= 0).sum()):,} labelled images are of one cluster, so none is left to train "
            "on when it is judged; give a training set (--train), or another column of clusters"
        )
    notes = [f"{folds} folds became {among}: there are no more clusters with a label"] if among < folds else []
    return min(folds, among), notes


def cluster_folds(labels: np.ndarray, clusters: np.ndarray, folds: int, *, seed: int) -> np.ndarray:
    """The fold of every image, int64 [n] of 0..folds-1, where a cluster is never cut; labels [n], -1 for none.

    Stratified as far as whole clusters allow: they are dealt out from the largest on, each to the fold that has least
    of its classes (shares of the images of a class, weighed by how many the cluster has), then to the one with the
    fewest images; those without a label come last. Clusters of one size come in an order that follows from the seed.
    """
    _, group = np.unique(clusters, return_inverse=True)
    _, label = np.unique(labels, return_inverse=True)
    unlabelled = bool((labels < 0).any())  # these are the first of `label` then, and are dealt out by number alone
    sizes, totals = np.bincount(group), np.bincount(label).astype(np.float64)
    pairs, counts = np.unique(group * len(totals) + label, return_counts=True)
    kinds = pairs % len(totals)
    shares = np.where((kinds == 0) & unlabelled, 0.0, counts / totals[kinds])
    ends = np.searchsorted(pairs // len(totals), np.arange(len(sizes) + 1))
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xF01D]))
    order = rng.permutation(len(sizes))
    held = np.zeros((folds, len(totals)))
    images = np.zeros(folds)
    chosen = np.zeros(len(sizes), np.int64)
    labelled = np.bincount(group, labels >= 0) > 0
    for cluster in order[np.lexsort((-sizes[order], ~labelled[order]))]:
        own = slice(ends[cluster], ends[cluster + 1])
        crowded = held[:, kinds[own]] @ shares[own]
        best = np.lexsort((images, crowded))[0]
        chosen[cluster] = best
        held[best, kinds[own]] += counts[own]
        images[best] += sizes[cluster]
    return chosen[group]
