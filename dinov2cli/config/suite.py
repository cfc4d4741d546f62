"""A suite: many tasks on many data sets, in one YAML file."""

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from dinov2cli.config.common import CommonConfig, Section


class SuiteEntry(Section):
    """One task on one pair of data sets. name: what the data are called in results, and the folder of this entry."""

    task: str
    test: str
    train: str | None = None
    others: dict[str, str] = Field(default_factory=dict)
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where its results go below those of the suite."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.task.removesuffix('.py').rpartition('/')[2].lower())}-{self.name}"


class SuiteConfig(CommonConfig):
    """What `dinov2 eval --suite FILE` runs. settings: given to every task that has them; an entry's own come first."""

    settings: dict[str, Any] = Field(default_factory=dict)
    tasks: Annotated[list[SuiteEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _different(self) -> "SuiteConfig":
        folders = [entry.folder for entry in self.tasks]
        twice = sorted({folder for folder in folders if folders.count(folder) > 1})
        if twice:
            raise ValueError(f"two entries would both write {twice[0]}: give them different names")
        return self
