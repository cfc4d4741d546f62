"""How a model is spread over the ranks of a launch: copied (DDP) or sharded block by block (FSDP2).

One code path shards on gloo and CPUs as on NCCL and GPUs. Weights, gradients, Adam's moments and the teacher stay in
float32, each rank holding its shard. In 16-bit training blocks are gathered, and their gradients reduced, in 16 bit;
the heads and the few parameters outside the blocks are gathered and reduced in float32 (paper §5, METHOD §3).
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from dinov2cli.errors import WorkError
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.network import Network, SSLModel
from dinov2cli.train.teacher import FrozenTeacher

M = TypeVar("M", bound=nn.Module)
Kind = Literal["none", "ddp", "fsdp", "hybrid"]


@dataclass(frozen=True)
class Sharding:
    """What is asked for. `hybrid` shards over `shard_ranks` neighbouring ranks (a node's) and copies over the others.

    Without `reshard_after_forward` gathered weights are kept from the forward to the backward pass (SHARD_GRAD_OP):
    less traffic, more memory. `offload` keeps shards and moments in the host's memory.
    """

    kind: Kind = "none"
    shard_ranks: int = 1
    reshard_after_forward: bool = True
    offload: bool = False

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 is asked for, in either form."""
        return self.kind in ("fsdp", "hybrid")


class Spread:
    """A model as it is trained: `student` is what to call for the student's pass."""

    def __init__(
        self, model: SSLModel, student: nn.Module, device: torch.device, blueprint: SSLModel | None = None
    ) -> None:
        self.model, self.student, self._device, self._blueprint = model, student, device, blueprint

    def part(self, last: bool) -> AbstractContextManager:
        """Context of one part of a batch: gradients are reduced over the ranks with the `last` part only."""
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(last)
        elif isinstance(self.student, DistributedDataParallel) and not last:
            return self.student.no_sync()
        return nullcontext()

    def whole(self) -> SSLModel:
        """The model with all its weights on every rank, and nothing spread (all ranks must call)."""
        if self._blueprint is None:
            return self.model
        whole = _materialized(self._blueprint)
        target = whole.state_dict()
        for name, tensor in full_tensors(self.model):
            target[name].copy_(tensor)
        return whole

    def teacher_backbone(self, wanted: bool) -> VisionTransformer | None:
        """The teacher's backbone with all its weights, in eval mode, where `wanted`; all ranks must call."""
        teacher = self.model.teacher.backbone
        if self._blueprint is None:
            return teacher if wanted else None
        whole = _materialized(self._blueprint.teacher.backbone) if wanted else None
        target = {} if whole is None else whole.state_dict()
        for name, tensor in full_tensors(teacher):
            if name in target:
                target[name].copy_(tensor)
        return None if whole is None else whole.to(self._device).eval()


def spread(
    model: SSLModel,
    sharding: Sharding,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    mesh: DeviceMesh | None,
) -> Spread:
    """Put `model` on `device` and spread it as asked; `dtype` is the 16-bit type of training, None for float32.

    `mesh` holds the ranks, one-dimensional, or [copies, shards] for `hybrid`. Raises WorkError if FSDP2 was asked for
    and a parameter is not sharded afterwards.
    """
    if not sharding.sharded:
        model.to(device)
        if sharding.kind != "ddp":
            return Spread(model, model.student, device)
        where = [device.index or 0] if device.type == "cuda" else None
        return Spread(model, DistributedDataParallel(model.student, where, gradient_as_bucket_view=True), device)
    assert mesh is not None
    # True of every packed pass, whose outputs are parts of one tensor; nothing here writes to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    blueprint = _without_values(model)
    _shard(model.student, sharding, dtype, mesh, trained=True)
    # The teacher has no backward pass to give its gathered weights up after: kept, they would never be gathered again.
    _shard(model.teacher, replace(sharding, reshard_after_forward=True), dtype, mesh, trained=False)
    for center in (model.dino_center, model.ibot_center):
        if center is not None:
            center.to(device)
    check_sharded(model, mesh)
    return Spread(model, model.student, device, blueprint)


def spread_frozen(
    teacher: FrozenTeacher,
    sharding: Sharding,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    mesh: DeviceMesh | None,
) -> None:
    """Put a frozen teacher on `device`: a copy on every rank, or where weights are sharded its shards.

    Raises WorkError if FSDP2 was asked for and a parameter is not sharded afterwards.
    """
    if not sharding.sharded:
        teacher.to(device)
        return
    assert mesh is not None
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    wrap, for_blocks, for_others = _wrapper(replace(sharding, reshard_after_forward=True), dtype, mesh)
    ours = isinstance(teacher.network, VisionTransformer)
    for block in teacher.network.blocks if isinstance(teacher.network, VisionTransformer) else ():
        wrap(block, for_blocks)
    for head in (teacher.dino_head, teacher.ibot_head):
        if head is not None:
            wrap(head, for_others)
    if ours:
        wrap(teacher.network, for_others)
        register_fsdp_forward_method(teacher.network, "forward_crops")
    wrap(teacher, for_others)
    for name in ("tokens", "logits"):
        register_fsdp_forward_method(teacher, name)
    for buffer in teacher.buffers():
        buffer.data = buffer.data.to(device)
    check_sharded(teacher, mesh)


def _wrapper(
    sharding: Sharding, dtype: torch.dtype | None, mesh: DeviceMesh
) -> tuple[Callable[..., None], MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """`wrap(module, policy)` that shards one module, and the policies for blocks and for all else."""
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if sharding.offload else OffloadPolicy()
    # Inputs keep their type: the residual stream is float32 under autocast in one process, and so it is here.
    for_blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, cast_forward_inputs=False)
    for_others = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    ranks = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        # FSDP2 pads the first axis to the number of ranks: tokens, which have one row, are cut along their width.
        wide = parameter.shape[0] < ranks and parameter.shape[-1] % ranks == 0
        return Shard(parameter.ndim - 1) if wide else None

    def wrap(module: nn.Module, policy: MixedPrecisionPolicy, again: bool = sharding.reshard_after_forward) -> None:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=again,
            shard_placement_fn=placement,
            mp_policy=policy,
            offload_policy=offload,
        )

    return wrap, for_blocks, for_others


