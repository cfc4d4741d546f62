"""Classes that a classifier is trained on, and true labels of the images it is judged on, in one numbering."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dinov2cli.data.spec import suggestion
from dinov2cli.errors import InputError
from dinov2cli.evaluation.scores import align_labels
from dinov2cli.fairness.attributes import Attributes, texts

if TYPE_CHECKING:
    from dinov2cli.evaluation.tasks.trial import Trial

Int64 = npt.NDArray[np.int64]


def training_classes(trial: "Trial") -> list[str]:
    """Names of the classes that `trial.train` has images of, as `answers` numbers them.

    Raises InputError for a training set without labels or of one class.
    """
    source = trial.train
    assert source is not None
    spec = {"train_spec": source.spec, "test_spec": source.spec}
    return align_labels(source.labels, source.label_names, source.labels, source.label_names, **spec)[2]


def labels_of(trial: "Trial", attributes: Attributes, column: str | None) -> tuple[Int64, list[str]]:
    """True labels int64 [rows of the source], -1 where unknown, and the names of the classes they number.

    column: of the attributes; None: labels of the source. The classes are those of `trial.train`, if it is given.
    Raises InputError where there are no labels, one class only, or one that was never trained on.
    """
    given = _own(trial) if column is None else texts(attributes, column)
    where = trial.test.spec if column is None else f"column {column} of {attributes.file}"
    present = sorted({label for label in given if label is not None})
    if not present:
        raise InputError(f"{where} gives no image a label; expected the true class of each: name the column by --label")
    classes = present if trial.train is None else training_classes(trial)
    number = {name: place for place, name in enumerate(classes)}
    strange = [name for name in present if name not in number]
    if strange:
        raise InputError(
            f"{where} has {len(strange)} class{'es' if len(strange) > 1 else ''} that the training set lacks "
            f"({', '.join(strange[:3])}){suggestion(strange[0], classes)}: give both the same names"
        )
    if len(classes) < 2:
        raise InputError(
            f"{where} has one class ({classes[0]}), so there is nothing to tell apart; expected two or more"
        )
    return np.array([-1 if label is None else number[label] for label in given], dtype=np.int64), classes


def _own(trial: "Trial") -> list[str | None]:
    """The labels of the source as texts."""
    source = trial.test
    if source.labels is None:
        return [None] * len(source)
    names = source.label_names
    return [None if label < 0 else str(label) if names is None else names[label] for label in source.labels.tolist()]
