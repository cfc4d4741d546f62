import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2cli.artifacts.results import read_results, read_scores
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.retrieval.ranking import LEVELS
from dinov2cli.evaluation.retrieval.setup import prepare
from dinov2cli.evaluation.tasks.retrieval import Retrieval
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.load import LoadedModel, load_model
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from tests.launch import launch

HOLIDAYS = Path(__file__).parents[3].parent / "shared" / "data" / "holidays" / "images.parquet"
needs_holidays = pytest.mark.skipif(not HOLIDAYS.exists(), reason="no holidays in ../shared/data")


def tiny_model() -> LoadedModel:
    network = VisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=32,
        depth=2,
        num_heads=2,
        layerscale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).eval()
    return LoadedModel(network, "tiny", Preprocess(resize=28, crop=28), True, {"arch": "tiny", "seed": 0})


def picture(group: int, number: int, side: int = 32) -> bytes:
    """An image of a group: its own colours, shifted and with noise, by which the images of the group differ."""
    base = np.random.default_rng(group).integers(0, 256, (2, 2, 3)).repeat(side // 2, 0).repeat(side // 2, 1)
    rng = np.random.default_rng([group, number])
    noise = rng.integers(-40, 41, base.shape) + rng.integers(-120, 121, 3)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(path, groups, *, broken=(), **columns):
    """A Parquet file of images with these groups; ids are 0.png, 1.png, ..."""
    images = [
        {"bytes": b"broken" if row in broken else picture(99 if group is None else group, row), "path": f"{row}.png"}
        for row, group in enumerate(groups)
    ]
    pq.write_table(pa.table({"image": images, **columns}), path)
    return open_source(str(path))


@pytest.fixture
def grouped(tmp_path):
    groups = [5, 3, 3, 5, 5, 8, None]
    return table(tmp_path / "g.parquet", groups, group=groups, is_query=[1, 1, 0, 0, 0, 1, 0])


def run(trial: Trial, **settings):
    task = Retrieval(**settings)
    task.check(trial)
    return task.judge(trial, task.collect(trial))


def values(judged) -> dict[str, float]:
    return {figure.metric: figure.statistic.value() for figure in judged.figures}


def trapezoid(ranked: list[bool], total: int) -> float:
    places = [place for place, right in enumerate(ranked) if right]
    pairs = [(1.0 if p == 0 else n / p, (n + 1) / (p + 1)) for n, p in enumerate(places)]
    return sum(sum(pair) / 2 for pair in pairs) / total


def test_groups_are_searched_as_in_holidays(grouped):
    trial = Trial(tiny_model(), grouped)
    judged = run(trial, ks=[1, 2])
    vectors = trial.features(grouped).pooled.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = [5, 3, 3, 5, 5, 8, None]
    expected = []
    for query in (0, 1):
        order = [row for row in np.argsort(-(vectors @ vectors[query])) if row != query]
        ranked = [groups[row] == groups[query] for row in order]
        expected.append(trapezoid(ranked, sum(ranked)))
        record = judged.predictions.to_pylist()[query]
        assert record["neighbours"] == [f"{row}.png" for row in order]
        assert record["relevant"] == ranked and record["correct"] == ranked[0]
        assert record["similarities"] == pytest.approx([vectors[row] @ vectors[query] for row in order], abs=1e-5)
    assert judged.units == ["0.png", "1.png"]
    assert judged.predictions["ap"].to_pylist() == pytest.approx(expected)
    assert list(values(judged)) == ["mAP", "mP@1", "mP@2", "recall@1", "recall@2"]
    assert values(judged)["mAP"] == pytest.approx(np.mean(expected))
    facts = {"images": 7, "queries": 2, "groups_of": "group", "left_out": 1, "every_image_asks": False}
    assert judged.settings == facts
    assert judged.notes == ["1 queries were left out: no other image is of their group"]
    assert [len(panel.images) for panel in judged.panels] == [6, 6]
    assert judged.panels[0].images[0].shape == (160, 160, 3)
    assert judged.panels[0].labels[0] == "query"


def test_without_flags_every_image_of_a_group_asks_and_labels_serve_as_groups(tmp_path):
    groups = [5, 3, 3, 5, 8, None]
    judged = run(Trial(tiny_model(), table(tmp_path / "a.parquet", groups, group=groups)))
    assert judged.units == ["0.png", "1.png", "2.png", "3.png"]
    assert judged.notes == ["2 images were left out: no other image is of their group"]
    labelled = run(Trial(tiny_model(), table(tmp_path / "b.parquet", groups, label=groups)))
    assert values(labelled) == values(judged)
    assert "images of the same label are taken to belong together" in labelled.notes[0]


def test_pool_and_area_are_what_was_asked_for(grouped):
    trial = Trial(tiny_model(), grouped)
    found = {
        (pool, ap): values(run(trial, pool=pool, ap=ap))["mAP"]
        for pool in ("cls", "mean")
        for ap in ("trapezoid", "step")
    }
    assert values(run(trial))["mAP"] == found["cls", "trapezoid"]
    assert found["mean", "step"] != found["cls", "step"] > found["cls", "trapezoid"]


def test_a_set_of_queries_of_its_own_may_hold_some_without_answer(tmp_path):
    database = table(tmp_path / "d.parquet", [1, 2, 2, 3], group=[1, 2, 2, 3])
    queries = table(tmp_path / "q.parquet", [2, 7, 3], group=["2", "7", "3"])
    trial = Trial(tiny_model(), database, others={"photos": queries})
    judged = run(trial, ks=[1])
    asked, among = (features.pooled.astype(np.float64) for features in map(trial.features, (queries, database)))
    asked, among = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (asked, among))
    cosine = asked @ among.T
    nearest, groups = cosine.argmax(1), np.array([1, 2, 2, 3])
    correct = groups[nearest] == [2, 7, 3]
    order = np.argsort(-cosine.max(1))
    expected = sum(correct[order][: n + 1].mean() * correct[order][n] for n in range(3)) / 2
    assert values(judged)["GAP"] == pytest.approx(expected)
    precisions = [trapezoid((groups[np.argsort(-cosine[q])] == g).tolist(), n) for q, g, n in ((0, 2, 2), (2, 3, 1))]
    assert values(judged)["mAP"] == pytest.approx(np.mean(precisions))
    assert judged.predictions["ap"].to_pylist()[1] is None
    assert judged.units == ["0.png", "1.png", "2.png"] and judged.settings["queries_with_answer"] == 2
    assert "1 of 3 queries have no image of their group" in judged.notes[0]
    with pytest.raises(UserError, match="--queries was given 2 times"):
        run(Trial(tiny_model(), database, others={"a": queries, "b": queries}))


