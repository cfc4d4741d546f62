"""Groups of images by attributes."""

import math

import numpy as np
import pandas as pd
import pytest

from dinov2cli.errors import InputError, UserError
from dinov2cli.fairness.ages import AgeRange, age_range, date_ranges
from dinov2cli.fairness.axis import bucket_axis, category_axis, crossed, third_cuts
from dinov2cli.fairness.groups import age_axis, axes_of, columns_to_audit, skin_axes
from tests.fairness.named_images import attributes


def groups(axis):
    """The group of every image by name."""
    assert axis.codes.dtype == np.int64
    return [None if code < 0 else axis.names[code] for code in axis.codes]


# --- categories, buckets, thirds


@pytest.mark.parametrize(
    "values, names, ordered",
    [
        (["b", "a", None, "b"], ("a", "b"), False),
        (["10", "9", None, "-1.5"], ("-1.5", "9", "10"), True),
        (["10-19", "3-9", "more than 70", "20-29"], ("3-9", "10-19", "20-29", "more than 70"), False),
        (["Site 10", "site 9", "Site 9"], ("Site 9", "site 9", "Site 10"), False),
        ([None, None], (), False),
    ],
)
def test_categories(values, names, ordered):
    axis = category_axis("x", values)
    assert axis.name == "x" and axis.names == names and axis.ordered is ordered and groups(axis) == values
    if ordered:
        np.testing.assert_array_equal(axis.values, [np.nan if value is None else float(value) for value in values])
    else:
        assert axis.values is None


def test_categories_in_a_given_order():
    axis = category_axis("x", ["c", "a", "b", "d", None], order=["d", "none of these", "c"])
    assert axis.names == ("d", "c", "a", "b") and axis.ordered and groups(axis) == ["c", "a", "b", "d", None]


@pytest.mark.parametrize(
    "closed, right, names", [("left", False, ("< 2", "2–4", "≥ 4")), ("right", True, ("≤ 2", "2–4", "> 4"))]
)
def test_buckets_beside_pandas(closed, right, names):
    values = np.array([1, 2, 3, 4, 5, np.nan, -np.inf, 2.0000001])
    axis = bucket_axis("x", values, (2, 4), closed=closed)
    finite = pd.Series(values).where(np.isfinite(values))
    expected = pd.cut(finite, [-math.inf, 2, 4, math.inf], right=right, labels=list(names))
    assert groups(axis) == [None if pd.isna(value) else value for value in expected]
    assert axis.names == names and axis.ordered and axis.values is not None
    assert axis.about.startswith("cut at 2 and 4; a value on a cut counts to the group ")
    assert axis.about.endswith(" above it" if closed == "left" else " below it")


def test_names_of_buckets():
    values = np.array([1.0])
    assert bucket_axis("x", values, (227, 1034)).names == ("< 227", "227–1,034", "≥ 1,034")
    assert bucket_axis("x", values, (0.25, 1034.5678)).names == ("< 0.25", "0.25–1,035", "≥ 1,035")
    assert bucket_axis("x", values, (1000.25, 1000.5)).names == ("< 1,000.25", "1,000.25–1,000.5", "≥ 1,000.5")
    low = bucket_axis("x", values, (5, 6), names=("low", "medium", "high"))
    assert low.names == ("low", "medium", "high") and groups(low) == ["low"]  # empty groups stay
    with pytest.raises(ValueError, match="1 cuts make 2 groups"):
        bucket_axis("x", values, (5,), names=("low",))


@pytest.mark.parametrize("cuts, shown", [((), "none"), ((3, 3), "3, 3"), ((4, 3), "4, 3"), ((1, math.nan), "1, nan")])
def test_cuts_must_ascend(cuts, shown):
    with pytest.raises(UserError, match=f"the cuts of x are {shown}; expected one or more numbers that ascend"):
        bucket_axis("x", np.array([1.0]), cuts)


def most_even(values):
    """Cuts by trying every pair: the first nearest to a third, then the second nearest to two."""
    known = np.sort(values[np.isfinite(values)])
    different = np.unique(known)
    far = {cut: (known < cut).mean() for cut in different[1:]}
    first = min(different[1:-1], key=lambda cut: (round(abs(far[cut] - 1 / 3), 12), cut))
    second = min(different[different > first], key=lambda cut: (round(abs(far[cut] - 2 / 3), 12), cut))
    return first, second


