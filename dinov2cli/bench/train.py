"""`dinov2 bench train`: one optimisation step, its parts, and how it compares with a textbook step and the machine."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2cli.bench.peak import matmul_peak, resident_peak, run_in_child
from dinov2cli.bench.textbook import ema, textbook_loss
from dinov2cli.data.augment import Augment
from dinov2cli.data.cores import default_workers
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader
from dinov2cli.data.masks import MaskedTokens, make_masks, masked_tokens
from dinov2cli.data.source import open_source
from dinov2cli.kernels.dispatch import choices
from dinov2cli.models.flops import step_flops
from dinov2cli.models.registry import architecture, build
from dinov2cli.train.ema import ema_update, pair_parameters
from dinov2cli.train.graphs import BlockGraphs, check_graphs, compile_blocks
from dinov2cli.train.network import build_ssl_model
from dinov2cli.train.optim import build_optimizer, clip_gradients
from dinov2cli.train.parallel import setup
from dinov2cli.train.ssl import Objective, loss_terms, student_views, teacher_targets

SMALL = 64  # pixels of a global crop
TEMPERATURE, LR, MOMENTUM, CLIP = 0.05, 1e-4, 0.99, 3.0
PARTS = ("data wait", "augment", "teacher", "student backbone", "heads and losses", "backward", "optimizer", "ema")


@dataclass(frozen=True)
class Case:
    """What is timed. Sizes in pixels."""

    arch: str
    batch_size: int
    prototypes: int
    global_size: int
    local_size: int
    local_number: int
    drop_path: float
    precision: str
    device: str
    seed: int
    compile: str = "false"  # as train.compile: false, true or graphs


_ON_A_GPU = {"vits14": (128, 65536, 0.3), "vitb14": (96, 65536, 0.3), "vitl14": (64, 131072, 0.4)}
_LARGE = (24, 131072, 0.4)
"""Batch, prototypes and stochastic depth of the paper's runs per architecture, in what one 80 GB GPU holds."""
_REFERENCE_BATCH = {"vits14": 64, "vitb14": 32, "vitl14": 24}
_SMALLEST = 8
"""Images that the textbook step has room for there: it keeps twice as much for its backward pass, and more."""


def default_case(device: str, seed: int, arch: str = "vits14") -> Case:
    """The paper's crops, prototypes and stochastic depth on a GPU; on a CPU 65,536 prototypes and small crops."""
    chosen, patch = setup(device), architecture(arch)["patch_size"]
    if chosen.device.type == "cuda":
        batch, prototypes, drop = _ON_A_GPU.get(arch, _LARGE)
        local = 98 // patch * patch
        return Case(arch, batch, prototypes, 224, local, 8, drop, chosen.precision, str(chosen.device), seed)
    batch = 16 if arch == "vits14" else 4
    return Case(arch, batch, 65536, 7 * patch, 3 * patch, 8, 0.3, chosen.precision, str(chosen.device), seed)