def ground_truth(path, queries, **more):
    path.write_text(json.dumps({"queries": queries, **more}))
    return str(path)


def test_graded_lists_make_three_protocols_and_boxes_are_what_is_searched_with(tmp_path):
    source = table(tmp_path / "d.parquet", [1, 1, 1, 2, 2, 3, 3], broken=[6])
    truth = [
        {"id": "0", "bbox": [0, 0, 16, 16], "easy": ["1"], "hard": ["2"], "junk": ["3"]},
        {"id": "4.png", "easy": ["3", "6"], "junk": ["5"]},
    ]
    path = ground_truth(tmp_path / "t.json", truth)
    trial = Trial(tiny_model(), source)
    judged = run(trial, ground_truth=path)
    assert list(values(judged))[:2] == ["mAP_medium", "mP@1_medium"]
    assert {f"mAP_{level.name}" for level in LEVELS} < set(values(judged))
    assert judged.units == ["0.png", "4.png"]
    assert judged.notes == ["1 images of the ground truth could not be read or are not searched, and were left out"]
    records = judged.predictions.to_pylist()
    # Queries are not in the database, junk is not among the neighbours, and 4.png has nothing hard.
    assert sorted(records[0]["neighbours"]) == ["1.png", "2.png", "5.png"]
    assert sorted(records[1]["neighbours"]) == ["1.png", "2.png", "3.png"]
    assert records[1]["ap_hard"] is None and values(judged)["mAP_hard"] == pytest.approx(records[0]["ap_hard"])
    # The first query is searched by its box alone: as if that were the image.
    crop = np.asarray(Image.open(io.BytesIO(source.read(0))))[:16, :16]
    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, "PNG")
    (tmp_path / "crop").mkdir()
    (tmp_path / "crop" / "c.png").write_bytes(buffer.getvalue())
    vectors = trial.features(source).pooled
    own = trial.features(open_source(str(tmp_path / "crop"))).pooled[0]
    cosine = vectors @ own / np.linalg.norm(vectors, axis=1) / np.linalg.norm(own)
    assert records[0]["similarities"] == pytest.approx(sorted(cosine[[1, 2, 5]], reverse=True), abs=1e-5)
    # A database of one's own leaves the rest out.
    some = ground_truth(tmp_path / "s.json", [{"id": "0", "easy": ["1"]}], database=["0", "1", "2"])
    assert sorted(run(trial, ground_truth=some).predictions["neighbours"][0].as_py()) == ["0.png", "1.png", "2.png"]


