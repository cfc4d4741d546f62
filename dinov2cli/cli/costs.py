"""What `--dry-run` of dedup and curate says of time, memory and disk."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.config.common import PlanConfig
    from dinov2cli.search.cost import Cost, Machines


def machines(plan: "PlanConfig") -> "Machines":
    """The machines that a plan is for: those named, else the cores of this one. UserError for a GPU without rates."""
    from dinov2cli.search.cost import Machines

    if plan.machines is None:
        return Machines(cores=os.cpu_count() or 1)
    if plan.machines.endswith("cores"):
        return Machines(cores=int(plan.machines.removesuffix("cores")))
    number, _, kind = plan.machines.partition("x")
    found = Machines(gpus=int(number), kind=kind)
    _ = found.rates
    return found


def cost_facts(costs: "Sequence[Cost]", plan: "PlanConfig", rows: int) -> dict[str, Any]:
    """A line per stage and the sum, for a plan; what they take on `plan.machines`, reckoned, not measured."""
    from dinov2cli.search.cost import amount, duration

    if not costs:
        return {}
    where = plan.machines or f"{os.cpu_count() or 1} cores"
    facts: dict[str, Any] = {}
    for stage in dict.fromkeys(cost.stage for cost in costs):
        same = [cost for cost in costs if cost.stage == stage]
        times = f"{len(same)} times " if len(same) > 1 else ""
        facts[f"cost of {stage}"] = (
            f"{times}{duration(same[0].seconds)}, {amount(same[0].memory)} of memory, {amount(same[0].disk)} of disk "
            f"({same[0].assumed})"
        )
    total = f"{duration(sum(cost.seconds for cost in costs))} on {where} for {rows:,} images, to a factor of two; "
    memory, disk = max(cost.memory for cost in costs), sum(cost.disk for cost in costs)
    facts["cost"] = f"{total}memory {amount(memory)} a process, disk {amount(disk)}"
    return facts
