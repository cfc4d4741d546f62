"""Training of a head on token maps: gradients summed over the ranks, state kept so that a killed run goes on."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import WorkError
from dinov2cli.losses.collectives import reduce_sum
from dinov2cli.search.blocks import Arrays, Stage

B = TypeVar("B")

Loss = Callable[[B], tuple[Tensor, Tensor]]
"""Sum of the losses of this rank's part of a batch, and how many were summed (pixels), both 0-d on the device."""

_AHEAD = 2  # batches that are made ready while the head is trained on others
_NUMBER, _MOMENTS = "head.", "optimizer."


@dataclass(frozen=True)
class Trained:
    """How a training went: mean loss per counted pixel at every step, float32 [steps]."""

    losses: "np.ndarray[Any, np.dtype[np.float32]]"


def group_of(ranks: Ranks) -> dist.ProcessGroup | None:
    """The process group in which the ranks of a launch train a head together; None for one process."""
    return dist.group.WORLD if ranks.world_size > 1 else None


def train_head(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_of: Callable[[int], B],
    loss_of: Loss[B],
    *,
    steps: int,
    rate: Callable[[int], float],
    ranks: Ranks = ALONE,
    stage: Stage | None = None,
    every: int = 200,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Train `head` in place for `steps` steps; all ranks end with the same parameters.

    batch_of(step): this rank's part of a batch, a pure function (it is called ahead, in a thread). rate(step): factor
    on the learning rate that the optimizer was made with. stage: where the state is kept every `every` steps, from
    where a run that was stopped goes on as if it had not been: two states lie there in turn. Raises WorkError when
    the loss is no number any more, and what `batch_of` raises on any rank.
    """
    if ranks.world_size > 1:
        _take(head, optimizer, ranks.first(lambda: _state(head, optimizer)))
    losses = np.zeros(steps, dtype=np.float32)
    state = ranks.first(lambda: _latest(stage, steps))
    first = 0
    if state is not None:
        _take(head, optimizer, state)
        first = int(state["step"])
        losses[:first] = state["losses"]
    base = [group["lr"] for group in optimizer.param_groups] if state is None else state["rates"].tolist()
    group = group_of(ranks)
    head.train()
    for step, batch in _batches(batch_of, first, steps, ranks):
        for params, lr in zip(optimizer.param_groups, base, strict=True):
            params["lr"] = lr * rate(step)
        losses[step] = _step(head, optimizer, loss_of, batch, group)
        if not np.isfinite(losses[step]):
            raise WorkError(f"the loss of the head is {losses[step]} at step {step}; lower the learning rate (lr)")
        done = step + 1
        if stage is not None and ranks.main and (done % every == 0 or done == steps):
            kept = {"step": np.array(done), "losses": losses[:done], "rates": np.array(base)}
            stage.save(done // every % 2, _state(head, optimizer) | kept)
        if on_step is not None:
            on_step(1)
    head.eval()
    return Trained(losses)


def _batches(batch_of: Callable[[int], B], first: int, steps: int, ranks: Ranks) -> Iterator[tuple[int, B]]:
    waiting: dict[int, Future[B]] = {}
    with ThreadPoolExecutor(1) as pool:
        try:
            for step in range(first, steps):
                for ahead in range(step, min(step + 1 + _AHEAD, steps)):
                    if ahead not in waiting:
                        waiting[ahead] = pool.submit(batch_of, ahead)
                future = waiting.pop(step)
                yield step, ranks.together(future.result)
        finally:
            for future in waiting.values():
                future.cancel()


def _step(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Loss[B],
    batch: B,
    group: dist.ProcessGroup | None,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    total, count = loss_of(batch)
    sums = reduce_sum(torch.stack([total.detach().double(), count.detach().double()]), group)
    everything = max(float(sums[1]), 1.0)
    # On a rank without a pixel too: the other ranks wait for its part in the norms' backward pass.
    (total / everything).backward()
    _sum_gradients(head, group)
    optimizer.step()
    return float(sums[0]) / everything


def _sum_gradients(head: nn.Module, group: dist.ProcessGroup | None) -> None:
    if group is None:
        return
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    together = reduce_sum(torch.cat([part.flatten() for part in parts]), group)
    for parameter, part in zip(trained, together.split([p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter)


def _state(head: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All numbers of head and optimizer, as arrays by name."""
    found = {f"{_NUMBER}{name}": value.detach().cpu().numpy() for name, value in head.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                found[f"{_MOMENTS}{index}.{name}"] = value.detach().cpu().numpy()
    return found


def _take(head: nn.Module, optimizer: torch.optim.Optimizer, arrays: Arrays) -> None:
    numbers = {name: torch.tensor(value) for name, value in arrays.items() if name.startswith((_NUMBER, _MOMENTS))}
    head.load_state_dict(
        {name.removeprefix(_NUMBER): value for name, value in numbers.items() if name.startswith(_NUMBER)}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in numbers.items():
        if name.startswith(_MOMENTS):
            index, _, moment = name.removeprefix(_MOMENTS).partition(".")
            moments.setdefault(int(index), {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def digest_of(head: nn.Module) -> str:
    """sha256 of the parameters and buffers of a head, for keys of what is computed with it."""
    digest = hashlib.sha256()
    for name, value in head.state_dict().items():
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _latest(stage: Stage | None, steps: int) -> Arrays | None:
    """The later of the two states that are kept, if any."""
    found = [] if stage is None else [arrays for slot in (0, 1) if (arrays := stage.load(slot)) is not None]
    fitting = [arrays for arrays in found if int(arrays["step"].item()) <= steps]
    return max(fitting, key=lambda arrays: int(arrays["step"].item()), default=None)
