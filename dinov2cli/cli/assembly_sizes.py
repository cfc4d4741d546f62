"""What the models of memory and traffic must know of a run, from its settings: batch and layout of one rank."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.config import TrainingConfig
    from dinov2cli.train.parallel import Parallel


def batch_of(config: "TrainingConfig", parallel: "Parallel", *, masked: float, checkpointing: bool) -> Any:
    """The batch of one rank in the run's own phase; `masked` patches of both global crops meet the iBOT head."""
    from dinov2cli.kernels.attention import PLAIN_TOKENS
    from dinov2cli.train.sizes import Batch

    return Batch(
        images=config.data.batch_size,
        **config.crops.model_dump(include={"global_size", "local_size", "local_number"}),
        masked=masked,
        precision=parallel.precision,
        accumulate=config.train.accumulate,
        checkpointing=checkpointing,
        plain_tokens=PLAIN_TOKENS if parallel.device.type == "cpu" and parallel.precision == "bf16" else 0,
    )


def layout_of(parallel: "Parallel") -> Any:
    """How the ranks share the work."""
    from dinov2cli.train.sizes import Layout

    sharding = parallel.sharding
    return Layout(
        sharding="ddp" if sharding.kind == "none" else sharding.kind,
        ranks=parallel.world_size,
        per_node=sharding.shard_ranks if sharding.kind == "hybrid" else parallel.ranks_per_node,
        reshard=sharding.reshard_after_forward,
    )
