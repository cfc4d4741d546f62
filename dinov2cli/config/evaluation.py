"""Settings of the evaluations: those that all tasks share, and any task's own, taken from its dataclass."""

from dataclasses import MISSING
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model

from dinov2cli.config.common import CommonConfig, Count, Memory, Share
from dinov2cli.evaluation.tasks.interface import Task, settings_of


class EvalConfig(CommonConfig):
    """Settings shared by the evaluations.

    `image_size` None is the model's own. Intervals are percentile bootstraps of `resamples` draws of the test images
    (shares of right answers: Wilson's). `cache` is a folder for features, `auto` (the user's cache folder) or `none`;
    above `cache_limit` bytes the least recently used features go.
    """

    image_size: Count | None = None
    batch_size: Count = 64
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    resamples: Annotated[int, Field(ge=100)] = 2000
    max_bad_fraction: Share = 0.01
    cache: str = "auto"
    cache_limit: Memory = 20_000_000_000

    def identity(self) -> dict[str, Any]:
        """Return the settings that shape the result; how many images go through the model at once does not."""
        return {
            key: value for key, value in super().identity().items() if key not in ("batch_size", "cache", "cache_limit")
        }


def task_config(task: type[Task]) -> type[EvalConfig]:
    """The settings of one task: the shared ones and the fields of its dataclass, with their bounds and defaults."""
    hints = get_type_hints(task, include_extras=True)
    fields: dict[str, Any] = {}
    for field in settings_of(task):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        # pydantic copies a default that is a list for every config.
        fields[field.name] = (hints[field.name], Field(default, description=field.metadata.get("help")))
    made: type[EvalConfig] = create_model(f"{task.__name__}Config", __base__=EvalConfig, **fields)
    return made


def task_from(task: type[Task], config: EvalConfig) -> Task:
    """The task with the settings that `config`, of `task_config(task)`, holds."""
    return task(**{field.name: getattr(config, field.name) for field in settings_of(task)})
