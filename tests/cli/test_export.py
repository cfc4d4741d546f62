"""`dinov2 export` of a run that two processes trained with sharded weights, in one process."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from dinov2cli.cli.export import parse_size
from dinov2cli.errors import UserError
from dinov2cli.models.files import read_weights
from dinov2cli.models.load import load_model
from dinov2cli.train.stored import StoredBackbone
from tests.cli.conftest import TINY
from tests.launch import launch

LIMIT = 200_000  # bytes: less than the largest tensor
LARGEST = 4 * 3 * 128 * 128 + 4 * 3 * 128  # query, key and value of a block, which are one tensor in the checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run over two ranks of shards: two steps at 32 pixels, two at 48."""
    run = tmp_path_factory.mktemp("export") / "run"
    sets = ["train.steps=2", "phases=[{steps: 2, global_size: 48}]", "checkpoint.every=2", "parallel.sharding=fsdp"]
    arguments = [part for text in sets for part in ("--set", text)]
    done = launch("pretrain", "demo:digits", "-o", str(run), *TINY, *arguments, "-q", processes=2)
    assert done.returncode == 0, done.stderr
    assert len(list((run / "checkpoints" / "step_00000004" / "teacher").iterdir())) == 2
    return run


@pytest.fixture
def unfinished(trained, tmp_path) -> Path:
    """The run as it was before its end: without export/ and not marked complete."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "export")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "files": {}}))
    return run


def equal(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in state.items()
    )


def test_it_is_the_runs_own_export_bit_for_bit(dinov2, trained, unfinished, tmp_path):
    done = dinov2("export", unfinished, "-o", tmp_path / "m")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "m")), done.err
    own = trained / "export"
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(p.name for p in own.iterdir())
    assert equal(load_file(tmp_path / "m" / "model.safetensors"), load_file(own / "model.safetensors"))
    same = (tmp_path / "m" / "preprocessor_config.json").read_text()
    assert same == (own / "preprocessor_config.json").read_text()
    made, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "m", own))
    origin = made.pop("dinov2cli")
    assert origin.items() >= expected.pop("dinov2cli").items()
    assert made == expected
    assert (origin["run"], origin["step"], origin["part"], origin["format"]) == ("run", 4, "teacher", "hf")


def test_several_files_give_transformers_the_same_features(dinov2, unfinished, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert dinov2("export", unfinished, "-o", tmp_path / "one").code == 0
    done = dinov2("export", unfinished, "-o", tmp_path / "many", "--max-shard-size", "0.2MB", "--json")
    assert done.code == 0, done.err
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == done.json["files"] and len(files) > 10
    assert index["metadata"]["total_size"] == done.json["bytes"] == 4 * done.json["parameters"]
    for name in files:
        held = load_file(tmp_path / "many" / name)
        assert sum(4 * t.numel() for t in held.values()) <= LIMIT or len(held) == 1
        assert {key for key, file in index["weight_map"].items() if file == name} == set(held)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    features = []
    for name in ("one", "many"):
        theirs = transformers.AutoModel.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            features.append(theirs(images).last_hidden_state)
            ours = load_model(tmp_path / name).backbone(images)
        assert (ours.cls - features[-1][:, 0]).abs().max() < 1e-4
    assert torch.equal(*features)
    assert equal(read_weights(tmp_path / "one"), read_weights(tmp_path / "many"))


def test_only_a_piece_is_in_memory_and_heads_are_never_read(dinov2, unfinished, tmp_path, monkeypatch):
    live: list[weakref.ref] = []
    most, seen = 0, []
    read, data = StoredBackbone.read, HuggingFaceStorageReader.read_data

    def counted(self, names):
        nonlocal most
        found = read(self, names)
        live.extend(weakref.ref(tensor.untyped_storage()) for tensor in found.values())
        most = max(most, sum(storage.nbytes() for ref in live if (storage := ref()) is not None))
        return found

    def listed(self, plan, planner):
        seen.extend((item.storage_index.fqn, self.path) for item in plan.items)
        return data(self, plan, planner)

    monkeypatch.setattr(StoredBackbone, "read", counted)
    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", listed)
    done = dinov2("export", unfinished, "-o", tmp_path / "m", "--max-shard-size", str(LIMIT), "--json")
    assert done.code == 0, done.err
    assert most <= LIMIT + LARGEST < done.json["bytes"] / 5
    assert seen and all(name.startswith("network.backbone.") for name, _ in seen)
    assert {Path(path).name for _, path in seen} == {"teacher"}


def test_an_earlier_phase_keeps_its_grid_and_size(dinov2, unfinished, tmp_path):
    assert dinov2("export", unfinished, "-o", tmp_path / "m", "--step", 2).code == 0
    loaded = load_model(tmp_path / "m")
    assert (loaded.backbone.img_size, loaded.preprocess.crop) == (32, 32)
    assert loaded.backbone.pos_embed.shape[1] == 1 + 4 * 4
    assert "at 32 pixels with batch 16" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize(("format_", "place"), [("timm", "m"), ("official", "m.pth")])
def test_other_formats_hold_the_same_weights(dinov2, trained, tmp_path, format_, place):
    done = dinov2("export", trained, "-o", tmp_path / place, "--format", format_)
    assert done.code == 0, done.err
    expected = load_model(trained).backbone.state_dict()
    found = load_model(tmp_path / place).backbone.state_dict()
    if format_ == "timm":  # has no place for it
        found["mask_token"] = expected["mask_token"]
    assert equal(dict(found), dict(expected))
    again = dinov2("export", trained, "-o", tmp_path / place, "--format", format_)
    assert again.code == 0 and "already done" in again.err
    other = dinov2("export", trained, "-o", tmp_path / place, "--format", format_, "--part", "student")
    assert other.code == 2 and "part: teacher → student" in other.err
    assert dinov2("export", trained, "-o", tmp_path / place, "--format", format_, "--step", 2, "--overwrite").code == 0


def test_the_student_is_another_model(dinov2, trained, tmp_path):
    assert dinov2("export", trained, "-o", tmp_path / "s", "--part", "student").code == 0
    student, teacher = read_weights(tmp_path / "s"), read_weights(trained / "export")
    assert student.keys() == teacher.keys()
    assert not equal(student, teacher)
    assert "weights of the student" in (tmp_path / "s" / "README.md").read_text()


def test_again_it_is_done_and_other_settings_are_refused(dinov2, trained, tmp_path):
    out = tmp_path / "m"
    assert dinov2("export", trained, "-o", out).code == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    again = dinov2("export", trained, "-o", out, "--json")
    assert again.json["already_done"] is True and again.json["path"] == str(out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    other = dinov2("export", trained, "-o", out, "--step", 2)
    assert other.code == 2 and "step: 4 → 2" in other.err and "checkpoint" in other.err
    split = dinov2("export", trained, "-o", out, "--max-shard-size", "1MB")
    assert split.code == 2 and "files of other sizes" in split.err
    (out / "notes.txt").write_text("mine")
    done = dinov2("export", trained, "-o", out, "--max-shard-size", "1MB", "--overwrite")
    assert done.code == 0, done.err
    assert not (out / "model.safetensors").exists() and (out / "notes.txt").read_text() == "mine"
    assert dinov2("export", trained, "-o", out, "--overwrite").code == 0
    assert not list(out.glob("model-*")) and not (out / "model.safetensors.index.json").exists()


def test_a_stopped_export_is_no_model_and_begins_again(dinov2, trained, tmp_path, monkeypatch):
    out, sizes = tmp_path / "m", ["--max-shard-size", str(LIMIT)]
    read, calls = StoredBackbone.read, []

    def stopped(self, names):
        calls.append(names)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(StoredBackbone, "read", stopped)
        assert dinov2("export", trained, "-o", out, *sizes).code == 130
    assert len(list(out.glob("model-*.safetensors"))) == 3 and not (out / "config.json").exists()
    assert dinov2("export", trained, "-o", out, "--step", 2, *sizes).code == 2
    assert "(continued)" in dinov2("export", trained, "-o", out, *sizes, "--dry-run").err
    assert dinov2("export", trained, "-o", out, *sizes, "-q").err == ""
    assert equal(read_weights(out), read_weights(trained / "export"))
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_what_dinov2_did_not_write_stays(dinov2, trained, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    shutil.copytree(trained / "export", tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0"}))
    for place, format_ in [("notes", "hf"), ("file", "hf"), ("x.pth", "official"), ("tuned", "timm")]:
        before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
        done = dinov2("export", trained, "-o", tmp_path / place, "--format", format_, "--overwrite")
        assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
        assert before == {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    for place in (trained, trained / "export", trained / "new"):
        done = dinov2("export", trained, "-o", place, "--overwrite")
        assert done.code == 2 and "inside the run" in done.err


def test_a_dry_run_plans_and_writes_nothing(dinov2, trained, tmp_path):
    done = dinov2("export", trained, "-o", tmp_path / "m", "--dry-run", "--json", "--max-shard-size", "2MB")
    assert done.code == 0 and not (tmp_path / "m").exists()
    assert done.json["files"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert done.json["step"] == 4 and done.json["output"].endswith("(new)")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--step", "3"], 2, "has checkpoints of steps 2, 4"),
        (["--format", "onnx"], 2, "expected hf, timm or official"),
        (["--part", "both"], 2, "expected teacher or student"),
        (["--max-shard-size", "many"], 2, "expected a size, as 500MB"),
        (["--max-shard-size", "1GB", "--format", "timm"], 2, "goes with --format hf"),
        (["--format", "official"], 2, "give -o NAME.pth"),
    ],
)
def test_wrong_options_are_one_line(dinov2, trained, tmp_path, arguments, code, text):
    done = dinov2("export", trained, "-o", tmp_path / "m", *arguments)
    assert done.code == code and text in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_wrong_runs_are_one_line(dinov2, trained, unfinished, tmp_path):
    def refused(run: Path, code: int = 3) -> str:
        done = dinov2("export", run, "-o", tmp_path / "m")
        assert done.code == code and len(done.err.splitlines()) == 1, done.err
        assert not (tmp_path / "m").exists()
        return done.err

    assert "does not exist" in refused(tmp_path / "absent")
    assert "was not written by dinov2" in refused(trained / "export")
    newest = unfinished / "checkpoints" / "step_00000004"
    for shard in sorted((newest / "teacher").iterdir()):
        shard.rename(tmp_path / "kept")
        assert "missing" in refused(unfinished)
        shutil.copy(tmp_path / "kept", shard)
    shard.write_bytes((tmp_path / "kept").read_bytes()[:1000])
    assert "cannot be read" in refused(unfinished)
    (newest / "state.json").write_text("{")
    assert "its state.json cannot be read" in refused(unfinished)
    (unfinished / "config.yaml").rename(tmp_path / "config.yaml")
    shutil.rmtree(newest)
    assert "config.yaml, which names the architecture" in refused(unfinished)
    shutil.rmtree(unfinished / "checkpoints")
    assert "no complete checkpoint yet: run `dinov2 " in refused(unfinished)


def test_a_run_that_continued_a_model_knows_its_architecture(dinov2, trained, tmp_path):
    run, initial = tmp_path / "run", tmp_path / "initial"
    assert dinov2("export", trained, "-o", initial, "--step", 2).code == 0
    arguments = ["--init", initial, *TINY, "--set", "train.steps=1", "-q"]
    assert dinov2("pretrain", "demo:digits?count=40", "-o", run, *arguments).code == 0
    assert dinov2("export", run, "-o", tmp_path / "a").code == 0
    assert equal(read_weights(tmp_path / "a"), read_weights(run / "export"))
    shutil.rmtree(initial)
    assert dinov2("export", run, "-o", tmp_path / "b").code == 0
    assert (tmp_path / "b" / "config.json").read_text() == (tmp_path / "a" / "config.json").read_text()
    (run / "export").rename(tmp_path / "gone")
    done = dinov2("export", run, "-o", tmp_path / "c")
    assert done.code == 3 and "needed for its architecture" in done.err


def test_sizes_are_read_as_people_write_them():
    assert parse_size("500MB") == parse_size("500 mb") == parse_size("0.5g") == 500_000_000
    assert parse_size("2GiB") == 2 * 2**30
    assert parse_size("1000") == parse_size("1000B") == 1000
    for text in ("", "0", "-1MB", "5 apples", "GB"):
        with pytest.raises(UserError, match="expected a size"):
            parse_size(text)
