"""`dinov2 fairness audit`: the general form, any labels by any attributes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from dinov2cli.evaluation.tasks.interface import Judged, setting
from dinov2cli.fairness.protocols.base import Study, Subjects

if TYPE_CHECKING:
    import numpy as np

    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.fairness.answers import Answers
    from dinov2cli.fairness.attributes import Attributes

_MANY_CLASSES = 12


@dataclass(frozen=True, kw_only=True)
class Audit(Study):
    """Accuracy, recall and false answers by any attributes of your images: gaps, worst groups, equalised odds.

    A classifier on frozen features answers for every image of --data, trained on --train, or without it on the other
    folds of --data itself, whole clusters (persons, sites, patients) to a fold. The labels are a column of the
    attributes, or those of --data.
    """

    name: ClassVar[str] = "audit"
    train: ClassVar[bool | None] = None
    example: ClassVar[str] = "--attributes patients.csv --label diagnosis --by sex,age:40:60 --cluster patient"
    tables: ClassVar[tuple[str, ...]] = ("groups", "gaps", "odds")

    label: str | None = setting(None, "column of labels; default: the labels of --data", flag="--label", metavar="COL")
    by: list[str] = setting(
        [],
        "columns of attributes; age:30:60 cuts numbers, sex*site crosses two; default: all of 2 to 20 values",
        flag="--by",
        metavar="LIST",
    )
    cluster: str | None = setting(
        None, "column of what several images belong to, as a person", flag="--cluster", metavar="COL"
    )
    classifier: Literal["linear", "knn"] = setting("linear", "what is trained on the features", flag="--classifier")
    folds: Annotated[int, Ge(2)] = setting(5, "parts of the images, without --train", flag="--folds")
    top: Annotated[int, Ge(2)] = setting(5, "answers that count for a hit, where there are more classes")
    neighbours: Annotated[int, Ge(1)] = setting(20, "images that vote, with --classifier knn")

    def check(self, trial: "Trial") -> None:
        """Columns, labels, groups."""
        attributes = self.read(trial)
        self._subjects(attributes)
        self._labels(trial, attributes)

    def collect(self, trial: "Trial") -> "tuple[Features | None, Features]":
        """Features, from every process."""
        return None if trial.train is None else trial.features(trial.train), trial.features(trial.test)

    def judge(self, trial: "Trial", collected: "tuple[Features | None, Features]") -> Judged:
        """Right answers by every group, recall and false answers of every class, equalised odds."""
        import numpy as np

        from dinov2cli.fairness.confusion import class_outcomes, equalised_odds
        from dinov2cli.fairness.judged import judged_study
        from dinov2cli.fairness.outcomes import Outcome

        train, test = collected
        attributes = self.read(trial)
        subjects = self._subjects(attributes).at(test.index)
        everyone, names = self._labels(trial, attributes)
        labels = everyone[test.index]
        found = self._answers(trial, train, test, labels, names, subjects)
        if found.class_names != names:  # a class none of whose training images could be read has no number there
            place = {name: number for number, name in enumerate(found.class_names)}
            labels = np.array([place.get(names[label], -1) if label >= 0 else -1 for label in labels], dtype=np.int64)
            names = found.class_names
        known = labels >= 0
        right = (found.classes == labels[:, None]) & known[:, None]
        outcomes = [Outcome("accuracy", right[:, 0].astype(float), known)]
        if len(names) > self.top:
            outcomes.append(Outcome(f"top{self.top}", right.any(axis=1).astype(float), known))
        by_class = class_outcomes(labels, found.classes[:, 0], names) if len(names) <= _MANY_CLASSES else []
        findings = self.analysed(trial, subjects, outcomes, by_class)
        odds = equalised_odds(
            labels,
            found.classes[:, 0],
            names,
            subjects.axes,
            subjects.clusters,
            min_images=self.min_images,
            min_clusters=1 if subjects.clusters is None else self.min_clusters,
            confidence=trial.confidence,
            resamples=trial.resamples,
            seed=trial.seed,
        )
        return judged_study(
            trial,
            test,
            subjects,
            [*outcomes, *by_class],
            findings,
            found,
            tables={"odds": odds},
            quoted=len(outcomes),
            show_images=self.show_images,
        )

    def _answers(
        self,
        trial: "Trial",
        train: "Features | None",
        test: "Features",
        labels: "np.ndarray",
        names: list[str],
        subjects: Subjects,
    ) -> "Answers":
        import numpy as np

        from dinov2cli.fairness.answers import answers, cross_answers

        how: dict[str, Any] = {"classifier": self.classifier, "top": self.top, "neighbours": self.neighbours}
        if train is not None:
            return answers(trial, train, test, **how)
        clusters = np.arange(len(test)) if subjects.clusters is None else subjects.clusters
        return cross_answers(trial, test, labels, names, clusters, folds=self.folds, **how)

    def _subjects(self, attributes: "Attributes") -> Subjects:
        from dinov2cli.evaluation.clustered import cluster_codes
        from dinov2cli.fairness.attributes import texts
        from dinov2cli.fairness.groups import axes_of, columns_to_audit

        taken = {name for name in (self.label, self.cluster, self.id) if name is not None}
        asked = self.by or columns_to_audit(attributes, without=taken)
        axes, notes = axes_of(asked, attributes, invalid=self.invalid, repair=self.repair_ages)
        notes = [*attributes.notes, *notes]
        if self.cluster is None:
            return self.parted(Subjects(attributes, axes, None, notes=notes))
        clusters = cluster_codes(texts(attributes, self.cluster))
        return self.parted(
            Subjects(attributes, axes, clusters, f"values of {self.cluster}", f"column {self.cluster}", notes)
        )

    def _labels(self, trial: "Trial", attributes: "Attributes") -> "tuple[np.ndarray, list[str]]":
        """Labels int64 [rows of the source], -1 unknown, and the names of the classes; those of --train, if given."""
        from dinov2cli.fairness.labels import labels_of

        return labels_of(trial, attributes, self.label)