def run(
    device: str = "auto",
    seed: int = 0,
    rounds: int = 3,
    case: Case | None = None,
    reference: bool = False,
    arch: str = "vits14",
    compile: str = "false",
) -> dict[str, Any]:
    """Time the step on noise and part by part on real images; with `reference` beside the textbook step.

    Returns `images_per_s`, `seconds` (per step, best of `rounds`), `gflop` (per step, as computed) with `tflop_per_s`
    and `mfu` (over `peak_tflop_per_s`, the best this machine showed in a matrix product), `parts` (seconds each, mean
    of `rounds` steps fed by the real loader), `memory_mib` (peak above weights, gradients, moments and teacher, in a
    process of its own on a CPU) and `state_mib`. With `reference` also `reference_images_per_s`, `reference_seconds`,
    `reference_gflop`, `reference_memory_mib`, `speedup` and `memory_ratio` (reference over ours, ours over reference;
    per image), `floor_speedup` (the ratio of operations) and `loss_difference` (relative, in float32, no drops). On a
    CPU the two are timed by turns; on a GPU, whose memory does not hold both, one after the other, the reference with
    `reference_batch_size` images (`reference_failed` says so if that is too much as well). `kernels` says what each
    operator ran on.
    """
    case = case or replace(default_case(device, seed, arch), compile=compile)
    plain = reference_case(case)
    ours = Step(case, plain=False)
    together = reference and plain == case
    sides = [ours, Step(plain, plain=True)] if together else [ours]
    times = time_by_turns(sides, rounds)
    del sides
    flops = case_flops(ours)
    parts = time_parts(ours, rounds)
    state = ours.state_bytes()
    peak = matmul_peak(ours.parallel)
    best = min(times[0])
    figures: dict[str, Any] = {
        "images_per_s": case.batch_size / best,
        "seconds": best,
        "gflop": flops / 1e9,
        "tflop_per_s": flops / best / 1e12,
        "peak_tflop_per_s": peak / 1e12,
        "mfu": flops / best / peak,
        "parts": parts,
        "state_mib": state / 2**20,
        "kernels": ", ".join(f"{c.operator} {c.backend}" for c in choices(ours.parallel.device)),
    }
    del ours
    figures["memory_mib"] = memory_above_state(case, plain=False) / 2**20
    if reference:
        try:
            figures |= compared(figures, case, plain, times[1] if together else None, rounds)
        except torch.OutOfMemoryError as error:
            figures["reference_failed"] = str(error).splitlines()[0]
    return figures | {key: getattr(case, key) for key in Case.__annotations__}


def reference_case(case: Case) -> Case:
    """What the textbook step is given: the same, but on a GPU no more images than it has memory for."""
    if torch.device(case.device).type != "cuda":
        return case
    most = _REFERENCE_BATCH.get(case.arch, _SMALLEST)
    return replace(case, batch_size=min(case.batch_size, most), compile="false")


def compared(ours: dict[str, Any], case: Case, plain: Case, times: list[float] | None, rounds: int) -> dict[str, Any]:
    """The figures of the textbook step and of ours beside it; `times` if it has been timed already."""
    step = Step(plain, plain=True)
    seconds = min(times or time_by_turns([step], rounds)[0])
    flops = case_flops(step)
    del step
    memory = memory_above_state(plain, plain=True) / 2**20
    rate = plain.batch_size / seconds
    return {
        "reference_batch_size": plain.batch_size,
        "reference_images_per_s": rate,
        "reference_seconds": seconds,
        "reference_gflop": flops / 1e9,
        "reference_memory_mib": memory,
        "speedup": ours["images_per_s"] / rate,
        "floor_speedup": (flops / plain.batch_size) / (ours["gflop"] * 1e9 / case.batch_size),
        "memory_ratio": (ours["memory_mib"] / case.batch_size) / (memory / plain.batch_size),
        "loss_difference": compare_losses(plain),
    }


