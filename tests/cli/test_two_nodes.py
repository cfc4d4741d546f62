"""A launch over two machines, which are two network namespaces joined by a veth pair: a real network in between.

Needs iproute2 and the right to make namespaces; elsewhere the tests skip, saying so.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launch import ROOT

RECIPES = ROOT / "recipes"
PORT = 29731
COMMON = ("demo:digits", "--config", "tiny-cpu", "--workers", "1", "--device", "cpu", "--set", "log.pictures=false")
BATCH = ("--set", "data.global_batch_size=32", "--set", "train.precision=fp32")


class Node(NamedTuple):
    """A namespace, its network device and its address."""

    name: str
    device: str
    address: str

    def sent(self) -> int:
        """Bytes that have left through its device."""
        found = ip("-n", self.name, "-s", "-j", "link", "show", self.device)
        return int(json.loads(found)[0]["stats64"]["tx"]["bytes"])


NODES: list[Node] = []


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def nodes():
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: no network namespaces")
    tag = f"{os.getpid() % 100000}"
    made = [Node(f"dinov2a{tag}", f"va{tag}", "10.213.7.1"), Node(f"dinov2b{tag}", f"vb{tag}", "10.213.7.2")]
    try:
        for node in made:
            ip("netns", "add", node.name)
        a, b = made
        ip("link", "add", a.device, "netns", a.name, "type", "veth", "peer", "name", b.device, "netns", b.name)
        for node in made:
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.device)
            for device in (node.device, "lo"):
                ip("-n", node.name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        remove(made)
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    NODES.extend(made)
    yield made
    remove(made)


def remove(made: list[Node]) -> None:
    for node in made:
        subprocess.run(["ip", "netns", "delete", node.name], capture_output=True, check=False)


def begin(node: Node, *command: str) -> subprocess.Popen[str]:
    """Start a command on a node; its output is one stream."""
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": node.device,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
    }
    whole = ["ip", "netns", "exec", node.name, *command]
    return subprocess.Popen(
        whole, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def end(processes: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Exit code and output of each, in at most `timeout` seconds for all together; what has not ended is killed."""
    deadline = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    if any(p.poll() is None for p in processes):
        for node in NODES:  # ranks are in sessions of their own
            for pid in ip("netns", "pids", node.name).split():
                os.kill(int(pid), signal.SIGKILL)
    return [(p.returncode, output) for p, output in ((p, p.communicate()[0]) for p in processes)]


def accelerate(nodes: list[Node], port: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """`accelerate launch` with the recipe for four machines, on two with one process each."""
    config = str(RECIPES / "accelerate" / "fsdp2-4x8.yaml")
    options = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", nodes[0].address]
    options += ["--main_process_port", str(port), "--mixed_precision", "no"]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *options]
    return [
        begin(node, *start, "--machine_rank", str(rank), "-m", "dinov2cli", "pretrain", *arguments)
        for rank, node in enumerate(nodes)
    ]


def by_hand(nodes: list[Node], port: int, restarts: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The script that stands in for a scheduler, started on both nodes."""
    script = str(RECIPES / "cluster" / "multinode.sh")
    options = ["--nodes", "2", "--master", nodes[0].address, "--gpus", "1", "--port", str(port)]
    return [
        begin(
            node,
            *("bash", script, *options, "--node-rank", str(rank), "--restarts", str(restarts)),
            *("--address", node.address, "--", *arguments),
        )
        for rank, node in enumerate(nodes)
    ]


def lines(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(run: Path, step: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not any(line["step"] >= step for line in lines(run)):
        assert time.monotonic() < deadline, f"no step {step} within {timeout:g} s"
        time.sleep(0.1)


def rank_process(node: Node) -> int:
    """The process id of the one rank on a node: the child of the launcher that has RANK set."""
    for pid in ip("netns", "pids", node.name).split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        of_parent = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
        ranked = any(entry.startswith(b"RANK=") for entry in environment)
        if ranked and b"dinov2cli pretrain" in command and not any(e.startswith(b"RANK=") for e in of_parent):
            return int(pid)
    raise AssertionError(f"no rank runs on {node.name}")


def test_two_nodes_give_the_losses_of_one_process_and_send_what_the_plan_says(nodes, tmp_path):
    steps = ("--set", "train.steps=12", "--set", "log.every=1")
    alone = [sys.executable, "-m", "dinov2cli", "pretrain", *COMMON, *BATCH, *steps, "-o", str(tmp_path / "one")]
    subprocess.run(alone, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
    sent = []
    for run, count in (("two", steps), ("short", ("--set", "train.steps=2"))):
        before = [node.sent() for node in nodes]
        done = end(accelerate(nodes, PORT, *COMMON, *BATCH, *count, "-o", str(tmp_path / run)), 180)
        assert [code for code, _ in done] == [0, 0], done
        assert "2 ranks of cpu, fsdp" in done[0][1]
        sent.append([node.sent() - start for node, start in zip(nodes, before, strict=True)])
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)

    plan = [sys.executable, "-m", "dinov2cli", "pretrain", *COMMON, *BATCH, *steps, "-o", str(tmp_path / "plan")]
    plan += ["--set", "parallel.sharding=fsdp", "-n", "2", "--dry-run", "--json"]
    facts = json.loads(subprocess.run(plan, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    # gloo sends a reduce-scatter as an all-reduce, which is twice as much; NCCL does not.
    expected = facts["traffic per step (MiB sent per rank, modelled)"] + facts["traffic in reduce-scatter (MiB)"]
    for long, short in zip(*sent, strict=True):  # the difference leaves out the start and the checkpoint
        assert (long - short) / 10 / 2**20 == pytest.approx(expected, rel=0.08)


def test_a_rank_that_is_killed_stops_all_within_a_minute_and_the_run_goes_on(nodes, tmp_path):
    run = tmp_path / "run"
    arguments = [*COMMON, *BATCH, "--set", "checkpoint.every=5", "--set", "log.every=1", "-o", str(run)]
    arguments += ["--set", "train.steps=40", "--set", "parallel.sharding=fsdp"]
    started = by_hand(nodes, PORT + 1, 0, *arguments)
    wait_for(run, 7)
    killed = time.monotonic()
    os.kill(rank_process(nodes[1]), signal.SIGKILL)
    (first, said), (second, _) = end(started, 60)
    assert time.monotonic() - killed < 60
    assert first != 0 and second != 0
    assert "has lost another rank" in said and "the same command continues" in said
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept

    done = end(by_hand(nodes, PORT + 2, 0, *arguments), 180)
    assert [code for code, _ in done] == [0, 0], done
    assert f"continuing from {kept[-1]}" in (run / "log.txt").read_text()
    assert [line["step"] for line in lines(run)] == list(range(1, 41))


def test_the_launch_starts_again_by_itself(nodes, tmp_path):
    run = tmp_path / "run"
    arguments = [*COMMON, *BATCH, "--set", "checkpoint.every=5", "--set", "log.every=1", "-o", str(run)]
    # More than one restart: the launchers of two machines may number their attempts differently, and then fail to meet.
    started = by_hand(nodes, PORT + 3, 6, *arguments, "--set", "train.steps=40")
    wait_for(run, 7)
    os.kill(rank_process(nodes[1]), signal.SIGKILL)
    done = end(started, 300)
    assert [code for code, _ in done] == [0, 0], done
    assert "continuing from step_" in (run / "log.txt").read_text()
    assert [line["step"] for line in lines(run)] == list(range(1, 41))
