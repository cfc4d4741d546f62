"""Settings of `dinov2 curate`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dinov2cli.config.common import Cosine, Count, CountOrZero, Memory, PlanConfig, Section, Share
from dinov2cli.config.images import PackConfig


class QueryConfig(Section):
    """One query set: `data` as DATA, and what it asks for where that differs from the command's settings."""

    data: str
    mode: Literal["sample", "cluster"] | None = None
    neighbours: Count | None = None
    more_than: CountOrZero | None = None
    per_cluster: Count | None = None
    per_set: Count | None = None
    include: bool | None = None


class CurateConfig(PackConfig):
    """Settings of `dinov2 curate`: retrieval with query sets, sampling or pruning without.

    `neighbours` per query image (sample mode), `clusters` of the pool (cluster, semdedup, balanced-kmeans), `levels` of
    the tree (balanced, finest first). A cluster is used when it holds more than `more_than` images of a query set.
    `per_set` limits what a query set brings (cluster mode: 1,000,000 unless told otherwise). `eps`: semdedup drops
    images with a cosine above 1 - eps to a kept one. `slack`: balanced-kmeans clusters hold at most slack times the
    mean. `include_queries` also keeps the query images themselves, unless a kept image has the same bytes or, with
    `include_threshold`, a cosine above it. `nprobe` None is planned for `recall`, within `memory`. `coverage_clusters`:
    clusters that evenness is measured on, 0 for none.
    """

    mode: Literal["auto", "sample", "cluster", "balanced", "hierarchical", "semdedup", "balanced-kmeans", "random"] = (
        "auto"
    )
    queries: Annotated[list[QueryConfig], Field(default_factory=list)]
    target_size: Count | None = None
    neighbours: Count = 4
    index: str = "auto"
    nprobe: Count | None = None
    recall: Share = 0.95
    clusters: Count | None = None
    more_than: CountOrZero = 3
    per_cluster: Count = 10_000
    per_set: Count | None = None
    include_queries: bool = False
    include_threshold: Cosine | None = None
    levels: list[Count] | None = None
    resample_steps: CountOrZero = 3
    iterations: Count = 20
    strategy: Literal["random", "closest"] = "random"
    eps: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    slack: Annotated[float, Field(ge=1.0)] = 2.0
    coverage_clusters: CountOrZero | None = None
    model: str | None = None
    memory: Memory | None = None
    plan: PlanConfig = Field(default_factory=PlanConfig)

    def resolved(self, query: QueryConfig) -> QueryConfig:
        """A query set with the command's settings where it has none of its own."""
        mode = query.mode or ("cluster" if self.mode == "cluster" else "sample")
        given: dict[str, Any] = {
            "neighbours": self.neighbours,
            "more_than": self.more_than,
            "per_cluster": self.per_cluster,
            "per_set": self.per_set,
            "include": self.include_queries,
        }
        own = {name: value for name, value in query.model_dump().items() if value is not None}
        return QueryConfig.model_validate({**given, **own, "mode": mode})
