"""`dinov2 distill`: its runs from the first line to the export, resumed, of one student and of several."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dinov2cli.artifacts.manifest import read_manifest
from dinov2cli.cli.main import run
from dinov2cli.errors import Preempted
from dinov2cli.models.load import load_model
from tests.cli.distill_runs import SMALL, teacher_run
from tests.launch import ROOT


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    """A run of `dinov2 pretrain` with its checkpoint."""
    return teacher_run(photos, tmp_path_factory)


@pytest.fixture(scope="module")
def alone(photos, teacher, tmp_path_factory):
    """A finished run of one student."""
    path = tmp_path_factory.mktemp("alone") / "run"
    settings = ("--set", "report.images=40", "--set", "eval.every=4")
    assert (
        run(["distill", f"{photos}?label=folder", "-t", str(teacher), "-o", str(path), *SMALL, *settings, "--quiet"])
        == 0
    )
    return path


@pytest.fixture(scope="module")
def several(photos, teacher, tmp_path_factory):
    """A finished run of two students: the one of `alone`, and one of another patch size."""
    path = tmp_path_factory.mktemp("several") / "run"
    students = ("--student", "tiny", "--student", "vitt4", "--set", "eval.every=4")
    assert (
        run(["distill", f"{photos}?label=folder", "-t", str(teacher), "-o", str(path), *SMALL, *students, "--quiet"])
        == 0
    )
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def stop_at(patch, step: int, number: int) -> None:
    """Send a signal to this process once that step is logged."""
    from dinov2cli.cli.watch import RunWatch

    told = RunWatch.on_metrics

    def stopping(self, line, total):
        told(self, line, total)
        if line["step"] == step:
            os.kill(os.getpid(), number)

    patch.setattr(RunWatch, "on_metrics", stopping)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_model_card_report_and_what_it_was_made_of(dinov2, photos, teacher, alone, tmp_path):
    manifest = read_manifest(alone)
    assert manifest.complete and manifest.extra["steps"] == 4
    images, model = manifest.inputs
    assert model["spec"] == str(teacher) and model["kind"] == "model" and len(model["sha256"]) == 64
    assert images["rows"] == 72
    stored = yaml.safe_load((alone / "config.yaml").read_text())
    assert (stored["heads"]["prototypes"], stored["loss"]["teacher_temperature"]) == (64, 0.05)
    assert stored["teacher"]["model"] == str(teacher)
    card = (alone / "export" / "README.md").read_text()
    assert "base_model" not in card  # a directory is no name on the hub
    assert f"Distilled by `dinov2 distill` from `{teacher}` for 4 steps (32 images)" in card
    assert "These are the weights of the student's moving average." in card
    assert set(lines(alone)[-1]) >= {"loss/total", "loss/ibot", "loss/dino_local", "loss/koleo", "eval/knn"}
    page = (alone / "report.html").read_text()
    assert "Distillation of a DINOv2 backbone from a teacher." in page
    assert json.loads((alone / "comparison.json").read_text())
    loaded = load_model(alone)
    assert loaded.backbone.embed_dim == 64 and not loaded.random
    assert dinov2("embed", photos, "-m", alone, "-o", tmp_path / "e", "--workers", "0").code == 0


def test_the_first_lines_say_what_learns_from_what(dinov2, photos, teacher, tmp_path):
    done = dinov2("distill", photos, "-t", teacher, "-o", tmp_path / "r", *SMALL)
    assert done.code == 0, done.err
    assert "distill run (0.82 M parameters) into tiny (0.16 M parameters) on 72 images, cpu, fp32" in done.err
    assert "teacher's heads: the heads of the moving average in" in done.err
    assert "heads.prototypes auto, 64: as many as the teacher's heads have" in done.err
    assert "loss.teacher_temperature auto, 0.05: as the teacher's own training ended" in done.err
    assert done.out.strip() == str(tmp_path / "r")
    again = dinov2("distill", photos, "-t", teacher, "-o", tmp_path / "r", *SMALL, "--json")
    assert again.code == 0 and again.json["already_done"]


def test_a_dry_run_reckons_with_both_and_writes_nothing(dinov2, photos, teacher, tmp_path):
    cached = ("--set", "data.views=2", "--set", "teacher.cache=true")
    options = ("-t", teacher, "-o", tmp_path / "r", *SMALL, *cached, "--dry-run", "--json")
    plan = dinov2("distill", photos, *options).json
    own, whole = weights(teacher / "export"), load_model(teacher).backbone
    assert plan["plan"] == f"distill {photos}" and plan["images"] == 72
    assert plan["parameters of the teacher"] == sum(t.numel() for t in own.values())
    assert plan["share of the teacher's parameters"] == round(plan["parameters"] / plan["parameters of the teacher"], 4)
    assert plan["bytes of the cache"] >= 72 * 2 * 2 * (1 + 16) * whole.embed_dim * 2
    looking, learning = plan["GFLOP of the teacher per image"], plan["GFLOP per image"]
    assert plan["teacher's share of the operations"] == pytest.approx(looking / (looking + learning), abs=2e-3)
    assert plan["steps"] == 4 and plan["batch size"] == 8
    assert "the heads of the moving average" in plan["teacher's heads"]
    assert {"export/", "teacher-tokens/ (until the end)"} <= set(plan["files"])
    assert plan["heads.prototypes"].startswith("auto, 64: ")
    assert not (tmp_path / "r").exists()
    two = dinov2("distill", photos, *options, "--student", "tiny", "--student", "vitt4").json
    assert {"parameters of tiny", "GFLOP per image of vitt4", "student vitt4"} <= set(two)
    assert {"export/tiny/", "export/vitt4/"} <= set(two["files"])


def test_operations_are_those_that_torch_counts(dinov2, photos, teacher, tmp_path):
    """The teacher's pass with its heads, as torch counts it."""
    from torch.utils.flop_counter import FlopCounterMode

    from dinov2cli.train.open_teacher import open_teacher

    plan = dinov2("distill", photos, "-t", teacher, "-o", tmp_path / "r", *SMALL, "--dry-run", "--json").json
    opened = open_teacher(str(teacher)).teacher
    with FlopCounterMode(display=False) as counter:
        tokens = opened.tokens(torch.zeros(2, 3, 32, 32), 4)
        opened.logits(tokens, torch.arange(32))
    assert plan["GFLOP of the teacher per image"] == pytest.approx(counter.get_total_flops() / 1e9, rel=0.03)


