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
from dinov2cli.errors import Preempted, WorkError
from dinov2cli.train.checkpoint import latest_checkpoint, list_checkpoints
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

    text = r"the loss is not finite at step 7; .* step_00000005; start again with a lower optim\.lr"
    with pytest.raises(WorkError, match=text):
        tiny.tiny_train(run, 12, model=model, on_metrics=poison)
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [5]
    assert [line["step"] for line in read_metrics(run)][-1] == 6


def test_loss_decreases_on_real_tiles(tiny, tmp_path):
    tiny.tiny_train(tmp_path, 120, log_every=20, checkpoint_every=0, objective=Objective(koleo_weight=0.0))
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
        tmp_path, 6, log_every=5, eval_every=3, evaluate=lambda backbone, step: {"knn": backbone.embed_dim + step}
    )
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    assert sorted(lines) == [1, 3, 5, 6]
    assert (lines[3]["eval/knn"], lines[6]["eval/knn"]) == (35.0, 38.0)
    assert "eval/knn" not in lines[5]


def test_a_time_budget_ends_near_its_time(tiny, tmp_path):
    result = tiny.tiny_train(tmp_path, 0, length=RunLength(seconds=2.0))
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
