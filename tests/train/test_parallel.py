"""What a training run takes from its settings and from the launcher's environment, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch

from dinov2cli.errors import UserError, WorkError
from dinov2cli.train.parallel import Wishes, launcher_wishes, setup
from dinov2cli.train.sharding import Sharding, check_sharded

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}


@pytest.fixture
def environment(monkeypatch):
    """Set what a launcher would set, and nothing else of the kind."""

    def set_to(**variables: str) -> None:
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_accelerates_wishes_are_read(environment):
    environment()
    assert launcher_wishes() == Wishes()
    environment(**FSDP, ACCELERATE_MIXED_PRECISION="bf16", FSDP_OFFLOAD_PARAMS="true")
    assert launcher_wishes() == Wishes(precision="bf16", fsdp=True, reshard_after_forward=False, offload=True)
    environment(**FSDP, FSDP_ACTIVATION_CHECKPOINTING="true")
    assert launcher_wishes().activation_checkpointing
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}
    environment(**FSDP, ACCELERATE_USE_PARALLELISM_CONFIG="true", **sizes)
    found = launcher_wishes()
    assert (found.copies, found.shard_ranks) == (4, 8)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (FSDP | {"FSDP_VERSION": "1"}, "asks for FSDP version 1; expected fsdp_version: 2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8; expected no, bf16 or fp16"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed; expected FSDP"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "tensor, context or sequence parallelism; expected data parallelism",
        ),
    ],
)
def test_what_is_not_supported_is_refused(environment, variables, sentence):
    environment(**variables)
    with pytest.raises(UserError, match=sentence):
        launcher_wishes()


def test_settings_win_where_the_launcher_says_nothing_and_may_not_contradict_it(environment):
    environment(ACCELERATE_MIXED_PRECISION="bf16")
    assert setup("cpu").precision == "bf16"
    assert setup("cpu", "fp32").precision == "fp32"
    environment(**FSDP)
    with pytest.raises(UserError, match=r"parallel\.sharding is ddp, the launcher asks for fsdp; expected the same"):
        setup("cpu", sharding="ddp", planned=4)
    assert setup("cpu", sharding="fsdp", planned=4).sharding == Sharding("fsdp", 4, reshard_after_forward=False)
    assert setup("cpu", reshard_after_forward=True, planned=4).sharding.reshard_after_forward


def test_a_plan_needs_no_launch(environment):
    environment()
    assert setup("cpu").sharding.kind == "none"
    plan = setup("cpu", sharding="hybrid", planned=32)
    assert (plan.world_size, plan.sharding.shard_ranks, plan.group, plan.mesh) == (32, 8, None, None)
    assert setup("cpu", planned=32).sharding.kind == "ddp"
    with pytest.raises(UserError, match="over 5 ranks each: found 32 ranks in all, expected a multiple"):
        setup("cpu", sharding="hybrid", shard_ranks=5, planned=32)


def test_sharding_that_was_asked_for_and_is_not_in_force_is_an_error():
    class Mesh:
        def size(self) -> int:
            return 2

    with pytest.raises(WorkError, match="FSDP was asked for, but weight is not sharded over the 2 ranks"):
        check_sharded(torch.nn.Linear(2, 2), Mesh())


def test_a_launch_that_cannot_meet_says_where_it_looked(tmp_path):
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "dinov2cli", "pretrain", "demo:digits", "-o", str(tmp_path / "run"), "-q"]
    command += ["--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    assert done.returncode == 1
    assert "rank 0 cannot reach the other processes of the launch at no MASTER_ADDR" in done.stderr
    assert not (tmp_path / "run").exists()
