"""Duplicate removal: edges of all tiers, components, one image kept per component, and why each other one went."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.fingerprints import Fingerprints
from dinov2cli.curation.resolve import (
    EdgeTable,
    drop_outright,
    join_tiers,
    keep_order,
    representatives,
    resolve_groups,
)
from dinov2cli.curation.summary import dedup_messages, dedup_summary
from dinov2cli.curation.tables import Curated, dropped_table, kept_table, other_rows
from dinov2cli.curation.thresholds import Thresholds, rules
from dinov2cli.curation.tiers import Keys, Reference, Tier, exact_tier, perceptual_tier, reference_matches
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress, Store
from dinov2cli.search.components import component_labels, cut_components, leave_unlike
from dinov2cli.search.edges import Edges
from dinov2cli.search.hamming import hash_edges
from dinov2cli.search.neighbours import similarity_edges
from dinov2cli.search.vectors import Float32, Int64, SubsetVectors, Vectors, as_vectors

MAX_COMPONENT = 1000


class Local(Protocol):
    """Comparison of images by their local features, see `local.py`."""

    def tier(self, known: Sequence[Edges]) -> Tier:
        """Pairs found by local features alone, beyond those that `known` edges join."""

    def confirms(self, edges: Edges) -> npt.NDArray[np.bool_]:
        """Which of these pairs have local features in common that lie alike, [E]."""


def dedup(
    pool: pa.Table,
    *,
    vectors: Vectors | npt.NDArray[np.floating] | None = None,
    fingerprints: Fingerprints | None = None,
    local: Local | None = None,
    confirm: bool = False,
    exact: bool = True,
    search_local: bool = True,
    unreadable: Sequence[str] = (),
    thresholds: Thresholds | None = None,
    k: int = 64,
    max_component: int = MAX_COMPONENT,
    min_representative: float | None = None,
    against: Sequence[Reference] = (),
    against_components: bool = False,
    seed: int = 0,
    search: dict[str, Any] | None = None,
    store: Store | None = None,
    progress: Callable[[str], Progress | None] | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """Remove duplicates within a pool, and what a reference set already holds.

    pool: columns id, image_path, source, row; width, height and sharpness decide which copy stays, sha256 finds
    exact ones. fingerprints: digests and perceptual hashes of the same rows; local: their local features; vectors:
    embeddings of the same rows. Each tier runs where its input is there. Two images are joined when their bytes or
    pixels are equal, their hashes are near each other, rare local features agree in place, or their cosine is above the
    threshold and one is among the k nearest of the other (METHOD.md section 1). Without `exact` or `search_local` equal
    files, or what local features find by themselves, join nothing; with `confirm` a cosine alone joins nothing within
    the pool, local features must agree too. Of each component the largest image stays, of equally large ones the
    sharpest, then the lowest id. Components above `max_component` are cut at a higher threshold; with
    `min_representative` a member that no edge joins to the image kept, and whose cosine to it is not above that value,
    leaves the component.

    against: rows that match one of these sets directly are dropped first; with `against_components` all that is joined
    to such a row goes too, which is the paper's form. unreadable: ids of images that have no row in the pool. search:
    further arguments of `similarity_edges`.

    The kept set does not depend on the order of the pool. The ranks share every search, and all get the result; a
    `store` keeps what blocks found. Raises UserError without any tier to run, or for a threshold outside (0, 1].
    """
    at = thresholds or Thresholds()
    for name, value in (("threshold", at.embedding), ("against_threshold", at.against)):
        if not 0 < value <= 1:
            raise UserError(f"{name}: found {value:g}; expected a cosine above 0 and at most 1")
    rows = pool.num_rows
    sha256 = _keys(pool, fingerprints)
    if sha256 is None and vectors is None and local is None:
        raise UserError(
            "dedup: no sha256 column, fingerprints or vectors to compare by; give images, or embeddings made by "
            "`dinov2 embed`"
        )
    priority = keep_order(pool)
    shared: dict[str, Any] = {"store": store, "ranks": ranks}
    said = progress or _quietly
    tiers = [] if sha256 is None or not exact else [exact_tier("bytes", sha256, priority)]
    if fingerprints is not None and exact:
        tiers.append(exact_tier("pixels", fingerprints.pixels, priority))
    copies = _copies(rows, tiers)
    if fingerprints is not None:
        asks = {"radius": at.hash_radius, "priority": priority, "progress": said("compare hashes"), **shared}
        near = hash_edges(fingerprints.hashes, **asks)
        tiers.append(perceptual_tier(near, at.hash_radius))
    if local is not None and search_local:
        tiers.append(local.tier([tier.edges for tier in tiers]))
    if vectors is not None:
        found = {"k": k, "seed": seed, "progress": said("compare embeddings"), **shared, **(search or {})}
        tier = _embedding_tier(vectors, at.embedding, copies, rows, **found)
        tiers.append(tier.only(local.confirms(tier.edges)) if local is not None and confirm else tier)
    matches = None
    if against:
        matches = reference_matches(
            rows,
            against,
            threshold=at.against,
            sha256=sha256 if exact else None,
            pixels=fingerprints.pixels if fingerprints and exact else None,
            hashes=fingerprints.hashes if fingerprints else None,
            hash_radius=at.hash_radius,
            vectors=vectors,
            **{name: value for name, value in (search or {}).items() if name in ("bias", "index", "nprobe", "memory")},
            seed=seed,
            progress=said("compare with the reference"),
            ranks=ranks,
        )
    edges = join_tiers(tiers)
    bad = sorted(fingerprints.unreadable) if fingerprints else []
    gone, parts = drop_outright(pool, edges, matches, against, bad, against_components)
    if unreadable:
        names = pa.table({"id": pa.array(list(unreadable), pa.string())})
        parts.append(dropped_table(names, np.arange(len(unreadable)), reason="unreadable"))
    edges = edges.take(~gone[edges.src] & ~gone[edges.dst])
    label, alive, recuts = cut_components(rows, edges.src, edges.dst, edges.strength, max_size=max_component)
    edges = edges.take(alive)
    left = 0
    if min_representative is not None and vectors is not None:
        label, edges, left = _without_chains(label, edges, priority, as_vectors(vectors), min_representative)
    groups = resolve_groups(pool, edges, label, gone, priority)
    dropped = pa.concat_tables([*parts, groups.dropped])
    summary = dedup_summary(rows + len(unreadable), len(groups.kept), dropped, groups.sizes, tiers, recuts)
    summary |= {"rules": rules(tiers, at, k=k, normalised=(search or {}).get("bias") is not None), "left_chains": left}
    return Curated(
        kept=kept_table(pool, groups.kept),
        dropped=dropped,
        rows=groups.kept,
        summary=summary,
        messages=dedup_messages(summary, k=k),
        groups=groups.table,
    )


def _without_chains(
    label: Int64, edges: EdgeTable, priority: Int64, vectors: Vectors, floor: float
) -> tuple[Int64, EdgeTable, int]:
    """Labels, edges and the number of rows that left, where every member must itself resemble the image kept.

    What stays without an edge of its own to the image kept gets one, so that its reason is a direct one.
    """

    def cosine(a: Int64, b: Int64) -> npt.NDArray[np.floating]:
        return np.einsum("nd,nd->n", vectors.gather(a), vectors.gather(b))

    keeper = representatives(label, priority)
    parted, left = leave_unlike(label, keeper, cosine, edges.src, edges.dst, floor=floor)
    edges = edges.take(parted[edges.src] == parted[edges.dst])
    tied = np.zeros(len(label), dtype=bool)
    for one, other in ((edges.src, edges.dst), (edges.dst, edges.src)):
        tied[one[keeper[one] == other]] = True
    loose = np.flatnonzero(~tied & ~left & (keeper != np.arange(len(label))))
    values = np.concatenate([cosine(part, keeper[part]) for part in np.array_split(loose, 1 + len(loose) // 65536)])
    return parted, edges.plus(keeper[loose], loose, values, "embedding"), int(left.sum())


def _quietly(_: str) -> None:
    return None


def _copies(rows: int, tiers: list[Tier]) -> Int64:
    """Rows that the tiers so far join to an earlier one."""
    if not tiers:
        return np.zeros(0, dtype=np.int64)
    edges = join_tiers(tiers)
    label = component_labels(rows, edges.src, edges.dst)
    return np.flatnonzero(label != np.arange(rows))


def _embedding_tier(
    vectors: Vectors | npt.NDArray[np.floating],
    threshold: float,
    copies: Int64,
    rows: int,
    *,
    bias: Float32 | None = None,
    **search: Any,
) -> Tier:
    """Edges by cosine among the rows that are no exact copy of another: a thousand identical files would fill each
    other's neighbour lists and hide what else resembles them."""
    single = other_rows(rows, copies)
    subset = SubsetVectors(as_vectors(vectors), single) if len(copies) else vectors
    found = similarity_edges(subset, threshold, bias=None if bias is None else bias[single], **search)
    edges = Edges(single[found.src], single[found.dst], found.similarity, single[found.truncated])
    return Tier("embedding", edges, threshold)


def _keys(pool: pa.Table, fingerprints: Fingerprints | None) -> Keys | None:
    if fingerprints is not None:
        return fingerprints.sha256
    return pool.column("sha256") if "sha256" in pool.column_names else None
