from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from dinov2cli.evaluation.intervals import wilson_interval
from dinov2cli.fairness.analysis import GAPS, GROUPS, analyse
from dinov2cli.fairness.axis import Axis
from dinov2cli.fairness.outcomes import Outcome
from dinov2cli.fairness.permutation import holm
from dinov2cli.fairness.simultaneous import compare

HOW = {"min_images": 30, "min_clusters": 1, "confidence": 0.95, "resamples": 500, "permutations": 1000, "seed": 0}
N = 1200


def made(seed=0):
    """Three outcomes and two axes: 'c' of 'letter' is worse at top1, 'd' has ten images, some images are unknown."""
    rng = np.random.default_rng(seed)
    letter = rng.choice(3, N)
    letter[:10] = 3
    letter[10:60] = -1
    sign = rng.choice(2, N)
    worse = (letter == 2) * 0.25
    hits = (rng.random(N) < 0.85 - worse).astype(float)
    counted = rng.random(N) < 0.9
    outcomes = [
        Outcome("top1", hits, counted, expected=np.full(N, 0.25)),
        Outcome("false", (rng.random(N) < 0.1 + worse).astype(float), np.ones(N, dtype=bool), better="low"),
        Outcome("human", (rng.random(N) < 0.5).astype(float), counted, better="neither"),
        Outcome("precision", rng.integers(0, 6, N) / 5, np.ones(N, dtype=bool), axis="sign"),
    ]
    return outcomes, [Axis("letter", ("a", "b", "c", "d"), letter), Axis("sign", ("+", "-"), sign)]


def row(table, **where):
    (found,) = [one for one in table.to_pylist() if all(one[name] == value for name, value in where.items())]
    return found


@pytest.fixture(scope="module")
def found():
    return analyse(*made(), None, **HOW)


def test_there_is_a_row_for_each_group_and_a_gap_for_each_axis_in_each_metric(found):
    assert found.groups.schema == GROUPS and found.gaps.schema == GAPS
    places = [(one["axis"], one["metric"]) for one in found.gaps.to_pylist()]
    metrics = ["top1", "false", "human"]
    assert places == [*(("letter", name) for name in metrics), *(("sign", name) for name in [*metrics, "precision"])]
    names = [one["group"] for one in found.groups.to_pylist() if (one["axis"], one["metric"]) == ("letter", "top1")]
    assert names == ["a", "b", "c", "d", "unknown"]
    empty = analyse([], made()[1], None, **HOW)
    assert (empty.groups.num_rows, empty.gaps.num_rows, empty.gaps.schema) == (0, 0, GAPS)


def test_rates_are_plain_means_of_counted_images_with_wilson_s_limits(found):
    outcomes, axes = made()
    for code, name in [(0, "a"), (2, "c"), (3, "d"), (-1, "unknown")]:
        own = outcomes[0].counted & (axes[0].codes == code)
        hits = outcomes[0].values[own]
        one = row(found.groups, axis="letter", metric="top1", group=name)
        assert (one["images"], one["clusters"], one["known"]) == (len(hits), len(hits), code >= 0)
        assert one["value"] == pytest.approx(hits.mean(), abs=1e-12) and one["expected"] == 0.25
        assert (one["ci_low"], one["ci_high"]) == pytest.approx(wilson_interval(int(hits.sum()), len(hits)))
        assert one["enough"] == (code in (0, 2))
    assert row(found.groups, axis="letter", metric="human", group="a")["expected"] is None


def test_differences_are_from_the_best_and_hold_for_all_pairs(found):
    outcomes, axes = made()
    pairs = compare(outcomes[0], axes[0].codes, 4, None, **{k: v for k, v in HOW.items() if k != "permutations"}).pairs
    values = {one["group"]: one for one in found.groups.to_pylist() if one["metric"] == "top1"}
    best = max("abc", key=lambda name: values[name]["value"])
    at = "abc".index(best)
    worst = values["c"]
    assert worst["difference"] == pytest.approx(worst["value"] - values[best]["value"])
    assert worst["difference_low"] == pytest.approx(pairs.low[2, at], abs=0.01)
    assert worst["difference_high"] == pytest.approx(pairs.high[2, at], abs=0.01)
    assert worst["drop"] == pytest.approx(1 - worst["value"] / values[best]["value"])
    assert worst["drop_low"] < worst["drop"] < worst["drop_high"]
    others = [values[name] for name in "ab"]
    rest = sum(one["value"] * one["images"] for one in others) / sum(one["images"] for one in others)
    assert worst["rest_difference"] == pytest.approx(worst["value"] - rest)
    assert values[best]["best"] and values[best]["difference"] is None and values[best]["drop"] is None
    assert values["d"]["rest_difference"] is None and values["d"]["p_value"] is None
    assert not values["d"]["significant"] and not values["d"]["best"]


