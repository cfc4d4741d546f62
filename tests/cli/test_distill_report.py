"""Teacher and students beside each other at the end of a run, with real exports on the demo images."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dinov2cli.artifacts.output import Output
from dinov2cli.cli import distill_report
from dinov2cli.cli.distill_report import check_comparison, read_side_by_side, write_side_by_side
from dinov2cli.cli.talk import Talk
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, WorkError
from dinov2cli.models.export import save_hf
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.report.run import run_report

TRAIN, TEST = "demo:digits?count=120", "demo:digits?split=test&count=60"
SETTINGS = {"images": 100, "seed": 0, "precision": "fp32", "device": torch.device("cpu")}


def export(path, *, width, patch, size, seed):
    net = VisionTransformer(img_size=size, patch_size=patch, embed_dim=width, depth=2, num_heads=2)
    net.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weight in net.blocks.parameters():
            weight.mul_(10)  # as it begins, a class token hardly looks at its image
    save_hf(net.eval(), path, resize=round(size * 8 / 7), crop=size, card="A test.")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "teacher": export(folder / "big", width=32, patch=8, size=32, seed=0),
        "small": export(folder / "small", width=16, patch=4, size=28, seed=1),
        "same": folder / "big",
    }


@pytest.fixture
def memory(monkeypatch):
    """No process is started to measure it; the last test does that."""
    monkeypatch.setattr("dinov2cli.bench.peak.run_in_child", lambda _, models, *__: [5 * 2**20] * len(models))


def compared(tmp_path, models, source=TRAIN, students=("small",), **more):
    out = Output.open(tmp_path / "run", "run", command="distill", config={})
    chosen = {name if len(students) > 1 else "": models[name] for name in students}
    with out:
        metrics = write_side_by_side(
            out, Talk(quiet=True), str(models["teacher"]), chosen, open_source(source), **{**SETTINGS, **more}
        )
    left = read_side_by_side(out.path)
    assert left is not None
    return metrics, *left


@pytest.mark.usefixtures("memory")
def test_a_run_gets_every_figure_of_both_models(tmp_path, models):
    metrics, found, maps = compared(tmp_path, models)
    teacher, student = found.models
    assert (teacher.label, student.label, teacher.model, student.model) == (
        "teacher",
        "student",
        "big",
        "vit-d16-l2-h2-p4",
    )
    # The teacher's patch of 8 does not divide 28 px, so it keeps its own size.
    assert (teacher.size, student.size) == (32, 28) and found.batch == 64
    assert set(student.figures) == {
        *("knn", "linear", "class_cosine", "class_constant", "class_cka", "patch_cosine", "patch_constant")
    }
    assert set(student.changes) == {"knn", "linear"} == set(teacher.figures)
    change = student.figures["knn"].value - teacher.figures["knn"].value
    assert student.changes["knn"].value == pytest.approx(change) == pytest.approx(metrics["student/knn_change"])
    assert student.figures["knn"].n == 100 and student.figures["linear"].n == 50
    assert metrics["teacher/parameters"] > metrics["student/parameters"] > 0
    assert metrics["student/images_per_s"] > 0 and metrics["student/memory_bytes"] == 5 * 2**20
    assert found.notes == [] and "100 images drawn from demo:digits?count=120" in found.protocol[0]
    assert maps.count("<image ") == 6 * 3
    page = run_report([], title="r", distilled=True, beside=(found, maps))
    assert "What teacher and students see" in page and "How far the tokens agree" in page


@pytest.mark.usefixtures("memory")
def test_several_students_and_one_that_is_the_teacher(tmp_path, models):
    metrics, found, maps = compared(tmp_path, models, students=("small", "same"), test=TEST)
    assert [one.label for one in found.models] == ["teacher", "small", "same"]
    same = found.models[2]
    assert {same.changes[key].value for key in ("knn", "linear")} == {0}
    for key in ("class_cosine", "class_plain", "patch_cosine", "patch_plain", "class_cka"):
        assert same.figures[key].value == pytest.approx(1, abs=1e-3), key
    assert found.models[1].figures["class_constant"].value < found.models[1].figures["class_cosine"].value < 0.9999
    assert same.figures["knn"].n == 60 and "60 drawn from demo:digits?count=60&split=test" in found.protocol[0]
    assert maps.count("<image ") == 6 * 4 and "same/knn_change" in metrics
    assert found.notes == []


@pytest.mark.usefixtures("memory")
def test_the_teacher_sees_the_size_asked_for_or_that_of_the_students(tmp_path, models):
    _, found, _ = compared(tmp_path / "a", models, teacher_size=16)
    assert found.models[0].size == 16
    swapped = {"teacher": models["small"], "small": models["teacher"]}
    _, found, _ = compared(tmp_path / "b", swapped)
    assert [one.size for one in found.models] == [32, 32]
    assert found.notes == ["The teacher sees images of 32 px, as the students do; its own size is 28 px."]


@pytest.mark.usefixtures("memory")
def test_without_labels_the_rest_is_measured_and_the_reason_said(tmp_path, models, photos):
    metrics, found, maps = compared(tmp_path, models, source=str(photos), images=40)
    assert "student/knn" not in metrics and "student/class_cosine" in metrics and maps
    assert len(found.notes) == 1 and found.notes[0].startswith("K-NN and linear probe are left out: ")
    assert "has no labels; name their column with ?label=NAME" in found.notes[0]


@pytest.mark.usefixtures("memory")
def test_what_fails_alone_is_left_out_alone(tmp_path, models, monkeypatch):
    def broken(*_, **__):
        raise WorkError("all 26 linear heads diverged: lower the rates")

    monkeypatch.setattr("dinov2cli.evaluation.side_by_side.train_linear", broken)
    monkeypatch.setattr("dinov2cli.bench.peak.run_in_child", lambda *_: None)  # as where the system does not tell
    metrics, found, _ = compared(tmp_path, models, images=8)
    assert "student/knn" in metrics and "student/linear" not in metrics
    text = " ".join(found.notes)
    for part in (
        "Teacher: linear is left out: all 26 linear heads diverged",
        "Student: linear is left out",
        "Student: agreement of tokens is left out: 8 images are too few",
        "Memory is left out: this system does not tell",
    ):
        assert part in text, part


def test_test_images_are_checked_before_a_run(tmp_path, photos):
    source = open_source(TRAIN)
    check_comparison(source, None)
    check_comparison(source, TEST)
    with pytest.raises(InputError, match="nowhere"):
        check_comparison(source, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="has no labels"):
        check_comparison(source, str(photos))
    with pytest.raises(InputError, match="classes that demo:digits"):
        check_comparison(source, f"{photos}?label=folder")
    with pytest.raises(InputError, match="has no labels"):
        check_comparison(open_source(str(photos)), TEST)


def test_a_run_without_a_comparison_has_none_and_a_broken_one_is_named(tmp_path):
    assert read_side_by_side(tmp_path) is None
    (tmp_path / distill_report.COMPARISON_FILE).write_text("{")
    with pytest.raises(InputError, match=r"comparison\.json: "):
        read_side_by_side(tmp_path)


def test_ctrl_c_leaves_nothing_half_written(tmp_path, models, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov2cli.bench.forward.forward_seconds", stopped)
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path, models)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"manifest.json"}


SCRIPT = """
import sys, torch
from dinov2cli.bench.forward import host_memory, weight_bytes
from dinov2cli.bench.peak import run_in_child
from dinov2cli.models.load import load_model
if __name__ == "__main__":
    torch.set_num_threads(1)
    models = [(sys.argv[1], size) for size in (28, 56, 28)]
    print([run_in_child(host_memory, models, batch, "fp32") for batch in (32, 512)])
    print(weight_bytes(load_model(sys.argv[1]).encoder))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of a part of a process's life")
def test_memory_of_a_pass_grows_with_the_batch(tmp_path, models):
    """512 images of 50 tokens, 16 wide: attention and feed-forward hold several times 512 x 50 x 64 x 4 bytes."""
    script = tmp_path / "measure.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, script, models["small"]], capture_output=True, text=True, env=environment, check=True
    )
    measured, weights = done.stdout.splitlines()
    (few, *_), (many, large, again) = json.loads(measured)
    hidden = 512 * 50 * 64 * 4
    assert int(weights) <= few < many
    assert hidden < many - few < 12 * hidden
    assert large > 2 * many
    assert again == pytest.approx(many, rel=0.3)  # the last of a process as if it were the first
