"""`dinov2 bench train`: one optimisation step, ours beside a plain one, in one process on this machine.

Plain means what a first implementation does: one forward per crop group, stochastic depth that computes every branch
(drop rate 0 costs the same), float32 Sinkhorn that rewrites the whole matrix, log-softmax kept for the backward pass,
one cross-entropy per pair of crops, AdamW and EMA one parameter at a time. The two compute the same loss.
"""

import multiprocessing
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2cli.data.masks import make_masks, masked_tokens
from dinov2cli.losses.koleo import koleo_loss
from dinov2cli.models.registry import build
from dinov2cli.train.ema import ema_update, pair_parameters
from dinov2cli.train.optim import build_optimizer
from dinov2cli.train.parallel import Parallel, setup
from dinov2cli.train.ssl import Objective, SSLModel, build_ssl_model, ssl_losses

TEMPERATURE, STUDENT_TEMPERATURE, LR, MOMENTUM = 0.05, 0.1, 1e-4, 0.99


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


def default_case(device: str, seed: int) -> Case:
    """ViT-S/14 at the paper's crops on a GPU, a tiny one with small crops on a CPU; drop path 0.3 on both."""
    chosen = setup(device)
    if chosen.device.type == "cuda":
        return Case("vits14", 64, 65536, 224, 98, 8, 0.3, chosen.precision, str(chosen.device), seed)
    return Case("tiny", 8, 16384, 48, 24, 8, 0.3, chosen.precision, str(chosen.device), seed)


def run(device: str = "auto", seed: int = 0, rounds: int = 3, case: Case | None = None) -> dict[str, Any]:
    """Time both steps alternately and measure their peak memory.

    Returns `images_per_s`, `seconds` (per step), the same of the reference, `speedup` (reference over ours, best of
    `rounds`), `memory_mib`, `memory_ratio` (ours over reference: allocated on a GPU, resident on a CPU, where each runs
    in a process of its own) and `loss_difference` (relative, both without stochastic depth).
    """
    case = case or default_case(device, seed)
    ours, plain = Step(case, plain=False), Step(case, plain=True)
    difference = compare_losses(case)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in (ours, plain):
        step()
    for _ in range(rounds):
        for step in (ours, plain):
            times[step.plain].append(timed(step))
    best, reference = min(times[False]), min(times[True])
    del ours, plain, step
    memory, reference_memory = peak_memory(case, plain=False), peak_memory(case, plain=True)
    return {
        "images_per_s": case.batch_size / best,
        "seconds": best,
        "reference_images_per_s": case.batch_size / reference,
        "reference_seconds": reference,
        "speedup": reference / best,
        "memory_mib": memory / 2**20,
        "reference_memory_mib": reference_memory / 2**20,
        "memory_ratio": memory / reference_memory,
        "loss_difference": difference,
        **{key: getattr(case, key) for key in Case.__annotations__},
    }


class Step:
    """A model, its optimizer and one fixed batch of noise; calling it makes one optimisation step."""

    def __init__(self, case: Case, *, plain: bool, drop_path: float | None = None) -> None:
        self.plain, self.parallel = plain, setup(case.device, case.precision)
        drop = case.drop_path if drop_path is None else drop_path
        backbone = build(
            case.arch, seed=case.seed, img_size=case.global_size, layerscale=1.0, drop_path=0.0 if plain else drop
        )
        self.model = build_ssl_model(backbone, prototypes=case.prototypes, seed=case.seed).to(self.parallel.device)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.model.student.parameters(), lr=LR, foreach=False)
            if plain
            else build_optimizer(self.model.student, depth=backbone.depth)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        self.averaged = pair_parameters(self.model.teacher, self.model.student)
        self.batch = make_batch(case, backbone.patch_size, self.parallel)
        self.generator = torch.Generator().manual_seed(case.seed)

    def loss(self) -> Tensor:
        """The loss of the batch, by our step or the plain one."""
        with self.parallel.autocast():
            if self.plain:
                return plain_loss(self.model, **self.batch)
            out = ssl_losses(
                self.model,
                Objective(),
                teacher_temperature=TEMPERATURE,
                generator=self.generator,
                **self.batch,
            )
            return out.total

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        if not self.plain:
            ema_update(*self.averaged, MOMENTUM)
            return
        with torch.no_grad():
            for teacher, student in zip(*self.averaged, strict=True):
                teacher.mul_(MOMENTUM).add_(student, alpha=1 - MOMENTUM)


