"""The query sets themselves among the chosen images: each image once, and every row leads to its pixels."""

import numpy as np
import pyarrow as pa

from dinov2cli.curation.query_images import QueryImages, images_of_all, include_queries
from dinov2cli.curation.query_sets import QuerySet
from dinov2cli.curation.retrieval import retrieve
from dinov2cli.data.source import open_source


def table(ids, rows, source="/curated", **columns):
    paths = [f"q/{i}" for i in ids]
    return pa.table({"id": ids, "image_path": paths, "source": [source] * len(ids), "row": pa.array(rows), **columns})


def chosen(make_pool, x, q, **columns):
    return retrieve(make_pool(len(x), **columns), x, [QuerySet("q", q, [str(i) for i in range(len(q))], k=2)])


def test_joins_what_is_not_there_yet(make_pool, random_vectors):
    x, q = random_vectors(50), random_vectors(4, 1)
    found = chosen(make_pool, x, q, sha256=[f"hash{i}" for i in range(50)])
    row = int(found.rows[0])
    place = found.kept["row"].to_pylist()[0]
    own = pa.concat_tables(
        [
            table(["same place"], [place], "/photos", sha256=["x1"]),
            table(
                ["same bytes", "new", "new again", f"img-{row:05d}"],
                [0, 1, 2, 3],
                sha256=[f"hash{row}", "x2", "x2", "x4"],
            ),
        ]
    )
    second = table(["new", "other"], [1, 9], sha256=["x5", "x9"])
    vectors = random_vectors(5, 2)
    result, joined = include_queries(found, x, [QueryImages("q", own, vectors), QueryImages("r", second, vectors[:2])])
    assert [j.tolist() for j in joined] == [[2, 4], [1]]  # /curated row 1 came with the first set
    kept = result.kept.to_pylist()
    assert [r["origin"] for r in kept] == ["retrieved"] * len(found.rows) + ["query"] * 3
    added = kept[len(found.rows) :]
    assert [(r["id"], r["source"], r["row"]) for r in added] == [
        ("new", "/curated", 1),
        (f"q/img-{row:05d}", "/curated", 3),  # the pool has an image of that name, which is another one
        ("other", "/curated", 9),
    ]
    assert [r["query_source"] for r in added] == ["q", "q", "r"]
    assert len(set(result.kept["id"].to_pylist())) == result.kept.num_rows
    np.testing.assert_array_equal(result.rows, [*found.rows, 50 + 2, 50 + 4, 55 + 1])
    assert result.summary["included"]["images"] == 3
    assert [e["final"] for e in result.summary["included"]["table"]] == [2, 1]
    assert "3 images of the query sets joined, 4 of theirs were there already" in result.messages[-1]


def test_a_threshold_keeps_look_alikes_out(make_pool, random_vectors):
    x = random_vectors(50)
    q = np.concatenate([x[3:5], random_vectors(3, 1)])  # two that the pool has
    q = np.concatenate([q, q[4:5] + 0.001])
    found = chosen(make_pool, x, q[:3])
    own = table([f"q{i}" for i in range(6)], np.arange(6))
    everything, joined = include_queries(found, x, [QueryImages("q", own, q)])
    assert joined[0].tolist() == list(range(6)) and everything.kept.num_rows == len(found.rows) + 6
    _, joined = include_queries(found, x, [QueryImages("q", own, q)], threshold=0.98)
    assert joined[0].tolist() == [2, 3, 4, 5]  # a set is not compared with itself: the user curated it
    both = [QueryImages("q", own, q), QueryImages("r", table(["r0", "r1"], [0, 1], "/r"), q[[4, 2]])]
    _, joined = include_queries(found, x, both, threshold=0.98)
    assert joined[1].tolist() == []


def test_rows_lead_to_the_pixels_of_pool_and_sets():
    pool, first = open_source("demo:photos?count=40"), open_source("demo:digits?count=75")
    images = images_of_all(pool, [first, pool])
    assert len(images) == 40 + 75 + 40
    for row, (source, there) in {
        0: (pool, 0),
        39: (pool, 39),
        40: (first, 0),
        114: (first, 74),
        118: (pool, 3),
    }.items():
        assert images.read(row) == source.read(there)


def test_columns_of_other_types_and_of_an_earlier_run(make_pool, random_vectors):
    x = random_vectors(50)
    found = chosen(make_pool, x, random_vectors(2, 1), label=list(range(50)), origin=["query"] * 50, name=["a"] * 50)
    own = table(["n"], [0], label=["rose"], name=[7], origin=["retrieved"], more=[1.5])
    result, _ = include_queries(found, x, [QueryImages("q", own, random_vectors(1, 2))])
    last = result.kept.to_pylist()[-1]
    assert (last["label"], last["name"], last["origin"], last["more"]) == (None, "7", "query", 1.5)
    assert result.kept["origin"].to_pylist()[:-1] == ["retrieved"] * len(found.rows)
    assert result.kept.schema.field("label").type == pa.int64()
