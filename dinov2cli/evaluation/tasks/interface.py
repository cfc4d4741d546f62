"""What a benchmark is. A new one is a single file with one subclass of `Task`, ours in this folder or anybody's:
`dinov2 eval ./mine.py MODEL --train D --test D -o OUT` runs it with caching, launches, intervals and reports.

Nothing here, nor at the top of a file with a task, may import torch or numpy: the command line reads the settings of
all tasks for its help. Import them inside `collect` and `judge`.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from dinov2cli.evaluation.statistics import Statistic
    from dinov2cli.evaluation.tasks.trial import Trial


def setting(default: Any, help: str, *, flag: str | None = None, metavar: str | None = None) -> Any:
    """A setting of a task: a field of its dataclass with a default and a line of help.

    Every setting is a key of `--set` and of recipes; `flag` makes it an option of the command as well (`--shots`),
    whose value the help calls `metavar`. Give bounds in the annotation: `Annotated[float, annotated_types.Gt(0)]`.
    Lists are copied, never shared.
    """
    metadata = {"help": help, "flag": flag, "metavar": metavar}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A benchmark: its settings are the fields of a frozen, keyword-only dataclass (see `setting`).

    The docstring of a subclass is the help of its command, `dinov2 FAMILY NAME`. `train` says whether `--train` is
    needed, None that it may be left out; `data` names the option of the images that are judged on; `others` a further
    option NAME=DATA, which may be repeated (`trial.others`), if there is one. `example`: what an example of the command
    needs besides data. `tables`: what `Judged.tables` may hold.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "eval"
    train: ClassVar[bool | None] = True
    data: ClassVar[str] = "--test"
    others: ClassVar[str | None] = None
    example: ClassVar[str] = ""
    tables: ClassVar[tuple[str, ...]] = ()

    def files(self) -> list[Path]:
        """Files that settings name and figures depend on: when their content changes, the output is another one."""
        return []

    def check(self, trial: "Trial") -> None:
        """Raise UserError or InputError for what can be seen to be wrong before anything is computed or written.

        On every process; only the model, the sources and the settings are there to be looked at.
        """
        del trial

    @abstractmethod
    def collect(self, trial: "Trial") -> Any:
        """On EVERY process of a launch: what takes all of them, as `trial.features(source)`; given to `judge`."""

    @abstractmethod
    def judge(self, trial: "Trial", collected: Any) -> "Judged":
        """On the main process only, while the others wait: figures from what was collected."""


@dataclass(frozen=True)
class Figure:
    """One number of a result. Its interval comes from `statistic`, by resampling the test images.

    unit: share (shown in percent), metres, or number. settings: what is special to this figure (k=10). rows: which of
    the units the statistic is of, int64 [m], if not of all. limits: the interval, where the task knows a better one.
    said: whether it is printed when the command ends; all are in the results.
    """

    metric: str
    statistic: "Statistic"
    unit: str = "share"
    lower_is_better: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    rows: "np.ndarray | None" = None
    limits: tuple[float, float] | None = None
    said: bool = True


@dataclass(frozen=True)
class Panel:
    """Pictures for the report that belong together in a row: an image, its answer, the truth.

    images: uint8 [H, W, 3] each; labels: a few words below each.
    """

    title: str
    images: "list[np.ndarray]"
    labels: list[str]


@dataclass
class Judged:
    """What a task found out.

    The first figure is the one to quote. units: names of what was judged, one for every row of every statistic (test
    images, queries), so that two models can be compared unit by unit. clusters: what each unit belongs to (a person
    with several images), int64 of as many, where units are not independent: then these are resampled. predictions: one
    row per test image (`id`, and where they make sense `label`, `prediction`, `correct`, `confidence`, `neighbours`),
    read by the report. settings: all that was chosen, given or found and is needed to repeat or to judge the figures.
    notes: warnings for the user. tables: by name, kept as files of their own beside the results, those of all models
    together.
    """

    figures: list[Figure]
    units: list[str]
    predictions: "pa.Table | None" = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    clusters: "np.ndarray | None" = None
    tables: "dict[str, pa.Table]" = field(default_factory=dict)


def settings_of(task: type[Task]) -> "tuple[dataclasses.Field[Any], ...]":
    """The settings of a task, in order."""
    return dataclasses.fields(task)
