import numpy as np
import pytest

from dinov2cli.artifacts.output import Output
from dinov2cli.artifacts.results import ResultRow, write_results
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.comparison import compare_results
from dinov2cli.evaluation.comparison_entries import short_names
from dinov2cli.evaluation.intervals import difference, interval
from dinov2cli.evaluation.statistics import mean, ratio, root_mean

N = 200
NAMES = [f"{i}.jpg" for i in range(N)]
HARD = np.random.default_rng(0).random(N)


def right(skill):
    return mean(np.less(HARD, skill).astype(float))


def errors(skill):
    return root_mean((1.5 - skill + HARD) ** 2)


def results(path, figures, *, model="m", spec=None, data_hash="h", units=None, scores=True, clusters=None, **settings):
    """figures: (task, dataset, metric, statistic, more settings) each."""
    rows, kept = [], []
    for task, dataset, metric, statistic, more in figures:
        low, high = interval(statistic, seed=0)
        facts = {"unit": "share", **settings, **more}
        rows.append(ResultRow(model, task, dataset, metric, statistic.value(), low, high, len(statistic), facts))
        kept.append(statistic.scores(NAMES[: len(statistic)] if units is None else units, clusters))
    inputs = [{"spec": dataset, "kind": "parquet", "hash": data_hash} for dataset in {figure[1] for figure in figures}]
    inputs.append({"spec": spec or f"/models/{model}", "kind": "model", "sha256": str(spec)})
    with Output.open(path, "results", command="dinov2 eval", config={}, inputs=inputs) as out:
        write_results(out, rows, scores=kept if scores else None)
    return path


def knn(path, skill, model="m", **more):
    """A results directory with a headline and a figure beside it."""
    figures = [
        ("knn", "/d/val.parquet", "top1_k10", right(skill - 0.05), {"headline": False}),
        ("knn", "/d/val.parquet", "top1_k20", right(skill), {"headline": True}),
    ]
    return results(path, figures, model=model, **more)


def test_the_first_model_is_the_baseline_and_differences_are_paired(tmp_path):
    paths = [knn(tmp_path / "a", 0.4, "small"), knn(tmp_path / "b", 0.6, "large")]
    found = compare_results(paths, seed=3)
    assert (found.models, found.baseline, found.notes) == (["small", "large"], "small", [])
    (column,) = found.columns
    assert (column.metric, column.data) == ("top1_k20", "d/val")
    assert found.best(column) == ["large"]
    (change,) = found.changes
    assert change.change == difference(right(0.4), right(0.6), seed=3)
    assert (change.model, change.verdict) == ("large", "better")
    (turned,) = compare_results(paths, baseline="large").changes
    assert (turned.model, turned.verdict, turned.change.value) == ("small", "worse", -change.change.value)
    every = compare_results(paths, every=True)
    assert [column.metric for column in every.columns] == ["top1_k10", "top1_k20"]
    with pytest.raises(UserError, match=r"--baseline 'tiny' is none of the models; expected one of small, large"):
        compare_results(paths, baseline="tiny")


def test_less_is_better_where_the_figure_says_so(tmp_path):
    for name, skill in (("good", 0.9), ("bad", 0.3)):
        figure = ("depth", "/d/nyu", "rmse", errors(skill), {"lower_is_better": True, "unit": "metres"})
        results(tmp_path / name, [figure], model=name)
    found = compare_results([tmp_path / "good", tmp_path / "bad"])
    assert found.best(found.columns[0]) == ["good"]
    assert found.changes[0].change.value > 0 and found.changes[0].verdict == "worse"


def test_directories_with_results_below_them_are_taken_and_unfinished_ones_named(tmp_path):
    knn(tmp_path / "all" / "a", 0.4, "small")
    knn(tmp_path / "all" / "b", 0.6, "large")
    Output.open(tmp_path / "all" / "c", "results", command="x", config={}).close()
    found = compare_results([tmp_path / "all"])
    assert found.models == ["small", "large"] and len(found.changes) == 1
    assert found.notes == [f"{tmp_path / 'all' / 'c'} is unfinished and was left out: run its command again"]


