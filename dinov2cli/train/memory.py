"""Bytes that one rank of a pretraining run needs, by what they are for: a model, checked against counted tensors.

The worst of three moments counts. At the end of the student's forward pass activations, logits and both sides' features
are all there. When the backward pass reaches the last block, logits are gone, but under checkpointing that block is
computed again. At the first block a process that trains alone holds all gradients, as others do throughout: DDP's
buckets and the shards of gradients do not come and go.

Left out: the CUDA context, library workspaces, what the allocator loses to fragments, and temporaries of a single
operation. Under 16-bit autocast the residual stream, norms and LayerScale's product are float32 and linear layers
16 bit (`Batch.wide` bytes); in fp32 everything is 4 bytes.
"""

from collections.abc import Sequence

from dinov2cli.train.sizes import GLOBAL_CROPS, Batch, HeadSizes, Layout, NetworkSizes, Shape, numel, shard_of

ALIVE = 2  # gathered groups at a time: the one in use and the one fetched ahead


def memory(network: NetworkSizes, batch: Batch, layout: Layout) -> dict[str, int]:
    """Bytes per rank by category at the worst moment, with their `total`."""
    state = 4 * network.parameters(layout.shards)
    gathered_weights, gathered_gradients = _gathered(network, batch, layout)
    lasting = state if layout.ranks > 1 or batch.accumulate > 1 else 0
    common = {
        "weights": state,
        "gradients": lasting,
        "moments": 2 * state,
        "teacher": state,
        "gathered weights": gathered_weights,
        "gathered gradients": gathered_gradients,
        "16-bit weights": _autocast_weights(network, batch, layout),
        "features": features(network, batch),
        "crops": 4 * network.channels * batch.pixels * batch.images,
    }
    kept, block = activations(network, batch), _largest_block(network, batch)
    end_of_forward = {
        "activations": kept,
        "head activations": head_activations(network, batch),
        "logits": logits(network, batch),
    }
    again = {"16-bit weights": common["16-bit weights"] // network.depth} if batch.checkpointing else {}
    last_block = (
        {"activations": kept + 2 * block, **again} if batch.checkpointing else {}
    )  # the block and its gradients
    first_block = {"gradients": state, "activations": 2 * block, **again}
    worst = max((common | m for m in (end_of_forward, last_block, first_block)), key=lambda parts: sum(parts.values()))
    return worst | {"total": sum(worst.values())}


_LASTING = ("weights", "gradients", "moments", "teacher")


def distillation_memory(
    students: Sequence[NetworkSizes],
    batches: Sequence[Batch],
    layout: Layout,
    *,
    teacher: int,
    teacher_tokens: int,
    teacher_bytes: int = 4,
) -> dict[str, int]:
    """As `memory`, for students that learn from one frozen teacher, one after the other in each part of a batch.

    `batches[i].masked` counts the patches of student i's iBOT term; category `teacher` becomes the students'
    `averages`. `teacher` is the number of the frozen one's parameters, each of `teacher_bytes`; `teacher_tokens` the
    numbers in its tokens of the global crops of an image. What its own pass needs for a moment is left out: it keeps
    nothing for a backward pass, and is over before the students begin.
    """
    alone = [memory(network, batch, layout) for network, batch in zip(students, batches, strict=True)]
    several = len(students) > 1
    own = [{name: parts[name] for name in _LASTING} for parts in alone]
    if several:  # all gradients are there before the first optimizer step
        own = [parts | {"gradients": parts["weights"]} for parts in own]
    passing = [{k: v for k, v in parts.items() if k not in (*_LASTING, "total")} for parts in alone]
    worst = max(passing, key=lambda parts: sum(parts.values()))
    together = {name: sum(parts[name] for parts in own) for name in _LASTING}
    found = {("averages" if name == "teacher" else name): size for name, size in (together | worst).items()}
    found["teacher"] = teacher_bytes * teacher // layout.shards
    found["teacher's tokens"] = 4 * teacher_tokens * batches[0].part
    return found | {"total": sum(found.values())}


def activations(network: NetworkSizes, batch: Batch) -> int:
    """Bytes that autograd keeps of the student's backbone over one part of the batch; with checkpointing of every
    block its input alone."""
    groups = batch.samples(network)
    tokens = sum(samples * length for samples, length in groups)
    images = 0 if batch.wide == 4 else batch.wide * network.channels * batch.pixels * batch.part
    final_norm = (4 * network.width + 8) * tokens
    if batch.checkpointing:
        return images + final_norm + 4 * network.width * tokens * network.depth
    return images + final_norm + sum(block_activations(network, batch, groups, rate) for rate in network.drop_rates)


def block_activations(network: NetworkSizes, batch: Batch, groups: list[tuple[int, int]], rate: float) -> int:
    """Bytes that autograd keeps of one block (models/blocks.py), for `groups` of (samples, tokens of each).

    At a drop-path `rate` above 0 both branches hold only the samples kept; the input of their norm is then a gathered
    copy instead of the residual stream itself.
    """
    wide, width = batch.wide, network.width
    kept = [(max(int(samples * (1 - rate) + 1e-9), 1), length) for samples, length in groups]
    tokens = sum(samples * length for samples, length in kept)
    norm = 4 * width + 8 + wide * width  # input, mean and 1 / std, and what the linear layer after it keeps
    scale = wide * width if network.layerscale else 0
    inner = wide * network.hidden * (4 if network.gated else 1)  # gate, value, silu(gate), their product; or fc1's
    several = len({length for _, length in kept}) > 1
    attention = sum(samples * length * _attention(network, batch, length, several) for samples, length in kept)
    return attention + tokens * (2 * (norm + scale) + inner)


def _attention(network: NetworkSizes, batch: Batch, length: int, several: bool) -> int:
    """Bytes per token between the qkv layer and the output layer: q, k, v, the output and the log-sum-exp.

    With `several` lengths the outputs are joined into one tensor, and the fused kernel keeps its own as well.
    """
    heads = network.attention_heads
    if length <= batch.plain_tokens:  # the matrix itself instead of the log-sum-exp
        return batch.wide * (4 * network.width + heads * length)
    return batch.wide * (5 if several else 4) * network.width + 4 * heads


def head_activations(network: NetworkSizes, batch: Batch) -> int:
    """Bytes that autograd keeps of the student's heads below their logits."""
    if not network.heads:
        return 0
    classes, masked = batch.head_rows()
    dino, ibot = network.heads[0], network.heads[-1]
    return classes * _head_row(dino, batch.wide) + masked * _head_row(ibot, batch.wide)


def _head_row(head: HeadSizes, wide: int) -> int:
    """Input, hidden layers before and after their GELU, and the bottleneck before and after normalisation."""
    return wide * (head.widths[0] + 2 * sum(head.widths[1:-1])) + 8 * head.widths[-1]


def logits(network: NetworkSizes, batch: Batch) -> int:
    """Bytes of logits at the worse of two moments: while iBOT's loss is computed, and while DINO's is.

    The teacher's live from its forward pass on, in fp16 under autocast; the student's only while their loss is
    computed, with a gradient of the same size, which stays.
    """
    if not network.heads:
        return 0
    classes, masked = batch.head_rows()
    dino, ibot = network.heads[0].prototypes, network.heads[-1].prototypes
    teacher = batch.wide * GLOBAL_CROPS * batch.part * dino
    first = teacher + batch.wide * masked * ibot + 2 * 4 * masked * ibot
    second = teacher + 4 * masked * ibot + 2 * 4 * classes * dino
    return max(first, second)


def features(network: NetworkSizes, batch: Batch) -> int:
    """Bytes of normalised tokens, float32: the student's, the teacher's of the global crops, and masked patches."""
    groups = batch.samples(network)
    tokens = sum(samples * length for samples, length in groups) + groups[0][0] * groups[0][1]
    return 4 * network.width * (tokens + batch.head_rows()[1])


def _largest_block(network: NetworkSizes, batch: Batch) -> int:
    groups = batch.samples(network)
    return max(block_activations(network, batch, groups, rate) for rate in set(network.drop_rates))


def _gathered(network: NetworkSizes, batch: Batch, layout: Layout) -> tuple[int, int]:
    """Bytes of whole weights and whole gradients that a sharded run holds at its worst moment.

    Between the parts of an accumulated batch nothing is reduced: all gradients are there whole.
    """
    if layout.shards == 1:
        return 0, 0
    block = batch.wide * layout.shards * shard_of(network.block, layout.shards)
    heads = [4 * layout.shards * shard_of(head.shapes, layout.shards) for head in network.heads]
    root = 4 * layout.shards * shard_of(network.root, layout.shards)
    alive = min(ALIVE, network.depth)
    weights = root + sum(heads) + (alive if layout.reshard else network.depth) * block
    if batch.accumulate > 1:
        return weights, network.depth * block + sum(heads) + root
    return weights, max(alive * block, max(heads))


def _autocast_weights(network: NetworkSizes, batch: Batch, layout: Layout) -> int:
    """16-bit copies of matrices that autograd keeps: of the heads' MLPs and, where not gathered so, of the blocks."""
    if batch.wide == 4:
        return 0
    kept = sum(numel(_matrices(head.shapes)[:-2]) for head in network.heads)  # all but gain and prototypes
    if layout.shards == 1:
        kept += network.depth * numel(_matrices(network.block))
    return batch.wide * kept


def _matrices(shapes: tuple[Shape, ...]) -> list[Shape]:
    return [shape for shape in shapes if len(shape) == 2]
