"""`dinov2 bench losses`: Sinkhorn and the prototype cross-entropy of one step, checked and then timed side by side.

Beside what a run would use here ("ours") stand plain torch operations ("torch", the fallback), a textbook's
("textbook": the loop that rewrites Q, a log-softmax per pair of crops) and the textbook's compiled by torch.compile. A
step's logits are gigabytes on a GPU, so every call finds the caches full of something else.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2cli.bench import textbook
from dinov2cli.bench.device_time import copy_rate, median_seconds, named
from dinov2cli.device import choose_device
from dinov2cli.errors import WorkError
from dinov2cli.kernels.dispatch import SETTING, choose
from dinov2cli.losses.cross_entropy import RowTargets
from dinov2cli.losses.dino import dino_loss
from dinov2cli.losses.ibot import ibot_loss
from dinov2cli.losses.sinkhorn import sinkhorn_scalings

TEMPERATURE = 0.05  # of the teacher
PASSES = 6  # reads of the teacher's logits for three iterations of Sinkhorn
BOUNDS = {"targets": 1e-4, "loss": 1e-5, "gradient": 1e-4}
"""Largest relative errors against float64, by the length of the difference over that of the exact result."""
_COMPILE_LIMIT = 25.0  # seconds after which no further case is compiled: the whole bench has to end in a minute

Sinkhorn = Callable[[Tensor], Any]
Loss = Callable[["Logits", Any, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """The logits of one step: two global and `n_local` local crops of `images`, `masked` patches, K prototypes."""

    name: str
    images: int
    prototypes: int
    masked: int
    n_local: int = 8

    def elements(self) -> tuple[int, int]:
        """Logits of the teacher and of the student."""
        teacher = 2 * self.images + self.masked
        return teacher * self.prototypes, (teacher + self.n_local * self.images) * self.prototypes


@dataclass(frozen=True)
class Logits:
    """Teacher logits of both heads [2 * B, K] and [M, K] in fp16; the student's in float32, for class tokens
    [(2 + L) * B, K] and patches [M, K]."""

    case: Case
    teacher_class: Tensor
    teacher_patch: Tensor
    student_class: Tensor
    student_patch: Tensor


GPU_CASES = (
    Case("ViT-L/14, 64 images, 131,072 prototypes", 64, 131072, 77 * 64),
    Case("ViT-S/14, 128 images, 65,536 prototypes", 128, 65536, 77 * 128),
)
CPU_CASES = (Case("16 images, 16,384 prototypes", 16, 16384, 20 * 16),)
CHECKED = Case("checked", 12, 3000, 50, 3)


def run(device: str = "auto", seed: int = 0, rounds: int = 10, cases: tuple[Case, ...] | None = None) -> dict[str, Any]:
    """Errors, then medians of each part of each case by each implementation that runs on `device`.

    `errors`: of ours against float64. `cases`: for each the parts sinkhorn, forward and backward with rows of
    microseconds, and for ours `tb_per_s` (bytes that these kernels read and write over the time) and `of_copy` (that
    over the rate of a copy), `speedup` of ours over each of the others for all three parts together, and the peak
    `memory_mib` above the logits (null on a CPU). `note` tells what did not run. Raises WorkError if ours is wrong.
    """
    where = choose_device(device)
    choice = choose("cross-entropy", where)
    errors = checked(where, seed)
    refuse_wrong(errors)
    rate, started = copy_rate(where), time.perf_counter()
    if cases is None:
        cases = GPU_CASES if where.type == "cuda" else CPU_CASES
    measured = []
    for number, case in enumerate(cases):
        compiled = where.type == "cuda" and (number == 0 or time.perf_counter() - started < _COMPILE_LIMIT)
        measured.append(measure(case, where, rate, seed, rounds, compiled))
    note = None if choice.backend == "triton" else f"our Triton kernels did not run: {choice.reason}"
    return {
        "device": named(where),
        "ours": f"{choice.backend} ({choice.reason})",
        "note": note,
        "copy_tb_per_s": rate / 1e12,
        "errors": errors,
        "cases": measured,
    }


def measure(case: Case, device: torch.device, rate: float, seed: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """One case: a row per implementation in each of three parts."""
    logits = make_logits(case, device, seed)
    rows: dict[str, dict[str, Any]] = {}
    for name, (setting, sinkhorn, loss) in implementations(device, compiled).items():
        with backend(setting):
            try:
                rows[name] = _timed(logits, sinkhorn, loss, device, rounds)
            except RuntimeError as error:  # out of memory, or a compiler that is not there
                rows[name] = {"failed": str(error).splitlines()[0][:200]}
    moved = moved_bytes(case)
    if "failed" not in rows["ours"] and choose("cross-entropy", device).backend == "triton":
        for part, count in moved.items():
            row = rows["ours"][part]
            row["tb_per_s"] = count / row["us"] / 1e6
            row["of_copy"] = count / (row["us"] / 1e6) / rate
    totals = {name: sum(row[part]["us"] for part in moved) for name, row in rows.items() if "failed" not in row}
    own = totals.get("ours")
    return {
        "case": case.name,
        "elements": dict(zip(("teacher", "student"), case.elements(), strict=True)),
        "parts": {
            part: {name: row["failed"] if "failed" in row else row[part] for name, row in rows.items()}
            for part in moved
        },
        "total_us": totals,
        "speedup": {name: total / own for name, total in totals.items() if own and name != "ours"},
        "memory_mib": {name: row.get("memory_mib") for name, row in rows.items()},
    }


def moved_bytes(case: Case) -> dict[str, int]:
    """What our kernels read and write: fp16 teacher logits, float32 student logits; vectors left out.

    Each global crop meets one teacher crop, and the local crops of an image read its two once for all of them.
    """
    teacher, student = case.elements()
    beside = 2 * (teacher + 2 * case.images * case.prototypes * (case.n_local > 0))
    return {"sinkhorn": 2 * PASSES * teacher, "forward": 4 * student + beside, "backward": 8 * student + beside}


def implementations(device: torch.device, compiled: bool) -> dict[str, tuple[str | None, Sinkhorn, Loss]]:
    """For each name: the setting of DINOV2_KERNELS (None: as it is), Sinkhorn, and the loss of a step."""
    found: dict[str, tuple[str | None, Sinkhorn, Loss]] = {"ours": (None, our_targets, our_loss)}
    if choose("cross-entropy", device).backend != "torch":
        found["torch"] = ("torch", our_targets, our_loss)
    found["textbook"] = ("torch", _textbook_sinkhorn, textbook_loss(textbook.cross_entropy))
    if compiled:
        pair = torch.compile(textbook.cross_entropy, dynamic=False)
        found["compiled"] = ("torch", torch.compile(_textbook_sinkhorn, dynamic=False), textbook_loss(pair))
    return found


def our_targets(logits: Tensor) -> RowTargets:
    """The product's Sinkhorn."""
    return sinkhorn_scalings(logits, TEMPERATURE)


