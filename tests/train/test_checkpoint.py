"""What is on disk in a checkpoint, which one is found, and the texts of refusals."""

import json

import pytest
import torch
from safetensors import safe_open

from dinov2cli.errors import InputError, WorkError
from dinov2cli.train.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    tensors_of,
)
from dinov2cli.train.optim import build_optimizer


def parts(tiny, **kwargs):
    model = tiny.tiny_model(**kwargs)
    return {
        "student": model.student,
        "teacher": model.teacher_side(),
        "optimizers": {"": build_optimizer(model.student, depth=2)},
    }


def test_layout_holds_tensors_as_safetensors_and_the_rest_as_json(tiny, tmp_path):
    held = parts(tiny)
    for parameter in held["student"].parameters():
        parameter.grad = torch.ones_like(parameter)
    held["optimizers"][""].step()
    path = save_checkpoint(tmp_path, 7, tensors_of(**held), state={"sampler": {"position": 56}})
    assert path.name == "step_00000007"
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert {name.split("/")[0] for name in files} == {"student", "teacher", "optimizer", "state.json"}
    assert all(name.endswith((".safetensors", ".json")) for name in files)
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["sampler"]) == (7, {"position": 56})
    with safe_open(next((path / "student").glob("*.safetensors")), framework="pt") as file:
        assert set(file.keys()) == set(held["student"].state_dict())
    with safe_open(next((path / "optimizer").glob("*.safetensors")), framework="pt") as file:
        assert "backbone.cls_token.exp_avg_sq" in file.keys()  # noqa: SIM118 - no iteration on this object


def test_only_the_newest_are_kept_and_incomplete_ones_are_not_seen(tiny, tmp_path):
    held = parts(tiny)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors_of(**held), state={}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3]
    (tmp_path / "step_00000003/state.json").unlink()
    assert latest_checkpoint(tmp_path).name == "step_00000002"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_another_model_is_refused_by_name(tiny, tmp_path):
    path = save_checkpoint(tmp_path, 1, tensors_of(**parts(tiny)), state={})
    with pytest.raises(InputError, match=r"the checkpoint is of another model \(\d+ tensors differ, first backbone"):
        load_checkpoint(path, **parts(tiny, embed_dim=16))


def test_another_format_is_refused(tiny, tmp_path):
    path = save_checkpoint(tmp_path, 1, tensors_of(**parts(tiny)), state={})
    (path / "state.json").write_text('{"format": 99, "step": 1}')
    with pytest.raises(InputError, match="found checkpoint format 99, expected 2"):
        load_checkpoint(path, **parts(tiny))


def test_a_place_that_cannot_be_written_is_explained(tiny, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(WorkError, match=r"cannot write the checkpoint .* free space or choose another place"):
        save_checkpoint(tmp_path / "checkpoints", 1, tensors_of(**parts(tiny)), state={})


def test_random_state_goes_through_json():
    torch.manual_seed(5)
    state = json.loads(json.dumps(rng_state(torch.device("cpu"))))
    first = torch.rand(3)
    set_rng_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)
