"""Memory and traffic of a run in words and numbers, for the plan that `--dry-run` prints."""

from dataclasses import replace

from dinov2cli.train.memory import memory
from dinov2cli.train.sizes import Batch, Layout, NetworkSizes
from dinov2cli.train.traffic import KINDS, traffic


def footprint(
    network: NetworkSizes, batch: Batch, layout: Layout, *, iterations: int = 3, koleo_global: bool = True
) -> dict[str, float]:
    """Flat facts of one rank: memory in GiB with its parts, and MiB sent per step (nothing where nothing is sent)."""
    facts = memory_facts(memory(network, batch, layout))
    other = replace(batch, checkpointing=not batch.checkpointing)
    word = "with" if other.checkpointing else "without"
    facts[f"memory per rank {word} activation checkpointing (GiB)"] = _gib(memory(network, other, layout)["total"])
    if layout.ranks == 1:
        return facts
    sent = traffic(network, batch, layout, iterations=iterations, koleo_global=koleo_global)
    facts["traffic per step (MiB sent per rank, modelled)"] = _mib(sent["total"]["total"])
    facts["traffic between nodes (MiB sent per rank)"] = _mib(sent["total"]["between"])
    named = {f"traffic in {kind.replace('_', '-')} (MiB)": _mib(sent[kind]["total"]) for kind in KINDS}
    return facts | {name: size for name, size in named.items() if size}


def memory_facts(parts: dict[str, int]) -> dict[str, float]:
    """Flat facts, in GiB, of what `memory` or `distillation_memory` found; parts of next to nothing are left out."""
    facts = {"memory per rank (GiB, modelled)": _gib(parts["total"])}
    named = {name: size for name, size in parts.items() if name != "total" and size >= 2**30 / 200}
    return facts | {f"memory of {name} (GiB)": _gib(size) for name, size in named.items()}


def _mib(size: float) -> float:
    return round(size / 2**20, 1)


def _gib(size: float) -> float:
    return round(size / 2**30, 2)
