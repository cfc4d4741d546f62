"""Small real distillations, in this process or over the ranks of a launch as `python distill_run.py JSON`.

JSON: a list of [folder, {steps, batch (images per rank), students, objective, heads, and what else is asked}].
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dinov2cli.data.augment import Augment
from dinov2cli.distributed import launched, leave
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.distill import DistillObjective, build_distill_model
from dinov2cli.train.distillation import Distillation
from dinov2cli.train.loop import TrainResult, train
from dinov2cli.train.network import SSLModel, build_heads
from dinov2cli.train.optim import build_optimizer
from dinov2cli.train.parallel import setup
from dinov2cli.train.step import Settings
from dinov2cli.train.teacher import FrozenTeacher

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.train.ranks_run import SEED, phase

WIDTH = 48
HEADS = {"prototypes": 96, "hidden": 64, "bottleneck": 32}
STUDENTS = {
    "small": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "coarse": {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16},
}


def backbone(**sizes: Any) -> VisionTransformer:
    """A backbone for 32 pixels with patch 8, drawn from SEED."""
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "layerscale": 0.5}
    return VisionTransformer(**(defaults | sizes), generator=torch.Generator().manual_seed(SEED))


def teacher(*, heads: bool = True, untied: bool = True, **sizes: Any) -> FrozenTeacher:
    """A wider teacher with registers, with heads of its own where asked."""
    made = build_heads(WIDTH, **HEADS, untied=untied, seed=SEED + 5) if heads else (None, None)
    network = backbone(**({"embed_dim": WIDTH, "depth": 3, "num_register_tokens": 2} | sizes))
    return FrozenTeacher(network, dino_head=made[0], ibot_head=made[1])


def student(
    objective: DistillObjective, *, heads: bool = True, centering: str = "sinkhorn", untied: bool = True, **sizes: Any
) -> SSLModel:
    """A student of such a teacher."""
    return build_distill_model(
        backbone(**sizes),
        WIDTH,
        objective,
        teacher_has_heads=heads,
        adapter=True,
        heads=HEADS | {"untied": untied},
        centering=centering,
        seed=SEED,
    )


def run(
    folder: Path,
    *,
    steps: int = 6,
    batch: int = 8,
    students: tuple[str, ...] = ("",),
    heads: bool = True,
    objective: dict[str, Any] | None = None,
    centering: str = "sinkhorn",
    precision: str = "fp32",
    place: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    second: tuple[int, ...] = (),
    distillation: dict[str, Any] | None = None,
    drop_path: float = 0.0,
    loaded: FrozenTeacher | None = None,
    loader: Any = None,
    **arguments: Any,
) -> TrainResult:
    """Distil from `teacher()` (or `loaded`) on digits; metrics.jsonl and the checkpoints in `folder` are the result."""
    goal = DistillObjective(**({"koleo_weight": 1.0} | (objective or {})))
    parallel = setup("cpu", precision, **(place or {}))
    folder.mkdir(parents=True, exist_ok=True)
    models = {
        name: student(goal, heads=heads, centering=centering, drop_path=drop_path, **STUDENTS.get(name, {}))
        for name in students
    }
    first = phase(parallel, batch, steps)
    if loader is not None:
        first = type(first)(**(first.__dict__ | {"loader": loader}))
    return train(
        folder,
        models=models,
        method=Distillation(loaded or teacher(heads=heads), goal, shared=len(models) > 1, **(distillation or {})),
        make_optimizer=lambda one: build_optimizer(one, depth=one.backbone.depth),
        phases=[first, *(phase(parallel, batch, n, size=48, seed=SEED + 1) for n in second)],
        settings=Settings(seed=SEED, **(settings or {})),
        augment=Augment(),
        parallel=parallel,
        log_every=1,
        **({"checkpoint_every": 4} | arguments),
    )


def main(text: str) -> None:
    """Run one job after the other: JSON pairs of a folder and what is asked."""
    torch.set_num_threads(1)
    for folder, asked in json.loads(text):
        run(Path(folder), **asked)


if __name__ == "__main__":
    main(sys.argv[1])
    if launched():
        leave()
    sys.stdout.flush()
    os._exit(0)  # as the command line does; see cli/main.py
