"""What the models of memory and traffic must know of a run: plain numbers, read off modules (meta ones will do).

Three dataclasses: the network's parameters by the groups in which they are sharded, one rank's batch, and how the
ranks share the work. Everything is counted in elements here; `memory` and `traffic` turn elements into bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dinov2cli.models.blocks import SwiGLU
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.vit import VisionTransformer

Shape = tuple[int, ...]
SHARDINGS = ("ddp", "fsdp", "hybrid")
GLOBAL_CROPS = 2


@dataclass(frozen=True)
class HeadSizes:
    """A projection head: shapes of its parameters, the widths its MLP passes through, and the prototypes K."""

    shapes: tuple[Shape, ...]
    widths: tuple[int, ...]
    prototypes: int


@dataclass(frozen=True)
class Group:
    """`times` equal groups of tensors, each gathered as one: in 16 bit under mixed precision (`half`), and `kept` from
    the student's forward to its backward pass even where others are given up."""

    times: int
    shapes: tuple[Shape, ...]
    half: bool
    kept: bool = False


@dataclass(frozen=True)
class NetworkSizes:
    """A backbone with its heads. `block` holds the parameter shapes of ONE of `depth` equal blocks, `root` what is left
    of the backbone: tokens, position and patch embedding, final norm. `heads` is (DINO, iBOT), one when tied, or none.

    `hidden` is the inner width of the feed-forward layer, `gated` for SwiGLU; `prefix` counts class and register
    tokens; `drop_rates` holds the stochastic-depth rate of every block.
    """

    block: tuple[Shape, ...]
    root: tuple[Shape, ...]
    heads: tuple[HeadSizes, ...]
    depth: int
    width: int
    attention_heads: int
    hidden: int
    gated: bool
    layerscale: bool
    patch: int
    channels: int
    prefix: int
    drop_rates: tuple[float, ...]

    def groups(self) -> list["Group"]:
        """The groups that are gathered as one."""
        heads = [Group(1, head.shapes, half=False, kept=True) for head in self.heads]
        return [Group(self.depth, self.block, half=True), *heads, Group(1, self.root, half=False)]

    def parameters(self, shards: int = 1) -> int:
        """Elements that one of `shards` ranks holds of the whole network."""
        return sum(group.times * shard_of(group.shapes, shards) for group in self.groups())


