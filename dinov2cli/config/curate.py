"""Settings of `dinov2 curate`."""

from typing import Literal

from dinov2cli.config.common import Count, CountOrZero
from dinov2cli.config.images import PackConfig


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
