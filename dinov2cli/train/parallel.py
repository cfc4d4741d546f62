"""Device, precision, ranks and sharding of a training run, from its settings and the launcher's environment.

`accelerate launch` tells what it was asked for in environment variables; torchrun sets ranks only, and then the
recipe's `parallel` section decides. Settings that say something win over the launcher; where both ask for different
shardings, that is an error. This file and distributed.py are the only ones that import accelerate.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2cli.device import PRECISIONS, autocast, choose_device, choose_precision
from dinov2cli.distributed import ALONE, Ranks, join, launched, process_group
from dinov2cli.errors import UserError
from dinov2cli.train.network import SSLModel
from dinov2cli.train.sharding import Sharding, Spread, spread, spread_frozen
from dinov2cli.train.teacher import FrozenTeacher

_NODE = 8  # ranks of a machine, where a launch is only planned
PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others in a step: an evaluation on the main process may take minutes."""


@dataclass(frozen=True)
class Parallel:
    """Where and how a run computes. `reason` says in words why the precision was chosen."""

    device: torch.device
    precision: str
    reason: str
    ranks: Ranks = ALONE
    sharding: Sharding = field(default_factory=Sharding)
    group: Any = None
    mesh: Any = None
    activation_checkpointing: bool = False  # asked for by the launcher
    ranks_per_node: int = 1

    @property
    def rank(self) -> int:
        """This process's number in the launch."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of processes of the launch."""
        return self.ranks.world_size

    def autocast(self) -> AbstractContextManager:
        """Context for the forward pass: 16-bit autocast, or nothing in fp32."""
        return autocast(self.device, self.precision)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose gradients underflow; passes everything through for bf16 and fp32."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def spread(self, model: SSLModel) -> Spread:
        """Put the model on the device and spread it over the ranks. Raises WorkError as `sharding.spread` does."""
        dtype = PRECISIONS[self.precision]
        return spread(model, self.sharding, device=self.device, dtype=dtype, mesh=self.mesh)

    def spread_frozen(self, teacher: FrozenTeacher, precision: str) -> None:
        """Put a frozen teacher that computes in `precision` on the device, or its shards on the ranks.

        Raises WorkError as `sharding.spread_frozen` does.
        """
        spread_frozen(teacher, self.sharding, device=self.device, dtype=PRECISIONS[precision], mesh=self.mesh)

    def same_start(self, model: SSLModel) -> None:
        """Give every rank the main one's weights: what was computed from images may differ in the last bit.

        The teacher is still a copy of the student.
        """
        if self.world_size == 1:
            return
        for tensor in model.student.state_dict().values():
            dist.broadcast(tensor, src=0, group=self.ranks.host)
        model.teacher.load_state_dict(model.student.state_dict())

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` over the ranks; NaN on one is NaN on all."""
        if self.group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.world_size

    def agree(self, number: float) -> float:
        """The highest `number` of all ranks: for what no rank may decide alone (a signal to stop, the time).

        On the host's group, so that a GPU never waits for it.
        """
        if self.world_size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.ranks.host)
        return float(value)


def setup(
    device: str = "auto",
    precision: str = "auto",
    *,
    sharding: str = "auto",
    reshard_after_forward: bool | None = None,
    shard_ranks: int | None = None,
    offload: bool | None = None,
    planned: int | None = None,
) -> Parallel:
    """Meet the other ranks of the launch and choose device, precision and sharding.

    `sharding` is auto (what the launcher asks for, else copies: ddp), ddp, fsdp or hybrid; `shard_ranks` are the ranks
    that share one copy under hybrid (default: those of a node). None leaves a choice to the launcher. With `planned`
    ranks nobody is met: what comes back serves to plan a run only. Raises UserError for what the machine or this
    program does not have, and where launcher and settings contradict each other.
    """
    asked = launcher_wishes()
    world_size = planned or int(os.environ.get("WORLD_SIZE", "1"))
    per_node = min(_NODE, planned) if planned else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shard_ranks = shard_ranks or asked.shard_ranks or per_node
    plan = _plan(asked, world_size, sharding, reshard_after_forward, shard_ranks, offload)
    ranks = Ranks(world_size=planned) if planned else join(device, PATIENCE)
    chosen = choose_device(device)
    if chosen.type == "cuda" and launched() and not planned:
        chosen = torch.device("cuda", ranks.local_rank)
    if plan.sharded and ranks is ALONE:
        _alone(chosen)
    met = ranks.world_size > 1 and not planned
    wanted = asked.precision if precision == "auto" and asked.precision else precision
    name, reason = choose_precision(wanted, chosen, training=True)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen.index or 0)
        # Prototype logits stay outside 16-bit autocast (models/heads.py); TF32 keeps that matmul on the tensor cores.
        torch.set_float32_matmul_precision("high")
    return Parallel(
        device=chosen,
        precision=name,
        reason="asked for by the launcher" if wanted != precision else reason,
        ranks=ranks,
        sharding=plan,
        group=dist.group.WORLD if met else None,
        mesh=None if planned else _mesh(plan, chosen, world_size),
        activation_checkpointing=asked.activation_checkpointing,
        ranks_per_node=per_node,
    )


@dataclass(frozen=True)
class Wishes:
    """What the launcher was asked for; None where it says nothing."""

    precision: str | None = None
    fsdp: bool = False
    copies: int = 1
    shard_ranks: int | None = None
    reshard_after_forward: bool | None = None
    offload: bool | None = None
    activation_checkpointing: bool = False


def launcher_wishes() -> Wishes:
    """Read the environment that `accelerate launch` sets. Raises UserError for what is not supported here."""
    for name, what in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if _flag(f"ACCELERATE_USE_{name}"):
            raise UserError(f"accelerate launch asks for {what}; expected FSDP (fsdp_version: 2) or MULTI_GPU")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"accelerate launch asks for mixed_precision {precision}; expected no, bf16 or fp16")
    copies, shard_ranks = _hybrid_wishes()
    wishes = Wishes(None if precision == "no" else precision, copies=copies, shard_ranks=shard_ranks)
    if not _flag("ACCELERATE_USE_FSDP"):
        return wishes
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate launch asks for FSDP version 1; expected fsdp_version: 2 under fsdp_config")
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()  # reads the rest of the environment
    return Wishes(
        wishes.precision,
        fsdp=True,
        copies=copies,
        shard_ranks=shard_ranks,
        reshard_after_forward=bool(plugin.reshard_after_forward),
        offload=_flag("FSDP_OFFLOAD_PARAMS"),
        activation_checkpointing=bool(plugin.activation_checkpointing),
    )


def _hybrid_wishes() -> tuple[int, int | None]:
    """(copies, ranks per copy) of accelerate's parallelism config; (1, None) without one."""
    if not _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1, None
    from accelerate import ParallelismConfig

    config = ParallelismConfig()
    if max(config.tp_size, config.cp_size, config.sp_size) > 1:
        raise UserError("accelerate launch asks for tensor, context or sequence parallelism; expected data parallelism")
    return config.dp_replicate_size, config.dp_shard_size


def _plan(
    asked: Wishes, world_size: int, sharding: str, reshard: bool | None, shard_ranks: int, offload: bool | None
) -> Sharding:
    launcher = None
    if asked.fsdp:
        launcher = "hybrid" if asked.copies > 1 else "fsdp"
    if sharding != "auto" and launcher is not None and launcher != sharding:
        raise UserError(
            f"parallel.sharding is {sharding}, the launcher asks for {launcher}; expected the same: "
            "leave parallel.sharding at auto, or change the launcher's configuration"
        )
    kind: Any = sharding if sharding != "auto" else launcher or ("ddp" if world_size > 1 else "none")
    if kind == "ddp" and world_size == 1:
        kind = "none"
    fits = world_size % shard_ranks == 0 and asked.copies in (1, world_size // shard_ranks)
    if kind == "hybrid" and not fits:
        raise UserError(
            f"hybrid sharding over {shard_ranks} ranks each: found {world_size} ranks in all, expected "
            f"{'a multiple' if asked.copies == 1 else shard_ranks * asked.copies}; "
            "set parallel.shard_ranks to a divisor"
        )
    return Sharding(
        kind=kind,
        shard_ranks=shard_ranks if kind == "hybrid" else world_size,
        reshard_after_forward=_first(reshard, asked.reshard_after_forward, True),
        offload=_first(offload, asked.offload, False),
    )


def _mesh(sharding: Sharding, device: torch.device, world_size: int) -> Any:
    if not sharding.sharded:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if sharding.kind == "fsdp":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // sharding.shard_ranks, sharding.shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard"))


def _alone(device: torch.device) -> None:
    """A process group of this process only, which FSDP2 needs to shard over one rank."""
    if launched_as_one():
        process_group(cpu=device.type == "cpu", patience=PATIENCE)
    elif not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def launched_as_one() -> bool:
    """Whether a launcher started this process alone, with an address to meet itself at."""
    return os.environ.get("WORLD_SIZE") == "1" and "MASTER_PORT" in os.environ and "RANK" in os.environ


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _first(*choices: bool | None) -> bool:
    return next(choice for choice in choices if choice is not None)
