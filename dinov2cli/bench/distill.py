"""`dinov2 bench distill`: a step of distillation beside a step of pretraining of the same student, on the same crops.

Both are the training loop's own steps (`train/step.py`) on crops of noise that are on the device already, without
stochastic depth, which distillation has none of. The teacher has heads of its own: the paper's form, in which all
patches of both global crops meet the prototypes, where pretraining takes the masked ones alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2cli.bench.peak import resident_peak, run_in_child
from dinov2cli.errors import UserError
from dinov2cli.models.flops import (
    backbone_flops,
    distilled_student_flops,
    frozen_teacher_flops,
    heads_flops,
    step_flops,
)
from dinov2cli.models.registry import architecture, build
from dinov2cli.train.distill import DistillObjective, build_distill_model
from dinov2cli.train.distillation import Distillation
from dinov2cli.train.learner import Learner
from dinov2cli.train.method import Method, SelfDistillation
from dinov2cli.train.network import SSLModel, build_heads, build_ssl_model
from dinov2cli.train.optim import build_optimizer
from dinov2cli.train.parallel import Parallel, setup
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.step import Settings, Stepper, StepResult
from dinov2cli.train.teacher import FrozenTeacher

SEVERAL = 2  # students of one teacher's pass
MASKED = 0.5 * 0.3  # mean share of a crop's patches that pretraining's iBOT term sees
_VALUES = StepValues(1e-4, 1e-4, weight_decay=0.04, momentum=0.99, teacher_temperature=0.05)
_CPU_PROTOTYPES, _GPU_PROTOTYPES = 8192, 65536


@dataclass(frozen=True)
class Case:
    """What is timed: architectures by name, sizes in pixels."""

    teacher: str
    student: str
    batch_size: int
    prototypes: int
    global_size: int
    local_size: int
    local_number: int
    precision: str
    device: str
    seed: int


def default_case(device: str, seed: int, teacher: str | None = None, arch: str | None = None) -> Case:
    """On a GPU the paper's crops, ViT-L to ViT-S; on a CPU small crops, ViT-S to a model of a quarter.

    Raises UserError for a student whose patches the teacher's do not meet in those crops.
    """
    chosen = setup(device)
    gpu = chosen.device.type == "cuda"
    teacher, student = teacher or ("vitl14" if gpu else "vits14"), arch or ("vits14" if gpu else "vitti14")
    patch, own = (architecture(name)["patch_size"] for name in (student, teacher))
    wide, narrow = (16, 7) if gpu else (7, 3)
    if wide * patch % own:
        raise UserError(
            f"bench distill: the crops of {student} have {wide * patch} pixels, which patches of {own} ({teacher}) do "
            "not divide; choose a student or a teacher with another patch size"
        )
    sizes = wide * patch, narrow * patch, 8
    batch, prototypes = (64, _GPU_PROTOTYPES) if gpu else (8, _CPU_PROTOTYPES)
    return Case(teacher, student, batch, prototypes, *sizes, chosen.precision, str(chosen.device), seed)


def run(
    device: str = "auto",
    seed: int = 0,
    rounds: int = 3,
    case: Case | None = None,
    teacher: str | None = None,
    arch: str | None = None,
) -> dict[str, Any]:
    """Time both steps by turns, and two students of one teacher's pass beside one at a time.

    Returns for distillation `images_per_s`, `seconds` (best of `rounds`) and `memory_mib` (peak, with weights, moments
    and teacher; in a process of its own on a CPU), the same of pretraining with `pretrain_` before it, `speedup`
    (images/s, distillation over pretraining), `memory_ratio` and `floor_speedup` (the ratio of operations);
    `teacher_share` of the time and `teacher_flop_share` of the operations, heads included; `several_seconds` of a step
    of two students, `several_speedup` over two steps of one, and its floor.
    """
    case = case or default_case(device, seed, teacher, arch)
    steps = [distillation(case), pretraining(case), distillation(case, SEVERAL)]
    one, plain, several = (min(times) for times in time_by_turns(steps, rounds))
    share = teacher_share(steps[0], rounds)
    del steps
    ours, reference = distill_flops(case), pretrain_flops(case)
    looking = ours["teacher"] + ours["teacher heads"]
    everything = sum(ours.values())
    memory, before = (peak_memory(case, form) / 2**20 for form in (distillation, pretraining))
    return {
        "images_per_s": case.batch_size / one,
        "seconds": one,
        "pretrain_images_per_s": case.batch_size / plain,
        "pretrain_seconds": plain,
        "speedup": plain / one,
        "floor_speedup": reference / everything,
        "gflop": everything * case.batch_size / 1e9,
        "teacher_share": share,
        "teacher_flop_share": looking / everything,
        "several_students": SEVERAL,
        "several_seconds": several,
        "several_speedup": SEVERAL * one / several,
        "several_floor_speedup": SEVERAL * everything / (looking + SEVERAL * (everything - looking)),
        "memory_mib": memory,
        "pretrain_memory_mib": before,
        "memory_ratio": memory / before,
        **{key: getattr(case, key) for key in Case.__annotations__},
    }


class Step:
    """One or several students in training, and one fixed batch of noise; calling it makes one step of each."""

    def __init__(self, case: Case, models: list[SSLModel], method: Method, parallel: Parallel) -> None:
        self.parallel, self.method = parallel, method
        method.place(parallel)
        learners = {}
        for number, model in enumerate(models):
            networks = parallel.spread(model)
            student = networks.model.student
            learners[str(number)] = Learner(
                networks, build_optimizer(student, depth=student.backbone.depth), parallel, clip=3.0
            )
        self.stepper = Stepper(
            learners,
            method,
            Settings(seed=case.seed),
            augment=_as_they_are,
            parallel=parallel,
            batch_size=case.batch_size,
            global_size=case.global_size,
        )
        self.batch = noise(case, parallel.device)
        self.made = 0

    def __call__(self) -> dict[str, StepResult]:
        """One step, finished on the device when it returns."""
        self.made += 1
        results = self.stepper(self.batch, _VALUES, self.made, seed=0)
        self.wait()
        return results

    def wait(self) -> None:
        """Until the device is done."""
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize(self.parallel.device)


def distillation(case: Case, students: int = 1) -> Step:
    """The step of `students` that learn from one frozen teacher with heads of its own."""
    parallel, objective = setup(case.device, case.precision), DistillObjective()
    network = build(case.teacher, seed=case.seed, img_size=case.global_size)
    dino_head, ibot_head = build_heads(network.embed_dim, prototypes=case.prototypes, seed=case.seed)
    frozen = FrozenTeacher(network, dino_head=dino_head, ibot_head=ibot_head)
    models = [
        build_distill_model(
            build(case.student, seed=case.seed + number, img_size=case.global_size, layerscale=1.0),
            network.embed_dim,
            objective,
            teacher_has_heads=True,
            adapter=False,
            heads={"prototypes": case.prototypes},
            seed=case.seed + number,
        )
        for number in range(students)
    ]
    return Step(case, models, Distillation(frozen, objective, shared=students > 1), parallel)


def pretraining(case: Case) -> Step:
    """The step of the same student that learns from its own moving average."""
    backbone = build(case.student, seed=case.seed, img_size=case.global_size, layerscale=1.0)
    model = build_ssl_model(backbone, prototypes=case.prototypes, seed=case.seed)
    return Step(case, [model], SelfDistillation(), setup(case.device, case.precision))


def noise(case: Case, device: torch.device) -> dict[str, Tensor]:
    """A batch of normalised crops: the arithmetic does not depend on what the images show."""
    generator = torch.Generator().manual_seed(case.seed)

    def crops(number: int, size: int) -> Tensor:
        return torch.randn(number, case.batch_size, 3, size, size, generator=generator).to(device)

    index = torch.arange(case.batch_size)
    big, small = crops(2, case.global_size), crops(case.local_number, case.local_size)
    return {"global_crops": big, "local_crops": small, "index": index, "epoch": torch.zeros_like(index)}


def _as_they_are(
    global_crops: Tensor, local_crops: Tensor, *, seed: int, epoch: Tensor, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """No augmentation: it is the same for both steps."""
    del seed, epoch, sample
    return global_crops, local_crops


def time_by_turns(steps: list[Step], rounds: int) -> list[list[float]]:
    """Seconds of `rounds` steps of each, alternating, after one that does not count."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 1):
        for step, seconds in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            if turn:
                seconds.append(time.perf_counter() - started)
    return times


