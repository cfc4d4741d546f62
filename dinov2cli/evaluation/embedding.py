"""Embedding a source into shards on disk: one per fixed range of rows, so that a stopped run goes on at a shard."""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.artifacts.embeddings import EmbeddingsWriter
from dinov2cli.data.loader import Batch
from dinov2cli.data.source import ImageSource
from dinov2cli.evaluation.features import FeatureBatch


def first_missing_shard(writer: EmbeddingsWriter, rows: int, shard_size: int) -> int:
    """Return the number of the first shard that is not on disk; the number of shards when all are."""
    shards = shard_count(rows, shard_size)
    return next((shard for shard in range(shards) if not writer.has_shard(shard)), shards)


def shard_count(rows: int, shard_size: int) -> int:
    """Return how many shards hold `rows` rows of a source."""
    return -(-rows // shard_size)


def write_shards(
    features: Iterable[FeatureBatch[Batch]],
    source: ImageSource,
    writer: EmbeddingsWriter,
    *,
    shard_size: int,
    start: int = 0,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write every shard from row `start` (the first row of a shard) to the end of `source`.

    `features` come in row order, each of rows of one shard (see `row_ranges`); rows may be missing where images could
    not be read. Vectors are L2-normalised if the writer says so. A shard is written when the first row beyond it
    arrives, so at most one is held in memory.
    """
    shards = shard_count(len(source), shard_size)
    shard = start // shard_size
    parts: list[FeatureBatch[Batch]] = []

    def flush() -> None:
        nonlocal shard
        writer.write_shard(shard, *_joined(parts, source, writer))
        parts.clear()
        shard += 1

    for part in features:
        while shard < part.batch.index[0] // shard_size:
            flush()
        parts.append(part)
        if advance is not None:
            advance(len(part.batch))
    while shard < shards:
        flush()


def _joined(
    parts: list[FeatureBatch[Batch]], source: ImageSource, writer: EmbeddingsWriter
) -> tuple[np.ndarray, pa.Table, np.ndarray | None]:
    """Vectors [n, dim], metadata of n rows, and patch tokens [n, N, D] if they were asked for."""
    vectors = np.concatenate(
        [np.zeros((0, writer.dim), np.float32), *(_unit(part.pooled, writer.normalized) for part in parts)]
    )
    kept = [part.patches.numpy() for part in parts if part.patches is not None]
    return vectors, _metadata(source, [part.batch for part in parts]), np.concatenate(kept) if kept else None


def _unit(vectors: Tensor, normalized: bool) -> np.ndarray:
    return (F.normalize(vectors, dim=1) if normalized else vectors).numpy()


def _metadata(source: ImageSource, batches: list[Batch]) -> pa.Table:
    """Identity, size, digest, origin, label and source columns of the images of some batches."""
    rows = np.concatenate([np.zeros(0, np.int64), *(batch.index for batch in batches)])
    ids, paths = source.ids, source.paths
    origins = [source.origin(int(row)) for row in rows]
    columns: dict[str, pa.Array] = {
        "id": pa.array([ids[row] for row in rows], pa.string()),
        "image_path": pa.array([paths[row] for row in rows], pa.string()),
        "width": pa.array([w for batch in batches for w in batch.width], pa.int32()),
        "height": pa.array([h for batch in batches for h in batch.height], pa.int32()),
        "sha256": pa.array([digest for batch in batches for digest in batch.sha256], pa.string()),
        "source": pa.array([spec for spec, _ in origins], pa.string()),
        "row": pa.array([row for _, row in origins], pa.int64()),
    }
    if source.labels is not None:
        columns["label"] = pa.array(source.labels[rows], pa.int64())
    for name in source.columns.column_names:
        if name not in columns:
            columns[name] = source.columns.column(name).take(pa.array(rows))
    return pa.table(columns)
