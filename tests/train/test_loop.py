"""Runs end to end on real tiles: metrics, resume bit for bit, signals, kill -9, loss that is not finite."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov2cli.artifacts.run import Journal, read_metrics
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader
from dinov2cli.data.source import open_source
from dinov2cli.errors import Preempted, UserError, WorkError
from dinov2cli.train.checkpoint import latest_checkpoint, list_checkpoints
from dinov2cli.train.parallel import setup
from dinov2cli.train.schedules import RunLength
from dinov2cli.train.ssl import Objective

SCRIPT = Path(__file__).with_name("tiny_run.py")
FIXED = (
    "step", "images", "loss/total", "loss/dino_local", "loss/dino_global", "loss/ibot", "loss/koleo",
    "lr", "grad_norm", "images_per_s", "data_wait",
)  # fmt: skip
TIMING = {"images_per_s", "data_wait", "seconds"}


def curve(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(run)]


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, moments included, as bytes."""
    newest = latest_checkpoint(run / "checkpoints")
    tensors = {}
    for path in newest.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            tensors[f"{path.parent.name}.{name}"] = tensor.numpy().tobytes()
    assert {name.split(".")[0] for name in tensors} == {"student", "teacher", "optimizer"}
    return tensors


def subprocess_run(run: Path, steps: int, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(run), str(steps), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """An uninterrupted run of 12 steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    tiny.tiny_train(run, 12)
    return run


def test_every_line_has_the_fixed_names(whole):
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert all(isinstance(line[name], int | float) for name in FIXED)
        assert line["images"] == 8 * line["step"]
        parts = [line[f"loss/{name}"] for name in ("dino_local", "dino_global", "ibot", "koleo")]
        assert line["loss/total"] == pytest.approx(sum(parts), rel=1e-5)
        assert 0 <= line["data_wait"] <= 1


def test_resume_is_bitwise_exact(whole, tiny, tmp_path):
    run = tmp_path / "run"

    def stop_at_8(line, total):
        if line["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="stopped by SIGTERM after saving step 8 of 12; run the same command"):
        tiny.tiny_train(run, 12, on_metrics=stop_at_8)
    torch.manual_seed(99)  # whatever happens to the global generator in between must not matter
    tiny.tiny_train(run, 12)
    assert curve(run) == curve(whole)
    assert weights(run) == weights(whole)


def test_log_interval_average_survives_a_checkpoint_inside_it(tiny, tmp_path):
    tiny.tiny_train(tmp_path / "whole", 8, log_every=4, checkpoint_every=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000008")
    tiny.tiny_train(tmp_path / "cut", 8, log_every=4, checkpoint_every=3)
    assert "continuing from step_00000006" in (tmp_path / "cut/log.txt").read_text()
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_kill_9_while_saving_loses_only_steps_after_the_last_checkpoint(whole, tiny, tmp_path):
    run = tmp_path / "run"
    process = subprocess_run(run, 12)
    for line in process.stdout:
        if int(line) == 7:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    # What a kill in the middle of the next save leaves, and a metrics line cut short.
    shutil.copytree(run / "checkpoints/step_00000005", run / "checkpoints/.partial-step_00000010")
    (run / "checkpoints/step_00000010").mkdir()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss/to')
    assert latest_checkpoint(run / "checkpoints").name == "step_00000005"
    tiny.tiny_train(run, 12)
    assert curve(run) == curve(whole)
    assert weights(run) == weights(whole)
    assert not list((run / "checkpoints").glob(".partial-*"))


@pytest.mark.parametrize(("name", "options"), [("SIGTERM", ["workers"]), ("SIGUSR1", []), ("SIGINT", ["workers"])])
def test_a_signal_saves_before_the_process_ends(tmp_path, name, options):
    process = subprocess_run(tmp_path / "run", 100000, *options)
    for line in process.stdout:
        if int(line) == 3:
            process.send_signal(getattr(signal, name))
            break
    # Also ends: worker processes that outlive the loop would hang the exit of the interpreter.
    stderr = process.communicate(timeout=300)[1]
    newest = latest_checkpoint(tmp_path / "run/checkpoints")
    step = json.loads((newest / "state.json").read_text())["step"]
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert step == last >= 3
    assert f"stopped by {name} after saving step {step} of 100000" in (tmp_path / "run/log.txt").read_text()
    assert ("KeyboardInterrupt" if name == "SIGINT" else "Preempted") in stderr
    assert process.returncode != 0


def test_a_finished_run_does_nothing_more(whole, tiny):
    before = (whole / "metrics.jsonl").read_bytes()
    result = tiny.tiny_train(whole, 12)
    assert (result.step, result.images) == (12, 96)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tiny, tmp_path):
    run, model = tmp_path / "run", tiny.tiny_model()

    def poison(line, total):
        if line["step"] == 6:
            with torch.no_grad():
                model.student.backbone.norm.weight.fill_(float("nan"))

    text = r"not finite in 3 steps in a row, the last seen at step 9; .* step_00000005; start again with --overwrite"
    with pytest.raises(WorkError, match=text):
        tiny.tiny_train(run, 12, model=model, on_metrics=poison, max_bad_steps=3)
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [5]
    lines = read_metrics(run)
    assert [(line["step"], line["skipped"]) for line in lines[-3:]] == [(6, 0), (7, 1), (8, 1)]
    assert lines[-1]["loss/total"] is None
    assert "step 7: 1 of the last steps skipped, loss or gradient was not finite" in (run / "log.txt").read_text()


def test_a_single_bad_step_leaves_the_student_as_it_was(tiny, tmp_path):
    model, seen = tiny.tiny_model(), {}

    class Poisoned(tiny.TileLoader):
        """Every pixel of batch 3 becomes NaN in the augmentation below."""

    def augment(global_crops, local_crops, *, seed, epoch, sample):
        factor = float("nan") if int(epoch[0]) == 3 else 1.0
        return global_crops.float() / 255 * factor, local_crops.float() / 255

    def watch(line, total):
        seen[line["step"]] = {k: v.clone() for k, v in model.student.state_dict().items()}

    tiny.tiny_train(tmp_path, 6, model=model, augment=augment, on_metrics=watch, phase={"loader": Poisoned()})
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [0, 0, 0, 1, 0, 0]
    assert all(torch.equal(seen[3][name], seen[4][name]) for name in seen[3])
    assert not all(torch.equal(seen[4][name], seen[5][name]) for name in seen[4])
    assert all(torch.isfinite(value).all() for value in model.teacher.state_dict().values())


def test_loss_decreases_on_real_tiles(tiny, tmp_path):
    tiny.tiny_train(tmp_path, 120, log_every=20, checkpoint_every=0, method={"objective": Objective(koleo_weight=0.0)})
    losses = [line["loss/total"] for line in read_metrics(tmp_path)]
    # Uniform predictions over 64 prototypes cost log 64 in DINO and, with half of the crops masked, half of it in iBOT.
    assert losses[-1] < 1.5 * math.log(64) - 0.08
    assert losses[-1] < losses[2] < losses[0]


def test_softmax_centring_resumes_with_its_centre(tiny, tmp_path):
    tiny.tiny_train(tmp_path / "whole", 6, model=tiny.tiny_model(centering="softmax"), checkpoint_every=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000006")
    tiny.tiny_train(tmp_path / "cut", 6, model=tiny.tiny_model(centering="softmax"), checkpoint_every=3)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_online_evaluation_is_added_to_its_line(tiny, tmp_path):
    tiny.tiny_train(
        tmp_path, 6, log_every=5, eval_every=3, evaluate=lambda backbone, step, name: {"knn": backbone.embed_dim + step}
    )
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    assert sorted(lines) == [1, 3, 5, 6]
    assert (lines[3]["eval/knn"], lines[6]["eval/knn"]) == (35.0, 38.0)
    assert "eval/knn" not in lines[5]


def test_a_time_budget_ends_near_its_time(tiny, tmp_path):
    result = tiny.tiny_train(tmp_path, 0, phase={"length": RunLength(seconds=2.0)})
    lines = read_metrics(tmp_path)
    assert result.step == lines[-1]["total_steps"] == lines[-1]["step"]
    assert lines[-1]["lr"] < 0.1 * max(line["lr"] for line in lines)  # the schedule has reached its end


def test_a_disk_that_refuses_is_explained(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(WorkError, match=r"cannot write .*metrics\.jsonl: is a directory; make room"):
        Journal(tmp_path).metrics({"step": 1.0})


def test_numbers_json_cannot_hold_become_null(tmp_path):
    Journal(tmp_path).metrics({"step": 1, "grad_norm": float("inf")})
    assert read_metrics(tmp_path) == [{"step": 1, "grad_norm": None}]


def two_phases(tiny, steps: int = 6) -> dict:
    """A run at 32 pixels, then one at 48 with a smaller learning rate and batch."""
    high = MultiCrop(global_size=48, local_size=24, local_number=2)
    loader = CropLoader(open_source("demo:digits?count=40"), crop=high, batch_size=4, seed=1, workers=0)
    second = {"batch_size": 4, "global_size": 48, "loader": loader, "seed": 1, "lr": 2e-4}
    return {"phases": [tiny.tiny_phase(steps), tiny.tiny_phase(4, **second)]}


def test_a_high_resolution_phase_follows_with_schedules_of_its_own(tiny, tmp_path):
    model = tiny.tiny_model()
    result = tiny.tiny_train(tmp_path, 0, model=model, **two_phases(tiny))
    assert (result.step, result.images) == (10, 6 * 8 + 4 * 4)
    lines = read_metrics(tmp_path)
    assert [line["global_size"] for line in lines] == [32] * 6 + [48] * 4
    assert {line["total_steps"] for line in lines} == {10}
    assert lines[6]["lr"] < lines[5]["lr"] * 0.5 or lines[7]["lr"] <= 2e-4  # its own warm-up, its own scale
    assert model.student.backbone.grid == model.teacher.backbone.grid == 6
    assert "phase 2 begins after step 6, 48 pixels" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("last", [5, 6, 9])
def test_a_run_of_phases_continues_bit_for_bit_from_either(tiny, tmp_path, last):
    tiny.tiny_train(tmp_path / "whole", 0, **two_phases(tiny), checkpoint_every=1, keep=0)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step, path in list_checkpoints(tmp_path / "cut/checkpoints"):
        if step > last:
            shutil.rmtree(path)
    tiny.tiny_train(tmp_path / "cut", 0, **two_phases(tiny), checkpoint_every=1, keep=0)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_accumulation_averages_the_gradients_of_the_parts(tiny, tmp_path):
    """Without terms that look across images, two halves give the step of the whole batch."""
    apart = {"objective": Objective(koleo_weight=0.0), "mask_probability": 0.0}
    ends = []
    for name, parts in (("whole", 1), ("halves", 2)):
        model = tiny.tiny_model(centering="none")
        model.student.backbone.set_drop_path(0.0)
        exact = setup("cpu", "fp32")
        tiny.tiny_train(tmp_path / name, 2, model=model, method=apart, step={"accumulate": parts}, parallel=exact)
        ends.append(dict(model.student.state_dict()))
    norms = [[line["grad_norm"] for line in read_metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    losses = [[line["loss/total"] for line in read_metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(UserError, match=r"train\.accumulate: found 3 parts of 8 images; expected a divisor"):
        tiny.tiny_train(tmp_path / "three", 2, step={"accumulate": 3})


def test_activation_checkpointing_changes_nothing(tiny, tmp_path):
    ends = []
    for recompute in (False, True):
        model, calls = tiny.tiny_model(), []
        model.student.backbone.activation_checkpointing = recompute
        model.student.backbone.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        tiny.tiny_train(tmp_path / str(recompute), 2, model=model)
        assert len(calls) == (4 if recompute else 2)  # twice in each of two steps
        ends.append(weights(tmp_path / str(recompute)))
    assert ends[0] == ends[1]
