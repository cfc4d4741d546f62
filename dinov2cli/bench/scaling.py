"""`dinov2 bench scaling`: memory, traffic and step time of the long recipes on 8 to 2,048 GPUs, MODELLED.

Nothing is timed here. Memory and volumes come from `train.memory` and `train.traffic`, operations from `models.flops`;
speeds of compute units and links are assumptions, each named in `Assumptions` and printed with the tables.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dinov2cli.bench.scaling_tables import lines as lines
from dinov2cli.models.flops import step_flops
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.registry import build
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.memory import memory
from dinov2cli.train.sizes import GLOBAL_CROPS, SHARDINGS, Batch, Layout, NetworkSizes, sizes_of
from dinov2cli.train.traffic import Collective, collectives, traffic

RECIPES = ("vitl14-long", "vitg14-long")
GPUS = tuple(2**power for power in range(3, 12))


@dataclass(frozen=True)
class Assumptions:
    """Everything the times rest on; no value was measured. Bandwidths in GB/s per direction, hop latencies in s."""

    total_batch: int = 3072  # the paper's; held while GPUs are added
    gpus_per_node: int = 8
    peak_tflops: float = 989.0  # H100 SXM, bf16 without sparsity, by its data sheet
    mfu: float = 0.40  # achieved share of that peak within one GPU: a guess, until a GPU measures it
    memory_gib: float = 72.0  # of the card's 80 GB (74.5 GiB), the rest for CUDA, NCCL and fragments
    nvlink: float = 450.0  # per GPU
    infiniband: float = 50.0  # per GPU: 400 Gb/s
    ethernet: float = 12.5 / 8  # per GPU: 100 Gb/s per node of 8
    hop_inside: float = 1.9e-6  # a ring's hop, as NCCL's own cost model has it for the LL128 protocol
    hop_between: float = 4.0e-6
    tree_inside: float = 1.25e-6  # the same for a tree
    tree_between: float = 8.5e-6


@dataclass(frozen=True)
class Model:
    """A recipe reduced to numbers: sizes, crops, and operations per image by part."""

    sizes: NetworkSizes
    crops: dict[str, Any]
    masked: float
    flops: dict[str, float]


def run(
    device: str = "auto",  # noqa: ARG001 - one signature for all benches
    seed: int = 0,  # noqa: ARG001
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    gpus: tuple[int, ...] = GPUS,
    assumed: Assumptions | None = None,
) -> dict[str, Any]:
    """Tables for `recipes` (settings of pretrain by recipe name, as nested dictionaries), see `row_of` and `limits`.

    Returns `seconds` (that the model took to compute, no step's time), `assumptions`, `rows`, `limits`.
    """
    started, assumed = time.perf_counter(), assumed or Assumptions()
    models = {name: model_of(settings) for name, settings in (recipes or {}).items()}
    rows = [
        {"recipe": name, **row_of(model, sharding, count, assumed)}
        for name, model in models.items()
        for count in gpus
        for sharding in SHARDINGS
    ]
    return {
        "seconds": time.perf_counter() - started,
        "assumptions": asdict(assumed),
        "rows": rows,
        "limits": limits(rows),
    }


def model_of(settings: Mapping[str, Any]) -> Model:
    """Numbers of a recipe, from modules on the meta device: nothing is allocated."""
    own, heads, crops, masks = (settings[name] for name in ("model", "heads", "crops", "masks"))
    crops = {name: crops[name] for name in ("global_size", "local_size", "local_number")}
    backbone = build(
        own["arch"],
        device="meta",
        img_size=crops["global_size"],
        drop_path=own["drop_path"],
        **({"ffn": own["ffn"]} if own["ffn"] else {}),
    )
    patches = (crops["global_size"] // backbone.patch_size) ** 2
    masked = GLOBAL_CROPS * patches * masks["probability"] * (masks["ratio_min"] + masks["ratio_max"]) / 2
    numbers = {name: size for name, size in heads.items() if name not in ("untied", "freeze_gain")}
    flops = step_flops(backbone, **numbers, **crops, masked=masked, drop_path=own["drop_path"])
    return Model(_sizes(backbone, heads), crops, masked, flops)


def _sizes(backbone: VisionTransformer, heads: Mapping[str, Any]) -> NetworkSizes:
    common = {name: heads[name] for name in ("prototypes", "hidden", "bottleneck", "layers")}
    own = {name: heads[f"ibot_{name}"] or heads[name] for name in ("prototypes", "bottleneck")}
    with torch.device("meta"):
        dino = ProjectionHead(backbone.embed_dim, **common)
        ibot = ProjectionHead(backbone.embed_dim, **(common | own)) if heads["untied"] else None
    return sizes_of(backbone, dino, ibot)


def row_of(model: Model, sharding: str, gpus: int, assumed: Assumptions) -> dict[str, Any]:
    """One setting: `memory` (bytes per GPU by category), `traffic` (bytes sent per GPU), times in seconds.

    `parts` is the smallest train.accumulate with which a step fits into `memory_gib`; None where none does, and then
    the figures are those of the smallest part. `links` has, for each network between nodes, seconds of weights and
    gradients on the way (`weights`), of what nothing can hide (`blocking`), and of a step if the former overlaps with
    `compute` fully (`hidden`) or not at all (`exposed`).
    """
    layout = Layout(sharding, gpus, assumed.gpus_per_node)
    images = math.ceil(assumed.total_batch / gpus)
    batch, needed, fits = fitting(model, images, layout, assumed)
    compute = images * model.flops["total"] / (assumed.mfu * assumed.peak_tflops * 1e12)
    rows = collectives(model.sizes, batch, layout)
    return {
        "sharding": sharding,
        "gpus": gpus,
        "images_per_gpu": images,
        "parts": batch.accumulate if fits else None,
        "memory": needed,
        "traffic": traffic(model.sizes, batch, layout),
        "compute": compute,
        "sinkhorn": {name: _sinkhorn(rows, assumed, tree=name == "tree") for name in ("ring", "tree")},
        "slowest": slowest(model, images, gpus),
        "links": {name: _times(rows, compute, name, assumed) for name in ("infiniband", "ethernet")},
    }


def fitting(model: Model, images: int, layout: Layout, assumed: Assumptions) -> tuple[Batch, dict[str, int], bool]:
    """The batch in as few parts as fit into memory, its memory, and whether it fits at all."""
    for parts in (n for n in range(1, images + 1) if images % n == 0 and (n == 1 or images >= 2 * n)):
        batch = Batch(images, **model.crops, masked=model.masked, accumulate=parts)
        needed = memory(model.sizes, batch, layout)
        if needed["total"] <= assumed.memory_gib * 2**30:
            return batch, needed, True
    return batch, needed, False


def seconds_of(row: Collective, network: str, assumed: Assumptions) -> float:
    """Time of one entry: latency of its hops, and bytes over the slower of the links its ring uses.

    An all-reduce takes a tree's latency where that is lower, as NCCL does for small tensors.
    """
    inside, between = row.sent * (1 - row.crossing), row.sent * row.crossing
    moving = max(inside / (assumed.nvlink * 1e9), between / (getattr(assumed, network) * 1e9))
    return moving + row.calls * min(_ring(row, assumed), _tree(row, assumed))


def _ring(row: Collective, assumed: Assumptions) -> float:
    return row.hops * (row.crossing * assumed.hop_between + (1 - row.crossing) * assumed.hop_inside)


def _tree(row: Collective, assumed: Assumptions) -> float:
    if row.kind != "all_reduce":
        return math.inf
    nodes = max(round(row.ranks * row.crossing), 1)
    inside = row.ranks / nodes - 1
    return 2 * (inside * assumed.tree_inside + math.log2(nodes) * assumed.tree_between)


def _sinkhorn(rows: list[Collective], assumed: Assumptions, *, tree: bool) -> float:
    """Latency alone of a step's Sinkhorn all-reduces, by a ring or by a tree."""
    latency = _tree if tree else _ring
    return sum(row.calls * latency(row, assumed) for row in rows if row.purpose == "sinkhorn")


def _times(rows: list[Collective], compute: float, network: str, assumed: Assumptions) -> dict[str, float]:
    weights = sum(seconds_of(row, network, assumed) for row in rows if not row.blocking)
    blocking = sum(seconds_of(row, network, assumed) for row in rows if row.blocking)
    hidden, exposed = max(compute, weights) + blocking, compute + weights + blocking
    return {"weights": weights, "blocking": blocking, "hidden": hidden, "exposed": exposed}


def slowest(model: Model, images: int, gpus: int) -> float:
    """Work of the busiest rank in a block's branch over the mean, if stochastic depth is drawn over the whole batch.

    The tokens a rank keeps then vary from rank to rank, as draws without replacement; the busiest of n normal values
    lies about sqrt(2 ln n) standard deviations up. Drawn on every rank for itself all keep equally many: 1.
    """
    rate = max(model.sizes.drop_rates)
    samples = Batch(images, **model.crops).samples(model.sizes)
    mean = (1 - rate) * sum(count * length for count, length in samples)
    spread = math.sqrt(rate * (1 - rate) * sum(count * length**2 for count, length in samples) * (1 - 1 / gpus))
    return min(1 + math.sqrt(2 * math.log(gpus)) * spread / mean, 1 / (1 - rate))


def limits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By recipe and sharding: `fits_from` (fewest GPUs), `whole_from` (fewest without accumulation), and for each
    network `bound_from`, the fewest GPUs from which on communication takes longer than compute; None where never."""
    found = []
    for recipe, sharding in dict.fromkeys((row["recipe"], row["sharding"]) for row in rows):
        own = [row for row in rows if (row["recipe"], row["sharding"]) == (recipe, sharding)]
        entry = {"recipe": recipe, "sharding": sharding}
        entry["fits_from"] = next((row["gpus"] for row in own if row["parts"]), None)
        entry["whole_from"] = next((row["gpus"] for row in own if row["parts"] == 1), None)
        for network in ("infiniband", "ethernet"):
            free = [row["gpus"] for row in own if _communicates(row, network) <= row["compute"]]
            after = [row["gpus"] for row in own if row["gpus"] > max(free, default=0)]
            entry[f"bound_from_{network}"] = min(after, default=None)
        found.append(entry)
    return found


def _communicates(row: dict[str, Any], network: str) -> float:
    return row["links"][network]["weights"] + row["links"][network]["blocking"]
