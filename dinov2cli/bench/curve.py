"""`dinov2 bench curve`: the losses of a short training with our kernels and with plain torch, on the same batches.

Two computations that round differently drift apart as training goes on. How far bf16 alone lets them is measured by a
third run in float32: kernels that compute the right thing differ from plain torch by no more than that.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dinov2cli.bench.train import Case, Step, default_case, make_batch
from dinov2cli.kernels.dispatch import SETTING, choices

STEPS, BATCHES = 50, 8
_WITHIN = 2.0  # times the drift of bf16


def run(
    device: str = "auto", seed: int = 0, arch: str | None = None, steps: int = STEPS, case: Case | None = None
) -> dict[str, Any]:
    """Train `steps` steps three times from the same weights: kernels, plain torch, plain torch in float32.

    `losses` by run; `kernels_difference` and `bf16_difference` are mean relative differences of the losses of kernels
    and of float32 from plain torch, `coincide` whether the first is within twice the second.
    """
    case = case or _case(device, seed, arch)
    sides = {
        "kernels": (os.environ.get(SETTING, "auto"), case.precision),
        "torch": ("torch", case.precision),
        "float32": ("torch", "fp32"),
    }
    losses = {}
    for name, (backend, precision) in sides.items():
        with backends(backend):
            losses[name] = curve(replace(case, precision=precision), steps)
    drift, noise = (difference(losses[name], losses["torch"]) for name in ("kernels", "float32"))
    where = torch.device(case.device)
    return {
        "arch": case.arch,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "steps": steps,
        "kernels": ", ".join(f"{c.operator} {c.backend}" for c in choices(where)),
        "first_loss": losses["torch"][0],
        "last_loss": losses["torch"][-1],
        "kernels_difference": drift,
        "bf16_difference": noise,
        "coincide": drift <= _WITHIN * noise,
        "losses": losses,
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures without the single losses."""
    width = max(map(len, figures))
    return [
        f"{key.ljust(width)}  {value:.4g}" if isinstance(value, float) else f"{key.ljust(width)}  {value}"
        for key, value in figures.items()
        if key != "losses"
    ]


def curve(case: Case, steps: int) -> list[float]:
    """Losses of `steps` steps that go through BATCHES batches of noise again and again."""
    step = Step(case, plain=False)
    batches = [
        make_batch(replace(case, seed=case.seed + i), step.backbone.patch_size, step.parallel.device)
        for i in range(BATCHES)
    ]
    return torch.stack([step(batches[i % BATCHES]) for i in range(steps)]).tolist()


def difference(losses: list[float], others: list[float]) -> float:
    """Mean relative difference of two curves."""
    return sum(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True)) / len(others)


@contextmanager
def backends(name: str) -> Iterator[None]:
    """DINOV2_KERNELS set to `name` meanwhile."""
    before = os.environ.get(SETTING)
    os.environ[SETTING] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[SETTING]
        else:
            os.environ[SETTING] = before


def _case(device: str, seed: int, arch: str | None) -> Case:
    """A batch that leaves room for three runs in float32 on a GPU; a small model on a CPU."""
    whole = default_case(device, seed, arch or "vits14")
    if torch.device(whole.device).type == "cuda":
        return replace(whole, batch_size=max(8, whole.batch_size // 4))
    return Case(arch or "tiny", 8, 1024, 32, 16, 4, 0.3, whole.precision, whole.device, seed)
