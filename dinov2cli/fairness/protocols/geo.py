"""`dinov2 fairness geo`: household objects by country, region and income (DINOv2, arXiv 2304.07193, section 7.1)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from dinov2cli.evaluation.tasks.interface import Judged, setting
from dinov2cli.fairness.protocols.base import Study, Subjects

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.fairness.attributes import Attributes
    from dinov2cli.fairness.axis import Axis
    from dinov2cli.fairness.outcomes import Outcome

_INCOMES = ("low", "medium", "high")


@dataclass(frozen=True, kw_only=True)
class Geo(Study):
    """How often an object is recognised, by region, country and household income: the protocol of Dollar Street.

    A classifier is trained on frozen features of --train; an image is a hit if one of its first five answers is among
    the image's target classes. Those are a column of names (or numbers) of training classes, or with --concepts what a
    file says of the image's concepts. Columns are those of Dollar Street's metadata.csv unless you name others.
    """

    name: ClassVar[str] = "geo"
    example: ClassVar[str] = "--attributes metadata.csv"
    tables: ClassVar[tuple[str, ...]] = ("groups", "gaps", "concepts", "curve")

    classifier: Literal["linear", "knn"] = setting("linear", "what is trained on the features", flag="--classifier")
    country: str = setting("country", "column of countries", flag="--country", metavar="COL")
    region: str = setting("region", "column of regions", flag="--region", metavar="COL")
    income: str = setting("income", "column of incomes of households", flag="--income", metavar="COL")
    income_cuts: list[Annotated[float, Gt(0)]] = setting(
        [], "incomes that part the groups (200,1998); default: thirds of the images", flag="--income-cuts"
    )
    household: str | None = setting(
        None, "column that names households; default: from Dollar Street's url", flag="--household", metavar="COL"
    )
    targets: str = setting("sin21k_labels", "column of target classes, lists of names", flag="--targets", metavar="COL")
    concepts: str | None = setting(
        None,
        "CSV or JSON: concept, training class; then targets follow from --concept",
        flag="--concepts",
        metavar="FILE",
    )
    concept: str = setting("label", "column of concepts, the user's own words", flag="--concept", metavar="COL")
    top: Annotated[int, Ge(1)] = setting(5, "answers that count", flag="--top")
    neighbours: Annotated[int, Ge(1)] = setting(20, "images that vote, with --classifier knn")
    concept_images: Annotated[int, Ge(2)] = setting(10, "images of a concept in either income group, to be listed")

    def files(self) -> list[Path]:
        """Attributes and the mapping of concepts."""
        return [*super().files(), *([Path(self.concepts).expanduser()] if self.concepts else [])]

    def check(self, trial: "Trial") -> None:
        """Columns, incomes, targets, labels to train on."""
        from dinov2cli.fairness.concepts import check_targets
        from dinov2cli.fairness.labels import training_classes

        self._subjects(trial)
        check_targets(self._targets(self.read(trial)), training_classes(trial))

    def collect(self, trial: "Trial") -> "tuple[Features, Features]":
        """Features of both sets, from every process."""
        assert trial.train is not None
        return trial.features(trial.train), trial.features(trial.test)

    def judge(self, trial: "Trial", collected: "tuple[Features, Features]") -> Judged:
        """Hits, by every group; the income curve; the concepts with the largest gaps."""
        from dinov2cli.fairness.answers import answers
        from dinov2cli.fairness.concepts import hits
        from dinov2cli.fairness.judged import judged_study
        from dinov2cli.fairness.outcomes import Outcome

        train, test = collected
        everyone = self._subjects(trial)
        subjects = everyone.at(test.index)
        targets = self._targets(everyone.attributes)
        wanted = [targets[row] for row in test.index]
        found = answers(trial, train, test, classifier=self.classifier, top=self.top, neighbours=self.neighbours)
        right, counted, notes = hits(found, wanted)
        outcome = Outcome(f"top{self.top}", right, counted)
        outcomes = [outcome]
        if self.top > 1:
            # Shown for all images only: the paper's figure is the first five, and every further test has its price.
            outcomes.append(Outcome("top1", *hits(found.first(1), wanted)[:2]))
        return judged_study(
            trial,
            test,
            subjects,
            outcomes,
            self.analysed(trial, subjects, [outcome]),
            found,
            tables=self._tables(trial, everyone.attributes, test.index, subjects, outcome),
            notes=notes,
            quoted=len(outcomes),
            show_images=self.show_images,
        )

    def _tables(
        self, trial: "Trial", attributes: "Attributes", rows: "np.ndarray", subjects: Subjects, outcome: "Outcome"
    ) -> "dict[str, pa.Table]":
        from dinov2cli.fairness.attributes import lists
        from dinov2cli.fairness.geography import concept_gaps, income_curve

        income = subjects.axis("income")
        if income is None:
            return {}
        limits: dict[str, Any] = {"confidence": trial.confidence, "resamples": trial.resamples, "seed": trial.seed}
        found = {"curve": income_curve(income, outcome, subjects.clusters, **limits)}
        if self.has(attributes, "concept"):
            named = lists(attributes, self.concept)
            found["concepts"] = concept_gaps(
                [named[row] for row in rows],
                income,
                outcome,
                subjects.clusters,
                min_images=self.concept_images,
                confidence=trial.confidence,
            )
        return found

    def _subjects(self, trial: "Trial") -> Subjects:
        from dinov2cli.evaluation.clustered import cluster_codes
        from dinov2cli.fairness.attributes import texts
        from dinov2cli.fairness.axis import category_axis, crossed
        from dinov2cli.fairness.geography import households

        attributes = self.read(trial)
        there = self.there(attributes, ("region", "income", "country"))
        notes, axes = list(attributes.notes), []
        if "region" in there:
            axes.append(category_axis("region", texts(attributes, self.region)))
        if "income" in there:
            income, more = self._incomes(attributes)
            axes.append(income)
            notes += more
        if {"region", "income"} <= set(there):
            axes.append(crossed(*axes))
        if "country" in there:
            axes.append(category_axis("country", texts(attributes, self.country)))
        homes, by = households(attributes, self.household, self.country, self.income)
        clusters = None if homes is None else cluster_codes(homes)
        return self.parted(Subjects(attributes, axes, clusters, "images" if homes is None else "households", by, notes))

    def _incomes(self, attributes: "Attributes") -> "tuple[Axis, list[str]]":
        from dinov2cli.fairness.attributes import numbers
        from dinov2cli.fairness.axis import bucket_axis, third_cuts

        incomes, notes = numbers(attributes, self.income, what="income", least=0, invalid=self.invalid)
        cuts = sorted(self.income_cuts) or third_cuts(incomes)
        axis = bucket_axis("income", incomes, cuts, names=_INCOMES if len(cuts) == len(_INCOMES) - 1 else None)
        return (axis if self.income_cuts else replace(axis, about=f"thirds of the images, {axis.about}")), notes

    def _targets(self, attributes: "Attributes") -> list[list[str] | None]:
        from dinov2cli.fairness.attributes import lists
        from dinov2cli.fairness.concepts import read_mapping, through

        if self.concepts is None:
            return lists(attributes, self.targets)
        return through(lists(attributes, self.concept), read_mapping(Path(self.concepts).expanduser()))
