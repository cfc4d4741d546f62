"""Values of `auto` settings, from the batch, the number of images and the length of the run, each with its reason.

The published defaults suit batches of 1,000 and more and runs of 100,000 steps. At a batch of 64 and a few thousand
steps 65,536 prototypes leave targets nearly uniform, and a teacher that averages 170 steps hardly moves.
"""

import math
from typing import NamedTuple

FEWEST, MOST = 128, 65536
PER_IMAGE = 8
"""Prototypes for each image of a batch, as the small recipes were tuned with at batch 64; the paper has 20 to 60."""


class Chosen(NamedTuple):
    """A value and why."""

    value: float
    reason: str


def automatic(batch: int, images: int, steps: int | None, prototypes: int | None = None) -> dict[str, Chosen]:
    """Settings by dotted name for `batch` images a step over all ranks, `images` in all, `steps` (None: not known).

    `prototypes` is their number where it is not automatic. Keys: heads.prototypes, teacher.momentum,
    loss.teacher_temperature, optim.warmup.
    """
    picked = _prototypes(batch, images)
    return {
        "heads.prototypes": picked,
        "teacher.momentum": _momentum(steps),
        "loss.teacher_temperature": _temperature(prototypes or int(picked.value)),
        "optim.warmup": _warmup(steps),
    }


def _prototypes(batch: int, images: int) -> Chosen:
    wanted = min(PER_IMAGE * batch, images // 8)
    value = min(max(2 ** int(math.log2(max(wanted, 1))), FEWEST), MOST)
    which = f"{PER_IMAGE} for each of {batch} images of a batch"
    if images // 8 < PER_IMAGE * batch:
        which = f"one for 8 of {images:,} images"
    return Chosen(value, f"{which}, as a power of two from {FEWEST} to {MOST:,}")


def _momentum(steps: int | None) -> Chosen:
    if steps is None:
        return Chosen(0.99, "the length in steps is not known; the average spans 100 steps")
    value = round(min(max(1 - 12 / max(steps, 1), 0.9), 0.994), 4)
    rule = {0.9: "the fewest that average anything", 0.994: "as the paper's"}.get(value, "a twelfth")
    return Chosen(value, f"the average spans {1 / (1 - value):.0f} of {steps:,} steps, {rule}")


def _temperature(prototypes: int) -> Chosen:
    """0.05 up to 2,048 prototypes, the paper's 0.07 at 65,536, between them in proportion to the logarithm."""
    share = min(max((math.log2(prototypes) - 11) / 5, 0.0), 1.0)
    return Chosen(round(0.05 + 0.02 * share, 4), f"{prototypes:,} prototypes; fewer need sharper targets")


def _warmup(steps: int | None) -> Chosen:
    if steps is None:
        return Chosen(0.1, "a tenth of the run")
    value = round(min(max(0.1, 50 / max(steps, 1)), 0.3), 4)
    return Chosen(value, f"{value * steps:.0f} of {steps:,} steps")
