"""The commands one after the other on real photographs: what they write, print, refuse and continue."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2cli.artifacts.manifest import read_manifest
from tests.cli.conftest import TINY

# Mean patch tokens: at random initialisation the class tokens of all images are nearly the same.
EMBED = ["embed", "-m", "tiny", "--pool", "mean", "--workers", "0", "--set", "shard_size=20"]


@pytest.fixture(scope="module")
def embeddings(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "e"
    done = program(*EMBED, photos, "-o", out, "-q")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    return out


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    done = program("pretrain", photos, "-o", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out


def program(*arguments, **options):
    command = [sys.executable, "-m", "dinov2cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_embeddings_are_what_the_format_says(embeddings):
    vectors = [np.load(path, mmap_mode="r") for path in sorted((embeddings / "img_emb").glob("*.npy"))]
    tables = [pq.read_table(path) for path in sorted((embeddings / "metadata").glob("*.parquet"))]
    assert [len(v) for v in vectors] == [20, 20, 20, 12] == [t.num_rows for t in tables]
    assert {v.dtype for v in vectors} == {np.dtype(np.float16)}
    assert {"id", "image_path", "width", "height", "sha256", "source", "row"} <= set(tables[0].column_names)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(vectors).astype(np.float64), axis=1), 1, atol=2e-3)
    manifest = read_manifest(embeddings)
    assert (manifest.kind, manifest.rows, manifest.extra["random"]) == ("embeddings", 72, True)


def test_done_again_says_so_and_other_settings_are_refused(dinov2, photos, embeddings):
    again = dinov2(*EMBED, photos, "-o", embeddings)
    assert again.code == 0
    assert "already done, nothing to do" in again.err
    other = dinov2(*EMBED, photos, "-o", embeddings, "--pool", "cls")
    assert other.code == 2
    assert "was made with other settings: pool: mean → cls; choose another directory" in other.err


def test_killed_embed_continues_to_the_same_bytes(photos, embeddings, tmp_path):
    """kill -9 after the first shard; the same command finishes, and every file is as if never killed."""
    out = tmp_path / "e"
    command = [sys.executable, "-m", "dinov2cli", *EMBED, str(photos), "-o", str(out), "--batch-size", "1", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first = out / "metadata" / "metadata_0000.parquet"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not read_manifest(out).complete
    done = program(*command[3:])
    assert done.returncode == 0, done.stderr
    for file in sorted(embeddings.rglob("*.parquet")):
        assert (out / file.relative_to(embeddings)).read_bytes() == file.read_bytes()
    for file in sorted(embeddings.rglob("*.npy")):  # the batch size moves the last bits of float32
        np.testing.assert_allclose(np.load(out / file.relative_to(embeddings)), np.load(file), atol=2e-3)


def test_dedup_from_images_finds_the_planted_copies(dinov2, photos, tmp_path):
    done = dinov2("dedup", photos, "-o", tmp_path / "d", "--json")
    assert done.code == 0, done.err
    assert done.json["kind"] == "selection"
    kept, dropped = (pq.read_table(tmp_path / "d" / f"{name}.parquet") for name in ("kept", "dropped"))
    assert kept.num_rows + dropped.num_rows == 72
    assert dropped.num_rows >= 4
    assert set(dropped.column("duplicate_of").to_pylist()) <= set(kept.column("id").to_pylist())
    assert (tmp_path / "d" / "report.html").read_text().startswith("<!doctype html>")


def test_dedup_against_itself_leaves_nothing(dinov2, photos, tmp_path):
    done = dinov2("dedup", photos, "-o", tmp_path / "d", "--against", photos, "--tiers", "exact", "--json")
    assert done.code == 0, done.err
    assert (done.json["kept"], done.json["dropped"]) == (0, 72)
    assert set(pq.read_table(tmp_path / "d" / "dropped.parquet").column("reason").to_pylist()) == {"against"}


def test_chain_through_a_pipe(photos, embeddings, tmp_path):
    """dedup reads the path that embed prints, curate that of dedup; the selection opens as images again."""
    first = program("dedup", embeddings, "-o", tmp_path / "d", "--tiers", "exact,perceptual", "-q")
    second = program("curate", "-", "-o", tmp_path / "c", "--target-size", "30", "-q", input=first.stdout)
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == str(tmp_path / "c")
    assert pq.read_table(tmp_path / "c" / "kept.parquet").num_rows == 30
    third = program("pretrain", "-", "-o", tmp_path / "r", *TINY, "-q", input=second.stdout)
    assert third.returncode == 0, third.stderr
    assert read_manifest(tmp_path / "r").inputs[0]["rows"] == 30


def test_curate_by_retrieval_embeds_queries_with_the_same_model(dinov2, photos, embeddings, tmp_path):
    query = next(path for path in photos.iterdir() if path.is_dir())
    done = dinov2(
        "curate", embeddings, "-o", tmp_path / "c", "--query", query, "--workers", "0", "--set", "neighbours=1"
    )
    assert done.code == 0, done.err
    kept = pq.read_table(tmp_path / "c" / "kept.parquet")
    asked = {path.name for path in query.iterdir()}
    # The queries are images of the pool, so the nearest image of each is itself (or a copy that looks the same).
    found = {path.rsplit("/", 1)[-1] for path in kept.column("image_path").to_pylist()}
    assert len(asked & found) >= len(asked) - 2
    assert set(kept.column("query_source").to_pylist()) == {str(query)}


def test_run_directory_is_what_the_format_says(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "log.txt", "checkpoints", "export", "report.html", "manifest.json"} <= names
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    losses = {f"loss/{term}" for term in ("total", "dino_local", "dino_global", "ibot", "koleo")}
    assert losses | {"step", "images", "lr", "grad_norm", "images_per_s", "data_wait"} <= set(lines[0])
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= {
        path.name for path in (trained / "export").iterdir()
    }
    assert not list(trained.rglob("*.pkl"))


def test_export_loads_in_transformers_and_as_a_model_here(dinov2, trained, photos, tmp_path):
    import torch
    from transformers import AutoImageProcessor, AutoModel

    from dinov2cli.models.load import load_model

    theirs = AutoModel.from_pretrained(trained / "export").eval()
    ours = load_model(str(trained))
    assert not ours.random
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = theirs(images).last_hidden_state[:, 0], ours.backbone(images).cls
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert AutoImageProcessor.from_pretrained(trained / "export").crop_size["height"] == 32


def test_preempted_run_continues_to_the_same_weights(photos, trained, tmp_path):
    """SIGTERM in the middle: exit 75, then the same command ends bit for bit where an unbroken run ends."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "dinov2cli", "pretrain", str(photos), "-o", str(out), *TINY]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "after saving step" in errors
    done = program(*command[3:])
    assert done.returncode == 0, done.stderr
    for name in ("export/model.safetensors",):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    again = program(*command[3:])
    assert again.returncode == 0
    assert "already done" in again.stderr


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_eval_writes_rows_with_intervals(dinov2, trained, photos, tmp_path, task):
    data = f"{photos}?label=folder"
    extra = ["--set", "steps=20", "--set", "learning_rates=[0.001,0.01]"] if task == "linear" else ["--k", "5"]
    arguments = ["eval", task, trained, "--train", data, "--test", data, "-o", tmp_path / "r", "--workers", "0", *extra]
    done = dinov2(*arguments, "--json")
    assert done.code == 0, done.err
    rows = done.json["results"]
    assert rows[0]["metric"].startswith("top1")
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] and row["n"] == 72 for row in rows)
    answers = pq.read_table(tmp_path / "r" / "predictions.parquet")
    assert np.mean(answers.column("correct").to_pylist()) == pytest.approx(rows[0]["value"])


