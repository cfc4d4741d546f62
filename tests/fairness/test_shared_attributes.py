"""The real metadata of Dollar Street, where they lie beside the checkout."""

import ast
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from dinov2cli.evaluation.clustered import cluster_codes
from dinov2cli.fairness.attributes import lists, numbers, read_attributes, texts
from dinov2cli.fairness.axis import bucket_axis, category_axis, crossed, third_cuts
from dinov2cli.fairness.groups import axes_of, columns_to_audit
from tests.fairness.named_images import NamedImages

METADATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "dollarstreet" / "metadata.csv"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not METADATA.is_file(), reason="no ../shared/data/dollarstreet beside the checkout"),
]


@pytest.fixture(scope="module")
def frame():
    return pd.read_csv(METADATA, index_col=0)


@pytest.fixture(scope="module")
def shuffled(frame):
    """Rows in another order, as files called like the ends of the urls."""
    order = np.random.Generator(np.random.Philox(key=2)).permutation(len(frame))
    rows = frame.iloc[order].reset_index(drop=True)
    return rows, read_attributes(METADATA, NamedImages([url.rsplit("/", 1)[-1] for url in rows["url"]]))


def test_every_row_finds_its_image(shuffled):
    rows, found = shuffled
    assert found.matched.all() and found.notes == [] and found.rows == len(rows) == 13_565
    assert found.key == "file name of column url"
    assert found.table.column_names == ["unnamed", *rows.columns]
    for column in ("url", "country", "region", "label"):
        assert found.table.column(column).to_pylist() == rows[column].tolist()


def counts(axis):
    return dict(zip(axis.names, np.bincount(axis.codes, minlength=len(axis.names)).tolist(), strict=True))


def test_counts_by_country_region_and_income(shuffled):
    rows, found = shuffled
    country, region = (category_axis(name, texts(found, name)) for name in ("country", "region"))
    assert counts(country) == rows["country"].value_counts().to_dict() and len(country.names) == 54
    assert counts(region) == {"Africa": 2492, "Asia": 6982, "Europe": 1836, "The Americas": 2255}
    values, notes = numbers(found, "income", what="income", least=0)
    np.testing.assert_array_equal(values, rows["income"])
    cuts = third_cuts(values)
    income = bucket_axis("income", values, cuts, names=("low", "medium", "high"))
    assert cuts == (227, 1034) and notes == []
    low, high = (rows["income"] < 227).sum(), (rows["income"] >= 1034).sum()
    assert counts(income) == {"low": low, "medium": len(rows) - low - high, "high": high}
    assert np.ptp(list(counts(income).values())) < 20  # thirds as nearly as homes of one income allow
    both = crossed(region, income)
    pairs = rows.groupby(["region", pd.cut(rows["income"], [0, 227, 1034, 1e9], right=False)], observed=True).size()
    assert list(counts(both).values()) == pairs.tolist() and len(both.names) == 12


def test_lists_homes_and_default_columns(shuffled):
    rows, found = shuffled
    for column in ("label", "sin21k_targets", "sin21k_labels", "sin21k_labels_alibaba"):
        assert lists(found, column) == [[str(word) for word in ast.literal_eval(cell)] for cell in rows[column]]
    homes = [unquote(url).split("/media/")[1].split("/")[0] for url in rows["url"]]
    np.testing.assert_array_equal(cluster_codes(homes), pd.factorize(pd.Series(homes))[0])
    assert columns_to_audit(found, without=()) == ["region"]
    axes, _ = axes_of(["income", "region*income"], found)
    assert axes[0].names == ("< 227", "227–1,034", "≥ 1,034") and len(axes[1].names) == 12


def test_some_images_of_a_copy_with_folders(frame):
    some = frame.iloc[::7]
    names = [unquote(url).split("/media/")[1] for url in some["url"]]
    found = read_attributes(METADATA, NamedImages([*names, "stranger.jpg"]))
    assert found.table.column("url").to_pylist() == [*some["url"], None]
    assert found.rows_without_image == len(frame) - len(some) and found.images_without_row == 1