def test_several_students_have_an_export_each_and_are_what_they_would_be_alone(dinov2, several, alone, tmp_path):
    assert sorted(path.name for path in (several / "export").iterdir()) == ["tiny", "vitt4"]
    assert same(several / "export" / "tiny", alone / "export")
    assert load_model(several / "export" / "vitt4").backbone.patch_size == 4
    last = lines(several)[-1]
    assert {"tiny/loss/ibot", "vitt4/loss/ibot", "tiny/eval/knn", "loss/total"} <= set(last)
    assert last["tiny/loss/total"] == lines(alone)[-1]["loss/total"]
    assert len(list((several / "pca").glob("*/step_00000004.png"))) == 2
    assert "vitt4" in (several / "report.html").read_text()
    done = dinov2("embed", "demo:photos?count=40", "-m", several, "-o", tmp_path / "e")
    assert done.code == 3
    assert f"is a run of several students; expected one of them: {several / 'export' / 'tiny'} or " in done.err


@pytest.mark.parametrize("name", ["tiny", "vitt4"])
def test_export_takes_one_of_several(dinov2, several, tmp_path, name):
    done = dinov2("export", several, "-o", tmp_path / "m", "--student", name, "--json")
    assert done.code == 0, done.err
    assert done.json["student"] == name
    assert same(tmp_path / "m", several / "export" / name)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "base_model" not in card and "out of a run of `dinov2 distill` from" in card
    assert "These are the weights of the student's moving average." in card