class Step:
    """A model, its optimizer and one fixed batch of noise; calling it makes one optimisation step."""

    def __init__(self, case: Case, *, plain: bool) -> None:
        self.case, self.plain, self.parallel = case, plain, setup(case.device, case.precision)
        self.backbone = build(
            case.arch, seed=case.seed, img_size=case.global_size, layerscale=1.0, drop_path=case.drop_path
        )
        self.model = build_ssl_model(self.backbone, prototypes=case.prototypes, seed=case.seed)
        self.model.to(self.parallel.device)
        self.graphs = self._compiled()
        student = self.model.student
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(student.parameters(), lr=LR, foreach=False)
            if plain
            else build_optimizer(student, depth=self.backbone.depth)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        self.averaged = pair_parameters(self.model.teacher, student)
        self.clipped = {name: list(part.parameters()) for name, part in student.named_children()}
        self.batch = make_batch(case, self.backbone.patch_size, self.parallel.device)
        self.generator = torch.Generator().manual_seed(case.seed)

    def __call__(self, batch: dict[str, Tensor] | None = None, mark: Callable[[str], None] = lambda _: None) -> Tensor:
        """One step on `batch` (default: the fixed one) and its loss; `mark` is told the name of each part that ends."""
        self.optimizer.zero_grad()
        total = self.loss(batch or self.batch, mark)
        total.backward()
        mark("backward")
        if self.plain:
            for parameters in self.clipped.values():
                torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=False)
        else:
            clip_gradients(self.clipped, CLIP)
        self.optimizer.step()
        mark("optimizer")
        (ema if self.plain else ema_update)(*self.averaged, MOMENTUM)
        mark("ema")
        return total.detach()

    def _compiled(self) -> BlockGraphs | None:
        """Compile as the case says, as `assemble` does for a run. Raises UserError where graphs cannot be."""
        backbones = [self.model.student.backbone, self.model.teacher.backbone]
        if self.case.compile == "false" or self.plain:
            return None
        if self.case.compile == "graphs":
            check_graphs(self.parallel.device, world_size=1, sharded=False, accumulate=1, recompute=False)
        compile_blocks(backbones)
        return BlockGraphs(backbones) if self.case.compile == "graphs" else None

    def loss(self, batch: dict[str, Tensor], mark: Callable[[str], None] = lambda _: None) -> Tensor:
        """The loss of a batch, by our step or the textbook's."""
        drop, model = self.case.drop_path, self.model
        with self.parallel.autocast(), self.graphs.running() if self.graphs else nullcontext():
            crops, device = batch["global_crops"], batch["global_crops"].device
            masks = batch["masks"].to(device, non_blocking=True)
            if self.plain:
                inputs: dict[str, Any] = {**batch, "masks": masks, "generator": self.generator}
                return textbook_loss(model, drop_path=drop, teacher_temperature=TEMPERATURE, **inputs)
            # As in a run: counted on the host, or it would have to wait for a GPU to know how many there are.
            tokens = MaskedTokens(*(part.to(device, non_blocking=True) for part in masked_tokens(batch["masks"])))
            targets = teacher_targets(model, crops, tokens.indices, temperature=TEMPERATURE, iterations=3)
            mark("teacher")
            views = student_views(
                model.student.backbone,
                crops,
                batch["local_crops"],
                masks,
                tokens.indices,
                generator=self.generator,
            )
            mark("student backbone")
            terms = loss_terms(model.student, views, Objective(), targets, tokens.weights)
            mark("heads and losses")
            return torch.stack(list(terms.values())).sum()

    def state_bytes(self) -> int:
        """Weights, gradients, two moments and the teacher."""
        student = sum(p.numel() * p.element_size() for p in self.model.student.parameters() if p.requires_grad)
        return 4 * student + sum(p.numel() * p.element_size() for p in self.model.teacher.parameters())

    def wait(self) -> None:
        """Until the device is done."""
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize(self.parallel.device)


def training_rate(arch: str, device: torch.device, crop: MultiCrop) -> tuple[float, float]:
    """(images/s, FLOP per image) of a training step of `arch` with these crops, drop path 0.3 and a batch that fits."""
    precision = setup(str(device)).precision
    small = crop.global_size < SMALL
    batch = 64 if small or device.type == "cuda" else 4
    sizes = crop.global_size, crop.local_size, crop.local_number
    step = Step(Case(arch, batch, 1024 if small else 65536, *sizes, 0.3, precision, str(device), 0), plain=False)
    return batch / min(time_by_turns([step], 2)[0]), case_flops(step) / batch