def test_queries_of_another_set_may_come_with_graded_lists(tmp_path):
    database = table(tmp_path / "d.parquet", [1, 2, 2, 3])
    queries = table(tmp_path / "q.parquet", [9, 2])
    path = ground_truth(tmp_path / "t.json", [{"id": "1", "bbox": [0, 0, 32, 32], "easy": ["1"], "hard": ["2"]}])
    trial = Trial(tiny_model(), database, others={"q": queries})
    boxed = run(trial, ground_truth=path)
    assert boxed.units == ["1.png"] and len(boxed.predictions["neighbours"][0]) == 4
    plain = ground_truth(tmp_path / "p.json", [{"id": "1", "easy": ["1"], "hard": ["2"]}])
    assert values(run(trial, ground_truth=plain)) == values(boxed)  # the box is the whole image


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"place": [1, 1, 2]}, r"has no column 'group' .* its columns are place; name one with \?group=COLUMN"),
        ({"group": [1, 2, 3]}, "none of the 0 queries has an image to be found"),
        ({"group": [1, 1, 3], "is_query": [0, 0, 0]}, "no row has is_query set"),
        ({"group": [1, 1, 3], "is_query": [0, 0, 1]}, "none of the 0 queries has an image to be found"),
        ({"group": [1, 1, 3], "is_query": [2, 0, 1]}, "is_query holds 2"),
    ],
)
def test_data_without_a_question_are_refused_before_anything_is_computed(tmp_path, columns, said):
    source = table(tmp_path / "d.parquet", [1, 1, 2], **columns)
    with pytest.raises(InputError, match=said):
        Retrieval().check(Trial(tiny_model(), source))


def test_a_ground_truth_that_does_not_fit_is_refused_before_anything_is_computed(tmp_path, grouped):
    task = Retrieval(ground_truth=ground_truth(tmp_path / "t.json", [{"id": "0", "easy": ["77"]}]))
    with pytest.raises(InputError, match=r"names 1 images that .* does not have \(77\)"):
        task.check(Trial(tiny_model(), grouped))
    task = Retrieval(ground_truth=ground_truth(tmp_path / "t.json", [{"id": "0", "junk": ["1"]}]))
    with pytest.raises(InputError, match="none of the 1 queries has an image to be found"):
        task.check(Trial(tiny_model(), grouped))


def test_features_that_are_not_finite_are_refused(grouped):
    model = tiny_model()
    with torch.no_grad():
        model.network.cls_token[:] = torch.nan
    with pytest.raises(WorkError, match=r"7 of 7 feature vectors of .* hold NaN"):
        run(Trial(model, grouped))


def test_two_processes_find_what_one_does(tmp_path):
    table(tmp_path / "d.parquet", [1, 1, 1, 2, 2, 3, 3])
    queries = [{"id": "0", "bbox": [0, 0, 16, 16], "easy": ["1"], "hard": ["2"]}, {"id": "4", "easy": ["3"]}]
    truth = ground_truth(tmp_path / "t.json", queries)
    given = ("--test", str(tmp_path / "d.parquet"), "--ground-truth", truth, "--cache", "none", "--device", "cpu")
    done = launch("eval", "retrieval", "baseline:pixels", *given, "-o", str(tmp_path / "r"), "--json", processes=2)
    assert done.returncode == 0, done.stderr
    judged = run(Trial(load_model("baseline:pixels"), open_source(str(tmp_path / "d.parquet"))), ground_truth=truth)
    assert {row.metric: row.value for row in read_results(tmp_path / "r")} == pytest.approx(values(judged))
    assert read_scores(tmp_path / "r", 0).units == ["0.png", "4.png"]


@pytest.mark.shared
@needs_holidays
def test_holidays_is_its_own_protocol():
    source = open_source(str(HOLIDAYS))
    setup = prepare(source, None, None, np.arange(len(source)), None)
    assert (len(source), len(setup.queries), setup.found["left_out"]) == (421, 149, 0)
    assert all(1 <= (truth.grades == 1).sum() <= 12 for truth in setup.truths)


@pytest.mark.shared
@needs_holidays
def test_colours_find_the_holidays_of_a_group_better_than_chance():
    source = open_source(str(HOLIDAYS))
    judged = run(Trial(load_model("baseline:histogram"), source))
    assert values(judged)["mAP"] > 0.2  # chance is about 1 / 421
