"""`dinov2 bench ranks`: real training steps over the ranks of a launch on this machine, beside one process.

Every setting runs in fresh processes (`ranks_child`), which torch's elastic launcher starts where there are several.
All make the same steps of the same batch, so their losses agree in float32; measured memory stands beside the model's.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dinov2cli.bench.ranks_child import Job
from dinov2cli.bench.train import Case
from dinov2cli.distributed import launched
from dinov2cli.errors import UserError, WorkError

_MIB = 2**20
# name → sharding, reshard_after_forward, activation checkpointing
SETTINGS: dict[str, tuple[str, bool, bool]] = {
    "one process": ("none", True, False),
    "ddp": ("ddp", True, False),
    "fsdp": ("fsdp", True, False),
    "fsdp, weights kept": ("fsdp", False, False),
    "fsdp, checkpointing": ("fsdp", True, True),
}


def default_case(device: str, precision: str, seed: int) -> Case:
    """ViT-S/14 with 65,536 prototypes and drop path 0.3, 8 small images in all."""
    return Case("vits14", 8, 65536, 98, 42, 4, 0.3, precision, device, seed)


def run(
    device: str = "auto",
    seed: int = 0,
    ranks: int = 2,
    precision: str = "fp32",
    warmup: int = 2,
    steps: int = 4,
    case: Case | None = None,
    settings: tuple[str, ...] = tuple(SETTINGS),
) -> dict[str, Any]:
    """Train in one process with all threads, then over `ranks` that divide the threads, as each of `settings` says.

    Returns `speedup` (the fastest of several ranks over one process), `memory_ratio` and `state_ratio` (a rank's under
    fsdp over ddp's: peak, and bytes of its tensors), `loss_difference` (largest, relative to one process), the case,
    and `settings`: rows as of `row_of`. Ratios are None where a setting they need is left out. Raises UserError for
    ranks that the batch cannot be divided among and under a launcher, WorkError where a process fails.
    """
    if launched():
        raise UserError("bench ranks starts its own processes; expected no launcher around it")
    case = case or default_case(device, precision, seed)
    if ranks < 2 or case.batch_size % ranks:
        raise UserError(f"bench ranks: found {ranks} processes; expected 2 or more that divide {case.batch_size}")
    case = replace(case, device=device_for(case.device, ranks))
    rows = [row_of(name, case, ranks, warmup, steps) for name in settings]
    by_name = {row["setting"]: row for row in rows}
    return {
        **_summary(by_name),
        "ranks": ranks,
        "settings": rows,
        **{key: getattr(case, key) for key in Case.__annotations__},
        "steps": steps,
    }


def device_for(device: str, ranks: int) -> str:
    """Where all settings run: `auto` takes GPUs only if there is one for every rank."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"


def row_of(setting: str, case: Case, ranks: int, warmup: int, steps: int) -> dict[str, Any]:
    """One setting, measured: `seconds` (best step; the slowest rank's) and `images_per_s`; in MiB of the rank with
    most, `memory_mib` (peak above what it had before the model was built), `start_memory_mib` (up to the first step),
    `state_mib` (weights, gradients, moments and teacher, counted) and `modelled_mib` (what train.memory says for the
    peak), `ratio` (measured over modelled) and `loss` (after the last step)."""
    sharding, reshard, checkpointing = SETTINGS[setting]
    ranks = 1 if sharding == "none" else ranks
    with tempfile.TemporaryDirectory() as folder:
        found = launch(Job(asdict(case), sharding, reshard, checkpointing, warmup, steps, folder), ranks)
    seconds = min(map(max, zip(*(one["seconds"] for one in found), strict=True)))
    memory, modelled = max(one["memory"] for one in found), found[0]["modelled"]["total"]
    return {
        "setting": setting,
        "ranks": ranks,
        "threads": found[0]["threads"],
        "images_per_s": case.batch_size / seconds,
        "seconds": seconds,
        "memory_mib": memory / _MIB,
        "modelled_mib": modelled / _MIB,
        "ratio": memory / modelled,
        "start_memory_mib": max(one["start_memory"] for one in found) / _MIB,
        "state_mib": max(one["state"] for one in found) / _MIB,
        "modelled": found[0]["modelled"],
        "loss": found[0]["loss"],
    }


def launch(job: Job, ranks: int) -> list[dict[str, Any]]:
    """What `ranks_child.measure` returns in each of `ranks` fresh processes that divide the threads of this one.

    Raises WorkError where one fails, with its reason or the last lines of what they said.
    """
    child = ["-m", "dinov2cli.bench.ranks_child", json.dumps(asdict(job))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    threads = str(max(torch.get_num_threads() // ranks, 1))
    process = subprocess.Popen(
        [sys.executable, *launcher, *child],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate()
    except BaseException:
        process.terminate()  # the launcher ends its ranks
        process.wait()
        raise
    files = [file for rank in range(ranks) if (file := Path(job.folder, f"{rank}.json")).exists()]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if process.returncode or len(found) < ranks:
        errors = [one["error"] for one in found if "error" in one] or [" | ".join(said.splitlines()[-8:])]
        raise WorkError(f"bench ranks: {job.sharding} over {ranks} failed with {process.returncode}: {errors[0]}")
    return found


def _summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def ratio(above: str, below: str, key: str) -> float | None:
        return rows[above][key] / rows[below][key] if above in rows and below in rows else None

    several = [name for name, row in rows.items() if row["ranks"] > 1]
    best = min(several, key=lambda name: rows[name]["seconds"], default="one process")
    alone = rows.get("one process")
    apart = [abs(rows[name]["loss"] / alone["loss"] - 1) for name in several] if alone else []
    return {
        "images_per_s": rows[best]["images_per_s"],
        "best": best,
        "speedup": ratio("one process", best, "seconds"),
        "memory_ratio": ratio("fsdp", "ddp", "memory_mib"),
        "modelled_memory_ratio": ratio("fsdp", "ddp", "modelled_mib"),
        "state_ratio": ratio("fsdp", "ddp", "state_mib"),
        "loss_difference": max(apart, default=None),
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The table of settings, then what they come to."""
    head = f"{'':22}{'images/s':>9}{'s/step':>8}{'MiB/rank':>10}{'modelled':>10}{'ratio':>7}{'state':>8}"
    table = [
        f"{row['setting']:22}{row['images_per_s']:9.2f}{row['seconds']:8.3f}{row['memory_mib']:10.0f}"
        f"{row['modelled_mib']:10.0f}{row['ratio']:7.2f}{row['state_mib']:8.0f}"
        for row in figures["settings"]
    ]
    names = ("best", "speedup", "memory_ratio", "modelled_memory_ratio", "state_ratio", "loss_difference")
    facts = {name: figures[name] for name in names if figures[name] is not None}
    return [
        head,
        *table,
        *(f"{k:22}{v:.3g}" if isinstance(v, float) else f"{k:22}{v}" for k, v in facts.items()),
        f"{figures['arch']}, {figures['prototypes']:,} prototypes, {figures['batch_size']} images in all, "
        f"{figures['precision']} on {figures['device']}; {figures['ranks']} ranks, best of {figures['steps']} steps",
    ]