@dataclass(frozen=True)
class Batch:
    """What one rank works on in a step: `images` of two global and `local_number` local crops, sizes in pixels.

    `masked` is the mean number of masked patches of both global crops of an image together. `accumulate` and
    `checkpointing` are the recipe's train.accumulate and train.activation_checkpointing. `plain_tokens`: the longest
    sequence whose attention matrix is written out, 0 where a fused kernel serves all (see models/blocks.py, `attend`).
    """

    images: int
    global_size: int = 224
    local_size: int = 98
    local_number: int = 8
    masked: float = 0.0
    precision: str = "bf16"
    accumulate: int = 1
    checkpointing: bool = False
    plain_tokens: int = 0

    @property
    def wide(self) -> int:
        """Bytes of an activation in the precision of the linear layers."""
        return 4 if self.precision == "fp32" else 2

    @property
    def part(self) -> int:
        """Images that are worked on at a time."""
        return max(self.images // self.accumulate, 1)

    @property
    def pixels(self) -> int:
        """Pixels of all crops of one image."""
        return GLOBAL_CROPS * self.global_size**2 + self.local_number * self.local_size**2

    def samples(self, network: NetworkSizes) -> list[tuple[int, int]]:
        """(crops, tokens of each) of one part: globals, then locals if there are any."""
        crops = [(GLOBAL_CROPS, self.global_size), (self.local_number, self.local_size)]
        return [(n * self.part, network.prefix + (size // network.patch) ** 2) for n, size in crops if n]

    def head_rows(self) -> tuple[int, int]:
        """Rows of the student's logits in one part: class tokens of all crops, and masked patches."""
        return (GLOBAL_CROPS + self.local_number) * self.part, int(self.masked * self.part)


@dataclass(frozen=True)
class Layout:
    """How `ranks` processes, `per_node` to a node, share the work; `reshard` frees weights after the forward pass.

    `ddp` holds everything on every rank, `fsdp` shards over all ranks, `hybrid` over the ranks of a node with a replica
    on every node. Raises ValueError for anything else, and for a hybrid that does not fill its nodes.
    """

    sharding: str = "ddp"
    ranks: int = 1
    per_node: int = 8
    reshard: bool = True

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS or self.ranks < 1 or self.per_node < 1:
            raise ValueError(f"{self}: expected ranks and one of {', '.join(SHARDINGS)}")
        if self.sharding == "hybrid" and self.ranks > self.per_node and self.ranks % self.per_node:
            raise ValueError(f"{self}: hybrid needs full nodes")

    @property
    def shards(self) -> int:
        """Ranks over which one replica is spread."""
        return {"ddp": 1, "fsdp": self.ranks, "hybrid": min(self.ranks, self.per_node)}[self.sharding]

    def crossing(self, ranks: int, stride: int = 1) -> float:
        """Share of the hops of a ring of `ranks` processes, every `stride`-th one, that lead to another node."""
        per_node = max(self.per_node // stride, 1)
        nodes = math.ceil(ranks / per_node)
        return nodes / ranks if nodes > 1 else 0.0


def numel(shapes: Iterable[Shape]) -> int:
    """Elements of some tensors."""
    return sum(math.prod(shape) for shape in shapes)


def shard_of(shapes: Iterable[Shape], shards: int) -> int:
    """Elements each rank holds of tensors cut into `shards` equal pieces, padding included (see train/sharding.py).

    FSDP2 cuts the first axis and pads every piece to the first one's size (torch/distributed/fsdp, FSDPParam). Tensors
    with fewer rows than ranks, as tokens, are cut along their last axis where that is a multiple of the ranks; where it
    is not, a piece is as large as one row.
    """

    def piece(shape: Shape) -> int:
        if shape[0] < shards and shape[-1] % shards == 0:
            return math.prod(shape) // shards
        return math.ceil(shape[0] / shards) * math.prod(shape[1:])

    return sum(map(piece, shapes))


def sizes_of(
    backbone: VisionTransformer, dino_head: ProjectionHead | None, ibot_head: ProjectionHead | None
) -> NetworkSizes:
    """Read the numbers off a network's modules, of any device or sharded; `ibot_head` is None when tied, and both are
    where there are none."""
    inner: Any = backbone.blocks[0].mlp
    gated = isinstance(inner, SwiGLU)
    return NetworkSizes(
        block=_shapes(backbone.blocks[0]),
        root=tuple(shape for name, shape in _named_shapes(backbone) if not name.startswith("blocks.")),
        heads=tuple(_head_sizes(head) for head in (dino_head, ibot_head) if head is not None),
        depth=backbone.depth,
        width=backbone.embed_dim,
        attention_heads=backbone.num_heads,
        hidden=(inner.w3 if gated else inner.fc2).in_features,
        gated=gated,
        layerscale=backbone.layerscale is not None,
        patch=backbone.patch_size,
        channels=backbone.in_chans,
        prefix=1 + backbone.num_register_tokens,
        drop_rates=tuple(backbone.drop_rates),
    )


def _head_sizes(head: ProjectionHead) -> HeadSizes:
    layers = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    widths = (layers[0].in_features, *(layer.out_features for layer in layers))
    return HeadSizes(_shapes(head), widths, head.last_layer.weight_v.shape[0])


def _named_shapes(module: nn.Module) -> list[tuple[str, Shape]]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def _shapes(module: nn.Module) -> tuple[Shape, ...]:
    return tuple(shape for _, shape in _named_shapes(module))
