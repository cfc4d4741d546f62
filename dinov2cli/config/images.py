"""Settings of the commands on sets of images: embed, pack, dedup, curate."""

from typing import Annotated, Literal

from pydantic import Field

from dinov2cli.config.common import Amount, CommonConfig, Count, Share


class EmbedConfig(CommonConfig):
    """Settings of `dinov2 embed`. `image_size` replaces the model's own preprocessing size."""

    model: str | None = None
    pool: Literal["cls", "mean", "cls+mean"] = "cls"
    patch: bool = False
    normalize: bool = True
    image_size: Count | None = None
    batch_size: Count = 64
    shard_size: Count = 8192
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_bad_fraction: Share = 0.01


class PackConfig(CommonConfig):
    """Settings of `dinov2 pack`, and of the same after a choice: None packs nothing. `pack_quality` is that of JPEG."""

    pack: Literal["parquet", "webdataset", "folder"] | None = None
    pack_size: Count = 512
    pack_quality: Annotated[int, Field(ge=1, le=100)] = 95
    pack_shard_mib: Amount = 256.0
    max_bad_fraction: Share = 0.01