def test_export_of_a_run_of_one_and_wrong_names(dinov2, several, alone, tmp_path):
    assert dinov2("export", alone, "-o", tmp_path / "m").code == 0
    assert same(tmp_path / "m", alone / "export")
    none = dinov2("export", several, "-o", tmp_path / "n")
    assert none.code == 2
    assert "no --student: " in none.err and "expected --student tiny or --student vitt4" in none.err
    wrong = dinov2("export", several, "-o", tmp_path / "n", "--student", "vits14")
    assert wrong.code == 2 and "--student vits14: " in wrong.err
    alone_named = dinov2("export", alone, "-o", tmp_path / "n", "--student", "tiny")
    assert alone_named.code == 2 and "trained one model; leave out --student" in alone_named.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_to_the_same_weights(dinov2, photos, teacher, alone, tmp_path, monkeypatch, number, code):
    arguments = ("distill", photos, "-t", teacher, "-o", tmp_path / "r", *SMALL)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        assert dinov2(*arguments).code == code
    assert not (tmp_path / "r" / "export").exists()
    done = dinov2(*arguments)
    assert done.code == 0, done.err
    assert "continuing from step_00000002" in done.err
    assert same(tmp_path / "r" / "export", alone / "export")


def test_other_settings_and_another_teacher_at_the_same_place_are_refused(dinov2, photos, teacher, tmp_path):
    import shutil

    copy, out = tmp_path / "teacher", tmp_path / "r"
    shutil.copytree(teacher / "export", copy)
    arguments = ["distill", photos, "-t", copy, "-o", out, *SMALL]
    assert dinov2(*arguments).code == 0
    other = dinov2(*arguments, "--set", "loss.gram_weight=1")
    assert other.code == 2 and "loss.gram_weight" in other.err
    assert "already done" in dinov2(*arguments, "--set", "teacher.precision=fp32", "--set", "report.images=7").err
    state = weights(copy)
    from safetensors.torch import save_file

    save_file({key: value + 1e-3 for key, value in state.items()}, copy / "model.safetensors", {"format": "pt"})
    changed = dinov2(*arguments)
    assert changed.code == 2 and "input" in changed.err
    assert same(out / "export", out / "export")
    assert dinov2(*arguments, "--overwrite").code == 0


def test_the_teacher_looks_at_every_view_once_with_a_cache(dinov2, photos, teacher, tmp_path, monkeypatch):
    """Its tokens come back rounded to float16: the losses are those without a cache but for that."""
    from dinov2cli.train.teacher import FrozenTeacher

    seen, tokens = [], FrozenTeacher.tokens

    def counted(self, crops, grid):
        seen.append(len(crops) // 2)
        return tokens(self, crops, grid)

    monkeypatch.setattr(FrozenTeacher, "tokens", counted)
    data = "demo:photos?count=40"
    views = [*SMALL, "--set", "data.views=1", "--set", "train.steps=8"]
    plain = dinov2("distill", data, "-t", teacher, "-o", tmp_path / "plain", *views)
    assert plain.code == 0, plain.err
    assert sum(seen) == 8 * 8
    seen.clear()
    done = dinov2("distill", data, "-t", teacher, "-o", tmp_path / "kept", *views, "--set", "teacher.cache=true")
    assert done.code == 0, done.err
    assert sum(seen) == 40
    for one, two in zip(lines(tmp_path / "plain"), lines(tmp_path / "kept"), strict=True):
        assert one["loss/total"] == pytest.approx(two["loss/total"], rel=1e-2)
    assert not (tmp_path / "kept" / "teacher-tokens").exists()  # and none of it in the manifest
    assert not any("tokens" in name for name in read_manifest(tmp_path / "kept").files)
    seen.clear()
    again = ("distill", data, "-t", teacher, "-o", tmp_path / "again", *views, "--set", "teacher.cache=true")
    with monkeypatch.context() as patch:
        stop_at(patch, 6, signal.SIGTERM)
        assert dinov2(*again).code == 75
    assert (tmp_path / "again" / "teacher-tokens").is_dir()
    assert dinov2(*again).code == 0
    assert sum(seen) == 40  # those before the stop are there after it
    assert same(tmp_path / "again" / "export", tmp_path / "kept" / "export")


def test_over_two_processes_it_is_the_same_run(photos, teacher, alone, tmp_path):
    """The same batch divided among them: the same weights but for the order of sums, and one voice."""
    line = ["distill", f"{photos}?label=folder", "-t", str(teacher), "-o", str(tmp_path / "r"), *SMALL, "-n", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dinov2cli", *line, "--set", "data.batch_size=4"],
        capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 ranks of cpu, ddp") == 1
    one, two = weights(alone / "export"), weights(tmp_path / "r" / "export")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6


def test_a_phase_at_twice_the_resolution(dinov2, photos, teacher, tmp_path):
    phase = "phases=[{steps: 2, global_size: 64, local_size: 32, batch_size: 4}]"
    done = dinov2("distill", photos, "-t", teacher, "-o", tmp_path / "r", *SMALL, "--set", phase)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "r" / "export" / "config.json").read_text())["image_size"] == 64


