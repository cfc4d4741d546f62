"""Small real runs over the ranks of a launch, as `python ranks_run.py JSON`: digits through the product's loader.

JSON: a list of [folder, {steps, batch (images per rank), and what else `setup`, `Settings` or `train` take}].
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinov2cli.data.augment import Augment
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader
from dinov2cli.data.source import open_source
from dinov2cli.distributed import launched, leave
from dinov2cli.errors import Preempted
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.loop import train
from dinov2cli.train.method import SelfDistillation
from dinov2cli.train.network import SSLModel, build_ssl_model
from dinov2cli.train.optim import build_optimizer
from dinov2cli.train.parallel import Parallel, setup
from dinov2cli.train.phase import Phase
from dinov2cli.train.schedules import RunLength, Schedules
from dinov2cli.train.ssl import Objective
from dinov2cli.train.step import Settings

SEED = 3


def model(centering: str = "sinkhorn", *, drop_path: float = 0.3, untied: bool = True) -> SSLModel:
    """A backbone of width 64 with heads of 96 prototypes, drawn from SEED."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
    generator = torch.Generator().manual_seed(SEED)
    backbone = VisionTransformer(**sizes, layerscale=0.5, drop_path=drop_path, generator=generator)
    sizes = {"prototypes": 96, "hidden": 64, "bottleneck": 32, "untied": untied}
    return build_ssl_model(backbone, **sizes, centering=centering, seed=SEED)


def phase(parallel: Parallel, batch: int, steps: int, *, size: int = 32, seed: int = SEED) -> Phase:
    """A phase of `steps` steps of `batch` images per rank, global crops of `size` pixels."""
    loader = CropLoader(
        open_source("demo:digits"),
        crop=MultiCrop(global_size=size, local_size=16, local_number=2),
        batch_size=batch,
        seed=seed,
        workers=0,
        rank=parallel.rank,
        world_size=parallel.world_size,
    )
    schedules = Schedules(lr=2e-3, momentum=0.9, warmup=0.2)
    length = RunLength(total=steps)
    return Phase(schedules, length, loader, batch_size=batch, global_size=size, seed=seed)


def run(folder: Path, asked: dict[str, Any]) -> None:
    """Train as asked; metrics.jsonl and the checkpoints in `folder` are the result."""
    parallel = setup("cpu", asked.get("precision", "fp32"), **asked.get("setup", {}))
    folder.mkdir(parents=True, exist_ok=True)
    objective = Objective(koleo_weight=1.0, koleo_scope=asked.get("koleo_scope", "global"))
    first = phase(parallel, asked["batch"], asked["steps"])
    second = [phase(parallel, asked["batch"], n, size=48, seed=SEED + 1) for n in asked.get("second", [])]
    network = model(asked.get("centering", "sinkhorn"), **asked.get("model", {}))
    network.student.backbone.activation_checkpointing = asked.get("recompute", False)
    rank, at = asked.get("stop", (None, None))  # this rank alone is told to stop, in the middle of this step

    def told(line: Any, _total: int) -> None:
        if line["step"] == at and parallel.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    train(
        folder,
        models={"": network},
        method=SelfDistillation(objective),
        make_optimizer=partial(build_optimizer, depth=3, layerwise_decay=0.9),
        phases=[first, *second],
        settings=Settings(seed=SEED, **asked.get("settings", {})),
        augment=Augment(),
        parallel=parallel,
        log_every=1,
        on_metrics=told,
        **asked.get("train", {}),
    )


def main(text: str) -> None:
    """Run one job after the other: JSON pairs of a folder and what is asked."""
    torch.set_num_threads(1)
    for folder, asked in json.loads(text):
        try:
            run(Path(folder), asked)
        except Preempted as stopped:
            print(f"{folder}: {stopped}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    if launched():
        leave()
    sys.stdout.flush()
    os._exit(0)  # as the command line does; see cli/main.py