def our_loss(logits: Logits, class_targets: RowTargets, patch_targets: RowTargets) -> Tensor:
    """The product's DINO and iBOT loss of student logits that autograd made."""
    case = logits.case
    student = logits.student_class.unflatten(0, (-1, case.images))
    weights = torch.full((case.masked,), 1.0, device=student.device)
    return sum(dino_loss(student, class_targets)) + ibot_loss(
        logits.student_patch, patch_targets, weights, 2 * case.images
    )


def textbook_loss(cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The same loss, one cross-entropy per pair of crops."""

    def loss(logits: Logits, class_targets: Tensor, patch_targets: Tensor) -> Tensor:
        case = logits.case
        crops = logits.student_class.unflatten(0, (-1, case.images)).unbind()
        first, second = class_targets.unflatten(0, (2, case.images))
        pairs = [(crops[0], second), (crops[1], first)]
        pairs += [(crop, target) for crop in crops[2:] for target in (first, second)]
        dino = torch.stack([cross_entropy(*pair).mean() for pair in pairs]).mean()
        return dino + cross_entropy(logits.student_patch, patch_targets).sum() / (2 * case.images)

    return loss


def make_logits(case: Case, device: torch.device, seed: int) -> Logits:
    """Cosines as heads give them at the start: normal with deviation 1/16."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(rows, case.prototypes, dtype=dtype, device=device)
        return out.normal_(std=1 / 16, generator=generator)

    class_rows = (2 + case.n_local) * case.images
    return Logits(
        case,
        draw(2 * case.images, torch.float16),
        draw(case.masked, torch.float16),
        draw(class_rows, torch.float32),
        draw(case.masked, torch.float32),
    )


def checked(device: torch.device, seed: int) -> dict[str, float]:
    """Relative errors of our targets, loss and gradients on a small case against the same in float64."""
    logits = make_logits(CHECKED, device, seed)
    found, exact = _results(logits, torch.float32), _results(logits, torch.float64)
    return {
        name: max(_error(a, b) for a, b in zip(found[name], exact[name], strict=True))
        for name in ("targets", "loss", "gradient")
    }


def refuse_wrong(errors: dict[str, float]) -> None:
    """WorkError if an error is above its bound: a wrong kernel is not timed."""
    for name, error in errors.items():
        if not error <= BOUNDS[name]:  # so that NaN is refused
            raise WorkError(f"bench losses: {name} is off by {error:.2e} of its length, allowed {BOUNDS[name]:.0e}")


@contextmanager
def backend(setting: str | None) -> Iterator[None]:
    """Run the body with DINOV2_KERNELS at `setting` (None: as it is)."""
    before = os.environ.get(SETTING)
    if setting is not None:
        os.environ[SETTING] = setting
    try:
        yield
    finally:
        if setting is not None:
            os.environ.pop(SETTING) if before is None else os.environ.__setitem__(SETTING, before)


class _Made(torch.autograd.Function):
    """Logits as a head gives them: made by autograd, here out of memory that is there already; its gradient is dropped.

    Their values become gradients where the loss writes in place, which costs the next call no more and no less.
    """

    @staticmethod
    def forward(_ctx: Any, _anchor: Tensor, store: Tensor) -> Tensor:
        return store.data

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> tuple[None, None]:
        return None, None


def _timed(logits: Logits, sinkhorn: Sinkhorn, loss: Loss, device: torch.device, rounds: int) -> dict[str, Any]:
    """Microseconds of the three parts, backward as the difference between both ways and one, and the peak memory."""
    anchor = torch.ones((), device=device, requires_grad=True)

    def targets() -> tuple[Any, Any]:
        return sinkhorn(logits.teacher_class), sinkhorn(logits.teacher_patch)

    def forward(given: tuple[Any, Any]) -> Tensor:
        student = (_Made.apply(anchor, store) for store in (logits.student_class, logits.student_patch))
        return loss(Logits(logits.case, logits.teacher_class, logits.teacher_patch, *student), *given)

    def everything() -> None:
        forward(targets()).backward()

    everything()
    peak = _peak(everything, device)
    options: dict[str, Any] = {"rounds": rounds, "warmup": 2}
    balanced = median_seconds([targets], device, **options)
    given = targets()
    one_way = median_seconds([lambda: forward(given).detach()], device, **options)
    both = median_seconds([lambda: forward(given).backward()], device, **options)
    seconds = {"sinkhorn": balanced, "forward": one_way, "backward": both - one_way}
    return {part: {"us": value * 1e6} for part, value in seconds.items()} | {"memory_mib": peak}


def _peak(call: Callable[[], None], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _results(logits: Logits, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Targets, loss and gradients of the product's functions; in float64 they are plain torch."""
    teacher = [t if dtype == torch.float32 else t.to(dtype) for t in (logits.teacher_class, logits.teacher_patch)]
    targets = [sinkhorn_scalings(t, TEMPERATURE) for t in teacher]
    leaves = [t.to(dtype).clone().requires_grad_() for t in (logits.student_class, logits.student_patch)]
    made = Logits(logits.case, *teacher, *(leaf * 1 for leaf in leaves))
    loss = our_loss(made, *targets)
    loss.backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return {"targets": [t.materialize() for t in targets], "loss": [loss.detach()], "gradient": gradients}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _textbook_sinkhorn(logits: Tensor) -> Tensor:
    return textbook.sinkhorn(logits, TEMPERATURE)


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures as tables for people."""
    out = [f"{figures['device']}, copies at {figures['copy_tb_per_s']:.3g} TB/s; ours: {figures['ours']}"]
    out += [] if figures["note"] is None else [figures["note"]]
    for case in figures["cases"]:
        out += ["", f"{case['case']}, microseconds", f"  {'':<12}" + "".join(f"{part:>12}" for part in case["parts"])]
        for name in next(iter(case["parts"].values())):
            cells = [part[name] for part in case["parts"].values()]
            if isinstance(cells[0], str):
                out.append(f"  {name:<12}did not run: {cells[0]}")
                continue
            line = f"  {name:<12}" + "".join(f"{cell['us']:>12.0f}" for cell in cells)
            memory = case["memory_mib"][name]
            line += "" if memory is None else f"   {memory:,.0f} MiB above the logits"
            rates = [f"{cell['of_copy']:.0%}" for cell in cells if "of_copy" in cell]
            out.append(line + (f"   {', '.join(rates)} of the copy rate" if rates else ""))
        out += [f"  ours is {speedup:.2f}x {name}" for name, speedup in case["speedup"].items()]
    found = ", ".join(f"{name} {error:.1e}" for name, error in figures["errors"].items())
    return [*out, "", f"relative errors against float64: {found}"]