def test_thirds():
    draw = np.random.Generator(np.random.Philox(key=1))
    for size in (3, 4, 7, 30, 101):
        for top in (3, 8, 1000):
            values = np.concatenate([[0, 1, 2], draw.integers(0, top, size)]).astype(float)
            values = np.concatenate([values, [np.nan, np.inf]])
            assert third_cuts(values) == most_even(values)
    smooth = draw.normal(size=3000)
    counts = np.bincount(bucket_axis("x", smooth, third_cuts(smooth)).codes)
    np.testing.assert_array_equal(counts, [1000, 1000, 1000])
    assert third_cuts(np.array([1.0, 2.0, 3.0])) == (2, 3)
    assert third_cuts(np.array([1.0] * 90 + [2.0] * 9 + [3.0])) == (2, 3)
    assert third_cuts(np.array([1.0] + [2.0] * 9 + [3.0] * 90)) == (2, 3)


@pytest.mark.parametrize(
    "values, count", [([], "0 different known values"), ([5, 5, math.nan], "1 different known va")]
)
def test_too_few_values_for_thirds(values, count):
    with pytest.raises(InputError, match=f"{count}.* cannot be parted into thirds"):
        third_cuts(np.array(values, dtype=float))


def test_crossed():
    one = category_axis("region", ["Africa", "Asia", "Asia", None, "Africa", "Asia", "Asia"])
    two = bucket_axis("income", np.array([9, 1, 9, 1, np.nan, 9, np.nan]), (5,), names=("low", "high"))
    both = crossed(one, two)
    assert both.name == "region × income" and both.crosses and not one.crosses
    assert groups(both) == ["Africa × high", "Asia × low", "Asia × high", None, None, "Asia × high", None]
    assert both.names == ("Africa × high", "Asia × low", "Asia × high")
    third = crossed(both, category_axis("z", ["p"] * 7))
    assert third.names == ("Africa × high × p", "Asia × low × p", "Asia × high × p")
    nothing = crossed(one, category_axis("z", [None] * 7))
    assert nothing.names == () and (nothing.codes == -1).all()


def test_some_images_of_an_axis():
    axis = bucket_axis("x", np.array([1.0, 5.0, np.nan]), (3,)).at(np.array([2, 1]))
    assert groups(axis) == [None, "≥ 3"]
    np.testing.assert_array_equal(axis.values, [np.nan, 5])
    assert category_axis("y", ["a", "b"]).at(np.array([1])).names == ("a", "b")


# --- skin


def test_skin():
    given = ["4", "IV", "type 4", "4.0", "Fitzpatrick IV", "skin-type_4", "1", "vi", "III", None]
    kind, tone = skin_axes(given)
    assert groups(kind) == [*["4"] * 6, "1", "6", "3", None] and kind.names == ("1", "2", "3", "4", "5", "6")
    assert groups(tone) == [*["darker"] * 6, "lighter", "darker", "lighter", None]
    assert (kind.name, tone.name, tone.names) == ("skin type", "skin tone", ("lighter", "darker"))


@pytest.mark.parametrize("wrong", ["0", "7", "4.5", "IIII", "vii", "dark", "iiv"])
def test_skin_that_is_none(wrong):
    with pytest.raises(InputError, match=f"'{wrong}' is no skin type; expected Fitzpatrick's types 1 to 6"):
        skin_axes(["1", wrong])


# --- ages


@pytest.mark.parametrize(
    "text, low, high",
    [
        ("20-29", 20, 29),
        ("0 – 2", 0, 2),
        ("(25, 32)", 25, 32),
        ("3 to 9 years", 3, 9),
        ("more than 70", 71, math.inf),
        ("70+", 70, math.inf),
        ("70 or older", 70, math.inf),
        (">= 70", 70, math.inf),
        ("under 3", -1, 3),
    ],
)
def test_ranges_of_ages(text, low, high):
    assert age_range(text) == AgeRange(low, high) and not date_ranges(text)


@pytest.mark.parametrize("text", ["20", "29-20", "2019-10", "adult", "03-Sep", "20-29-30", ""])
def test_texts_that_are_no_ranges(text):
    assert age_range(text) is None


