"""Recipes as data: the settings of every command, each with its default and its bounds; `recipe.py` loads them.

Plain values only; the command line turns them into keyword arguments, so no core room ever sees a config object.
"""

from dinov2cli.config.common import CommonConfig
from dinov2cli.config.curate import CurateConfig
from dinov2cli.config.dedup import DedupConfig
from dinov2cli.config.distill import DistillConfig
from dinov2cli.config.evaluation import EvalConfig, task_config, task_from
from dinov2cli.config.images import EmbedConfig, PackConfig
from dinov2cli.config.pretrain import PretrainConfig
from dinov2cli.config.training import TrainingConfig

__all__ = [
    "CommonConfig",
    "CurateConfig",
    "DedupConfig",
    "DistillConfig",
    "EmbedConfig",
    "EvalConfig",
    "PackConfig",
    "PretrainConfig",
    "TrainingConfig",
    "task_config",
    "task_from",
]