def test_models_of_one_name_are_told_apart(tmp_path):
    paths = [
        knn(tmp_path / "1", 0.4, "run", spec="/runs/small/run"),
        knn(tmp_path / "2", 0.6, "run", spec="/runs/large/run"),
        results(tmp_path / "3", [("depth", "/d/x", "rmse", errors(0.5), {})], model="run", spec="/runs/small/run"),
    ]
    found = compare_results(paths)
    assert found.models == ["small/run", "large/run"]
    assert sum(model == "small/run" for model, _ in found.rows) == 2


def test_one_model_measured_twice_is_named_by_what_differs(tmp_path):
    paths = [knn(tmp_path / "a", 0.4, image_size=224), knn(tmp_path / "b", 0.6, image_size=448)]
    found = compare_results(paths)
    assert found.models == ["m (image_size 224)", "m (image_size 448)"]
    assert found.notes == [
        "knn on d/val of m (image_size 224) and m (image_size 448) differ in image_size: 224 and 448"
    ]
    again = compare_results([paths[0], knn(tmp_path / "c", 0.4, image_size=224)])
    assert again.models == ["m"] and again.notes == ["knn of m is there twice: the first was taken"]
    assert compare_results([paths[0], paths[0]]).notes == []  # the very same directory
    unlike = compare_results([paths[0], knn(tmp_path / "e", 0.5, image_size=224)])
    assert unlike.models == ["m (a)", "m (e)"]


def test_other_settings_and_other_data_are_never_compared_in_silence(tmp_path):
    paths = [
        knn(tmp_path / "a", 0.4, "small", image_size=224, device="cpu", found={"x": 1}),
        knn(tmp_path / "b", 0.6, "large", image_size=448, device="cuda", found={"x": 2}, data_hash="changed"),
    ]
    assert compare_results(paths).notes == [
        "d/val changed between the measurement of small and that of large",
        "knn on d/val of small and large differ in image_size: 224 and 448",
    ]
    elsewhere = results(tmp_path / "c", [("knn", "/e/val.parquet", "top1_k20", right(0.5), {})], model="other")
    found = compare_results([paths[0], elsewhere])
    assert not found.changes and len(found.columns) == 2 and found.best(found.columns[0]) == []
    assert found.notes == [
        "knn top1_k20 was measured on different test sets (small on d/val, other on e/val): these are not compared"
    ]


def test_models_are_compared_on_the_images_that_both_have(tmp_path):
    first = knn(tmp_path / "a", 0.4, "small")
    order = np.random.default_rng(1).permutation(N)[:150]
    figures = [("knn", "/d/val.parquet", "top1_k20", right(0.6).at(order), {})]
    second = results(tmp_path / "b", figures, model="large", units=[NAMES[i] for i in order])
    found = compare_results([first, second])
    common = np.sort(order)
    assert found.changes[0].change == difference(right(0.4).at(common), right(0.6).at(common), seed=0)
    assert found.notes == [
        "knn top1_k20 on d/val, small and large: compared on the 150 test images that both have, of 200 and 150"
    ]
    # The same images in another order are the same images.
    shuffled = np.random.default_rng(2).permutation(N)
    figures = [("knn", "/d/val.parquet", "top1_k20", right(0.6).at(shuffled), {})]
    third = results(tmp_path / "c", figures, model="large", units=[NAMES[i] for i in shuffled])
    found = compare_results([first, third])
    assert found.changes[0].change == difference(right(0.4), right(0.6), seed=0) and not found.notes


def test_images_that_belong_together_are_drawn_together(tmp_path):
    owners = np.arange(N) // 4
    names = [f"person {owner}" for owner in owners]
    renamed = [f"subject {owner}" for owner in owners]
    expected = difference(right(0.4), right(0.6), clusters=owners, seed=0)
    assert expected != difference(right(0.4), right(0.6), seed=0)
    first = knn(tmp_path / "a", 0.4, "small", clusters=names)
    for place, clusters in (("b", names), ("c", renamed), ("d", None)):  # the same persons, under whatever name
        second = knn(tmp_path / place, 0.6, "large", clusters=clusters)
        assert compare_results([first, second]).changes[0].change == expected
        assert compare_results([second, first], baseline="small").changes[0].change == expected
    # In another order, and of some of them, the clusters are those of the images.
    order = np.random.default_rng(1).permutation(N)[:150]
    figures = [("knn", "/d/val.parquet", "top1_k20", right(0.6).at(order), {})]
    units, own = [NAMES[i] for i in order], [renamed[i] for i in order]
    second = results(tmp_path / "e", figures, model="large", units=units, clusters=own)
    common = np.sort(order)
    (change,) = compare_results([first, second]).changes
    assert change.change == difference(right(0.4).at(common), right(0.6).at(common), clusters=owners[common], seed=0)


