"""The launch files: every accelerate config starts a run here, with fewer processes; scripts start what they say."""

import os
import subprocess
import sys

import pytest
import yaml

from dinov2cli.recipe import launch_files
from tests.launch import ROOT

FILES = launch_files()
CONFIGS = {name: path for name, path in FILES.items() if name.startswith("accelerate/")}
HERE = {  # what a machine without GPUs can do of each, and what the run must say of itself
    "accelerate/one-gpu": ([], "on 1,347 images, cpu, bf16 (asked for by the launcher)"),
    "accelerate/ddp": (["--num_processes", "2"], "2 ranks of cpu, ddp"),
    "accelerate/fsdp2": (["--num_processes", "2"], "2 ranks of cpu, fsdp"),
    "accelerate/fsdp2-4x8": (["--num_machines", "1", "--num_processes", "2"], "2 ranks of cpu, fsdp"),
    "accelerate/hybrid-4x8": (
        ["--num_machines", "1", "--num_processes", "2"]
        + ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "1"],
        "2 ranks of cpu, hybrid over 1 each",
    ),
}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=240, check=False)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_starts_a_run(name, tmp_path):
    options, said = HERE[name]
    command = ["pretrain", "demo:digits", "-o", str(tmp_path / "run"), "--config", "tiny-cpu", "--workers", "1"]
    command += ["--set", "train.steps=2", "--set", "data.global_batch_size=8", "--device", "cpu"]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name]), *options]
    done = run(*start, "-m", "dinov2cli", *command, "--set", "log.pictures=false")
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert done.stdout.count(str(tmp_path / "run")) == 1


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_names_whole_machines(name):
    config = yaml.safe_load(CONFIGS[name].read_text())
    assert config["num_processes"] % config["num_machines"] == 0
    if "parallelism_config" in config:
        sizes = config["parallelism_config"]
        copies, shards = (sizes[f"parallelism_config_dp_{kind}_size"] for kind in ("replicate", "shard"))
        assert (copies, copies * shards) == (config["num_machines"], config["num_processes"])


def test_the_slurm_script_starts_what_the_other_one_does(tmp_path):
    """With a `srun` and a `scontrol` that only say what they were asked."""
    for name, says in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo node7; echo node8")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    line = ["curated", "-o", "run", "--config", "vitl14-long"]
    done = run("bash", str(FILES["cluster/slurm"]), *line, PATH=path, **slurm)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:29500"
    assert (words[words.index("--nnodes") + 1], words[words.index("--nproc-per-node") + 1]) == ("2", "4")
    assert words[-7:] == ["dinov2cli", "pretrain", *line]
    assert run("bash", str(FILES["cluster/slurm"])).returncode == 2


def test_the_script_for_plain_machines_explains_itself():
    done = run("bash", str(FILES["cluster/multinode"]), "--nodes", "2")
    assert done.returncode == 2
    assert "usage: multinode.sh --nodes N --node-rank I --master HOST" in done.stderr
