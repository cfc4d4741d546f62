"""Measure what docs/fairness.md says of the statistics: python benchmarks/fairness.py [-o FILE] [--sets N]

Made-up sets of images with a known truth, analysed as `dinov2 fairness` does. False alarms: attributes at random, how
often any gap or any group of several axes and metrics is called significant. Coverage and power: groups of which one is
worse by a known gap, how often the intervals hold the truth and how often the gap is found. The outcome goes into
fairness.json beside it, with all settings. About half an hour on one core.
"""

import argparse
import json
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from dinov2cli.evaluation.statistics import drop
from dinov2cli.fairness.analysis import analyse
from dinov2cli.fairness.axis import Axis
from dinov2cli.fairness.outcomes import Outcome
from dinov2cli.fairness.permutation import permutation_test
from dinov2cli.fairness.simultaneous import compare

FILE = Path(__file__).with_suffix(".json")
CONFIDENCE = 0.95
GROUPS = 4


def outcomes_of(rng, share, cluster, icc):
    """Zeros and ones [n] with mean `share` [n], whose correlation within a cluster is `icc`: beta-binomial."""
    if icc == 0:
        return (rng.random(len(cluster)) < share).astype(float)
    spread = (1 - icc) / icc
    first = np.unique(cluster, return_index=True)[1]
    own = rng.beta(share[first] * spread, (1 - share[first]) * spread)
    return (rng.random(len(cluster)) < own[cluster]).astype(float)


# False alarms


@dataclass(frozen=True)
class Null:
    """Sets without any difference between groups. unequal: images per cluster differ fourfold between the groups of the
    first axis. within: attributes vary within clusters. known: whether the analysis is told of the clusters."""

    name: str
    clusters: int
    images: int
    icc: float = 0.0
    households: bool = False
    unequal: bool = False
    within: bool = False
    known: bool = True


NULLS = (
    Null("1,000 images", 1000, 1),
    Null("100 subjects of 10 images, alike by chance only", 100, 10),
    Null("100 subjects of 10 images, correlation 0.3", 100, 10, icc=0.3),
    Null("20 subjects of 10 images, correlation 0.3", 20, 10, icc=0.3),
    Null("290 households of 5 to 60 images, correlation 0.1", 290, 20, icc=0.1, households=True),
    Null("290 households, of one region with four times the images, correlation 0", 290, 12, unequal=True),
    Null("290 households, of one region with four times the images, correlation 0.1", 290, 12, icc=0.1, unequal=True),
    Null("100 subjects of 10 images, correlation 0.3, attributes of the image", 100, 10, icc=0.3, within=True),
    Null("100 subjects of 10 images, correlation 0.3, analysed as if independent", 100, 10, icc=0.3, known=False),
)
AXES = {"two groups": (0.5, 0.5), "four groups": (0.4, 0.3, 0.2, 0.1), "six groups": (1 / 6,) * 6}
SHARES = {"top1": 0.75, "top5": 0.95}


