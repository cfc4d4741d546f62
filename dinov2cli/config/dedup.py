"""Settings of `dinov2 dedup`."""

from typing import Literal

from dinov2cli.config.common import Cosine, Count, CountOrZero
from dinov2cli.config.images import PackConfig


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
