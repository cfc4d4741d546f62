"""The tables of `dinov2 bench scaling` as Markdown: what the terminal prints and docs/scaling.md shows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

NAMES = {"ddp": "DDP", "fsdp": "FSDP2", "hybrid": "hybrid"}
DETAIL = 128  # GPUs of the tables that go into parts
_GIB, _MIB = 2**30, 2**20
Row = dict[str, Any]


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Every table by its title, from what `bench.scaling.run` returns."""
    made = {"Assumptions": _table(["assumption", "value"], ([k, f"{v:g}"] for k, v in figures["assumptions"].items()))}
    for recipe in dict.fromkeys(row["recipe"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["recipe"] == recipe]
        made[f"{recipe}: memory per GPU (GiB)"] = _by_gpus(rows, _memory, first=("images per GPU", _images))
        if any(row["gpus"] == DETAIL for row in rows):
            made[f"{recipe}: memory per GPU on {DETAIL} GPUs (GiB)"] = _parts(rows)
            made[f"{recipe}: sent per GPU and step on {DETAIL} GPUs (MiB)"] = _kinds(rows)
        made[f"{recipe}: sent per GPU and step (MiB), of which between nodes"] = _by_gpus(rows, _sent)
        for network in rows[0]["links"]:
            made[f"{recipe}: step time (ms) over {network}, overlapped to exposed"] = _by_gpus(
                rows, _step(network), first=("compute", _compute)
            )
    made["Where it breaks (GPUs)"] = _limits(figures["limits"])
    made["What grows with the ranks"] = _growth(figures["rows"])
    return made


def lines(figures: dict[str, Any]) -> list[str]:
    """All tables under their titles, for the terminal."""
    return [line for title, table in tables(figures).items() for line in (title, "", table, "")][:-1]


def _by_gpus(
    rows: list[Row], value: Callable[[Row], str], first: tuple[str, Callable[[Row], str]] | None = None
) -> str:
    """A line per number of GPUs, a column of `value` per sharding, `first` before them."""
    shardings = list(dict.fromkeys(row["sharding"] for row in rows))
    found = {(row["gpus"], row["sharding"]): row for row in rows}
    head = ["GPUs", *([first[0]] if first else []), *(NAMES[sharding] for sharding in shardings)]
    body = []
    for gpus in dict.fromkeys(row["gpus"] for row in rows):
        cells = [f"{gpus:,}", *([first[1](found[gpus, shardings[0]])] if first else [])]
        body.append(cells + [value(found[gpus, sharding]) for sharding in shardings])
    return _table(head, body)


def _images(row: Row) -> str:
    return str(row["images_per_gpu"])


def _memory(row: Row) -> str:
    total = f"{row['memory']['total'] / _GIB:.1f}"
    if row["parts"] is None:
        return f"{total}, too much"
    return total if row["parts"] == 1 else f"{total} in {row['parts']} parts"


def _sent(row: Row) -> str:
    total = row["traffic"]["total"]
    return f"{total['total'] / _MIB:,.0f}, {total['between'] / _MIB:,.0f}"


def _compute(row: Row) -> str:
    return f"{1e3 * row['compute']:,.0f}"


def _step(network: str) -> Callable[[Row], str]:
    def step(row: Row) -> str:
        times = row["links"][network]
        return f"{1e3 * times['hidden']:,.0f} to {1e3 * times['exposed']:,.0f}"

    return step


def _detail(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["gpus"] == DETAIL]


def _parts(rows: list[Row]) -> str:
    own = _detail(rows)
    names = dict.fromkeys(name for row in own for name in row["memory"])
    body = [[name, *(f"{row['memory'].get(name, 0) / _GIB:.2f}" for row in own)] for name in names if name != "total"]
    body.append(["total", *(f"{row['memory']['total'] / _GIB:.2f}" for row in own)])
    return _table(["", *(NAMES[row["sharding"]] for row in own)], body)


def _kinds(rows: list[Row]) -> str:
    own = _detail(rows)
    body = [[kind, *(f"{row['traffic'][kind]['total'] / _MIB:,.1f}" for row in own)] for kind in own[0]["traffic"]]
    return _table(["", *(NAMES[row["sharding"]] for row in own)], body)


def _limits(limits: list[dict[str, Any]]) -> str:
    names = {
        "fits_from": "fits from",
        "whole_from": "without accumulation from",
        "bound_from_infiniband": "communication-bound from, InfiniBand",
        "bound_from_ethernet": "Ethernet",
    }
    body = [
        [entry["recipe"], NAMES[entry["sharding"]], *("never" if entry[k] is None else f"{entry[k]:,}" for k in names)]
        for entry in limits
    ]
    return _table(["recipe", "sharding", *names.values()], body)


def _growth(rows: list[Row]) -> str:
    """Latency of Sinkhorn's all-reduces and the busiest rank's share, which no bandwidth cures: undivided batches."""
    own = [row for row in rows if row["recipe"] == rows[0]["recipe"] and row["sharding"] == "ddp"]
    body = [
        [
            f"{row['gpus']:,}",
            str(row["images_per_gpu"]),
            f"{1e3 * row['sinkhorn']['ring'] / (row['parts'] or 1):.1f}",
            f"{1e3 * row['sinkhorn']['tree'] / (row['parts'] or 1):.1f}",
            f"{row['slowest']:.2f}",
        ]
        for row in own
    ]
    head = [
        "GPUs",
        "images per GPU",
        "Sinkhorn, ring (ms)",
        "Sinkhorn, tree (ms)",
        "busiest rank's block over the mean",
    ]
    return _table(head, body)


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [list(head), *map(list, body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(rows[0]), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows[1:])])
