"""Learning rate, weight decay, momentum and temperature as pure functions of the step, and the length of a run.

Warm-ups and the frozen last layer are fractions of the run, not absolute steps: the released code's absolute counts
leave any short run inside its warm-up for ever. DINOv2 (arXiv 2304.07193), appendix B; no torch in this file.
"""

import math
import re
from dataclasses import dataclass

from dinov2cli.errors import UserError


def warmup_cosine(step: int, total: int, *, base: float, final: float, warmup: float, start: float = 0.0) -> float:
    """Rise linearly from `start` to `base` over the first `warmup` (fraction) of the run, then fall to `final`.

    With W = round(warmup * total): for step < W the value is start + (base - start) * (step + 1) / W (so that no step
    is spent at zero), later final + (base - final) * (1 + cos(pi * t)) / 2 with t = (step - W) / (total - W).
    Steps past the end keep `final`.
    """
    warm = round(warmup * total)
    if step < warm:
        return start + (base - start) * (step + 1) / warm
    if step >= total:
        return final
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * (step - warm) / (total - warm)))


def linear_then_constant(step: int, total: int, *, start: float, end: float, warmup: float) -> float:
    """Go linearly from `start` at step 0 to `end` at step warmup * total, then stay there (teacher temperature)."""
    warm = warmup * total
    return end if step >= warm else start + (end - start) * step / warm


def scaled_lr(lr: float, total_batch: int, reference_batch: int = 1024) -> float:
    """Square-root scaling of the learning rate with the batch of all ranks (the released code's `sqrt_wrt_1024`)."""
    return lr * math.sqrt(total_batch / reference_batch)


@dataclass(frozen=True)
class StepValues:
    """Everything that varies during the run, at one step. `last_layer_lr` is 0 while the prototypes are frozen."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """The schedules of one run; `at(step, total)` is a pure function. `lr` is the peak rate at this run's batch."""

    lr: float
    min_lr: float = 1e-6
    warmup: float = 0.1
    freeze_last_layer: float = 0.01
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2
    momentum: float = 0.994
    momentum_end: float = 1.0
    teacher_temperature_start: float = 0.04
    teacher_temperature: float = 0.07
    teacher_temperature_warmup: float = 0.3

    def at(self, step: int, total: int) -> StepValues:
        """Values for the update numbered `step` (from 0) of a run of `total` updates."""
        lr = warmup_cosine(step, total, base=self.lr, final=self.min_lr, warmup=self.warmup)
        frozen = step < round(self.freeze_last_layer * total)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if frozen else lr,
            weight_decay=warmup_cosine(step, total, base=self.weight_decay, final=self.weight_decay_end, warmup=0.0),
            momentum=warmup_cosine(step, total, base=self.momentum, final=self.momentum_end, warmup=0.0),
            teacher_temperature=linear_then_constant(
                step,
                total,
                start=self.teacher_temperature_start,
                end=self.teacher_temperature,
                warmup=self.teacher_temperature_warmup,
            ),
        )


_SECONDS = {
    "s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60,
    "h": 3600, "hour": 3600, "d": 86400, "day": 86400,
}  # fmt: skip
_BUDGET = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-z]+)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """How long to train: exactly one of a number of steps, of images seen, of epochs, or of seconds."""

    steps: int | None = None
    images: int | None = None
    epochs: float | None = None
    seconds: float | None = None

    def total_steps(self, total_batch: int, dataset_size: int = 0) -> int | None:
        """Steps of the run with `total_batch` images a step over all ranks; None where time decides.

        `dataset_size` images are an epoch; only a budget in epochs asks for it.
        """
        if self.seconds is not None:
            return None
        if self.steps is not None:
            return self.steps
        if self.images is None and not dataset_size:
            raise ValueError("a budget in epochs needs the number of images")
        images = self.images if self.images is not None else (self.epochs or 0) * dataset_size
        return max(1, math.ceil(images / total_batch))


def parse_budget(text: str) -> Budget:
    """Read '300 steps', '20000 images', '100 epochs', '90s', '5m', '1.5 h' or '2 days' (a bare m is minutes).

    Raises UserError, telling the accepted forms, for anything else and for zero.
    """
    match = _BUDGET.match(str(text))
    amount, unit = (float(match[1].replace("_", "")), match[2].lower()) if match else (0.0, "")
    singular = unit[:-1] if unit.endswith("s") and len(unit) > 1 else unit
    if amount > 0:
        if singular in ("step", "image") and amount == int(amount):
            return Budget(steps=int(amount)) if singular == "step" else Budget(images=int(amount))
        if singular == "epoch":
            return Budget(epochs=amount)
        if singular in _SECONDS:
            return Budget(seconds=amount * _SECONDS[singular])
    raise UserError(
        f"train.budget: cannot read {text!r}; expected a positive amount with its unit: "
        "'300 steps', '20000 images', '100 epochs', '5m', '1.5h'"
    )


class RunLength:
    """The number of steps of a run, and for a budget in time its estimate from the measured rate.

    A time budget is turned into steps once: while the first `calibration` (a fraction) of the time passes, `total`
    follows the measured rate; then it is fixed, and from there the run is as reproducible as one given in steps. The
    state goes into the checkpoint, so a resumed run keeps its schedule.
    """

    warm_steps = 2
    """Steps left out of the rate: they pay for the start of workers and libraries."""

    def __init__(self, *, total: int | None = None, seconds: float | None = None, calibration: float = 0.05) -> None:
        """Exactly one of `total` steps and `seconds` is given. `total` is None until a rate has been measured."""
        if (total is None) == (seconds is None):
            raise ValueError("give either total steps or seconds")
        self.total, self.seconds, self.calibration = total, seconds, calibration
        self.fixed = seconds is None
        self._warm_elapsed = 0.0

    @classmethod
    def of(cls, budget: Budget, total_batch: int, dataset_size: int = 0) -> "RunLength":
        """Length for a budget with `total_batch` images a step over all ranks and a set of `dataset_size` images."""
        return cls(total=budget.total_steps(total_batch, dataset_size), seconds=budget.seconds)

    def update(self, steps_done: int, elapsed: float) -> int:
        """Total steps, given `steps_done` steps in `elapsed` seconds since the run began."""
        if self.total is not None and (self.fixed or self.seconds is None):
            return self.total
        assert self.seconds is not None
        if steps_done <= self.warm_steps:
            self._warm_elapsed = elapsed
            return 1000  # a guess on the long side: the warm-up has hardly begun
        rate = (steps_done - self.warm_steps) / max(elapsed - self._warm_elapsed, 1e-9)
        self.total = steps_done + max(0, int(rate * (self.seconds - elapsed)))
        enough = steps_done >= self.warm_steps + 8 and elapsed >= self.calibration * self.seconds
        self.fixed = enough or elapsed >= self.seconds
        return self.total

    def state_dict(self) -> dict[str, float | int | bool | None]:
        """JSON-able state for the checkpoint."""
        return {"total": self.total, "fixed": self.fixed, "warm_elapsed": self._warm_elapsed}

    def load_state_dict(self, state: dict) -> None:
        """Take over a checkpointed time estimate; a length given in steps stays as configured."""
        if self.seconds is not None:
            self.total, self.fixed = state["total"], bool(state["fixed"])
            self._warm_elapsed = float(state["warm_elapsed"])
