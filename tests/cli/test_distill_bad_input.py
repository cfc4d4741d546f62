"""What `dinov2 distill` refuses: one line, the right exit code, and nothing written or lost."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.distill_runs import SMALL, teacher_run

FEATURES = ["loss.dino_weight=0", "loss.ibot_weight=0", "loss.feature_weight=1"]


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    """A run of `dinov2 pretrain` with its checkpoint: width 128, patch 8, 64 prototypes."""
    return teacher_run(photos, tmp_path_factory)


@pytest.mark.parametrize(
    ("sets", "code", "text"),
    [
        (
            ["crops.global_size=36", "model.patch_size=4", "crops.local_number=0"],
            2,
            "the teacher's patch size 8 does not",
        ),
        (["teacher.image_size=30"], 2, "the teacher's patch size 8 does not divide the 30 pixels"),
        (["crops.local_size=20"], 2, "crops.local_size 20 is not a multiple of the patch size 8"),
        (["crops.global_size=30"], 2, "crops.global_size 30 is not a multiple of the patch size 8"),
        (["phases=[{steps: 2, global_size: 60}]"], 2, "phases[0].global_size 60 is not a multiple"),
        (
            ["teacher.adapter=none", *FEATURES],
            2,
            "teacher.adapter=none: the student's tokens are 64 wide, the teacher's",
        ),
        (["teacher.adapter=none", "teacher.heads=learned"], 2, "and teacher.heads=learned compares them"),
        (["heads.prototypes=32"], 2, "heads.prototypes: found 32, the teacher's head has 64; leave it out"),
        (["heads.ibot_prototypes=32"], 2, "heads.ibot_prototypes: found 32, the teacher's head has 64"),
        (["loss.dino_weight=0", "loss.ibot_weight=0"], 2, "loss: found no term that learns from the teacher"),
        (["teacher.cache=true"], 2, "teacher.cache: found no data.views"),
        (
            ["loss.gram_weight=1", "crops.global_size=8", "crops.local_number=0"],
            2,
            "gives the student 1 patch, expected 4",
        ),
        (["train.compile=graphs"], 2, "CUDA graphs need an NVIDIA GPU"),
        (["teacher.precision=fp16"], 2, "fp16 on a CPU"),
        (["report.test=nowhere"], 3, "nowhere"),
        (["model.arch=resnet"], 2, "resnet"),
    ],
)
def test_settings_that_cannot_work(dinov2, photos, teacher, tmp_path, sets, code, text):
    options = [word for value in sets for word in ("--set", value)]
    if any("report" in value for value in sets):
        options += ["--set", "report.images=10"]
    done = dinov2("distill", photos, "-t", teacher, "-o", tmp_path / "r", *SMALL, *options)
    assert done.code == code, done.err
    assert text in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "--teacher is missing: expected the MODEL to learn from"),
        (["-t", "baseline:pixels"], 2, "nobody trained it"),
        (["-t", "sscd:nothing.pt"], 2, "a descriptor gives one vector per image"),
        (["-t", "no/such/model"], 3, "not found"),
        (["-t", "tiny", "--set", "teacher.heads=run"], 3, "teacher.heads=run: tiny is a backbone alone"),
        (["-t", "tiny", "--student", "vitt8", "--student", "vitt8"], 2, "--student vitt8 is given twice"),
        (["-t", "tiny", "--student", "vitt8", "--student", "resnet"], 2, "resnet"),
        (["-t", "tiny", "--config", "tiny-cpu"], 2, "--config tiny-cpu: is a recipe of `dinov2 pretrain`"),
        (["-t", "tiny", "-n", "3", "--set", "data.views=2", "--set", "teacher.cache=true", "--dry-run"], 2, "3 ranks"),
    ],
)
def test_commands_that_cannot_work(dinov2, photos, tmp_path, arguments, code, text):
    done = dinov2("distill", photos, "-o", tmp_path / "r", *SMALL, *arguments)
    assert done.code == code, done.err
    assert text in done.err
    assert len(done.err.strip().splitlines()) <= 2, done.err  # a random model warns first
    assert not (tmp_path / "r").exists()


def test_recipes_of_distillation_are_none_of_pretraining(dinov2, photos, tmp_path):
    done = dinov2("pretrain", photos, "-o", tmp_path / "r", "--config", "distill-vits14")
    assert done.code == 2
    assert "--config distill-vits14: is a recipe of `dinov2 distill`" in done.err


@pytest.mark.parametrize("where", [".", "export", "export/small", "..", "small"])
def test_teacher_and_student_never_lie_in_each_other(dinov2, photos, teacher, tmp_path, where):
    """Nor does --overwrite make room for one in the other."""
    copy = tmp_path / "all" / "run"
    shutil.copytree(teacher, copy)
    before = sorted(path for path in copy.rglob("*"))
    out = (copy / where).resolve()
    for given in (copy, copy / "export"):
        done = dinov2("distill", photos, "-t", given, "-o", out, *SMALL, "--overwrite")
        assert done.code == 2
        assert f"the teacher {given}; choose another place for the student" in done.err
        assert sorted(path for path in copy.rglob("*")) == before
    assert dinov2("distill", photos, "-t", copy / "export" / "model.safetensors", "-o", copy, *SMALL).code == 2


def test_teacher_files_that_are_not_whole(dinov2, photos, teacher, tmp_path):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher / "export", copy)
    state = load_file(copy / "model.safetensors")
    missing = {key: value for key, value in state.items() if "layer.1." not in key}
    save_file(missing, copy / "model.safetensors", {"format": "pt"})
    done = dinov2("distill", photos, "-t", copy, "-o", tmp_path / "r", *SMALL)
    assert done.code == 3 and len(done.err.strip().splitlines()) == 1
    assert "missing" in done.err
    (copy / "model.safetensors").write_bytes(b"no tensors")
    assert dinov2("distill", photos, "-t", copy, "-o", tmp_path / "r", *SMALL).code == 3
    assert not (tmp_path / "r").exists()


def test_a_run_of_several_students_is_no_teacher_by_itself(dinov2, photos, tmp_path):
    two = ("--student", "tiny", "--student", "vitt4", "--set", "train.steps=1")
    assert dinov2("distill", photos, "-t", "tiny", "-o", tmp_path / "two", *SMALL, *two).code == 0
    done = dinov2("distill", photos, "-t", tmp_path / "two", "-o", tmp_path / "r", *SMALL)
    assert done.code == 2
    assert "found a run of several students (tiny, vitt4), expected one of them" in done.err
    one = ("-t", tmp_path / "two" / "export" / "vitt4", "--set", "train.steps=1")
    done = dinov2("distill", photos, *one, "-o", tmp_path / "r", *SMALL)
    assert done.code == 0, done.err
