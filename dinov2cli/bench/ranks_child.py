"""One rank of `dinov2 bench ranks`, in a process of its own: `python -m dinov2cli.bench.ranks_child JSON`.

JSON holds the fields of a `Job`. What the rank measured goes to `<folder>/<rank>.json`.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2cli.bench.peak import resident_peak
from dinov2cli.bench.train import CLIP, LR, MOMENTUM, TEMPERATURE, Case
from dinov2cli.data.augment import Augment
from dinov2cli.distributed import launched, leave
from dinov2cli.errors import DinoError
from dinov2cli.kernels.attention import PLAIN_TOKENS
from dinov2cli.models.registry import build
from dinov2cli.train.learner import Learner
from dinov2cli.train.memory import memory
from dinov2cli.train.method import SelfDistillation
from dinov2cli.train.network import SSLModel, build_ssl_model
from dinov2cli.train.optim import build_optimizer
from dinov2cli.train.parallel import Parallel, setup
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import local
from dinov2cli.train.sizes import GLOBAL_CROPS, Batch, Layout, sizes_of
from dinov2cli.train.step import Settings, Stepper


@dataclass(frozen=True)
class Job:
    """What this rank is to do: `warmup` and then `steps` timed steps of its part of the case's batch.

    `case` holds the fields of a `Case`, its batch being that of all ranks together.
    """

    case: dict[str, Any]
    sharding: str
    reshard: bool
    checkpointing: bool
    warmup: int
    steps: int
    folder: str


def measure(job: Job) -> dict[str, Any]:
    """Train on noise. Returns `seconds` of every timed step, bytes, and what was computed:

    `memory` is the peak above what the process had before the model was built, `start_memory` that of building and
    spreading it alone, `state` counts this rank's weights, gradients, moments and teacher, and `modelled` what the
    memory model says of them all. `loss` is the mean of all ranks in the last step.
    """
    case = Case(**job.case)
    parallel = setup(case.device, case.precision, sharding=job.sharding, reshard_after_forward=job.reshard)
    batch = own_images(case, parallel.rank, parallel.world_size)
    rehearse(case, job, parallel, batch)
    before = _peak(parallel)
    model = build_model(case, job.checkpointing)
    student = model.student
    network = sizes_of(student.backbone, student.class_head, student.ibot_head)
    modelled = memory(network, batch_of(case, job, parallel, network.patch), _layout(parallel))
    stepper = stepper_of(model, case, parallel)
    del model, student
    started = _peak(parallel) - before
    seconds, loss = _time(stepper, batch, job.warmup + job.steps, case.seed)
    return {
        "seconds": seconds[job.warmup :],
        "memory": _peak(parallel) - before,
        "start_memory": started,
        "state": _state_bytes(stepper),
        "modelled": modelled,
        "loss": loss,
        "threads": torch.get_num_threads(),
    }


def rehearse(case: Case, job: Job, parallel: Parallel, batch: dict[str, Tensor]) -> None:
    """Two steps of a network of next to no weights: FSDP2 loads about 80 MiB of code when it is first used, and all
    make thread pools and buffers; neither is the model's memory."""
    model = build_model(case, job.checkpointing, embed_dim=64, num_heads=1, depth=2, prototypes=64, hidden=64)
    _time(stepper_of(model, case, parallel), batch, 2, case.seed)
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(parallel.device)


def build_model(case: Case, checkpointing: bool, *, prototypes: int = 0, hidden: int = 2048, **sizes: Any) -> SSLModel:
    """The case's networks; `prototypes` and `sizes` (of the backbone) replace the case's own."""
    backbone = build(case.arch, seed=case.seed, img_size=case.global_size, drop_path=case.drop_path, **sizes)
    backbone.activation_checkpointing = checkpointing
    return build_ssl_model(backbone, prototypes=prototypes or case.prototypes, hidden=hidden, seed=case.seed)


