"""Bad input: one line with the cure, the right exit code, and nothing lost. Every text is asserted."""

import pytest

from tests.cli.conftest import TINY


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    return lines[0].removeprefix("error: ")


def test_missing_path(dinov2, photos, tmp_path):
    done = dinov2("embed", photos.parent / (photos.name + "x"), "-m", "tiny", "-o", tmp_path / "o")
    assert done.code == 3
    assert "no such file or folder; expected a folder, a .tar, a .parquet or a text file of paths" in last_line(
        done.err
    )
    assert f"did you mean '{photos.name}'" in last_line(done.err)
    assert not (tmp_path / "o").exists()


def test_empty_folder_and_folder_of_text(dinov2, tmp_path):
    (tmp_path / "empty").mkdir()
    done = dinov2("pretrain", tmp_path / "empty", "-o", tmp_path / "o", *TINY)
    assert done.code == 3
    assert "is empty" in last_line(done.err)
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "text" / name).write_text("words")
    done = dinov2("dedup", tmp_path / "text", "-o", tmp_path / "o")
    assert done.code == 3
    assert ".txt" in last_line(done.err)
    assert ".md" in last_line(done.err)
    assert not (tmp_path / "o").exists()


def test_some_bad_images_are_skipped_and_named(dinov2, photos, tmp_path):
    folder = _copy(photos, tmp_path / "photos")
    good = next(folder.rglob("*.png"))
    (folder / "truncated.png").write_bytes(good.read_bytes()[:200])
    (folder / "nonsense.jpg").write_bytes(b"this is no image")
    done = dinov2("embed", folder, "-m", "tiny", "-o", tmp_path / "e", "--workers", "0", "--json")
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["unreadable"]) == (72, 2)
    for name in ("truncated.png", "nonsense.jpg"):
        assert f"skipped unreadable image {name}" in done.err
        assert name in done.json["bad"]
    done = dinov2("pretrain", folder, "-o", tmp_path / "r", *TINY, "--json")
    assert done.code == 0, done.err


def test_too_many_bad_images_stop_the_run(dinov2, photos, tmp_path):
    folder = _copy(photos, tmp_path / "photos")
    for number in range(12):
        (folder / f"bad{number:02d}.jpg").write_bytes(b"this is no image")
    done = dinov2("embed", folder, "-m", "tiny", "-o", tmp_path / "e", "--workers", "0", "-q")
    assert done.code == 3
    assert "of 84 images cannot be read, the limit is 1.0%: bad00.jpg" in last_line(done.err)


def test_unknown_config_keys_are_listed_together(dinov2, photos, tmp_path):
    done = dinov2("pretrain", photos, "-o", tmp_path / "r", *TINY, "--set", "optim.lrr=1", "--set", "crops.size=2")
    assert done.code == 2
    assert "2 config errors:" in done.err
    assert "optim.lrr (--set): unknown key, did you mean optim.lr?" in done.err
    assert "crops.size (--set): unknown key" in done.err
    assert not (tmp_path / "r").exists()


def test_wrong_kind_of_artefact_names_the_command_to_use(dinov2, photos, tmp_path):
    assert dinov2("embed", photos, "-m", "tiny", "-o", tmp_path / "e", "--workers", "0", "-q").code == 0
    assert dinov2("dedup", photos, "-o", tmp_path / "d", "--tiers", "exact", "-q").code == 0
    done = dinov2("embed", photos, "-m", tmp_path / "d", "-o", tmp_path / "x")
    assert done.code == 3
    assert "a selection" in last_line(done.err)
    done = dinov2("embed", photos, "-m", "tiny", "-o", tmp_path / "d")
    assert done.code == 2
    assert "holds a selection; choose another directory, or replace it with --overwrite" in last_line(done.err)


def test_unwritable_output(dinov2, photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = dinov2("dedup", photos, "-o", tmp_path / "file" / "out", "--tiers", "exact")
    assert done.code == 2
    assert "not a directory; choose another place with -o" in last_line(done.err)
    done = dinov2("dedup", photos, "-o", tmp_path / "file", "--tiers", "exact", "--overwrite")
    assert done.code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_unfinished_input_is_refused_with_the_command_that_finishes_it(dinov2, photos, tmp_path):
    from dinov2cli.artifacts.output import Output

    Output.open(tmp_path / "e", "embeddings", command="dinov2 embed photos -o e", config={}).close()
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d")
    assert done.code == 3
    assert "is unfinished (its run was stopped); run `dinov2 embed photos -o e` again" in last_line(done.err)


def test_models_that_are_none(dinov2, photos, tmp_path):
    done = dinov2("embed", photos, "-m", "vist14", "-o", tmp_path / "e")
    assert done.code == 3
    assert "vits14" in last_line(done.err)
    done = dinov2("embed", photos, "-o", tmp_path / "e")
    assert done.code == 2
    assert "embed needs a model; give -m MODEL" in last_line(done.err)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["curate", "IN", "-o", "OUT"], "curate without --query needs --target-size"),
        (["curate", "IN", "-o", "OUT", "--mode", "sample"], "--mode sample needs --query"),
        (["curate", "IN", "-o", "OUT", "--target-size", "10"], "holds images without embeddings; give -m MODEL"),
        (["dedup", "IN", "-o", "OUT", "--tiers", "embedding"], "holds no embeddings; give -m MODEL"),
        (
            ["dedup", "IN", "-o", "OUT", "--tiers", "exakt"],
            "should be 'exact', 'perceptual', 'geometric' or 'embedding'",
        ),
        (
            ["embed", "IN", "-m", "tiny", "-o", "OUT", "--image-size", "30"],
            "30 is not a multiple of the patch size 8: use 24 or 32",
        ),
        (["embed", "IN", "-m", "tiny", "-o", "OUT", "--device", "tpu"], "no such device"),
        (["pretrain", "IN", "-o", "OUT", "--config", "tiny-cpu", "--budget", "soon"], "train.budget"),
        (
            ["pretrain", "IN", "-o", "OUT", "--config", "tiny-cpu", "--set", "crops.global_size=30"],
            "crops.global_size 30",
        ),
        (["embed", "-", "-m", "tiny", "-o", "OUT"], "stdin is empty"),
    ],
)
def test_usage_errors(dinov2, photos, tmp_path, monkeypatch, arguments, text):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    names = {"IN": photos, "OUT": tmp_path / "o"}
    done = dinov2(*(names.get(argument, argument) for argument in arguments))
    assert done.code == 2, done.err
    assert text in done.err


def test_evaluation_without_labels(dinov2, photos, tmp_path):
    done = dinov2("eval", "knn", "tiny", "--train", photos, "--test", photos, "-o", tmp_path / "r", "--workers", "0")
    assert done.code == 3
    assert "has no labels" in last_line(done.err)
    assert "?label=folder" in last_line(done.err)


def _copy(source, target):
    import shutil

    shutil.copytree(source, target)
    return target