def make_batch(case: Case, patch_size: int, device: torch.device) -> dict[str, Tensor]:
    """Crops of noise on the device, and masks on the host: the arithmetic does not depend on what the images show."""
    generator = torch.Generator().manual_seed(case.seed)
    grid = case.global_size // patch_size

    def crops(number: int, size: int) -> Tensor:
        return torch.randn(number, case.batch_size, 3, size, size, generator=generator).to(device)

    masks = make_masks(2 * case.batch_size, (grid, grid), rng=np.random.default_rng(case.seed))
    return {
        "global_crops": crops(2, case.global_size),
        "local_crops": crops(case.local_number, case.local_size),
        "masks": masks,
    }


def time_by_turns(steps: list[Step], rounds: int) -> list[list[float]]:
    """Seconds of `rounds` steps of each, alternating, after one that does not count."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 1):
        for step, seconds in zip(steps, times, strict=True):
            step.wait()
            started = time.perf_counter()
            step()
            step.wait()
            if turn:
                seconds.append(time.perf_counter() - started)
    return times


def time_parts(step: Step, rounds: int) -> dict[str, float]:
    """Mean seconds of each part of a step fed by the real loader from photographs."""
    case, device = step.case, step.parallel.device
    crop = MultiCrop(global_size=case.global_size, local_size=case.local_size, local_number=case.local_number)
    source = open_source(f"demo:photos?count={max(40, 2 * case.batch_size)}")
    loader = CropLoader(source, crop=crop, batch_size=case.batch_size, seed=case.seed, workers=default_workers())
    augment, seconds = Augment(), dict.fromkeys(PARTS, 0.0)
    batches = iter(loader)
    try:
        batch = next(batches)  # starts the workers
        for _ in range(rounds):
            step()
            started = time.perf_counter()
            batch = next(batches)
            seconds["data wait"] += (time.perf_counter() - started) / rounds
    finally:
        batches.close()  # type: ignore[attr-defined]
    last = 0.0

    def mark(part: str) -> None:
        nonlocal last
        step.wait()
        now = time.perf_counter()
        seconds[part] += (now - last) / rounds
        last = now

    # Without workers beside it: on few cores they would slow the parts they happen to run beside.
    for _ in range(rounds):
        last = time.perf_counter()
        crops = (batch[name].to(device) for name in ("global_crops", "local_crops"))
        big, small = augment(*crops, seed=case.seed, epoch=batch["epoch"], sample=batch["index"])
        mark("augment")
        step({"global_crops": big, "local_crops": small, "masks": step.batch["masks"]}, mark)
    return seconds


def case_flops(step: Step) -> float:
    """Operations of one step, stochastic depth counted as each side computes it."""
    case = step.case
    kept = max(int(case.batch_size * (1 - case.drop_path) + 1e-9), 1) / case.batch_size
    per_image = step_flops(
        step.backbone,
        prototypes=case.prototypes,
        global_size=case.global_size,
        local_size=case.local_size,
        local_number=case.local_number,
        masked=float(step.batch["masks"].sum()) / case.batch_size,
        drop_path=0.0 if step.plain else 1 - kept,
    )
    return per_image["total"] * case.batch_size


def compare_losses(case: Case) -> float:
    """Relative difference of the two losses on the same weights and batch, in float32 and without stochastic depth."""
    exact = replace(case, precision="fp32", drop_path=0.0, compile="false")
    with torch.no_grad():
        ours, plain = (float(step.loss(step.batch)) for step in (Step(exact, plain=False), Step(exact, plain=True)))
    return abs(ours - plain) / abs(plain)


def memory_above_state(case: Case, *, plain: bool) -> int:
    """Bytes that two steps need at most, beyond the state that lives through all of them."""
    device = torch.device(case.device)
    if device.type != "cuda":
        return int(run_in_child(_resident_above_state, case, plain))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    state = _two_steps(case, plain)
    return torch.cuda.max_memory_allocated(device) - before - state


def _resident_above_state(case: Case, plain: bool) -> int:
    before = resident_peak()
    state = _two_steps(case, plain)
    return resident_peak() - before - state


def _two_steps(case: Case, plain: bool) -> int:
    step = Step(case, plain=plain)
    step()
    step()
    return step.state_bytes()