def test_knn_on_its_own_training_images_leaves_each_out(dinov2, photos, tmp_path):
    """An image must not vote for itself: on noise every k-NN would be right otherwise."""
    data = f"{photos}?label=folder"
    done = dinov2("eval", "knn", "tiny", "--train", data, "--test", data, "-o", tmp_path / "r", "--k", "1", "--json")
    assert "each is left out of its own neighbours" in done.err
    answers = pq.read_table(tmp_path / "r" / "predictions.parquet").to_pylist()
    assert all(answer["id"] not in answer["neighbours"] for answer in answers)
    again = dinov2("eval", "knn", "tiny", "--train", data, "--test", data, "-o", tmp_path / "r", "--k", "1", "--json")
    assert again.json["already_done"]
    assert again.json["results"] == done.json["results"]


def test_a_model_is_the_same_however_it_is_spelled(dinov2, photos, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    assert dinov2("embed", photos, "-m", trained.name, "-o", tmp_path / "e", "--workers", "0").code == 0
    again = dinov2("embed", photos, "-m", f"./{trained.name}/", "-o", tmp_path / "e", "--workers", "0")
    assert "already done" in again.err
    query = next(path for path in photos.iterdir() if path.is_dir())
    monkeypatch.chdir(tmp_path)  # the model is found again from any directory
    done = dinov2("curate", "e", "-o", "c", "--query", query, "--workers", "0")
    assert done.code == 0, done.err


def test_curating_with_another_model_is_not_already_done(dinov2, photos, trained, tmp_path):
    arguments = ["curate", photos, "-o", tmp_path / "c", "--target-size", "20", "--workers", "0"]
    assert dinov2(*arguments, "-m", "tiny").code == 0
    other = dinov2(*arguments, "-m", trained)
    assert other.code == 2
    assert "was made with other settings" in other.err


def test_too_large_a_target_keeps_all_and_says_so(dinov2, embeddings, tmp_path):
    done = dinov2("curate", embeddings, "-o", tmp_path / "c", "--target-size", "5000", "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] == 72
    assert "the pool holds 72 images, --target-size 5,000: all are kept" in done.err


def test_selection_outlives_the_embeddings_it_was_made_from(dinov2, photos, tmp_path):
    assert dinov2(*EMBED, photos, "-o", tmp_path / "e").code == 0
    assert dinov2("curate", tmp_path / "e", "-o", tmp_path / "c", "--target-size", "30").code == 0
    (tmp_path / "e").rename(tmp_path / "moved")
    done = dinov2("dedup", tmp_path / "c", "-o", tmp_path / "d")
    assert done.code == 0, done.err


def test_raising_the_limit_of_bad_images_continues(dinov2, photos, tmp_path):
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    for number in range(12):
        (tmp_path / "photos" / f"zz{number:02d}.jpg").write_bytes(b"this is no image")
    arguments = ["embed", tmp_path / "photos", "-m", "tiny", "-o", tmp_path / "e", "--workers", "0"]
    arguments += ["--set", "shard_size=20", "--batch-size", "10"]
    assert dinov2(*arguments).code == 3
    done = dinov2(*arguments, "--set", "max_bad_fraction=0.5", "--json")
    assert done.code == 0, done.err
    assert "continuing where an earlier run stopped" in done.err
    assert (done.json["rows"], done.json["unreadable"]) == (72, 12)


def test_reader_that_leaves_early_is_no_error(embeddings):
    script = f"{sys.executable} -m dinov2cli info {embeddings} --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "0"


def test_continuing_from_the_weights_of_another_run(dinov2, trained, photos, tmp_path):
    done = dinov2("pretrain", photos, "-o", tmp_path / "r", *TINY, "--set", f"model.init_from={trained}", "--json")
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "r").inputs[1]["kind"] == "model"


def test_online_knn_is_logged(dinov2, photos, tmp_path):
    data = f"{photos}?label=folder"
    done = dinov2("pretrain", data, "-o", tmp_path / "r", *TINY, "--set", "eval.every=3", "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/knn" in line] == [3, 6]


def test_interrupt_is_130(photos, tmp_path):
    command = [sys.executable, "-m", "dinov2cli", "embed", str(photos), "-m", "tiny", "-o", str(tmp_path / "e")]
    process = subprocess.Popen(
        [*command, "--workers", "0", "--batch-size", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "e" / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped by Ctrl-C" in errors
