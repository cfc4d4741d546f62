"""`dinov2 curate` as a user runs it: query sets with budgets of their own, policies without, resume, bad input."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2cli.artifacts.parts import PartStage
from dinov2cli.cli.main import run
from dinov2cli.data.source import open_source
from tests.cli.test_dedup import made_embeddings

HERE = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def embeddings(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "e"
    assert run(["embed", str(photos), "-m", "tiny", "-o", str(out), "-q", *HERE]) == 0
    return out


@pytest.fixture(scope="module")
def sets(photos, tmp_path_factory):
    """Three small query sets: copies of files of the pool, new images, and one image."""
    folder = tmp_path_factory.mktemp("sets")
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    for name in ("known", "new", "one"):
        (folder / name).mkdir()
    for path in files[:6]:
        shutil.copy(path, folder / "known" / path.name)
    for number in range(8):
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(folder / "new" / f"{number}.png")
    shutil.copy(folder / "new" / "0.png", folder / "one" / "0.png")
    return folder


def kept(place):
    return pq.read_table(place / "kept.parquet")


def test_query_sets_with_budgets_of_their_own_make_one_union(dinov2, embeddings, sets, tmp_path):
    budgets = [
        *("--query", f"{sets}/known?neighbours=3"),
        *("--query", f"{sets}/new?neighbours=9&per_set=5&include=true"),
        *("--query", f"{sets}/known?mode=cluster&per_cluster=4&more_than=1"),
    ]
    arguments = ["curate", embeddings, *budgets, "--set", "clusters=4", "--target-size", 20, *HERE]
    done = dinov2(*arguments, "-o", tmp_path / "c", "--json")
    assert done.code == 0, done.err
    summary = done.json["summary"]
    assert summary["mode"] == "sample+cluster" and summary["kept"] == 20
    assert [row["dataset"] for row in summary["table"]] == [f"{sets}/known", f"{sets}/new", f"{sets}/known (2)"]
    assert [row["retrieval"] for row in summary["table"]] == ["sample", "sample", "cluster"]
    assert summary["table"][1]["final"] <= 5 and len(summary["overlap"]) == 3
    assert summary["index"]["recall"] == 1.0 and "index Flat" in done.err
    table = kept(tmp_path / "c")
    assert table["origin"].to_pylist() == ["retrieved"] * 20 + ["query"] * 8
    hits = pq.read_table(tmp_path / "c" / "hits.parquet")
    assert {s for text in table["query_source"].to_pylist()[:20] for s in text.split(";")} <= set(
        hits["query_source"].to_pylist()
    )
    lines = [line for line in done.err.splitlines() if line.startswith(str(sets))]
    assert [line.split()[2].rstrip(":") for line in lines[:2]] == ["sample", "sample"]
    assert "as it is" in lines[-1] and "all, each image once" in done.err and "28" in done.err.splitlines()[-1]
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Query sets" in page and "Coverage and balance" in page and "28 images in all" in page
    assert summary["coverage"]["clusters"] == 2 and len(summary["coverage"]["near"]["sets"]) == 3
    assert not (tmp_path / "c" / "parts").exists()
    images = open_source(str(tmp_path / "c"))  # as pretrain opens it
    assert len(images) == 28 and len(set(images.ids)) == 28
    for row, name in enumerate(images.ids):
        assert images.read(row), name
    assert images.read(20) == (sets / "new" / "0.png").read_bytes()

    recipe = tmp_path / "recipe.yaml"
    queries = [
        {"data": f"{sets}/known", "neighbours": 3},
        {"data": f"{sets}/new", "neighbours": 9, "per_set": 5, "include": True},
        {"data": f"{sets}/known", "mode": "cluster", "per_cluster": 4, "more_than": 1},
    ]
    recipe.write_text(json.dumps({"queries": queries, "clusters": 4, "target_size": 20}))
    again = dinov2("curate", embeddings, "-o", tmp_path / "r", "--config", recipe, *HERE)
    assert again.code == 0, again.err
    # Each run embedded the queries itself, so all but that is the same.
    for name in ("kept.parquet", "dropped.parquet", "hits.parquet"):
        assert pq.read_table(tmp_path / "r" / name).equals(pq.read_table(tmp_path / "c" / name)), name
    assert "already done" in dinov2(*arguments, "-o", tmp_path / "c").err
    other = dinov2(*[str(a).replace("neighbours=3", "neighbours=4") for a in arguments], "-o", tmp_path / "c")
    assert other.code == 2 and "was made with other settings: queries" in other.err


def test_included_sets_join_once_and_can_be_packed(dinov2, embeddings, sets, tmp_path):
    done = dinov2(
        *("curate", embeddings, "-o", tmp_path / "c", "--query", sets / "known", "--query", sets / "new"),
        *("--query", sets / "one", "--include-queries", "--set", "neighbours=1", "--pack", "parquet", "--json", *HERE),
    )
    assert done.code == 0, done.err
    included = done.json["summary"]["included"]["table"]
    # The pool retrieved the very files of `known`, and the image of `one` came with `new`.
    assert [row["final"] for row in included] == [0, 8, 0]
    table = kept(tmp_path / "c")
    assert done.json["packed"]["images"] == table.num_rows == done.json["summary"]["kept"] + 8
    shutil.rmtree(tmp_path / "c" / "query_embeddings_1")
    packed = open_source(str(tmp_path / "c"))
    assert packed.read(table["origin"].to_pylist().index("query")) == (sets / "new" / "0.png").read_bytes()
    trained = dinov2("embed", tmp_path / "c", "-m", "tiny", "-o", tmp_path / "e", *HERE)
    assert trained.code == 0, trained.err


@pytest.mark.parametrize("mode", ["balanced", "hierarchical", "balanced-kmeans", "semdedup"])
def test_policies_without_queries_keep_exactly_the_target(dinov2, embeddings, tmp_path, mode):
    arguments = ["curate", embeddings, "--mode", mode, "--target-size", 31, *HERE]
    done = dinov2(*arguments, "-o", tmp_path / "c", "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] == kept(tmp_path / "c").num_rows == 31 and done.json["dropped"] == 41
    assert done.json["summary"]["mode"] == ("balanced" if mode == "hierarchical" else mode)
    coverage = done.json["summary"]["coverage"]
    assert 0 < coverage["after"]["evenness"] <= 1 and coverage["near"]["sets"] == []
    assert "evenness over 2 clusters" in done.err
    assert dinov2(*arguments, "-o", tmp_path / "again", "--set", "coverage_clusters=0").code == 0
    assert kept(tmp_path / "again").equals(kept(tmp_path / "c"))


def test_a_random_draw_needs_no_features(dinov2, photos, tmp_path):
    done = dinov2("curate", photos, "-o", tmp_path / "c", "--mode", "random", "--target-size", 9, "--json", *HERE)
    assert done.code == 0, done.err
    assert kept(tmp_path / "c").num_rows == 9 and not (tmp_path / "c" / "embeddings").exists()
    assert len(open_source(str(tmp_path / "c")).ids) == 9
    dry = dinov2("curate", photos, "-o", tmp_path / "x", "--mode", "random", "--target-size", 9, "--dry-run", *HERE)
    assert dry.code == 0, dry.err


def test_semdedup_by_eps_names_what_each_image_repeats(dinov2, embeddings, tmp_path):
    done = dinov2("curate", embeddings, "-o", tmp_path / "c", "--mode", "semdedup", "--set", "eps=0.01", *HERE)
    assert done.code == 0, done.err
    dropped = pq.read_table(tmp_path / "c" / "dropped.parquet")
    assert 0 < dropped.num_rows < 72
    assert set(dropped["duplicate_of"].to_pylist()) <= set(kept(tmp_path / "c")["id"].to_pylist())
    assert min(dropped["similarity"].to_pylist()) > 0.99


def test_a_killed_run_goes_on_to_the_same_choice(dinov2, embeddings, sets, tmp_path, monkeypatch):
    arguments = ["curate", embeddings, "--query", f"{sets}/known?mode=cluster&more_than=0", *HERE]
    arguments += ["--query", f"{sets}/new?neighbours=4", "--set", "clusters=4"]
    assert dinov2(*arguments, "-o", tmp_path / "whole").code == 0
    saved, loaded = [], []
    save, load = PartStage.save, PartStage.load

    def dying(stage, start, arrays):
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(stage, start, arrays)
        saved.append(stage.path.name)

    def noting(stage, start):
        found = load(stage, start)
        loaded.append(found is not None)
        return found

    monkeypatch.setattr(PartStage, "save", dying)
    assert dinov2(*arguments, "-o", tmp_path / "c").code == 130
    assert (tmp_path / "c" / "parts").is_dir() and len(saved) == 2
    monkeypatch.setattr(PartStage, "save", save)
    monkeypatch.setattr(PartStage, "load", noting)
    done = dinov2(*arguments, "-o", tmp_path / "c")
    assert done.code == 0 and "continuing where an earlier run stopped" in done.err
    assert sum(loaded) >= 2 and not (tmp_path / "c" / "parts").exists()
    for name in ("kept.parquet", "dropped.parquet", "hits.parquet"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_dry_run_says_what_every_set_may_ask_for(dinov2, embeddings, sets, tmp_path):
    plan = dinov2(
        *("curate", embeddings, "-o", tmp_path / "c", "--query", f"{sets}/known?neighbours=3&per_set=7"),
        *("--query", f"{sets}/new?mode=cluster&include=1", "--dry-run", "--json", *HERE),
    ).json
    assert plan["images"] == 72 and plan["mode"] == "sample+cluster" and plan["query images"] == 14
    assert plan["query set 1"].endswith("known (6 images): sample, the 3 nearest of each, at most 7")
    assert (
        "10,000 of each cluster with more than 3 of them, at most 1,000,000 and its own images" in plan["query set 2"]
    )
    assert plan["clusters"] == 1 and plan["index"].startswith("Flat")
    assert "every pair compared" in plan["cost of search"]
    assert "to a factor of two; memory " in plan["cost"]
    assert "hits.parquet" in plan["files"] and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--query", "SETS/new?neighbors=4"], 2, "unknown option 'neighbors'; did you mean 'neighbours'?"),
        (["--query", "SETS/new?mode=near&per_set=0"], 2, "mode: found 'near', should be 'sample' or 'cluster'"),
        (["--query", "SETS/new?mode=sample&per_set=0"], 2, "per_set: found '0', should be greater than 0"),
        (["--query", "SETS/nothing"], 3, "SETS/nothing: no such file or folder"),
        (["--query", "SETS/empty"], 3, "SETS/empty"),
        (
            ["--query", "SETS/broken", "--set", "max_bad_fraction=0.2"],
            3,
            "query set SETS/broken: none of the 12 images can be read",
        ),
        (["--query", "SETS/other"], 3, "expected the same model"),
        (["--query", "SETS/one", "--mode", "cluster"], 2, "no cluster holds more than 3 images of query set"),
        (["--query", "SETS/new", "--mode", "semdedup"], 2, "--mode semdedup takes no --query"),
        (["--mode", "semdedup"], 2, "found neither of eps and --target-size"),
        (["--mode", "semdedup", "--set", "eps=0.1", "--target-size", "9"], 2, "found both of eps and --target-size"),
        (["--mode", "balanced-kmeans"], 2, "curate without --query needs --target-size"),
        (["--mode", "best", "--target-size", "9"], 2, "mode"),
        (["--include-queries", "--target-size", "9"], 2, "--include-queries needs --query"),
        (["--query", "SETS/new", "--target-size", "73"], 2, "--target-size 73: the pool holds 72 images"),
        (["--memory", "lots", "--target-size", "9"], 2, "expected an amount of memory such as 8GB"),
    ],
)
def test_bad_input(dinov2, embeddings, sets, photos, tmp_path, arguments, code, text):
    (sets / "empty").mkdir(exist_ok=True)
    (sets / "broken").mkdir(exist_ok=True)
    for number in range(12):
        (sets / "broken" / f"{number}.jpg").write_bytes(b"no image")
    if "SETS/other" in arguments and not (sets / "other").exists():
        other = [*("embed", sets / "new", "-m", "tiny", "-o", sets / "other"), "--seed", "1", "--set", "pool=mean"]
        assert dinov2(*other, *HERE).code == 0
    given = [argument.replace("SETS", str(sets)) for argument in arguments]
    done = dinov2("curate", embeddings, "-o", tmp_path / "c", *given, *HERE)
    assert (done.code, text.replace("SETS", str(sets)) in done.err) == (code, True), (done.code, done.err)
    assert "Traceback" not in done.err


def test_identical_images_curate_like_others(dinov2, sets, tmp_path):
    folder = tmp_path / "same"
    folder.mkdir()
    for number in range(40):
        shutil.copy(sets / "new" / "0.png", folder / f"{number:02d}.png")
    assert dinov2("embed", folder, "-m", "tiny", "-o", tmp_path / "e", *HERE).code == 0
    for name, more in {
        "near": ["--query", sets / "one", "--target-size", "10"],
        "home": ["--query", sets / "new", "--mode", "cluster", "--set", "clusters=1", "--target-size", "10"],
        "tree": ["--target-size", "10"],
        "flat": ["--mode", "balanced-kmeans", "--target-size", "10"],
        "pruned": ["--mode", "semdedup", "--target-size", "10"],
    }.items():
        done = dinov2("curate", tmp_path / "e", "-o", tmp_path / name, *more, *HERE)
        assert done.code == 0, (name, done.err)
        assert kept(tmp_path / name).num_rows == 10


def test_no_picture_is_no_obstacle(dinov2, tmp_path):
    """Embeddings of images that are nowhere: a choice and a report without pictures."""
    vectors = np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32)
    made_embeddings(tmp_path / "e", vectors)
    made_embeddings(tmp_path / "q", vectors[:4])
    queries = ["--query", f"{tmp_path / 'q'}?neighbours=3"]
    for name, options in (("b", ["--target-size", 10]), ("r", queries)):
        done = dinov2("curate", tmp_path / "e", "-o", tmp_path / name, *options, *HERE)
        assert done.code == 0 and "the report has no pictures" in done.err, done.err
        assert "<image" not in (tmp_path / name / "report.html").read_text()
