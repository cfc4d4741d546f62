"""`dinov2 fairness people`: harmful and missing labels of people (DINOv2, arXiv 2304.07193, section 7.2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from dinov2cli.evaluation.tasks.interface import Judged, setting
from dinov2cli.fairness.protocols.base import Study, Subjects

if TYPE_CHECKING:
    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.fairness.outcomes import Outcome

_Nearest = Annotated[list[Annotated[int, Ge(1)]], "k of neighbours"]


@dataclass(frozen=True, kw_only=True)
class People(Study):
    """What pictures of people are taken for, by gender, age and skin tone: the protocol of Casual Conversations.

    A classifier is trained on frozen features of --train; --meta-labels says which of its classes are Human,
    Possibly-Human, Non-Human or Crime. The rate of a meta-label is the share of images with a class of it among the
    first five answers, of confidence 0.1 or more (Goyal et al. 2022). Besides, whether the nearest images of other
    persons share gender, age or skin tone. --attributes is a table or the annotations of Casual Conversations.
    """

    name: ClassVar[str] = "people"
    example: ClassVar[str] = "--attributes CasualConversations.json --meta-labels classes.csv"

    meta_labels: str = setting(
        "", "CSV or JSON: class of the training set, meta-label", flag="--meta-labels", metavar="FILE"
    )
    classifier: Literal["linear", "knn"] = setting("linear", "what is trained on the features", flag="--classifier")
    gender: str = setting("gender", "column of genders", flag="--gender", metavar="COL")
    skin: str = setting("skin_type", "column of skin types, Fitzpatrick 1 to 6", flag="--skin", metavar="COL")
    age: str = setting("age", "column of ages, years or ranges", flag="--age", metavar="COL")
    age_cuts: Annotated[list[int], "years"] = setting([18, 30, 45, 70], "ages that part the groups", flag="--age-cuts")
    subject: str = setting("subject", "column of persons, who may have several images", flag="--subject", metavar="COL")
    threshold: Annotated[float, Ge(0)] = setting(0.1, "confidence from which an answer counts", flag="--threshold")
    top: Annotated[int, Ge(1)] = setting(5, "answers that count", flag="--top")
    neighbours: Annotated[int, Ge(1)] = setting(20, "images that vote, with --classifier knn")
    nearest: _Nearest = setting([1, 5, 10], "how many nearest images are looked at for the same attribute")

    def files(self) -> list[Path]:
        """Attributes and meta-labels."""
        return [*super().files(), *([Path(self.meta_labels).expanduser()] if self.meta_labels else [])]

    def check(self, trial: "Trial") -> None:
        """Columns, ages, skin types, meta-labels of the training classes."""
        from dinov2cli.errors import UserError
        from dinov2cli.fairness.concepts import read_meta_labels
        from dinov2cli.fairness.labels import training_classes

        if not self.meta_labels:
            raise UserError(
                "--meta-labels is missing: give a CSV with a line `class,meta_label` for every class that is "
                "Human, Possibly-Human, Non-Human or Crime"
            )
        self._subjects(trial)
        read_meta_labels(self.files()[-1], training_classes(trial))

    def collect(self, trial: "Trial") -> "tuple[Features, Features]":
        """Features of both sets, from every process."""
        assert trial.train is not None
        return trial.features(trial.train), trial.features(trial.test)

    def judge(self, trial: "Trial", collected: "tuple[Features, Features]") -> Judged:
        """Rates of meta-labels by every group; how often neighbours share an attribute."""
        import numpy as np

        from dinov2cli.fairness.answers import answers
        from dinov2cli.fairness.concepts import meta_rates, read_meta_labels
        from dinov2cli.fairness.judged import judged_study
        from dinov2cli.fairness.outcomes import Better, Outcome

        train, test = collected
        subjects = self._subjects(trial).at(test.index)
        found = answers(trial, train, test, classifier=self.classifier, top=self.top, neighbours=self.neighbours)
        meta, notes = read_meta_labels(self.files()[-1], found.class_names)
        rates = meta_rates(found, meta, threshold=self.threshold)
        better: dict[str, Better] = {"Human": "high", "Non-Human": "low", "Crime": "low"}
        everyone = np.ones(len(test), dtype=bool)
        labelled = [Outcome(name, rates[name], everyone, better.get(name, "neither")) for name in rates]
        alike = self._alike(test, subjects)
        findings = self.analysed(trial, subjects, labelled, alike)
        return judged_study(
            trial,
            test,
            subjects,
            [*labelled, *alike],
            findings,
            found,
            tables={},
            settings={"classes_of": {name: int(classes.sum()) for name, classes in meta.items()}},
            notes=notes,
            quoted=len(labelled),
            show_images=self.show_images,
        )

    def _alike(self, test: "Features", subjects: Subjects) -> "list[Outcome]":
        """Same-attribute retrieval (Goyal et al. 2022, third indicator), among the images themselves."""
        import numpy as np

        from dinov2cli.fairness.neighbours import same_attribute_precision
        from dinov2cli.fairness.outcomes import Outcome

        vectors, clusters = test.pool(), subjects.clusters
        found = []
        for axis in subjects.axes:
            if axis.crosses or len(np.unique(axis.codes[axis.codes >= 0])) < 2:
                continue
            for k, precise in same_attribute_precision(vectors, axis.codes, clusters, self.nearest).items():
                name = f"same {axis.name} among the nearest {k}"
                found.append(Outcome(name, precise.values, precise.counted, axis=axis.name, expected=precise.expected))
        return found

    def _subjects(self, trial: "Trial") -> Subjects:
        from dinov2cli.evaluation.clustered import cluster_codes
        from dinov2cli.fairness.attributes import texts
        from dinov2cli.fairness.axis import category_axis, crossed
        from dinov2cli.fairness.groups import age_axis, skin_axes

        attributes = self.read(trial)
        there = self.there(attributes, ("gender", "skin", "age"))
        notes, axes = list(attributes.notes), []
        if "gender" in there:
            axes.append(category_axis("gender", texts(attributes, self.gender)))
        if "skin" in there:
            kind, tone = skin_axes(texts(attributes, self.skin))
            axes += [kind, tone]
        if "age" in there:
            age, more = age_axis(
                "age", attributes, self.age, cuts=tuple(self.age_cuts), repair=self.repair_ages, invalid=self.invalid
            )
            axes.append(age)
            notes += more
        plain = [axis for axis in axes if axis.name != "skin type"]
        axes += [crossed(one, other) for place, one in enumerate(plain) for other in plain[place + 1 :]]
        if "lighting" in attributes.table.column_names:
            axes.append(category_axis("lighting", texts(attributes, "lighting")))
        clusters = cluster_codes(texts(attributes, self.subject)) if self.has(attributes, "subject") else None
        if clusters is None:
            return self.parted(Subjects(attributes, axes, None, notes=notes))
        return self.parted(Subjects(attributes, axes, clusters, "persons", f"column {self.subject}", notes))