def test_images_that_belong_together_otherwise_are_not_compared(tmp_path):
    first = knn(tmp_path / "a", 0.4, "small", clusters=[str(i // 4) for i in range(N)])
    second = knn(tmp_path / "b", 0.6, "large", clusters=[str(i // 5) for i in range(N)])
    third = knn(tmp_path / "c", 0.6, "other", clusters=[str(i // 4) for i in range(N)])
    found = compare_results([first, second, third])
    assert [change.model for change in found.changes] == ["other"]
    assert found.notes == [
        "knn top1_k20 on d/val, small and large: other test images belong together (persons, households) in one than "
        "in the other, so there is no difference to tell: evaluate again"
    ]


def test_models_without_a_common_image_are_refused(tmp_path):
    first = knn(tmp_path / "a", 0.4, "small")
    second = knn(tmp_path / "b", 0.6, "large", units=[f"other/{name}" for name in NAMES])
    with pytest.raises(InputError, match=r"no test images in common .*none of 200 and 200 test images is in both"):
        compare_results([first, second])


def test_what_has_no_scores_or_other_classes_stays_in_the_table(tmp_path):
    first, second = knn(tmp_path / "a", 0.4, "small"), knn(tmp_path / "b", 0.6, "large", scores=False)
    found = compare_results([first, second])
    assert not found.changes and found.best(found.columns[0]) == ["large"]
    assert found.notes == [f"{second} kept no scores of its test images, so no difference: evaluate again"]
    paths = []
    for name, classes in (("a", 3), ("b", 4), ("c", 3)):
        values = np.random.default_rng(classes).random((N, classes))
        figure = ("segmentation", "/d/x", "miou", ratio(values, values + 1), {})
        paths.append(results(tmp_path / f"s{name}", [figure], model=name))
    found = compare_results(paths)
    assert [change.model for change in found.changes] == ["c"]
    assert found.notes == [
        "segmentation miou on x, a and b: the metrics are not of the same classes, so there is no difference to tell"
    ]


def test_one_model_makes_a_table_without_differences(tmp_path):
    found = compare_results([knn(tmp_path / "a", 0.4, "small")])
    assert (found.models, found.changes, found.notes) == (["small"], [], [])
    (record,) = found.records()
    assert record["value"] == right(0.4).value() and record["difference"] is None and not record["best"]


def test_models_that_tie_are_all_best(tmp_path):
    found = compare_results([knn(tmp_path / name, 0.4, name) for name in "ab"])
    assert found.best(found.columns[0]) == ["a", "b"]
    assert found.changes[0].verdict == ""


def test_short_names_are_ends_that_tell_apart():
    assert short_names(["/a/b/val.parquet", "/a/c/val.parquet"]) == {
        "/a/b/val.parquet": "b/val",
        "/a/c/val.parquet": "c/val",
    }
    assert short_names(["/x/photos", "/y/birds"]) == {"/x/photos": "photos", "/y/birds": "birds"}
    assert short_names(["/x/holidays/images.parquet"]) == {"/x/holidays/images.parquet": "holidays/images"}
    two = ["demo:photos?split=train", "demo:photos?split=test"]
    assert short_names(two) == {name: name for name in two}
    assert short_names(["run", "/a/run"]) == {"run": "run", "/a/run": "a/run"}


def test_settings_that_are_tables_may_differ(tmp_path):
    paths = [
        knn(tmp_path / "a", 0.4, "small", others={"z": "/d/z"}),
        knn(tmp_path / "b", 0.6, "large", others={}),
    ]
    found = compare_results(paths)
    assert any("differ in others" in note and "/d/z" in note for note in found.notes)


def test_a_share_of_all_units_and_of_some_are_one_metric(tmp_path):
    counted = np.ones(N)
    figures = [right(0.4), ratio(right(0.6).values[:, 0] * counted, counted)]
    paths = [
        results(tmp_path / name, [("robustness", "/d/x", "top1", figure, {})], model=name)
        for name, figure in zip("ab", figures, strict=True)
    ]
    (change,) = compare_results(paths).changes
    assert change.change.value == pytest.approx(right(0.6).value() - right(0.4).value())
    assert change.verdict == "better"
