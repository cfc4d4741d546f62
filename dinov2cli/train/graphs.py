"""CUDA graphs: the blocks' forward and backward passes recorded once and replayed, where launch gaps dominate a step.

A small model's kernels take less time than the host needs to launch them. What runs between patch embedding and final
norm has the same shapes in every step of a phase, so it is recorded, one graph for the forward and one for the backward
pass, and replayed with one launch each. The rest of a step (augmentation, heads, losses, whose masked patches
vary in number) runs as ever, and so does everything outside training steps: an evaluation has other shapes.

What a graph computes lies in its own memory until the next replay overwrites it: the output, and the gradients, which
become `.grad` of the weights as they are. So a step replays each graph once, which rules out `train.accumulate`; and
the weights must keep their address, which rules out FSDP2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2cli.errors import UserError
from dinov2cli.models.depth import Groups, Kept
from dinov2cli.models.vit import VisionTransformer

_WARMUP = 3  # passes before the recording: compilation and the libraries' own set-up must not be recorded


class Passes(Protocol):
    """A recorded stack of blocks."""

    def __call__(self, x_TD: Tensor, index: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor: ...


Record = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Sequence[nn.Parameter]], Passes]


def check_graphs(device: torch.device, *, world_size: int, sharded: bool, accumulate: int, recompute: bool) -> None:
    """Raise UserError where `train.compile: graphs` cannot work, saying why."""
    name = "train.compile=graphs"
    if device.type != "cuda":
        raise UserError(f"{name}: CUDA graphs need an NVIDIA GPU, this is {device}; use train.compile=true or false")
    if world_size > 1 or sharded:
        raise UserError(
            f"{name}: found {world_size} processes{', sharded' if sharded else ''}, expected one with its own copy: "
            "gathered weights and kept samples change from step to step; use train.compile=true"
        )
    if accumulate > 1:
        raise UserError(
            f"{name}: found train.accumulate={accumulate}, expected 1: the gradients of the parts would share memory; "
            "use train.compile=true"
        )
    if recompute:
        raise UserError(
            f"{name}: found activation checkpointing, expected none: all activations stay in the graphs' memory; "
            "use train.compile=true"
        )


def compile_blocks(backbones: Sequence[VisionTransformer]) -> None:
    """Let torch.compile fuse what is elementwise in every block, when it first runs."""
    import torch._dynamo

    # All blocks share one piece of code, which is compiled for each rate of stochastic depth and each kind of pack.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max([limits.recompile_limit, *(2 * backbone.depth + 8 for backbone in backbones)])
    for backbone in backbones:
        for block in backbone.blocks:
            block.compile()


class BlockGraphs:
    """Runs the blocks of `backbones` as CUDA graphs inside `running`; recorded at first and whenever shapes change."""

    def __init__(self, backbones: Sequence[VisionTransformer], record: "Record | None" = None) -> None:
        self._runners = [(backbone, _Runner(backbone, record or RecordedPasses)) for backbone in backbones]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context of one training step."""
        for backbone, runner in self._runners:
            backbone.runner = runner
        try:
            yield
        finally:
            for backbone, _ in self._runners:
                backbone.runner = None


class _Runner:
    """Stands in for a backbone's loop over its blocks."""

    def __init__(self, backbone: VisionTransformer, record: Record) -> None:
        self._blocks, self._record = backbone.blocks, record
        self._parameters = list(backbone.blocks.parameters())
        self._key: Any = None
        self._passes: Passes | None = None

    def __call__(self, x_TD: Tensor, groups: Groups, kept: Sequence[Kept | None]) -> Tensor:
        pieces = [index for one in kept if one is not None for index in (*one.attention, *one.ffn)]
        counts = [len(index) for index in pieces]
        plans = [None if one is None else (one.scale, one.fused) for one in kept]
        kind = x_TD.device.type
        types = (x_TD.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        key = (x_TD.shape, x_TD.requires_grad, torch.is_grad_enabled(), types, groups, counts, plans)
        index = torch.cat(pieces) if pieces else x_TD.new_zeros(0, dtype=torch.int64)
        if self._passes is None or key != self._key:
            self._passes = None  # its memory is free again before as much is taken
            self._passes = self._record(self._stack(list(groups), counts, plans), x_TD, index, self._parameters)
            self._key = key
        return self._passes(x_TD, index, self._parameters)

    def _stack(self, groups: Groups, counts: list[int], plans: list[Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """The loop over the blocks as a function of tensors: x, and the indices of all kept samples in one."""

        def run(x_TD: Tensor, index: Tensor) -> Tensor:
            pieces = iter(index.split(counts))
            for block, plan in zip(self._blocks, plans, strict=True):
                kept = None
                if plan is not None:
                    kept = Kept([next(pieces) for _ in groups], [next(pieces) for _ in groups], *plan)
                x_TD = block(x_TD, groups, kept)
            return x_TD

        return run


class RecordedPasses:
    """Forward pass of `run` and, where its output has a gradient, backward pass, as two CUDA graphs on one memory."""

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        x_TD: Tensor,
        index: Tensor,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self.x = x_TD.detach().clone().requires_grad_(x_TD.requires_grad)
        self.index = index.clone()
        self.inputs = [tensor for tensor in (self.x, *parameters) if tensor.requires_grad]
        kind = x_TD.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # A cached 16-bit weight would be that of the recording for ever: conversions are recorded too.
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            self._warm_up(run)
            self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            pool = torch.cuda.graph_pool_handle()
            # Loader and checkpoint threads may pin memory meanwhile: only this thread's doings are recorded or wrong.
            with torch.cuda.graph(self.forward_graph, pool=pool, capture_error_mode="thread_local"):
                self.out = run(self.x, self.index)
            if not self.out.requires_grad:
                return
            self.grad_out = torch.zeros_like(self.out)
            with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode="thread_local"):
                self.grads = torch.autograd.grad(self.out, self.inputs, self.grad_out)
        # The recording's own graph would keep the weights' gradient nodes on the recording's stream, where every later
        # backward pass would have to wait for them.
        self.out = self.out.detach()

    def _warm_up(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                out = run(self.x, self.index)
                if out.requires_grad:
                    torch.autograd.grad(out, self.inputs, torch.zeros_like(out))
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, x_TD: Tensor, index: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Replay on other values; gradients reach `parameters` through autograd as ever."""
        out: Tensor = _Replay.apply(self, x_TD, index, *parameters)
        return out


class _Replay(torch.autograd.Function):
    """One node for the whole stack of blocks."""

    @staticmethod
    def forward(ctx: Any, passes: RecordedPasses, x: Tensor, index: Tensor, *_: Tensor) -> Tensor:
        passes.x.detach().copy_(x)
        passes.index.copy_(index)
        passes.forward_graph.replay()
        ctx.passes = passes
        return passes.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.passes.grad_out.copy_(grads[0])
        ctx.passes.backward_graph.replay()
        found = iter(ctx.passes.grads)
        return tuple(next(found).detach() if needed else None for needed in ctx.needs_input_grad)