def stepper_of(model: SSLModel, case: Case, parallel: Parallel) -> Stepper:
    """The product's own step over the ranks of `parallel`, with its optimizer."""
    networks = parallel.spread(model)
    optimizer = build_optimizer(networks.model.student, depth=networks.model.student.backbone.depth)
    return Stepper(
        {"": Learner(networks, optimizer, parallel, clip=CLIP)},
        SelfDistillation(),
        Settings(seed=case.seed, clip=CLIP),
        augment=Augment(),
        parallel=parallel,
        batch_size=case.batch_size // parallel.world_size,
        global_size=case.global_size,
    )


def own_images(case: Case, rank: int, world_size: int) -> dict[str, Tensor]:
    """This rank's images of one batch of noise, the same over any number of ranks, as the loader gives them."""
    generator = torch.Generator().manual_seed(case.seed)
    size = case.batch_size // world_size
    own = torch.arange(rank * size, (rank + 1) * size)

    def crops(number: int, pixels: int) -> Tensor:
        shape = (number, case.batch_size, 3, pixels, pixels)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)[:, own].clone()

    return {
        "global_crops": crops(GLOBAL_CROPS, case.global_size),
        "local_crops": crops(case.local_number, case.local_size),
        "index": own,
        "epoch": torch.zeros_like(own),
    }


def _time(stepper: Stepper, batch: dict[str, Tensor], steps: int, seed: int) -> tuple[list[float], float]:
    """Seconds of every step, and the last one's loss."""
    values = StepValues(LR, LR, weight_decay=0.04, momentum=MOMENTUM, teacher_temperature=TEMPERATURE)
    seconds, loss = [], float("nan")
    for step in range(steps):
        started = time.perf_counter()
        result = stepper(batch, values, step, seed=seed)[""]
        loss = float(result.losses["total"])  # waits for the device
        if stepper.parallel.device.type == "cuda":
            torch.cuda.synchronize(stepper.parallel.device)
        seconds.append(time.perf_counter() - started)
    return seconds, loss


def batch_of(case: Case, job: Job, parallel: Parallel, patch: int) -> Batch:
    """The batch of one rank as the memory model wants it, for `patch` pixels; masks as pretraining has them."""
    method = SelfDistillation()
    patches = (case.global_size // patch) ** 2
    masked = GLOBAL_CROPS * patches * method.mask_probability * sum(method.mask_ratio) / 2
    plain = parallel.device.type == "cpu" and parallel.precision == "bf16"
    return Batch(
        images=case.batch_size // parallel.world_size,
        global_size=case.global_size,
        local_size=case.local_size,
        local_number=case.local_number,
        masked=masked,
        precision=parallel.precision,
        checkpointing=job.checkpointing,
        plain_tokens=PLAIN_TOKENS if plain else 0,
    )


def _layout(parallel: Parallel) -> Layout:
    kind = "ddp" if parallel.sharding.kind == "none" else parallel.sharding.kind
    reshard = parallel.sharding.reshard_after_forward
    return Layout(kind, parallel.world_size, parallel.world_size, reshard=reshard)


def _state_bytes(stepper: Stepper) -> int:
    """Bytes of this rank's part of weights, gradients, moments and teacher; without Adam's count of steps."""
    learner = stepper.learners[""]
    model, moments = learner.model, learner.optimizer.state
    held: list[Tensor] = list(model.teacher.parameters())
    for parameter in model.student.parameters():
        held += [parameter, *([] if parameter.grad is None else [parameter.grad])]
        held += [value for name, value in moments.get(parameter, {}).items() if name != "step"]
    return sum(part.numel() * part.element_size() for part in map(local, held))


def _peak(parallel: Parallel) -> int:
    """Most bytes this process had so far: tensors on a GPU, resident memory on a CPU."""
    if parallel.device.type == "cuda":
        return torch.cuda.max_memory_allocated(parallel.device)
    return resident_peak()


def main(text: str) -> int:
    """Do one job and leave its figures in the folder, or {"error": why not}; the exit code."""
    job = Job(**json.loads(text))
    figures: dict[str, Any]
    try:
        figures = measure(job)
    except DinoError as error:
        figures = {"error": str(error)}
    Path(job.folder, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(figures), encoding="utf-8")
    if "error" in figures:
        return 1
    if launched():
        leave()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # as the command line does; see cli/main.py
