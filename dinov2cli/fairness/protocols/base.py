"""What the studies share: images with attributes, groups, what is measured of every image, and figures of all that."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from dinov2cli.evaluation.tasks.interface import Task, setting

if TYPE_CHECKING:
    import numpy as np

    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.fairness.analysis import Findings
    from dinov2cli.fairness.attributes import Attributes
    from dinov2cli.fairness.axis import Axis
    from dinov2cli.fairness.outcomes import Outcome


@dataclass(frozen=True)
class Subjects:
    """The images of a study with what is known of them, in the rows of the source or (`at`) of some of them.

    clusters: int64 [n], which images belong to one person or household; None where each stands alone. unit: what they
    are called, in the plural; by: how they were found, in words.
    """

    attributes: "Attributes"
    axes: "list[Axis]"
    clusters: "np.ndarray | None"
    unit: str = "images"
    by: str = "every image alone"
    notes: list[str] = field(default_factory=list)

    def at(self, rows: "np.ndarray") -> "Subjects":
        """Those of some images, in the order of `rows`."""
        clusters = None if self.clusters is None else self.clusters[rows]
        return replace(self, axes=[axis.at(rows) for axis in self.axes], clusters=clusters)

    def axis(self, name: str) -> "Axis | None":
        """The axis of this name, if there is one."""
        return next((axis for axis in self.axes if axis.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Study(Task):
    """What all studies are told: the attributes, when a group is large enough, how much is resampled."""

    family: ClassVar[str] = "fairness"
    data: ClassVar[str] = "--data"
    example: ClassVar[str] = "--attributes attributes.csv"
    tables: ClassVar[tuple[str, ...]] = ("groups", "gaps")

    attributes: str | None = setting(
        None,
        "table with a row per image: CSV, Parquet, JSON of Casual Conversations; default: the columns of the images",
        flag="--attributes",
        metavar="FILE",
    )
    id: str | None = setting(
        None, "column that names the images; default: found by what matches", flag="--id", metavar="COL"
    )
    min_images: Annotated[int, Ge(2)] = setting(
        30, "groups of fewer images are shown greyed and left out of gaps", flag="--min-images"
    )
    min_clusters: Annotated[int, Ge(2)] = setting(5, "the same for groups of fewer persons or households")
    permutations: Annotated[int, Ge(100)] = setting(2000, "shuffles of every test")
    invalid: Literal["error", "unknown"] = setting("error", "what impossible values (an income of 0) are taken for")
    repair_ages: bool = setting(False, "turn ages that a spreadsheet made dates (03-Sep) back into ranges (3-9)")
    show_images: bool = setting(False, "put images into the report", flag="--show-images")

    def files(self) -> list[Path]:
        """The attributes."""
        return [] if self.attributes is None else [Path(self.attributes).expanduser()]

    def read(self, trial: "Trial") -> "Attributes":
        """The attributes beside the images. Raises what `read_attributes` raises."""
        from dinov2cli.fairness.attributes import read_attributes

        file = None if self.attributes is None else Path(self.attributes).expanduser()
        return read_attributes(file, trial.test, key=self.id)

    def has(self, attributes: "Attributes", setting: str) -> bool:
        """Whether there is the column that a setting names; one that the user named must be there.

        Raises InputError for that.
        """
        from dinov2cli.fairness.attributes import texts

        column = getattr(self, setting)
        if column is None or column in attributes.table.column_names:
            return column is not None
        if column != type(self).__dataclass_fields__[setting].default:
            texts(attributes, column)  # which says what is there instead
        return False

    def there(self, attributes: "Attributes", settings: Sequence[str]) -> list[str]:
        """Those of the settings whose columns are there. Raises InputError if none is."""
        from dinov2cli.errors import InputError

        found = [name for name in settings if self.has(attributes, name)]
        if not found:
            asked = ", ".join(f"--{name}" for name in settings)
            columns = ", ".join(str(getattr(self, name)) for name in settings)
            raise InputError(
                f"{attributes.file} has none of the columns {columns}; "
                f"its columns are {', '.join(attributes.table.column_names)}: name them with {asked}"
            )
        return found

    def parted(self, subjects: Subjects) -> Subjects:
        """The subjects, where there is something to compare. Raises InputError where no axis has two groups."""
        from dinov2cli.errors import InputError

        if not subjects.axes:
            raise InputError(
                f"{subjects.attributes.file}: no column parts the images into groups; give a table by "
                "--attributes FILE, or name its columns"
            )
        if not any(len(axis.names) > 1 for axis in subjects.axes):
            groups = ", ".join(f"{axis.name} ({', '.join(axis.names) or 'unknown'})" for axis in subjects.axes)
            raise InputError(
                f"{subjects.attributes.file}: every image is of one group by {groups}; expected two or more: "
                "name columns whose values differ, or give images of other groups too"
            )
        return subjects

    def analysed(self, trial: "Trial", subjects: Subjects, *families: "Sequence[Outcome]") -> "Findings":
        """Rates of groups, their gaps and tests; p-values are corrected within each family of outcomes."""
        import pyarrow as pa

        from dinov2cli.fairness.analysis import Findings, analyse

        found = [
            analyse(
                outcomes,
                subjects.axes,
                subjects.clusters,
                min_images=self.min_images,
                min_clusters=1 if subjects.clusters is None else self.min_clusters,
                confidence=trial.confidence,
                resamples=trial.resamples,
                permutations=self.permutations,
                seed=trial.seed,
            )
            for outcomes in families
            if outcomes
        ]
        return Findings(*(pa.concat_tables([getattr(one, name) for one in found]) for name in ("groups", "gaps")))
