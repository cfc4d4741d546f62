"""Settings of `dinov2 dedup`."""

from typing import Literal

from pydantic import Field

from dinov2cli.config.common import AmountOrZero, Cosine, Count, CountOrZero, Memory, PlanConfig, Share
from dinov2cli.config.images import PackConfig


class DedupConfig(PackConfig):
    """Settings of `dinov2 dedup`: edges from each tier, then one image kept per component.

    `tiers` None runs what the input allows; thresholds None are those of the kind of model, or measured with
    `calibrate`, for a share `false_merge` of images joined to a different one. `hash_radius` counts differing bits of
    256. `verify` looks at local features, pair by pair. `background` are images unlike each other: how near an image is
    to its `background_neighbours` nearest of them is subtracted, `background_weight` times, from its similarities.
    `min_representative` is the cosine that a member of a group must have to the image kept. `nprobe` None is planned
    for `recall`, within `memory`.
    """

    tiers: list[Literal["exact", "perceptual", "geometric", "embedding"]] | None = None
    hash_radius: CountOrZero | None = None
    verify: Literal["none", "geometric"] = "none"
    threshold: Cosine | None = None
    against_threshold: Cosine | None = None
    against_components: bool = False
    calibrate: bool = False
    calibrate_images: Count = 1000
    false_merge: Share = 0.001
    background: str | None = None
    background_neighbours: Count = 3
    background_weight: AmountOrZero = 1.0
    neighbours: Count = 64
    index: str = "auto"
    nprobe: Count | None = None
    recall: Share = 0.95
    memory: Memory | None = None
    plan: PlanConfig = Field(default_factory=PlanConfig)
    max_component: Count = 1000
    min_representative: Cosine | None = None
    model: str | None = None