def null_set(null, rng):
    """Outcomes, axes and clusters of one set without differences."""
    kinds = {name: rng.choice(len(shares), null.clusters, p=shares) for name, shares in AXES.items()}
    sizes = np.full(null.clusters, null.images)
    if null.households:
        sizes = np.clip(np.rint(rng.lognormal(np.log(null.images), 0.6, null.clusters)), 5, 60).astype(int)
    if null.unequal:
        sizes = np.where(kinds["two groups"] == 0, sizes, sizes // 4)
    cluster = np.repeat(np.arange(null.clusters), sizes)
    n = len(cluster)
    axes = [
        Axis(
            name,
            tuple(map(str, range(len(shares)))),
            rng.choice(len(shares), n, p=shares) if null.within else kinds[name][cluster],
        )
        for name, shares in AXES.items()
    ]
    easy = outcomes_of(rng, np.full(n, SHARES["top5"]), cluster, null.icc)
    # What is right at first is right among the first five: metrics hang together.
    right = easy * outcomes_of(rng, np.full(n, SHARES["top1"] / SHARES["top5"]), cluster, null.icc)
    every = np.ones(n, dtype=bool)
    outcomes = [Outcome("top1", right, every), Outcome("top5", easy, every)]
    return outcomes, axes, cluster if null.known and null.images > 1 else None


def false_alarms(null, sets, seed):
    """How often anything is called significant in `sets` sets."""
    gaps = groups = raw = families = outside = 0
    for number in range(sets):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        outcomes, axes, clusters = null_set(null, rng)
        limits = {"min_images": 30, "min_clusters": 5 if clusters is not None else 1, "confidence": CONFIDENCE}
        found = analyse(outcomes, axes, clusters, **limits, resamples=100, permutations=1000, seed=number)
        gaps += any(found.gaps["significant"].to_pylist())
        groups += any(found.groups["significant"].to_pylist())
        tested = [p for p in found.gaps["p_value"].to_pylist() if p is not None]
        raw += sum(p <= 1 - CONFIDENCE for p in tested)
        families += len(tested)
        outside += sum(low > 0 for low in found.gaps["gap_low"].to_pylist() if low is not None)
    return {
        "name": null.name,
        "sets": sets,
        "any_gap": gaps / sets,
        "any_group": groups / sets,
        "single_test": raw / families,
        "gap_interval_without_0": outside / families,
    }


# Coverage and power


def planted(rng, clusters, images, share, gap, icc):
    """Values, codes and clusters of GROUPS groups of `clusters` clusters of `images` images; the last is worse by
    `gap`."""
    cluster = np.repeat(np.arange(GROUPS * clusters), images)
    codes = cluster // clusters
    value = outcomes_of(rng, np.where(codes == GROUPS - 1, share - gap, share), cluster, icc)
    return value, codes, cluster if images > 1 else None


def coverage(clusters, images, share, gap, icc, sets, seed):
    """How often the intervals of planted sets hold the truth, and how often the gap is found."""
    truth = np.full(GROUPS, share)
    truth[-1] -= gap
    apart, true_drop = truth[:, None] - truth, 1 - truth.min() / truth.max()
    hits = dict.fromkeys(("group", "pairs", "gap", "drop", "found_by_test", "found_by_interval"), 0.0)
    widths = []
    for number in range(sets):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        values, codes, owners = planted(rng, clusters, images, share, gap, icc)
        outcome = Outcome("top1", values, np.ones(len(values), dtype=bool))
        how = {"min_images": 2, "min_clusters": 2, "confidence": CONFIDENCE, "resamples": 200, "seed": number}
        found = compare(outcome, codes, GROUPS, owners, **how)
        low, high = found.pairs.gap()
        hits["group"] += ((found.low <= truth) & (truth <= found.high)).mean()
        hits["pairs"] += ((found.pairs.low <= apart + 1e-12) & (apart - 1e-12 <= found.pairs.high)).all()
        hits["gap"] += low <= gap + 1e-12 and gap - 1e-12 <= high
        drop_low, drop_high = found.pairs.drop()
        hits["drop"] += drop_low <= true_drop + 1e-12 and true_drop - 1e-12 <= drop_high
        hits["found_by_interval"] += low > 0
        tested = permutation_test(values, codes, owners, permutations=400, seed=number)
        hits["found_by_test"] += tested.gap <= 1 - CONFIDENCE
        widths.append(high - low)
    setting = {"clusters": clusters, "images": images, "share": share, "planted": gap, "icc": icc, "sets": sets}
    width = round(float(np.mean(widths)), 4)
    return {**setting, **{name: round(float(count / sets), 4) for name, count in hits.items()}, "gap_width": width}


# Groups whose clusters are not alike: clusters, images and correlation of each of four groups of one rate.
UNLIKE = (
    ((5, 5, 5, 5), (10, 10, 10, 10), (0.4, 0.0, 0.0, 0.0)),
    ((10, 10, 10, 10), (10, 10, 10, 10), (0.4, 0.0, 0.0, 0.0)),
    ((30, 30, 30, 30), (10, 10, 10, 10), (0.4, 0.0, 0.0, 0.0)),
    ((50, 50, 5, 50), (10, 10, 10, 10), (0.05, 0.05, 0.5, 0.05)),
    ((50, 10, 50, 50), (3, 40, 10, 10), (0.1, 0.1, 0.1, 0.1)),
)


def unlike(clusters, images, iccs, share, sets, seed):
    """Coverage and false alarms where groups are worth the same but their clusters differ in number, size or likeness:
    the interval of a group borrows from the others, and the test is that clusters are alike, so both must suffer."""
    groups = len(clusters)
    codes = np.repeat(np.arange(groups), np.multiply(clusters, images))
    owners = np.repeat(np.arange(sum(clusters)), np.repeat(images, clusters))
    held, pairs, alarms = np.zeros(groups), 0, 0
    for number in range(sets):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        values = np.concatenate(
            [
                outcomes_of(rng, np.full(own * size, share), np.repeat(np.arange(own), size), icc)
                for own, size, icc in zip(clusters, images, iccs, strict=True)
            ]
        )
        outcome = Outcome("top1", values, np.ones(len(values), dtype=bool))
        how = {"min_images": 2, "min_clusters": 2, "confidence": CONFIDENCE, "resamples": 200, "seed": number}
        found = compare(outcome, codes, groups, owners, **how)
        held += (found.low <= share) & (share <= found.high)
        pairs += bool((found.pairs.low <= 1e-12).all() and (found.pairs.high >= -1e-12).all())
        alarms += permutation_test(values, codes, owners, permutations=400, seed=number).gap <= 1 - CONFIDENCE
    setting = {"clusters": clusters, "images": images, "icc": iccs, "share": share, "sets": sets}
    return {**setting, "group": (held / sets).round(4).tolist(), "pairs": pairs / sets, "found_by_test": alarms / sets}


def drops(clusters, images, share, gap, icc, sets, seed):
    """Coverage of the interval of the drop beside the percentile bootstrap's, which was not taken."""
    ours = theirs = 0
    true_drop = gap / share
    for number in range(sets):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        values, codes, owners = planted(rng, clusters, images, share, gap, icc)
        outcome = Outcome("top1", values, np.ones(len(values), dtype=bool))
        how = {"min_images": 2, "min_clusters": 2, "confidence": CONFIDENCE, "resamples": 200, "seed": number}
        low, high = compare(outcome, codes, GROUPS, owners, **how).pairs.drop()
        ours += low <= true_drop + 1e-12 and true_drop - 1e-12 <= high
        groups = np.eye(GROUPS)[codes]
        metric = drop(groups * values[:, None], groups).pooled(np.arange(len(codes)) if owners is None else owners)
        units = len(metric)
        weights = rng.multinomial(units, np.full(units, 1 / units), size=400).astype(float)
        low, high = np.nanquantile(metric.replicates(weights), [0.025, 0.975])
        theirs += low <= true_drop + 1e-12 and true_drop - 1e-12 <= high
    setting = {"clusters": clusters, "images": images, "share": share, "planted": gap, "icc": icc, "sets": sets}
    return {**setting, "ours": ours / sets, "percentile_bootstrap": theirs / sets}


CLUSTERS, SHARE_GRID, GAP_GRID, ICCS = (5, 10, 20, 50), (0.5, 0.7, 0.9, 0.97), (0.0, 0.05, 0.1, 0.2), (0.0, 0.3)
ALONE = (10, 30, 100, 1000)
"""Images of a group where each is its own cluster."""


def main():
    """Run all and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=FILE)
    parser.add_argument("--sets", type=int, default=1000, help="sets of false alarms; half as many of coverage")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started, half = time.perf_counter(), max(2, given.sets // 2)
    record = {"confidence": CONFIDENCE, "seed": given.seed, "groups": GROUPS, "axes": AXES, "metrics": SHARES}
    record["limits"] = {"min_images": 30, "min_clusters": 5, "permutations": 1000}
    record["false_alarms"] = [false_alarms(null, given.sets, given.seed) for null in NULLS]
    clustered = list(product(CLUSTERS, (10,), SHARE_GRID, GAP_GRID, ICCS))
    alone = list(product(ALONE, (1,), SHARE_GRID, GAP_GRID, (0.0,)))
    record["coverage"] = [coverage(*case, half, given.seed) for case in clustered + alone]
    record["unlike"] = [unlike(*case, share, half, given.seed) for case in UNLIKE for share in (0.6, 0.9)]
    some = list(product((5, 20), (10,), (0.7, 0.97), (0.0, 0.1, 0.2), (0.3,)))
    record["drops"] = [drops(*case, half, given.seed) for case in some]
    record["seconds"] = round(time.perf_counter() - started, 1)
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