@pytest.mark.parametrize(
    "text, ranges",
    [
        ("03-Sep", [(3, 9)]),
        ("3-Sep", [(3, 9)]),
        ("9-Mar", [(3, 9)]),
        ("Sep-03", [(3, 9)]),
        ("3 September", [(3, 9)]),
        ("Oct-19", [(10, 19)]),
        ("19-Oct", [(10, 19)]),
        ("2010-10-19 00:00:00", [(10, 19)]),
        ("2024-09-03", [(3, 9)]),
        ("2019-10-01", [(1, 10), (10, 19)]),
        ("01-Oct-2019", [(1, 10), (10, 19)]),
        ("2024-10-01", [(1, 10), (10, 24)]),
        ("2003-09-01T00:00:00", [(1, 9)]),
        ("10/19/2024", [(10, 19)]),
        ("03/09/2024", [(3, 9)]),
        ("20-29", []),
        ("3-9", []),
        ("2019-13-01", []),
        ("44-Sep", []),
        ("3-Foo", []),
        ("34", []),
    ],
)
def test_dates_that_were_ranges(text, ranges):
    assert date_ranges(text) == [AgeRange(*pair) for pair in ranges]


def ages(values, **keywords):
    return age_axis("age", attributes(age=values), "age", **keywords)


def test_ages_of_numbers():
    axis, notes = ages(["18", "29.5", "30", "45", "70", "99", "N/A", "69"])
    assert groups(axis) == ["18–30", "18–30", "30–45", "45–70", "70+", "70+", None, "45–70"] and notes == []
    assert axis.names == ("18–30", "30–45", "45–70", "70+") and axis.ordered
    assert axis.about == "cut at 18, 30, 45 and 70; a value on a cut counts to the group above it"
    axis, _ = ages(["3", "60", None], cuts=(18, 65))
    assert axis.names == ("under 18", "18–65", "65+") and groups(axis) == ["under 18", "18–65", None]
    assert axis.values[1] == 60
    assert groups(ages([0, 130, None], cuts=(18,))[0]) == ["under 18", "18+", None]
    with pytest.raises(UserError, match="the cuts of age are none"):
        ages(["3"], cuts=())


def test_impossible_ages():
    with pytest.raises(InputError, match="column age, image a1: '-1' is no age; expected a number from 0 to 130"):
        ages(["20", "-1", "300"])
    axis, notes = ages(["20", "-1", "300", "young"], invalid="unknown")
    assert groups(axis) == ["18–30", None, None, None]
    assert notes == [
        "the age of 3 images counts as unknown, for it is not a number from 0 to 130 (column age: '-1', '300', 'young')"
    ]


def test_ages_of_ranges():
    axis, notes = ages(["10-19", "more than 70", "3-9", "0-2", None, "3 – 9", "20-29"])
    assert axis.names == ("0-2", "3-9", "10-19", "20-29", "more than 70") and axis.ordered and notes == []
    assert groups(axis) == ["10-19", "more than 70", "3-9", "0-2", None, "3-9", "20-29"]
    with pytest.raises(InputError, match=r"column age mixes ages \('34'\) and ranges of ages \('20-29'\)"):
        ages(["34", "20-29"])
    with pytest.raises(InputError, match="image a1: 'old' is no age; expected a range such as 20-29"):
        ages(["20-29", "old"])
    assert groups(ages(["20-29", "old"], invalid="unknown")[0]) == ["20-29", None]
    assert groups(ages(["Young", "old", None])[0]) == ["Young", "old", None]


def test_ages_that_a_spreadsheet_made_dates():
    damaged = ["0-2", "03-Sep", "Oct-19", "20-29", "03-Sep", None, "more than 70"]
    with pytest.raises(InputError) as caught:
        ages(damaged)
    assert str(caught.value) == (
        "f.csv: column age, image a1: '03-Sep' is a date: a spreadsheet makes one of the range 3-9; take the column "
        "from the original file, or --set repair_ages=true turns such dates back"
    )
    axis, notes = ages(damaged, repair=True)
    assert groups(axis) == ["0-2", "3-9", "10-19", "20-29", "3-9", None, "more than 70"]
    assert axis.names == ("0-2", "3-9", "10-19", "20-29", "more than 70")
    assert notes == [
        "the ages of 3 images were dates made by a spreadsheet and were turned back (03-Sep → 3-9, Oct-19 → 10-19)"
    ]