def teacher_share(step: Step, rounds: int) -> float:
    """The share of the time of `rounds` steps that goes into the teacher's pass and its heads."""
    method = step.method
    assert isinstance(method, Distillation)
    spent = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any) -> Any:
            nonlocal spent
            step.wait()
            started = time.perf_counter()
            result = call(*arguments)
            step.wait()
            spent += time.perf_counter() - started
            return result

        return clocked

    teacher = method.teacher
    original = teacher.tokens, teacher.logits
    teacher.tokens, teacher.logits = timed(teacher.tokens), timed(teacher.logits)  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        for _ in range(rounds):
            step()
        return spent / (time.perf_counter() - started)
    finally:
        teacher.tokens, teacher.logits = original  # type: ignore[method-assign]


def distill_flops(case: Case) -> dict[str, float]:
    """Operations of a step PER IMAGE by part; all patches meet the iBOT heads."""
    widths = (architecture(name)["embed_dim"] for name in (case.teacher, case.student))
    wide, narrow = (heads_flops(width, prototypes=case.prototypes) for width in widths)
    patches = 2 * (case.global_size // architecture(case.student)["patch_size"]) ** 2
    looking = frozen_teacher_flops(backbone_flops(case.teacher, case.global_size), wide, patches)
    return looking | distilled_student_flops(
        case.student,
        global_size=case.global_size,
        local_size=case.local_size,
        local_number=case.local_number,
        heads=narrow,
        classes=True,
        patches=patches,
    )


def pretrain_flops(case: Case) -> float:
    """Operations of a pretraining step of the student per image."""
    backbone = build(case.student, device="meta", img_size=case.global_size)
    patches = 2 * (case.global_size // backbone.patch_size) ** 2
    sizes = {"global_size": case.global_size, "local_size": case.local_size, "local_number": case.local_number}
    return step_flops(backbone, prototypes=case.prototypes, masked=MASKED * patches, **sizes)["total"]


def peak_memory(case: Case, form: Callable[[Case], Step]) -> int:
    """Bytes that two steps need at most, with everything that lives through them."""
    device = torch.device(case.device)
    if device.type != "cuda":
        return int(run_in_child(_resident, case, form))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _two_steps(case, form)
    return torch.cuda.max_memory_allocated(device) - before


def _resident(case: Case, form: Callable[[Case], Step]) -> int:
    before = resident_peak()
    _two_steps(case, form)
    return resident_peak() - before


def _two_steps(case: Case, form: Callable[[Case], Step]) -> None:
    step = form(case)
    step()
    step()
