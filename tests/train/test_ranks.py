"""Training over the ranks of a launch (gloo, on the CPU) gives what one process gives with the whole batch.

Losses are compared over 20 steps of float32 with stochastic depth, masks, Sinkhorn and a heavy KoLeo. What the tests
would miss without is shown by `by_rank`: the paper's per-rank forms, which give other losses.
"""

import json
from pathlib import Path

import pytest
import torch

from dinov2cli.train.checkpoint import latest_checkpoint, load_module, read_state
from tests.launch import launch
from tests.train.ranks_run import model

SCRIPT = str(Path(__file__).with_name("ranks_run.py"))
STEPS = 20
FSDP = {"sharding": "fsdp"}
PHASES = {"steps": 5, "second": [4], "centering": "softmax", "train": {"checkpoint_every": 4}}


def start(root: Path, processes: int, jobs: dict[str, dict]) -> str:
    """Run jobs by name in one launch; the batch of 16 is divided among the processes. What was printed."""
    whole = [[str(root / name), {"steps": STEPS, "batch": 16 // processes} | job] for name, job in jobs.items()]
    done = launch(SCRIPT, json.dumps(whole), processes=processes, module="")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("ranks")
    half = {"precision": "bf16", "steps": 6}
    parts = {"settings": {"accumulate": 2}, "steps": 6}
    # One head, and so few samples kept that some rank has none of a block's.
    sparse = {"model": {"drop_path": 0.95, "untied": False}, "steps": 4}
    alone = {"one": {}, "one_phases": PHASES, "one_half": half, "one_sharded": {"setup": FSDP}, "one_sparse": sparse}
    start(root, 1, alone)
    jobs = {
        "ddp": {},
        "fsdp": {"setup": FSDP, "train": {"save_in_background": True, "checkpoint_every": 7}},
        "fsdp_phases": PHASES | {"setup": FSDP},
        "ddp_phases": PHASES,
        "fsdp_half": half | {"setup": FSDP},
        "fsdp_recompute": {"setup": FSDP | {"offload": True}, "recompute": True},
        "ddp_sparse": sparse,
        "fsdp_sparse": sparse | {"setup": FSDP},
        "ddp_parts": parts,
        "fsdp_parts": parts | {"setup": FSDP},
        "by_rank": {"koleo_scope": "rank", "settings": {"depth_scope": "rank"}},
    }
    start(root, 2, jobs)
    start(root, 4, {"hybrid": {"setup": {"sharding": "hybrid", "shard_ranks": 2, "reshard_after_forward": False}}})
    return root


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def furthest(runs: Path, name: str, other: str, keys: tuple[str, ...] = ("loss/",)) -> float:
    """Largest relative difference between two runs in what begins with `keys`, over the steps both have."""
    a, b = lines(runs / name), lines(runs / other)
    return max(
        abs(x[key] - y[key]) / max(abs(y[key]), 1e-3)
        for x, y in zip(a, b, strict=False)
        for key in y
        if key.startswith(keys)
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hybrid"])
def test_ranks_give_the_losses_of_one_process(runs, name):
    assert len(lines(runs / name)) == len(lines(runs / "one")) == STEPS
    assert furthest(runs, name, "one") < 1e-5
    assert furthest(runs, name, "one", ("grad_norm",)) < 1e-4
    assert [line["images"] for line in lines(runs / name)] == [16 * step for step in range(1, STEPS + 1)]


def test_the_papers_forms_per_rank_give_others(runs):
    """Else the comparison above would prove nothing."""
    assert furthest(runs, "by_rank", "one") > 1e-2


@pytest.mark.parametrize("name", ["ddp_phases", "fsdp_phases"])
def test_what_is_spread_changes_shape_between_phases(runs, name):
    """Position grid 4 x 4 to 6 x 6 after five steps, under softmax-centring."""
    assert [line["global_size"] for line in lines(runs / name)] == 5 * [32] + 4 * [48]
    assert furthest(runs, name, "one_phases") < 1e-5


def test_recomputation_and_offload_change_nothing(runs):
    assert furthest(runs, "fsdp_recompute", "one", ("loss/", "grad_norm")) < 1e-4


def test_parts_of_a_batch_sum_to_the_same_in_copies_and_in_shards(runs):
    assert furthest(runs, "fsdp_parts", "ddp_parts", ("loss/", "grad_norm")) < 1e-4


def test_bf16_stays_within_its_rounding(runs):
    assert furthest(runs, "fsdp_half", "one_half", ("loss/dino", "loss/ibot")) < 5e-3


@pytest.mark.parametrize("name", ["ddp_sparse", "fsdp_sparse"])
def test_a_rank_without_a_single_sample_of_a_block_takes_part(runs, name):
    assert furthest(runs, name, "one_sparse", ("loss/", "grad_norm")) < 1e-4


def test_one_rank_shards_too(runs):
    assert furthest(runs, "one_sharded", "one") < 1e-5


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hybrid"])
def test_a_checkpoint_of_several_ranks_loads_in_one(runs, name):
    found = [model(), model()]
    for each, run in zip(found, (name, "one"), strict=True):
        path = latest_checkpoint(runs / run / "checkpoints")
        load_module(path / "student", each.student)
        load_module(path / "teacher", each.teacher_side())
    for (key, ours), theirs in zip(found[0].state_dict().items(), found[1].state_dict().values(), strict=True):
        if not key.endswith("qkv.bias"):  # keys' biases change nothing: their gradient is rounding, which Adam blows up
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5, msg=key)
    written = list((runs / name / "checkpoints").rglob("*.safetensors"))
    assert written
    assert not list((runs / name).rglob("*.pt"))


def test_a_run_goes_on_over_other_ranks(runs, tmp_path):
    """2 ranks of shards, stopped by a signal to the second alone; then 1; then 2 copies: one curve, one position."""
    assert "after saving step 8 of 20" in start(tmp_path, 2, {"run": {"setup": FSDP, "stop": (1, 8)}})
    assert read_state(latest_checkpoint(tmp_path / "run" / "checkpoints"))["sampler"] == {"position": 8 * 16}
    start(tmp_path, 1, {"run": {"stop": (0, 13)}})
    assert read_state(latest_checkpoint(tmp_path / "run" / "checkpoints"))["sampler"] == {"position": 13 * 16}
    start(tmp_path, 2, {"run": {}})
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, STEPS + 1))
    (tmp_path / "one").symlink_to(runs / "one")
    assert furthest(tmp_path, "run", "one") < 1e-5


def test_another_batch_keeps_the_number_of_steps(tmp_path):
    """A budget in images or epochs makes twice the steps of half the batch; a run that has begun keeps its own."""
    start(tmp_path, 1, {"run": {"steps": 8, "stop": (0, 3)}})
    start(tmp_path, 1, {"run": {"steps": 16, "batch": 8}})
    assert [line["images"] for line in lines(tmp_path / "run")] == [16, 32, 48, 56, 64, 72, 80, 88]
    assert "a step has 8 images from here on, it had 16" in (tmp_path / "run" / "log.txt").read_text()