def test_the_best_is_the_lowest_where_low_is_better_and_a_drop_is_of_what_is_good(found):
    top = row(found.gaps, axis="letter", metric="top1")
    assert (top["worst"], top["groups"], top["left_out"]) == ("c", 3, 1)
    assert top["gap"] == pytest.approx(top["best_value"] - top["worst_value"])
    assert top["drop"] == pytest.approx(top["gap"] / top["best_value"])
    assert top["gap_low"] > 0.1 and top["significant"] and top["p_corrected"] < 0.02
    low = row(found.gaps, axis="letter", metric="false")
    assert low["worst"] == "c" and low["worst_value"] > low["best_value"] and low["drop"] is None
    assert low["gap"] == pytest.approx(low["worst_value"] - low["best_value"])
    either = row(found.gaps, axis="letter", metric="human")
    assert either["best_value"] > either["worst_value"] and either["drop"] is None
    assert row(found.groups, axis="letter", metric="false", group=low["best"])["best"]
    outcomes, axes = made()
    assert top["unknown"] == (outcomes[0].counted & (axes[0].codes < 0)).sum()


def test_gaps_are_corrected_by_holm_and_groups_for_all_that_was_tested(found):
    gaps = found.gaps.to_pylist()
    assert [one["p_corrected"] for one in gaps] == pytest.approx(holm([one["p_value"] for one in gaps]))
    assert all(one["significant"] == (one["p_corrected"] <= 0.05) for one in gaps)
    for one in found.groups.to_pylist():
        if one["p_value"] is not None:
            assert one["p_corrected"] == pytest.approx(min(1, 7 * one["p_value"]))
            assert one["significant"] == (one["p_corrected"] <= 0.05)
    assert row(found.groups, axis="letter", metric="top1", group="c")["significant"]
    # 1,000 shuffles could not reach a tenth of 5 % after seven tests: 1,400 were made.
    assert min(one["p_value"] for one in gaps) == pytest.approx(1 / 1401)


def test_an_axis_is_found_the_same_with_others_and_alone():
    outcomes, axes = made()
    whole = analyse(outcomes, axes, None, **{**HOW, "permutations": 2000})
    alone = analyse(outcomes[:1], axes[1:], None, **{**HOW, "permutations": 2000})
    first, second = (row(one.gaps, axis="sign", metric="top1") for one in (whole, alone))
    corrected = {"p_corrected", "significant"}
    assert {k: v for k, v in first.items() if k not in corrected} == {
        k: v for k, v in second.items() if k not in corrected
    }


def test_nothing_to_compare_is_null_and_the_same_everywhere_is_no_finding():
    outcomes, axes = made()
    strict = analyse(outcomes[:1], axes, None, **{**HOW, "min_images": 10_000})
    one = row(strict.gaps, axis="letter")
    assert (one["groups"], one["left_out"], one["significant"]) == (0, 4, False)
    assert all(one[name] is None for name in ("best", "worst", "gap", "gap_low", "drop", "p_value", "p_corrected"))
    assert row(strict.groups, axis="letter", group="a")["value"] is not None
    constant = replace(outcomes[0], values=np.ones(N))
    same = analyse([constant, outcomes[1]], axes, None, **HOW)
    one = row(same.gaps, axis="letter", metric="top1")
    assert (one["gap"], one["gap_low"], one["p_value"], one["significant"]) == (0, 0, 1, False)
    # What cannot be found counts for no test.
    tested = row(same.groups, axis="letter", metric="false", group="c")
    assert tested["p_corrected"] == pytest.approx(2 * tested["p_value"])
    never = analyse([replace(outcomes[0], counted=np.zeros(N, dtype=bool))], axes, None, **HOW)
    assert row(never.groups, axis="letter", group="a")["value"] is None
    assert row(never.groups, axis="letter", group="unknown")["ci_low"] is None


