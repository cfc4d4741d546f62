"""Duplicate removal: edges of all tiers, components, one image kept per component, and why each other one went."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2cli.curation.fingerprints import Fingerprints
from dinov2cli.curation.resolve import EdgeTable, drop_outright, join_tiers, keep_order, resolve_groups
from dinov2cli.curation.summary import dedup_messages, dedup_summary
from dinov2cli.curation.tables import Curated, kept_table, other_rows
from dinov2cli.curation.tiers import Keys, Reference, Tier, exact_tier, perceptual_tier, reference_matches
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress
from dinov2cli.search.components import component_labels, cut_components
from dinov2cli.search.edges import Edges
from dinov2cli.search.hamming import RADIUS, hash_edges
from dinov2cli.search.neighbours import similarity_edges
from dinov2cli.search.vectors import Int64, SubsetVectors, Vectors, as_vectors

COPY_DETECTION_THRESHOLD = 0.6
"""Cosine above which a copy-detection embedding (SSCD) calls two images copies (METHOD.md section 1)."""

COPY_DETECTION_AGAINST = 0.45
"""The same against a reference set, where a copy missed costs more than an image lost."""

BACKBONE_THRESHOLD = 0.95
"""For features of a general backbone, which are alike for look-alikes and not only for copies: strict on purpose.
Use `calibrate_threshold` to find the value for a model and a data set."""

MAX_COMPONENT = 1000


def dedup(
    pool: pa.Table,
    *,
    vectors: Vectors | npt.NDArray[np.floating] | None = None,
    fingerprints: Fingerprints | None = None,
    threshold: float = COPY_DETECTION_THRESHOLD,
    k: int = 64,
    hash_radius: int = RADIUS,
    max_component: int = MAX_COMPONENT,
    against: Reference | None = None,
    against_threshold: float = COPY_DETECTION_AGAINST,
    against_components: bool = False,
    index: str = "auto",
    nprobe: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Curated:
    """Remove duplicates within a pool, and what a reference set already holds.

    pool: columns id, image_path, source, row; width, height and sharpness decide which copy stays, sha256 finds
    exact ones. fingerprints: digests and perceptual hashes of the same rows; vectors: embeddings of the same rows.
    Each tier runs where its input is there. Two images are joined when their bytes or pixels are equal, their
    hashes differ in at most `hash_radius` of 256 bits, or their cosine is above `threshold` and one is among the k
    nearest of the other (METHOD.md section 1). Of each component the largest image stays, of equally large ones
    the sharpest, then the lowest id. Components above `max_component` are cut at a higher threshold.

    against: rows that match it directly are dropped first (cosine > against_threshold); with `against_components`
    all that is joined to such a row goes too, which is the paper's form.

    The kept set does not depend on the order of the pool. The ranks share every search, and all get the result. Raises
    UserError without any tier to run, or for a threshold outside (0, 1].
    """
    for name, value in (("threshold", threshold), ("against_threshold", against_threshold)):
        if not 0 < value <= 1:
            raise UserError(f"{name}: found {value:g}; expected a cosine above 0 and at most 1")
    rows = pool.num_rows
    sha256 = _keys(pool, fingerprints)
    if sha256 is None and vectors is None:
        raise UserError(
            "dedup: no sha256 column, fingerprints or vectors to compare by; give images, or embeddings made by "
            "`dinov2 embed`"
        )
    priority = keep_order(pool)
    search: dict[str, Any] = {"index": index, "nprobe": nprobe, "seed": seed, "ranks": ranks}
    tiers = [] if sha256 is None else [exact_tier("bytes", sha256, priority)]
    if fingerprints is not None:
        tiers.append(exact_tier("pixels", fingerprints.pixels, priority))
    exact = join_tiers(tiers) if tiers else None
    if fingerprints is not None:
        near = hash_edges(fingerprints.hashes, radius=hash_radius, ranks=ranks)
        tiers.append(perceptual_tier(near, hash_radius))
    if vectors is not None:
        copies = _exact_copies(rows, exact)
        tiers.append(_embedding_tier(vectors, threshold, copies, rows, k=k, progress=progress, **search))
    matches = None
    if against is not None:
        matches = reference_matches(
            rows,
            against,
            threshold=against_threshold,
            sha256=sha256,
            pixels=fingerprints.pixels if fingerprints else None,
            hashes=fingerprints.hashes if fingerprints else None,
            hash_radius=hash_radius,
            vectors=vectors,
            **search,
        )
    edges = join_tiers(tiers)
    unreadable = sorted(fingerprints.unreadable) if fingerprints else []
    gone, parts = drop_outright(pool, edges, matches, against, unreadable, against_components)
    edges = edges.take(~gone[edges.src] & ~gone[edges.dst])
    label, alive, recuts = cut_components(rows, edges.src, edges.dst, edges.strength, max_size=max_component)
    groups = resolve_groups(pool, edges.take(alive), label, gone, priority)
    dropped = pa.concat_tables([*parts, groups.dropped])
    summary = dedup_summary(rows, len(groups.kept), dropped, groups.sizes, tiers, recuts)
    return Curated(
        kept=kept_table(pool, groups.kept),
        dropped=dropped,
        rows=groups.kept,
        summary=summary,
        messages=dedup_messages(summary, k=k),
        groups=groups.table,
    )


def _exact_copies(rows: int, exact: EdgeTable | None) -> Int64:
    """Rows that are byte by byte or pixel by pixel another, earlier row."""
    if exact is None:
        return np.zeros(0, dtype=np.int64)
    label = component_labels(rows, exact.src, exact.dst)
    return np.flatnonzero(label != np.arange(rows))


def _embedding_tier(
    vectors: Vectors | npt.NDArray[np.floating], threshold: float, copies: Int64, rows: int, **search: Any
) -> Tier:
    """Edges by cosine among the rows that are no exact copy of another: a thousand identical files would fill each
    other's neighbour lists and hide what else resembles them."""
    single = other_rows(rows, copies)
    found = similarity_edges(SubsetVectors(as_vectors(vectors), single), threshold, **search)
    edges = Edges(single[found.src], single[found.dst], found.similarity, single[found.truncated])
    return Tier("embedding", edges, threshold)


def _keys(pool: pa.Table, fingerprints: Fingerprints | None) -> Keys | None:
    if fingerprints is not None:
        return fingerprints.sha256
    return pool.column("sha256").to_pylist() if "sha256" in pool.column_names else None
