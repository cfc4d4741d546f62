"""The backbone read out of checkpoints that several ranks wrote, tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch

from dinov2cli.errors import InputError
from dinov2cli.train.checkpoint import latest_checkpoint, load_module, save_checkpoint
from dinov2cli.train.stored import StoredBackbone, StoredTensors, stored_students
from tests.launch import launch
from tests.train.ranks_run import model

SCRIPT = str(Path(__file__).with_name("ranks_run.py"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The checkpoint of a step over four ranks, by how they were sharded."""
    root = tmp_path_factory.mktemp("stored")
    ways = {"ddp": {}, "fsdp": {"sharding": "fsdp"}, "hybrid": {"sharding": "hybrid", "shard_ranks": 2}}
    jobs = [[str(root / name), {"steps": 1, "batch": 4, "setup": way}] for name, way in ways.items()]
    done = launch(SCRIPT, json.dumps(jobs), processes=4, module="")
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: latest_checkpoint(root / name / "checkpoints") for name in ways}
    return {name: path for name, path in found.items() if path is not None}


@pytest.mark.parametrize("part", ["teacher", "student"])
@pytest.mark.parametrize("way", ["ddp", "fsdp", "hybrid"])
def test_tensors_are_those_of_the_whole_module(checkpoints, way, part):
    network = model()
    whole = network.teacher_side() if part == "teacher" else network.student
    load_module(checkpoints[way] / part, whole)
    backbone = (network.teacher if part == "teacher" else network.student).backbone
    stored, expected = StoredBackbone(checkpoints[way], part), backbone.state_dict()
    assert stored.shapes == {name: value.shape for name, value in expected.items()}
    for names in (list(expected)[:3], list(expected)[3:]):
        found = stored.read(names)
        assert list(found) == names
        assert all(torch.equal(found[name], expected[name]) for name in names)


def test_a_lost_shard_is_seen_before_anything_is_read(checkpoints):
    shards = sorted((checkpoints["fsdp"] / "teacher").iterdir())
    assert len(shards) == 4
    shards[2].rename(shards[2].with_suffix(".lost"))
    with pytest.raises(InputError, match=r"only a part of .* is there, a shard is missing"):
        StoredBackbone(checkpoints["fsdp"])
    shards[2].with_suffix(".lost").rename(shards[2])
    StoredBackbone(checkpoints["fsdp"])


def test_what_is_gone_is_said(checkpoints, tmp_path):
    with pytest.raises(InputError, match=r"is not there: a run that goes on drops old checkpoints"):
        StoredBackbone(tmp_path / "step_00000001")
    (tmp_path / "teacher").mkdir()
    with pytest.raises(InputError, match="holds no backbone"):
        StoredBackbone(tmp_path)


@pytest.mark.parametrize("part", ["teacher", "student"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_heads_are_read_as_the_backbone_is(checkpoints, way, part):
    network = model()
    load_module(checkpoints[way] / part, network.teacher_side() if part == "teacher" else network.student)
    side = network.teacher if part == "teacher" else network.student
    for name in ("dino_head", "ibot_head"):
        stored, expected = StoredTensors(checkpoints[way], name, part), side.get_submodule(name).state_dict()
        assert stored.shapes == {key: value.shape for key, value in expected.items()}
        found = stored.read(list(expected))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert StoredTensors(checkpoints[way], "adapter", part).shapes == {}
    assert stored_students(checkpoints[way], part) == [""]


def test_several_students_are_told_apart_by_name(tmp_path):
    models = {"small": model(), "large": model(untied=False)}
    for scale, network in enumerate(models.values(), start=1):
        for parameter in network.parameters():
            parameter.data.mul_(scale)
    parts = {
        "student": {f"{n}.{k}": v for n, m in models.items() for k, v in m.student.state_dict().items()},
        "teacher": {f"{n}.{k}": v for n, m in models.items() for k, v in m.teacher_side().state_dict().items()},
    }
    checkpoint = save_checkpoint(tmp_path, 1, parts, state={})
    for part in parts:
        assert stored_students(checkpoint, part) == ["large", "small"]
        for name, network in models.items():
            side = network.teacher if part == "teacher" else network.student
            stored = StoredBackbone(checkpoint, part, name=name)
            expected = side.backbone.state_dict()
            assert stored.shapes == {key: value.shape for key, value in expected.items()}
            assert all(torch.equal(value, expected[key]) for key, value in stored.read(list(expected)).items())
            assert bool(StoredTensors(checkpoint, "ibot_head", part, name=name).shapes) == (name == "small")
        with pytest.raises(InputError, match="holds no backbone"):
            StoredBackbone(checkpoint, part)


def test_a_message_ends_with_what_else_to_do(checkpoints, tmp_path):
    with pytest.raises(InputError, match=r"is not there: .*; say no more$"):
        StoredTensors(tmp_path / "step_00000001", "dino_head", cure="say no more")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"short")
    for opened in (StoredBackbone, lambda path, cure: stored_students(path, cure=cure)):
        with pytest.raises(InputError, match=r"cannot be read .*: copy the checkpoint again, or say no more$"):
            opened(tmp_path, cure="say no more")