def test_features_and_gram_need_no_heads_and_random_teachers_are_told(dinov2, photos, tmp_path):
    terms = ["dino_weight=0", "ibot_weight=0", "koleo_weight=0", "feature_weight=1", "gram_weight=1"]
    sets = [word for term in terms for word in ("--set", f"loss.{term}")]
    done = dinov2("distill", photos, "-t", "tiny", "-o", tmp_path / "r", *SMALL, *sets, "--set", "crops.local_number=0")
    assert done.code == 0, done.err
    assert "model tiny has random weights" in done.err
    assert "heads.prototypes auto" not in done.err
    assert {key for key in lines(tmp_path / "r")[-1] if key.startswith("loss/")} == {
        "loss/total",
        "loss/feature",
        "loss/gram",
    }


def test_a_student_larger_than_its_teacher_is_allowed_and_told(dinov2, photos, alone, tmp_path):
    large = ["--set", "model.embed_dim=128", "--set", "model.num_heads=2", "--set", "teacher.heads=learned"]
    done = dinov2("distill", photos, "-t", alone, "-o", tmp_path / "r", *SMALL, *large, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert "the student is larger than its teacher" in done.json["note"]


def test_a_card_names_a_teacher_of_the_hub_alone(tmp_path):
    from dinov2cli.cli.distill_checks import base_model

    assert base_model("facebook/dinov2-base") == {"base_model": "facebook/dinov2-base"}
    assert base_model("transformers:facebook/dinov2-base@main") == {"base_model": "facebook/dinov2-base"}
    assert base_model(str(tmp_path)) == base_model("vits14") == {}


@pytest.mark.parametrize("failure", [RuntimeError("CUDA out of memory"), Preempted("stopped by SIGTERM")])
def test_a_comparison_that_fails_loses_nothing_and_one_that_is_stopped_is_made_again(
    dinov2, photos, teacher, tmp_path, monkeypatch, failure
):
    def fail(*_):
        raise failure

    order = ["distill", photos, "-t", teacher, "-o", tmp_path / "run", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("dinov2cli.cli.assembly_distill.DistillAssembly.compare", fail)
        done = dinov2(*order)
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    complete = json.loads((tmp_path / "run" / "manifest.json").read_text())["complete"]
    if isinstance(failure, Preempted):
        assert (done.code, complete) == (75, False)
        assert dinov2(*order).code == 0
        assert json.loads((tmp_path / "run" / "manifest.json").read_text())["complete"]
    else:
        assert (done.code, complete) == (0, True)
        assert "not compared: CUDA out of memory; `dinov2 eval` compares" in " ".join(done.err.split())
