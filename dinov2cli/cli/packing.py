"""What `dedup`, `curate` and `pack` share: the images of a selection, made small and stored with it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.distributed import ALONE, Ranks

if TYPE_CHECKING:
    from dinov2cli.artifacts.output import Output
    from dinov2cli.artifacts.packed import PackWriter
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PackConfig
    from dinov2cli.curation.tables import Curated
    from dinov2cli.data.source import ImageSource

_SIZE = "Pixels of the shorter side of packed images, at most; default 512."
_PACK = (
    "Also store the kept images in the output, made small for training: parquet, webdataset or folder. Files that are "
    "small and upright already are copied as they are."
)
Pack = Annotated[str | None, typer.Option("--pack", metavar="FORMAT", help=_PACK)]
PackSize = Annotated[int | None, typer.Option("--pack-size", metavar="PX", help=_SIZE)]


def check(config: "PackConfig", pack_size: int | None) -> None:
    """Raise UserError for a size of packed images where none are to be packed."""
    from dinov2cli.errors import UserError

    if pack_size is not None and config.pack is None:
        raise UserError("--pack-size without --pack; give --pack parquet, webdataset or folder")


def identity(config: "PackConfig") -> dict[str, Any]:
    """The settings that shape the result; how to pack is among them only where something is packed."""
    found = config.identity()
    return found if config.pack else {key: value for key, value in found.items() if not key.startswith("pack")}


def files(config: "PackConfig") -> list[str]:
    """The files that packing adds to a plan."""
    if config.pack is None:
        return []
    name = {"parquet": "pack-00000.parquet", "webdataset": "pack-00000.tar", "folder": "…"}[config.pack]
    return [f"packed/{name}", "packed_index/pack-00000.parquet"]


def pack_found(
    out: "Output",
    images: "Callable[[], ImageSource]",
    found: "Curated",
    config: "PackConfig",
    talk: "Talk",
    ranks: Ranks = ALONE,
) -> "tuple[Curated, dict[str, Any]]":
    """Pack the kept images of `found` into `out`, where the config asks for it; a stopped run goes on at a shard.

    images: opens the images behind the pool, row by row; called only to pack.

    Returns, on the main process, `found` with what packing tells (original sizes, where each packed image is; images
    that cannot be read are dropped), and what to say of it in the manifest. On other ranks both are as before.
    """
    if config.pack is None:
        return found, {}
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.data.bad import BadImages
    from dinov2cli.data.pack import stream_packed

    source = ranks.together(images)
    _warn_of_other_pixels(source, talk)
    found = _labelled(found, source)
    writers: list[PackWriter] = []

    def opened() -> int:
        writers.append(_writer(out, source, found, config))
        return writers[0].rows

    start = ranks.first(opened)
    bad = BadImages(config.max_bad_fraction)
    for writer in writers:
        index = writer.index
        for name, reason in zip(*(index.column(key).to_pylist() for key in ("id", "unreadable")), strict=True):
            if reason is not None:
                bad.add(name, reason)
    with (
        talk.progress("pack", len(found.rows) - start) as advance,
        stream_packed(
            source,
            found.rows,
            size=config.pack_size,
            quality=config.pack_quality,
            workers=workers_for(config.workers),
            bad=bad,
            start=start,
            advance=advance,
            ranks=ranks,
        ) as stream,
    ):
        for writer in writers:
            writer.write(stream)
        for _ in stream:  # the other ranks get nothing, but must come along to the end
            pass
    if not writers:
        return found, {}
    return _with_packed(found, writers[0], source.label_names, config)


def readable_bytes(count: int) -> str:
    """A number of bytes for people: `1.2 GB`."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def _labelled(found: "Curated", source: "ImageSource") -> "Curated":
    """`found` with the labels of the images as they were asked for: those kept with embeddings may be others."""
    from dataclasses import replace

    import pyarrow as pa

    if source.labels is None:
        return found
    return replace(found, kept=_set(found.kept, "label", pa.array(source.labels[found.rows], pa.int64())))


def _writer(out: "Output", source: "ImageSource", found: "Curated", config: "PackConfig") -> "PackWriter":
    from dinov2cli.artifacts.packed import PackWriter

    assert config.pack is not None
    return PackWriter(
        out,
        found.kept,
        format=config.pack,
        label_names=source.label_names,
        shard_bytes=max(1, int(config.pack_shard_mib * 2**20)),
    )


def _with_packed(
    found: "Curated", writer: "PackWriter", label_names: list[str] | None, config: "PackConfig"
) -> "tuple[Curated, dict[str, Any]]":
    from dataclasses import replace

    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from dinov2cli.artifacts.packed import PATH_COLUMN, with_label_names
    from dinov2cli.curation.tables import dropped_table

    index, facts = writer.index, {**writer.summary(), "size": config.pack_size, "quality": config.pack_quality}
    here = index.column("unreadable").is_null().to_numpy()
    gone = np.flatnonzero(~here)
    kept = found.kept
    for name in ("width", "height", "sha256", PATH_COLUMN):
        kept = _set(kept, name, index.column(name))
    reasons = [f"unreadable: {reason}" for reason in index.column("unreadable").drop_null().to_pylist()]
    lost = dropped_table(found.kept, gone, reason=pa.array(reasons, pa.string()))
    groups = found.groups
    if groups is not None and len(gone):
        still = pc.invert(pc.is_in(groups.column("id"), lost.column("id").combine_chunks()))
        groups = _set(groups, "keep", pc.and_(groups.column("keep"), still))
    packed = replace(
        found,
        kept=with_label_names(kept.filter(pa.array(here)), label_names),
        dropped=pa.concat_tables([found.dropped, lost], promote_options="default"),
        rows=found.rows[here],
        groups=groups,
        messages=[*found.messages, *_messages(facts, len(gone))],
    )
    return packed, {"packed": facts}


def _messages(facts: dict[str, Any], unreadable: int) -> list[str]:
    before, after = facts["bytes_before"], facts["bytes_after"]
    copied = f", {facts['copied']:,} of them copied as they were" if facts["copied"] else ""
    lines = [
        f"{facts['images']:,} images packed as {facts['format']}, shorter side at most {facts['size']} pixels{copied}: "
        f"{readable_bytes(before)} before, {readable_bytes(after)} after"
    ]
    if unreadable:
        lines.append(f"{unreadable:,} of the images could not be read and went to dropped.parquet")
    return lines


def _warn_of_other_pixels(source: "ImageSource", talk: "Talk") -> None:
    more = [role for role in ("mask", "depth") if source.has_role(role)]
    if more:
        talk.warn(f"only images are packed; {' and '.join(more)} stay where they are and are not found from there")


def _set(table: Any, name: str, column: Any) -> Any:
    place = table.schema.get_field_index(name)
    return table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