def test_no_number_of_the_tables_is_nan_or_infinite():
    outcomes, axes = made()
    zero = replace(outcomes[0], values=np.zeros(N))
    one = Axis("one cluster", ("a", "b"), (np.arange(N) >= 90).astype(int))  # the best may have none: nothing is known
    few = replace(outcomes[0], metric="one", values=((np.arange(N) < 80) | (np.arange(N) % 7 == 0)).astype(float))
    tables = analyse([zero, few], [*axes, one], np.maximum(np.arange(N) // 3, 29), **HOW)
    assert row(tables.groups, axis="one cluster", metric="one", group="b")["drop_low"] is None
    assert row(tables.gaps, axis="one cluster", metric="one")["drop_low"] == 0
    for table in (tables.groups, tables.gaps):
        for name in table.column_names:
            if table.schema.field(name).type == pa.float64():
                assert np.isfinite([one for one in table[name].to_pylist() if one is not None]).all(), name


def test_clusters_make_intervals_wider_and_small_ones_too_few():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(60), 20)
    easy = rng.beta(2, 1, 60)[cluster]
    codes = cluster % 3
    outcome = Outcome("top1", (rng.random(N) < easy).astype(float), np.ones(N, dtype=bool))
    axis = Axis("who", ("x", "y", "z"), codes)
    plain, clustered = (analyse([outcome], [axis], own, **HOW) for own in (None, cluster))
    for name in "xyz":
        first, second = (row(one.groups, group=name) for one in (plain, clustered))
        assert (first["clusters"], second["clusters"]) == (400, 20) and first["value"] == second["value"]
        assert second["ci_high"] - second["ci_low"] > 1.5 * (first["ci_high"] - first["ci_low"])
    assert row(clustered.gaps)["p_value"] > row(plain.gaps)["p_value"]
    assert row(analyse([outcome], [axis], cluster, **{**HOW, "min_clusters": 21}).gaps)["groups"] == 0


def null_set(rng, clusters, images, icc):
    """Two metrics and three axes of clusters that have nothing to do with each other."""
    cluster = np.repeat(np.arange(clusters), images)
    easy = np.full(clusters, 0.8) if icc == 0 else rng.beta(0.8 * (1 - icc) / icc, 0.2 * (1 - icc) / icc, clusters)
    first = (rng.random(len(cluster)) < easy[cluster]).astype(float)
    every = np.ones(len(cluster), dtype=bool)
    outcomes = [Outcome("top1", first * (rng.random(len(cluster)) < 0.8), every), Outcome("top5", first, every)]
    axes = [
        Axis(str(groups), tuple(map(str, range(groups))), rng.integers(0, groups, clusters)[cluster])
        for groups in (2, 3, 5)
    ]
    return outcomes, axes, cluster if images > 1 else None


@pytest.mark.parametrize("clusters, images, icc", [(400, 1, 0.0), (50, 8, 0.0), (50, 8, 0.3)])
def test_false_alarms_are_as_rare_as_they_are_said_to_be(clusters, images, icc):
    rng, sets = np.random.default_rng(0), 200
    gaps = groups = 0
    for number in range(sets):
        outcomes, axes, owners = null_set(rng, clusters, images, icc)
        tables = analyse(outcomes, axes, owners, **{**HOW, "resamples": 20, "permutations": 400, "seed": number})
        gaps += any(tables.gaps["significant"].to_pylist())
        groups += any(tables.groups["significant"].to_pylist())
    most = stats.binom.ppf(0.999, sets, 0.05)
    assert max(gaps, groups) <= most


def test_outcomes_that_are_no_shares_are_refused():
    every = np.ones(3, dtype=bool)
    with pytest.raises(ValueError, match=r"m: values must lie within 0..1, got 0.0 to 2.0"):
        Outcome("m", np.array([0.0, 2, 1]), every)
    Outcome("m", np.array([0.0, np.nan, 1]), np.array([True, False, True]))  # what is not counted may be anything
    with pytest.raises(ValueError, match="m: one number for each image"):
        Outcome("m", np.zeros(3), every, expected=np.zeros(4))