def make_batch(case: Case, patch_size: int, parallel: Parallel) -> dict[str, Any]:
    """Crops of noise and masks: the arithmetic does not depend on what the images show."""
    generator = torch.Generator().manual_seed(case.seed)
    grid = case.global_size // patch_size

    def crops(number: int, size: int) -> Tensor:
        return torch.randn(number, case.batch_size, 3, size, size, generator=generator).to(parallel.device)

    masks = make_masks(2 * case.batch_size, (grid, grid), rng=np.random.default_rng(case.seed))
    return {
        "global_crops": crops(2, case.global_size),
        "local_crops": crops(case.local_number, case.local_size),
        "masks": masks.to(parallel.device),
    }


def plain_loss(model: SSLModel, *, global_crops: Tensor, local_crops: Tensor, masks: Tensor) -> Tensor:
    """The objective of `ssl_losses`, written without any of its economies."""
    student, teacher, batch = model.student, model.teacher, global_crops.shape[1]
    tokens = masked_tokens(masks)
    with torch.no_grad():
        seen = teacher.backbone(global_crops.flatten(0, 1))
        dino_targets = plain_sinkhorn(teacher.dino_head(seen.cls)).unflatten(0, (2, batch))
        ibot_targets = plain_sinkhorn(teacher.patch_head(seen.patches.flatten(0, 1)[tokens.indices]))
    views = student.backbone(global_crops.flatten(0, 1), masks)
    global_logits = student.dino_head(views.cls).unflatten(0, (2, batch))
    locals_ = [student.dino_head(student.backbone(crop).cls) for crop in local_crops]
    pairs = [(global_logits[0], dino_targets[1]), (global_logits[1], dino_targets[0])]
    pairs += [(logits, target) for logits in locals_ for target in dino_targets]
    dino = torch.stack([plain_cross_entropy(logits, target).mean() for logits, target in pairs]).mean()
    patch_logits = student.patch_head(views.patches.flatten(0, 1)[tokens.indices])
    ibot = (plain_cross_entropy(patch_logits, ibot_targets) * tokens.weights).sum() / len(masks)
    return dino + ibot + 0.1 * koleo_loss(views.cls.unflatten(0, (2, batch)))


def plain_sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """The published loop: the whole matrix is rewritten at every normalisation."""
    q = torch.exp(logits.float() / TEMPERATURE).t()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).t()


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row, through a log-softmax that autograd keeps."""
    return -(targets * F.log_softmax(logits.float() / STUDENT_TEMPERATURE, dim=-1)).sum(dim=-1)


def compare_losses(case: Case) -> float:
    """Relative difference of the two losses on the same weights and batch, without stochastic depth."""
    with torch.no_grad():
        ours = float(Step(case, plain=False, drop_path=0.0).loss())
        plain = float(Step(case, plain=True).loss())
    return abs(ours - plain) / abs(plain)


def timed(step: Step) -> float:
    """Seconds of one step, device work included."""
    cuda = step.parallel.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(step.parallel.device)
    started = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize(step.parallel.device)
    return time.perf_counter() - started


def peak_memory(case: Case, *, plain: bool) -> int:
    """Bytes that two steps, with model and optimizer, need at most."""
    device = torch.device(case.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step = Step(case, plain=plain)
        step()
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # A process's peak only ever rises, so each variant is measured in a fresh one.
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=_report_growth, args=(case, plain, torch.get_num_threads(), results))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"the process that measures memory ended with {child.exitcode}")
    return results.get()


def _report_growth(case: Case, plain: bool, threads: int, results: Any) -> None:
    torch.set_num_threads(threads)
    before = _peak_resident()
    step = Step(case, plain=plain)
    step()
    step()
    results.put(_peak_resident() - before)


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss would still hold the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
