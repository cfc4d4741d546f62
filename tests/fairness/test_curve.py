import numpy as np
import pytest
from scipy import stats

from dinov2cli.errors import InputError
from dinov2cli.fairness import curve
from dinov2cli.fairness.curve import silverman, smoothed

HOW = {"confidence": 0.95, "resamples": 400, "seed": 0}


def households(seed=0, count=80, noise=0.0):
    """log10 income and right or wrong, 2 to 30 images each: 0.3 to 0.9 along a straight line."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), rng.integers(2, 30, count))
    x = rng.uniform(1.5, 4, count)
    share = np.clip(truth(x) + noise * rng.standard_normal(count), 0, 1)[owner]
    return x[owner], (rng.random(len(owner)) < share).astype(float), owner


def truth(x):
    return 0.3 + 0.6 * (x - 1.5) / 2.5


def local_line(x, values, at, width, weights=None):
    """By weighted least squares at every point."""
    found = []
    for point in at:
        kernel = np.exp(-0.5 * ((x - point) / width) ** 2) * (1 if weights is None else weights)
        root = np.sqrt(kernel)
        design = np.stack([np.ones_like(x), x - point], axis=1) * root[:, None]
        found.append(np.linalg.lstsq(design, values * root, rcond=None)[0][0])
    return np.clip(found, 0, 1)


@pytest.mark.parametrize("clustered", [True, False])
def test_the_curve_is_weighted_least_squares_at_every_point(clustered):
    x, values, owner = households()
    found = smoothed(x, values, owner if clustered else None, points=15, **HOW)
    assert (found.x[0], found.x[-1]) == pytest.approx(tuple(np.quantile(x, [0.01, 0.99])))
    assert found.value == pytest.approx(local_line(x, values, found.x, found.bandwidth), abs=1e-9)
    incomes = x[np.unique(owner, return_index=True)[1]]
    assert found.bandwidth == pytest.approx(silverman(incomes if clustered else x))
    wide = smoothed(x, values, owner, points=15, bandwidth=1.0, **HOW)
    assert wide.value == pytest.approx(local_line(x, values, found.x, 1.0), abs=1e-9)


def test_the_band_is_that_of_households_drawn_again():
    x, values, owner = households(count=40, noise=0.2)
    found = smoothed(x, values, owner, points=7, **{**HOW, "resamples": 2000})
    rng, drawn = np.random.default_rng(1), []
    for _ in range(600):
        counts = np.bincount(rng.integers(0, 40, 40), minlength=40)[owner].astype(float)
        drawn.append(local_line(x, values, found.x, found.bandwidth, counts))
    # Widened for few households: from z to sqrt(40 / 39) t.
    outside = stats.norm.sf(np.sqrt(40 / 39) * stats.t.ppf(0.975, 39))
    low, high = np.quantile(drawn, [outside, 1 - outside], axis=0)
    assert found.low == pytest.approx(low, abs=0.05) and found.high == pytest.approx(high, abs=0.05)
    alone = smoothed(x, values, None, points=7, bandwidth=found.bandwidth, **HOW)
    assert (found.high - found.low).mean() > 1.5 * (alone.high - alone.low).mean()


def test_bands_hold_the_truth_as_often_as_they_say():
    held = 0.0
    for number in range(60):
        x, values, owner = households(number, noise=0.1)
        found = smoothed(x, values, owner, points=5, **{**HOW, "resamples": 200})
        held += ((found.low <= truth(found.x)) & (truth(found.x) <= found.high)).mean()
    assert 0.9 < held / 60 <= 1


def test_many_different_numbers_are_resampled_on_a_grid(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=3000)
    values = (rng.random(3000) < stats.norm.cdf(x)).astype(float)
    whole = smoothed(x, values, None, points=9, **HOW)
    monkeypatch.setattr(curve, "_MAX_ROWS", 100)
    monkeypatch.setattr(curve, "_PER_CHUNK", 5000)
    rounded = smoothed(x, values, None, points=9, **HOW)
    assert rounded.value == pytest.approx(whole.value, abs=1e-3)
    assert rounded.low == pytest.approx(whole.low, abs=0.02) and rounded.high == pytest.approx(whole.high, abs=0.02)


def test_silverman_s_rule():
    x = np.random.default_rng(0).normal(size=500)
    assert silverman(x) == pytest.approx(0.9 * min(x.std(ddof=1), stats.iqr(x) / 1.34) * 500**-0.2)
    assert silverman(np.array([0.0, 0, 0, 0, 5])) > 0  # no spread in the middle
    assert silverman(np.ones(4)) == 0


@pytest.mark.parametrize("x, owner", [([], []), ([2.0, 2.0], [0, 1]), ([1.0, 2.0], [3, 3])])
def test_one_household_or_one_income_has_no_curve(x, owner):
    with pytest.raises(InputError, match="a curve needs at least two different numbers of two households or images"):
        smoothed(x, np.zeros(len(x)), np.array(owner, dtype=int), **HOW)