def test_dates_that_may_have_been_several_ranges():
    assert groups(ages(["0-2", "3-9", "2019-10-01"], repair=True)[0]) == ["0-2", "3-9", "10-19"]
    assert groups(ages(["11-20", "2019-10-01"], repair=True)[0]) == ["11-20", "1-10"]
    for repair in (False, True):
        with pytest.raises(InputError, match=r"image a1: '2019-10-01' is a date: .* here of 1-10 or 10-19; take the"):
            ages(["30-39", "2019-10-01"], repair=repair)


# --- what is asked for


def test_axes_asked_for():
    table = attributes(
        sex=["f", "m", "f", None],
        age=["20", "40", "65", "50"],
        site=["b", "a", "b", "a"],
        **{"odd:name*x": ["p", "q", "p", "q"]},
    )
    axes, notes = axes_of(["sex", "age:30:60", "sex * age:45", "odd:name*x", "sex"], table)
    assert [axis.name for axis in axes] == ["sex", "age", "sex × age", "odd:name*x"] and notes == []
    assert groups(axes[0]) == ["f", "m", "f", None]
    assert groups(axes[1]) == ["< 30", "30–60", "≥ 60", "30–60"]
    assert groups(axes[2]) == ["f × < 45", "m × < 45", "f × ≥ 45", None]
    assert groups(axes[3]) == ["p", "q", "p", "q"]
    assert axes_of(["sex*site*age:45"], table)[0][0].names[0] == "f × b × < 45"


def test_numbers_asked_for_without_cuts():
    few = attributes(x=[str(number % 12) for number in range(36)])
    assert axes_of(["x"], few)[0][0].names == tuple(map(str, range(12)))
    many = attributes(x=[str(number % 13) for number in range(39)])
    axis = axes_of(["x"], many)[0][0]
    assert axis.names == ("< 4", "4–9", "≥ 9")
    assert axis.about.startswith("thirds of the images: cut at 4 and 9;")
    spoiled = attributes(x=[*(str(number) for number in range(20)), "abc"])
    with pytest.raises(InputError, match="image a20: 'abc' is no x; expected a number "):
        axes_of(["x"], spoiled)
    axes, notes = axes_of(["x", "x:5"], spoiled, invalid="unknown")
    assert groups(axes[0])[-1] is None and groups(axes[1])[-1] is None and len(notes) == 1


def test_ages_asked_for_are_in_order_and_repaired():
    table = attributes(age=["20-29", "03-Sep", "more than 70"], taken=["2019-10-01", "2020-03-09", "2019-10-01"])
    with pytest.raises(InputError, match="'03-Sep' is a date"):
        axes_of(["age"], table)
    axes, notes = axes_of(["age", "taken"], table, repair=True)
    assert axes[0].names == ("3-9", "20-29", "more than 70") and len(notes) == 1
    assert axes[1].names == ("2019-10-01", "2020-03-09")


def test_what_cannot_be_an_axis():
    table = attributes(
        name=[f"n{row}" for row in range(201)],
        empty=["N/A"] * 201,
        one=["a"] * 201,
        many=[f"n{r % 200}" for r in range(201)],
    )
    with pytest.raises(InputError, match="column name has 201 different texts, which looks like names"):
        axes_of(["name"], table)
    assert len(axes_of(["many"], table)[0][0].names) == 200
    with pytest.raises(InputError, match="column empty has no known value"):
        axes_of(["empty"], table)
    with pytest.raises(InputError, match="no column 'oen'; did you mean 'one'"):
        axes_of(["oen"], table)
    with pytest.raises(UserError, match="--by one:x:3: 'x:3' are no numbers; expected cuts, such as one:30:60"):
        axes_of(["one:x:3"], table)
    assert axes_of(["one"], table)[1] == ["one has one group, a: nothing to compare it with"]


def test_columns_to_audit():
    rows = range(42)
    table = attributes(
        file=[f"{row}.jpg" for row in rows],
        one=["a"] * 42,
        two=["a", "b"] * 20 + [None] * 2,
        twenty=[str(row % 20) for row in rows],
        more=[str(row % 21) for row in rows],
        left=["a", "b"] * 21,
        rare=["x", "y", *[None] * 40],
        tags=[["a"], ["b"]] * 21,
    )
    assert columns_to_audit(table, without=["left"]) == ["two", "twenty"]
