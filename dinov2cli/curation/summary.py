"""The figures of a dedup run, for JSON and for people."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.tiers import Tier
from dinov2cli.search.components import Recut

_SIZE_BINS = (2, 3, 5, 10, 100, 1000, 10_000)


def dedup_summary(
    images: int,
    kept: int,
    dropped: pa.Table,
    component_sizes: npt.NDArray[np.integer],
    tiers: Sequence[Tier],
    recuts: Sequence[Recut],
) -> dict[str, Any]:
    """Counts of images, reasons, edges per tier, group sizes and what the guard against chaining did."""
    return {
        "images": images,
        "kept": kept,
        "dropped": dropped.num_rows,
        "reasons": dict(sorted(Counter(dropped.column("reason").to_pylist()).items())),
        "edges": {tier.name: len(tier.edges) for tier in tiers},
        "groups": len(component_sizes),
        "largest_group": int(component_sizes.max(initial=1)),
        "group_sizes": _histogram(component_sizes),
        "truncated_rows": int(sum(len(tier.edges.truncated) for tier in tiers)),
        "recut": [
            {"size": r.size, "strength": r.strength, "largest_after": r.largest_after, "first_row": r.first_row}
            for r in recuts
        ],
    }


def dedup_messages(summary: dict[str, Any], *, k: int) -> list[str]:
    """The summary in sentences; what may have gone wrong is said with what to do."""
    share = summary["dropped"] / max(1, summary["images"])
    reasons = ", ".join(f"{count} {name}" for name, count in summary["reasons"].items()) or "none"
    lines = [
        f"kept {summary['kept']} of {summary['images']} images; dropped {summary['dropped']} ({share:.1%}): {reasons}",
        f"{summary['groups']} groups of duplicates, the largest of {summary['largest_group']} images",
    ]
    if summary["truncated_rows"]:
        lines.append(
            f"{summary['truncated_rows']} images have more than {k} neighbours above the threshold and were compared "
            f"with the nearest {k} only; raise k or the threshold"
        )
    if summary.get("left_chains"):
        lines.append(f"{summary['left_chains']} images left a group that only a chain of others tied them to")
    for cut in summary["recut"]:
        lines.append(
            f"a group of {cut['size']} images looked like a chain of look-alikes and was cut at strength "
            f"{cut['strength']:.2f} of the way from the threshold to 1; its largest part now holds "
            f"{cut['largest_after']}"
        )
    return lines


def _histogram(sizes: npt.NDArray[np.integer]) -> dict[str, int]:
    result: dict[str, int] = {}
    for low, high in zip(_SIZE_BINS, [*_SIZE_BINS[1:], None], strict=True):
        inside = (sizes >= low) & (sizes < high if high is not None else True)
        name = f"{low}+" if high is None else str(low) if high == low + 1 else f"{low}-{high - 1}"
        if inside.any():
            result[name] = int(inside.sum())
    return result
