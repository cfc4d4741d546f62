"""Distillation over the ranks of a launch (gloo, on the CPU) gives what one process gives with the whole batch."""

import json
from pathlib import Path

import pytest

from tests.launch import launch
from tests.train.test_ranks import furthest, lines

SCRIPT = str(Path(__file__).with_name("distill_run.py"))
FSDP = {"place": {"sharding": "fsdp"}}
FORMS = {
    "paper": {"students": ["small", "coarse"], "drop_path": 0.2, "objective": {"ibot_share": 0.6}},
    "learned": {"heads": False, "objective": {"gram_weight": 1.0, "feature_weight": 1.0}, "second": [2]},
    "features": {"objective": {"dino_weight": 0, "ibot_weight": 0, "koleo_weight": 0, "feature_weight": 1}},
}
SPREAD = {"ddp": {}, "fsdp": FSDP}
PARTS = {"objective": {"ibot_weight": 0}, "settings": {"accumulate": 2}}  # one head is never used


def start(root: Path, processes: int, jobs: dict[str, dict]) -> None:
    """Run jobs by name in one launch; the batch of 12 is divided among the processes."""
    whole = [[str(root / name), {"steps": 5, "batch": 12 // processes, **job}] for name, job in jobs.items()]
    done = launch(SCRIPT, json.dumps(whole), processes=processes, module="")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("ranks")
    half = {"precision": "bf16"}
    start(root, 1, FORMS | {"half": half, "sharded": FORMS["paper"] | FSDP})
    spread = {f"{form}_{how}": job | place for form, job in FORMS.items() for how, place in SPREAD.items()}
    parts = {f"parts_{how}": PARTS | place for how, place in SPREAD.items()}
    start(root, 2, spread | parts | {"half_fsdp": half | FSDP})
    return root


@pytest.mark.parametrize("how", SPREAD)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_give_the_losses_of_one_process(runs, form, how):
    assert len(lines(runs / f"{form}_{how}")) == len(lines(runs / form)) == 5 + sum(FORMS[form].get("second", []))
    assert furthest(runs, f"{form}_{how}", form) < 1e-5
    if form == "paper":
        assert furthest(runs, f"{form}_{how}", form, ("small/loss", "coarse/loss")) < 1e-3


def test_one_rank_shards_the_teacher_too(runs):
    assert furthest(runs, "sharded", "paper", ("loss/", "small/loss", "coarse/loss")) < 1e-5


def test_bf16_stays_within_its_rounding(runs):
    assert furthest(runs, "half_fsdp", "half", ("loss/dino", "loss/ibot")) < 5e-3


def test_parts_of_a_batch_with_a_head_that_no_loss_uses(runs):
    assert furthest(runs, "parts_fsdp", "parts_ddp", ("loss/", "grad_norm")) < 1e-4
