"""Settings of the commands on sets of images: embed, pack, dedup, curate."""

from typing import Annotated, Literal

from pydantic import Field

from dinov2cli.config.common import Amount, CommonConfig, Cosine, Count, CountOrZero, Share


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


class DedupConfig(PackConfig):
    """Settings of `dinov2 dedup`: edges from each tier, then one image kept per component.

    `tiers` None runs what the input allows; thresholds None are those of the kind of model. `hash_radius` counts
    differing bits of 256.
    """

    tiers: list[Literal["exact", "perceptual", "embedding"]] | None = None
    hash_radius: CountOrZero | None = None
    threshold: Cosine | None = None
    against_threshold: Cosine | None = None
    against_components: bool = False
    neighbours: Count = 64
    nprobe: Count = 16
    max_component: Count = 1000
    index: str = "auto"
    model: str | None = None


class CurateConfig(PackConfig):
    """Settings of `dinov2 curate`: retrieval with `--query`, balanced sampling without.

    `neighbours` per query image (sample mode), `clusters` of the pool (cluster mode), `levels` of the tree (without
    query, finest first). A cluster is used when it holds more than `more_than` images of a query set.
    """

    mode: Literal["auto", "sample", "cluster", "balanced"] = "auto"
    target_size: Count | None = None
    neighbours: Count = 4
    nprobe: Count = 64
    clusters: Count | None = None
    more_than: CountOrZero = 3
    per_cluster: Count = 10_000
    per_set: Count = 1_000_000
    levels: list[Count] | None = None
    resample_steps: CountOrZero = 3
    iterations: Count = 20
    strategy: Literal["random", "closest"] = "random"
    index: str = "auto"
    model: str | None = None
