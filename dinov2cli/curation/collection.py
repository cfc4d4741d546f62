"""What `dedup` and `curate` read: images, embeddings, or a selection of either, as one pool of rows with vectors."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.artifacts.embeddings import Embeddings, open_embeddings
from dinov2cli.artifacts.manifest import Manifest, has_manifest, read_manifest
from dinov2cli.artifacts.selection import open_selection
from dinov2cli.curation.fingerprints import pool_from_images
from dinov2cli.curation.tables import pool_from_metadata
from dinov2cli.data.source import ImageSource, open_source
from dinov2cli.data.spec import parse_spec
from dinov2cli.errors import InputError
from dinov2cli.search.vectors import SubsetVectors, Vectors


@dataclass(frozen=True)
class Collection:
    """An opened IN. `pool` is None until the images behind it are listed (see `images`); `vectors` None without
    embeddings. `embedded_by` is the config of the embeddings (its `model`, `pool` …), `random` whether they come
    from a model without training. `fingerprint` goes into the manifest of what is made from it."""

    spec: str
    kind: str
    rows: int
    pool: pa.Table | None
    vectors: Vectors | None
    embeddings: Embeddings | None
    images: Callable[[], ImageSource]
    fingerprint: dict[str, Any]

    @property
    def random(self) -> bool:
        """Whether the embeddings come from random weights, so that their similarities say little."""
        return self.embeddings is not None and bool(self.embeddings.manifest.extra.get("random"))

    @property
    def copy_detection(self) -> bool:
        """Whether the embeddings come from a model made to find copies, whose thresholds the paper gives."""
        return self.embeddings is not None and bool(self.embeddings.manifest.extra.get("copy_detection"))

    def table(self) -> pa.Table:
        """The pool: id, image_path, source, row and every other column known of the rows."""
        return self.pool if self.pool is not None else pool_from_images(self.images())


def open_collection(spec: str) -> Collection:
    """Open the IN `spec`: embeddings, a selection (with the embeddings it was made from, if any), or any DATA.

    Raises InputError as `open_source` and `open_embeddings` do, and when a selection and its embeddings no longer fit.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "embeddings":
        embeddings = open_embeddings(parsed.location)
        pool = pool_from_metadata(embeddings.metadata(), source=str(Path(parsed.location).resolve()))
        return _from_artifact(spec, parsed.kind, embeddings.manifest, pool, embeddings, embeddings)
    if parsed.kind == "selection":
        selection = open_selection(parsed.location)
        # Images of query sets that joined have no row in the pool's embeddings.
        origins = (
            pc.unique(selection.kept.column("origin")).to_pylist() if "origin" in selection.kept.column_names else []
        )
        behind = None if "query" in origins else _embeddings_behind(selection.manifest)
        vectors = None if behind is None else _subset(behind, selection.kept, parsed.location)
        pool = None if behind is None else selection.kept
        return _from_artifact(spec, parsed.kind, selection.manifest, pool, vectors, behind, selection.kept.num_rows)
    source = open_source(parsed)
    return Collection(spec, parsed.kind, len(source), None, None, None, lambda: source, source.fingerprint())


def _from_artifact(
    spec: str,
    kind: str,
    manifest: Manifest,
    pool: pa.Table | None,
    vectors: Vectors | None,
    embeddings: Embeddings | None,
    rows: int | None = None,
) -> Collection:
    count = rows if rows is not None else pool.num_rows if pool is not None else 0
    parsed = parse_spec(spec)
    # With its options: a label column that was asked for is stored with packed images.
    location = str(Path(parsed.location).resolve()) + parsed.canonical()[len(os.path.abspath(parsed.location)) :]
    content = hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()
    fingerprint = {"spec": location, "kind": kind, "rows": count, "hash": content}
    return Collection(spec, kind, count, pool, vectors, embeddings, lambda: open_source(spec), fingerprint)


def _embeddings_behind(manifest: Manifest) -> Embeddings | None:
    """The embeddings that a selection was made from, through any number of selections; None if made from images."""
    first = manifest.inputs[0] if manifest.inputs else {}
    path = str(first.get("spec", "")).partition("?")[0]
    if first.get("kind") == "embeddings":
        # Moved away since, the images behind the selection still open.
        return open_embeddings(path) if has_manifest(path) else None
    if first.get("kind") == "selection" and has_manifest(path):
        return _embeddings_behind(read_manifest(path))
    return None


def _subset(embeddings: Embeddings, kept: pa.Table, location: str) -> SubsetVectors:
    found = pc.index_in(kept.column("id"), value_set=embeddings.metadata(["id"]).column("id"), skip_nulls=True)
    rows = np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)
    if (rows < 0).any():
        raise InputError(
            f"{location}: {int((rows < 0).sum())} of its {len(rows)} images are not in {embeddings.path}, which it was "
            "made from; the embeddings were made again since: make the selection again too"
        )
    return SubsetVectors(embeddings, rows)