def _shard(network: Network, sharding: Sharding, dtype: torch.dtype | None, mesh: DeviceMesh, *, trained: bool) -> None:
    wrap, for_blocks, for_others = _wrapper(sharding, dtype, mesh)
    for block in network.backbone.blocks:
        wrap(block, for_blocks)
    for head in (network.dino_head, network.ibot_head):
        # A student's head that no loss uses is never gathered, which FSDP2 cannot bear where gradients are reduced with
        # the last part of a batch alone: it goes with what is left of the network.
        if head is not None and (not trained or any(one.requires_grad for one in head.parameters())):
            # The student's heads are the last of the forward and the first of the backward pass.
            wrap(head, for_others, again=not trained)
    wrap(network.backbone, for_others)
    wrap(network, for_others)
    register_fsdp_forward_method(network.backbone, "forward_crops")
    for name in ("class_and_patches", "logits"):
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)


def check_sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise WorkError unless every parameter is a shard over `mesh`, that is, FSDP asked for is in force."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.device_mesh != mesh:
            raise WorkError(
                f"FSDP was asked for, but {name} is not sharded over the {mesh.size()} ranks; this is a fault of "
                "dinov2cli: report it, and train with parallel.sharding=ddp meanwhile"
            )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded (or not yet summed) tensor, which all ranks must ask for; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of the state of a sharded module, one at a time; all ranks must iterate."""
    for name, tensor in module.state_dict().items():
        yield name, full(tensor.detach())


def _without_values(model: SSLModel) -> SSLModel:
    """A copy of the model whose tensors have shapes and types, but no memory."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _materialized(blueprint: M) -> M:
    return copy.deepcopy(blueprint).to_empty(device="cpu")
