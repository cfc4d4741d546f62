"""Embeddings on disk: numbered pairs of a memory-mappable .npy and a Parquet table, row i to row i.

The layout is clip-retrieval's, so autofaiss, DuckDB and NumPy read it as it is.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2cli.artifacts.manifest import Manifest, require_kind
from dinov2cli.artifacts.output import Output
from dinov2cli.errors import InputError

REQUIRED_COLUMNS = ("id", "image_path", "width", "height", "sha256")


def _vector_name(shard: int) -> str:
    return f"img_emb/img_emb_{shard:04d}.npy"


def _patch_name(shard: int) -> str:
    return f"patch_emb/patch_emb_{shard:04d}.npy"


def _metadata_name(shard: int) -> str:
    return f"metadata/metadata_{shard:04d}.parquet"


class EmbeddingsWriter:
    """Writes numbered shards into an `Output`; a shard counts as present when both its files are."""

    def __init__(self, out: Output, dim: int, *, normalized: bool = True) -> None:
        self._out = out
        self.dim = dim
        self.normalized = normalized

    def has_shard(self, shard: int) -> bool:
        """Tell whether a shard was written whole; the metadata file is written last, so it decides."""
        return (self._out.path / _metadata_name(shard)).is_file() and (self._out.path / _vector_name(shard)).is_file()

    def write_shard(
        self, shard: int, vectors: np.ndarray, metadata: pa.Table, patches: np.ndarray | None = None
    ) -> None:
        """Store float vectors [n, dim] as float16 in C order, their metadata table of n rows, and, where given, the
        patch tokens [n, N, D] beside them.

        Raises ValueError when the shapes or the columns do not fit.
        """
        if vectors.shape != (metadata.num_rows, self.dim):
            raise ValueError(f"vectors {vectors.shape} do not fit {metadata.num_rows} metadata rows of dim {self.dim}")
        absent = [name for name in REQUIRED_COLUMNS if name not in metadata.column_names]
        if absent:
            raise ValueError(f"metadata lacks {absent}")
        half = np.ascontiguousarray(vectors, dtype=np.float16)
        self._out.write(_vector_name(shard), lambda p: _save_npy(p, half))
        if patches is not None:
            tokens = np.ascontiguousarray(patches, dtype=np.float16)
            self._out.write(_patch_name(shard), lambda p: _save_npy(p, tokens))
        self._out.write_table(_metadata_name(shard), metadata)

    def shard_rows(self, shard: int) -> int:
        """Return the number of rows of a shard that is present."""
        return int(pq.read_metadata(self._out.path / _metadata_name(shard)).num_rows)

    def finish(self, rows: int, **extra: object) -> Manifest:
        """Finish the output, recording dimension and normalisation."""
        return self._out.finish(rows=rows, dim=self.dim, normalized=self.normalized, **extra)


class Embeddings:
    """Finished embeddings opened for reading. Vectors stay on disk until asked for."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._whole()
        files = sorted((path / "img_emb").glob("img_emb_*.npy"))
        self.shards: list[np.ndarray] = [_mapped(file) for file in files]
        self._metadata_files = [
            path / "metadata" / file.name.replace("img_emb", "metadata").replace(".npy", ".parquet") for file in files
        ]
        self._check(files)
        self._starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def _whole(self) -> None:
        """Every file that was written is there, in its size; a shard left out would be a set of other images."""
        for name, entry in self.manifest.files.items():
            if not name.startswith(("img_emb/", "metadata/")):
                continue
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["size"]:
                found = "is missing" if size is None else f"has {size:,} bytes, expected {entry['size']:,}"
                raise InputError(f"{file} {found}; make {self.path} again with `dinov2 embed --overwrite`")

    def _check(self, files: list[Path]) -> None:
        if not files:
            raise InputError(f"{self.path} has no img_emb/img_emb_*.npy; it is damaged: make it again with --overwrite")
        for file, shard, meta in zip(files, self.shards, self._metadata_files, strict=True):
            if not meta.is_file():
                raise InputError(
                    f"{meta} is missing beside {file.name}; make {self.path} again with `dinov2 embed --overwrite`"
                )
            rows = pq.read_metadata(meta).num_rows
            if rows != len(shard):
                raise InputError(
                    f"{file} has {len(shard)} rows and {meta.name} has {rows}, expected the same; "
                    f"make {self.path} again with `dinov2 embed --overwrite`"
                )
            if shard.shape[1] != self.dim:
                raise InputError(
                    f"{file} holds vectors of length {shard.shape[1]}, {files[0].name} of {self.dim}; expected one "
                    "length in all shards: embed all images with one model"
                )

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.shards[0].shape[1])

    @property
    def normalized(self) -> bool:
        """Whether the vectors were L2-normalised when written."""
        return bool(self.manifest.extra.get("normalized", True))

    def metadata(self, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of all rows, in order."""
        return pa.concat_tables(
            [pq.read_table(f, columns=columns) for f in self._metadata_files], promote_options="default"
        )

    def block(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop as float32 [n, dim]."""
        stop = min(stop, self.rows)
        parts = []
        for shard, first in zip(self.shards, self._starts[:-1], strict=True):
            low, high = max(start - first, 0), min(stop - first, len(shard))
            if low < high:
                parts.append(np.asarray(shard[low:high], dtype=np.float32))
                _release(shard)
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 [<= size, dim]) over all rows."""
        for start in range(0, self.rows, size):
            yield start, self.block(start, start + size)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows of `indices` as float32 [n, dim], in the order asked."""
        indices = np.asarray(indices)
        result = np.empty((len(indices), self.dim), np.float32)
        which = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(which):
            here = which == shard
            result[here] = self.shards[shard][indices[here] - self._starts[shard]]
            _release(self.shards[shard])
        return result


def open_embeddings(path: Path | str) -> Embeddings:
    """Open a finished embeddings directory; InputError when it is another kind, unfinished or damaged."""
    return Embeddings(Path(path), require_kind(path, "embeddings"))


def _mapped(file: Path) -> np.ndarray:
    try:
        shard = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} cannot be read ({reason}); embed the images again with --overwrite") from None
    if shard.ndim != 2 or shard.dtype.kind != "f":
        raise InputError(
            f"{file} holds {shard.dtype} of shape {shard.shape}, expected one float vector per row; embed the images "
            "again with --overwrite"
        )
    return shard


def _release(shard: np.ndarray) -> None:
    """Give up the memory that pages of a mapped file take in this process; they stay in the system's cache.

    Without it a pass over the file would leave all of it resident, however small the blocks.
    """
    mapping = getattr(shard, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _save_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as handle:  # a handle, for np.save(path) would append .npy to the temporary name
        np.save(handle, array)
